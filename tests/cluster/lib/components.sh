# The components, their configuration, and how one is started and stopped.
# shellcheck shell=bash disable=SC2034,SC2154 # the files share their variables

components=(containerd etcd kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy outside-dns)

# A pid file names the nsenter that waits outside for the component: the component's own id is only valid on the node.
component_alive() { alive "$run/$1.pid" "$1"; }

start_component() {
    if component_alive "$1"; then return 0; fi
    local program where=(--target "$(node_pid)" --net --mount --pid)
    mapfile -t program < <(component_command "$1")
    if [ "$1" = outside-dns ]; then where=(--target "$(laptop_pid)" --net --mount); fi
    PATH=$bin:$system_path setsid nsenter "${where[@]}" --wdns=/ -- "${program[@]}" \
        >>"$state/logs/$1.log" 2>&1 </dev/null 9>&- &
    echo $! >"$run/$1.pid"
}

stop_component() {
    component_alive "$1" || return 0
    local pid
    pid=$(cat "$run/$1.pid")
    pkill -9 -P "$pid" || kill -9 "$pid" # nsenter --pid has the component as its child, the laptop's one became it
    while component_alive "$1"; do sleep 0.02; done
    rm -f "$run/$1.pid"
}

# One argument per line.
component_command() {
    local pki=$state/pki kubeconfig=$state/kubeconfig config=$state/config
    case $1 in
        containerd)
            printf '%s\n' containerd --config "$config/containerd.toml" ;;
        outside-dns)
            printf '%s\n' bash -c "exec -a $cluster-outside-dns $bin/coredns -conf $config/outside-dns" ;;
        etcd)
            # No fsync: the data need not outlive the machine, and compilers share its disk.
            printf '%s\n' etcd --name=node --data-dir="$state/etcd" --unsafe-no-fsync --log-level=warn \
                --listen-client-urls=http://127.0.0.1:2379 --advertise-client-urls=http://127.0.0.1:2379 \
                --listen-peer-urls=http://127.0.0.1:2380 --initial-advertise-peer-urls=http://127.0.0.1:2380 \
                --initial-cluster=node=http://127.0.0.1:2380 ;;
        kube-apiserver)
            printf '%s\n' kube-apiserver --etcd-servers=http://127.0.0.1:2379 --advertise-address="$node_ip" \
                --service-cluster-ip-range="$service_cidr" --allow-privileged=true \
                --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction \
                --client-ca-file="$pki/ca.crt" --tls-cert-file="$pki/apiserver.crt" --tls-private-key-file="$pki/apiserver.key" \
                --kubelet-certificate-authority="$pki/ca.crt" --kubelet-preferred-address-types=InternalIP \
                --kubelet-client-certificate="$pki/apiserver-kubelet-client.crt" \
                --kubelet-client-key="$pki/apiserver-kubelet-client.key" \
                --service-account-issuer=https://kubernetes.default.svc.cluster.local \
                --service-account-key-file="$pki/sa.key" --service-account-signing-key-file="$pki/sa.key" \
                --requestheader-client-ca-file="$pki/front-proxy-ca.crt" --requestheader-allowed-names=front-proxy-client \
                --requestheader-username-headers=X-Remote-User --requestheader-group-headers=X-Remote-Group \
                --requestheader-extra-headers-prefix=X-Remote-Extra- \
                --proxy-client-cert-file="$pki/front-proxy-client.crt" --proxy-client-key-file="$pki/front-proxy-client.key" \
                --profiling=false ;;
        kube-controller-manager)
            printf '%s\n' kube-controller-manager --kubeconfig="$kubeconfig/controller-manager.yaml" \
                --authentication-kubeconfig="$kubeconfig/controller-manager.yaml" \
                --authorization-kubeconfig="$kubeconfig/controller-manager.yaml" --bind-address=127.0.0.1 \
                --use-service-account-credentials --service-account-private-key-file="$pki/sa.key" \
                --root-ca-file="$pki/ca.crt" --cluster-signing-cert-file="$pki/ca.crt" --cluster-signing-key-file="$pki/ca.key" \
                --cluster-cidr="$pod_cidr" --service-cluster-ip-range="$service_cidr" --leader-elect=false --profiling=false \
                --kube-api-qps=200 --kube-api-burst=400 ;;
        kube-scheduler)
            printf '%s\n' kube-scheduler --kubeconfig="$kubeconfig/scheduler.yaml" \
                --authentication-kubeconfig="$kubeconfig/scheduler.yaml" \
                --authorization-kubeconfig="$kubeconfig/scheduler.yaml" \
                --bind-address=127.0.0.1 --leader-elect=false --profiling=false ;;
        kubelet)
            printf '%s\n' kubelet --config="$config/kubelet.yaml" --kubeconfig="$kubeconfig/kubelet.yaml" \
                --hostname-override="$node_name" --node-ip="$node_ip" ;;
        kube-proxy)
            printf '%s\n' kube-proxy --config="$config/kube-proxy.yaml" ;;
    esac
}

# fill TEMPLATE...: the files of tests/cluster/config with the script's addresses and directories.
write_configs() {
    local file text name
    for file in "$here"/config/*; do
        text=$(<"$file")
        for name in cluster state run bin node_name node_ip pod_cidr dns_service_ip outside_dns_ip; do
            text=${text//@$name@/${!name}}
        done
        printf '%s\n' "$text" >"$state/config/${file##*/}"
    done
    mv "$state/config/10-bridge.conflist" "$state/cni/"
}

admin() {
    local enter=()
    if [ "$(id -u)" = 0 ]; then enter=(nsenter --target "$(laptop_pid)" --net --); fi
    KUBECACHEDIR=$state/kubectl-cache "${enter[@]}" "$bin/kubectl" --kubeconfig "$admin_kubeconfig" "$@"
}

node_ready() { admin wait --for=condition=Ready --timeout=1s "node/$node_name"; }
dns_ready() { admin -n kube-system wait --for=condition=Available --timeout=1s deployment/coredns; }
