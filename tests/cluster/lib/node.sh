# The node: network, mount and process namespaces of its own. Its first process reaps orphans; killing it ends everything
# in it (components, shims, containers) and with them its mounts, network devices and rules.
# shellcheck shell=bash disable=SC2034,SC2154 # the files share their variables

node_alive() { alive "$run/node.pid" "$cluster-node"; }
node_pid() { cat "$run/node.pid"; }
in_node() { nsenter --target "$(node_pid)" --net --mount --pid --wdns=/ -- "$@"; }
on_node() { in_node env PATH="$bin:$system_path" KUBECONFIG="$admin_kubeconfig" "$@"; }
ctr() { command ctr --address "$run/containerd/containerd.sock" --namespace k8s.io "$@"; }
cgroups() { find /sys/fs/cgroup -mindepth 2 -maxdepth 2 -type d -name "$cluster"; }

# Binaries are linked into the state directory because the cache may be in a home that the laptop's users cannot enter.
prepare_state() {
    mkdir -p "$run" "$bin" "$state"/{logs,etcd,kubelet,containerd,pods-log,cni,config}
    chmod 755 "$state"
    chmod 700 "$state/etcd"
    touch "$state/.forkd-cluster"
    cp -l "$kubernetes_binary" "$bin/kubernetes" 2>/dev/null || cp "$kubernetes_binary" "$bin/kubernetes"
    cp -l "$coredns_binary" "$bin/coredns" 2>/dev/null || cp "$coredns_binary" "$bin/coredns"
    cp "$pki_tool" "$bin/pki"
    local name
    for name in etcd kubectl kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy; do
        ln -s kubernetes "$bin/$name"
    done
    "$bin/pki" cluster "$state" "$server_url" "$node_name" "$node_ip" "$kubernetes_service_ip" 127.0.0.1
    write_configs
    local controller
    for controller in /sys/fs/cgroup/*/; do
        mkdir -p "$controller/$cluster"
    done
}

start_node() {
    local i
    cluster=$cluster state=$state run=$run setsid unshare --net --mount --pid --fork -- \
        bash "$here/lib/node-init.sh" >"$state/logs/node.log" 2>&1 </dev/null 9>&- &
    for ((i = 0; i < 100; i++)); do
        [ -e "$run/node.ready" ] && node_alive && break
        sleep 0.05
    done
    node_alive || fail 1 "the node's namespaces did not come up" "$(tail -n 3 "$state/logs/node.log")" ""
    # The wire. Neither end gets a default route: nothing here leads out of the machine.
    in_node ip link add eth0 type veth peer name laptop
    nsenter --target "$(node_pid)" --net -- ip link set laptop netns "$(laptop_pid)" name eth0
    in_node ip address add "$node_ip/24" dev eth0
    in_node ip link set eth0 up
    in_laptop ip address add "$laptop_ip/24" dev eth0
    in_laptop ip link set eth0 up
    # Without any route the kernel refuses a ClusterIP before kube-proxy's rules see it, for processes of the node itself.
    in_node ip route add "$service_cidr" dev eth0
    say "node and laptop are wired"
}

# load IMAGE.tar: done when the kubelet can see the image, not only when containerd has it.
load() {
    [ -r "${1:-}" ] || fail 2 "cannot read the image \"${1:-}\"" "" "scripts/cluster load IMAGE.tar"
    local name i imported
    imported=$(ctr images import "$1") || fail 1 "cannot import $1" "containerd refused it" "scripts/cluster logs containerd"
    sed -nE 's/^unpacking ([^ ]+) .*/\1/p' <<<"$imported" | while read -r name; do
        for ((i = 0; i < 100; i++)); do
            ctr images ls "name==$name" | grep -q io.cri-containerd.image=managed && break
            sleep 0.1
        done
        say "loaded $name"
    done
}

make_user() {
    [[ ${1:-} =~ ^[^/]+$ ]] || fail 2 "a user needs a name" "" "scripts/cluster user NAME [GROUP...]"
    "$bin/pki" user "$state" "$server_url" "$@"
    echo "$state/kubeconfig/user-$1.yaml"
}

# Works on whatever is there: a running cluster, half of one, or files that outlived a reboot. The first processes of the
# namespaces are found by the names they gave themselves, so that lost pid files leave nothing running.
tear_down() {
    local cgroup i pid
    for pid in $(pgrep -fx "$cluster-(laptop|outside-dns) .*"); do
        stop_laptop "$pid"
    done
    for pid in $(pgrep -fx "$cluster-node .*"); do
        kill -9 "$pid" 2>/dev/null || true
        while [ -e "/proc/$pid" ]; do sleep 0.05; done
    done
    for ((i = 0; i < 100; i++)); do
        for cgroup in $(cgroups); do
            find "$cgroup" -depth -type d -exec rmdir {} + 2>/dev/null || true
        done
        [ -n "$(cgroups)" ] || break
        sleep 0.05
    done
    [ -z "$(cgroups)" ] || fail 1 "cgroups are left" "processes live in $(cgroups | head -n 1)" "scripts/cluster down, again"
    if grep -q " $state/" /proc/self/mountinfo; then
        fail 1 "mounts are left below $state" "$(grep -c " $state/" /proc/self/mountinfo) of them" "umount them, then scripts/cluster down"
    fi
    if [ -e "$state" ] && [ ! -e "$state/.forkd-cluster" ] && [ -n "$(ls -A "$state")" ]; then
        fail 1 "$state is not this script's" "it lacks the file .forkd-cluster" "set FORKD_STATE to another directory"
    fi
    rm -rf --one-file-system "$state" "$run"
    # The empty /run/containerd and its like stay: removing a directory unmounts what other namespaces mount on it, such as
    # the node of a second cluster.
}
