# Where things are, and how the script speaks.
# shellcheck shell=bash disable=SC2034,SC2154 # the files share their variables

cache=${FORKD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/forkd}
cluster=${FORKD_CLUSTER:-forkd-cluster} # names processes, cgroups and directories, so that two clusters can live side by side
state=${FORKD_STATE:-/var/lib/$cluster}
run=/run/$cluster
bin=$state/bin
admin_kubeconfig=$state/kubeconfig/admin.yaml

node_name=node
node_ip=172.30.0.2
laptop_ip=172.30.0.1
service_cidr=10.96.0.0/16
kubernetes_service_ip=10.96.0.1
dns_service_ip=10.96.0.10
pod_cidr=10.244.0.0/24
outside_dns_ip=127.0.0.53 # where systemd-resolved listens on a laptop that has it
server_url=https://$node_ip:6443
kubernetes_version=v1.35.4

system_path=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
started=${EPOCHREALTIME/[^0-9]/}

say() {
    local spent=$((${EPOCHREALTIME/[^0-9]/} - started))
    printf '%4d.%ds  %s\n' $((spent / 1000000)) $((spent / 100000 % 10)) "$*" >&2
}

# fail EXIT_CODE WHAT BECAUSE TRY
fail() {
    echo "error: $2" >&2
    [ -z "$3" ] || echo "because: $3" >&2
    [ -z "$4" ] || echo "try: $4" >&2
    exit "$1"
}

# wait_for SECONDS COMPONENT WHAT COMMAND...: polls COMMAND; COMPONENT is whose log explains a failure.
wait_for() {
    local deadline=$((SECONDS + $1)) component=$2 what=$3 reason=
    shift 3
    until "$@" >/dev/null 2>"$run/last-error"; do
        component_alive "$component" || reason="$component has ended"
        ((SECONDS < deadline)) || reason=$(tail -n 3 "$run/last-error")
        if [ -n "$reason" ]; then
            tail -n 15 "$state/logs/$component.log" >&2
            fail 1 "waited in vain until $what" "$reason" "scripts/cluster logs $component"
        fi
        sleep 0.1
    done
    say "$what"
}

# One `up` or `down` at a time; what they start must not inherit the lock.
locked() {
    need_root
    while true; do
        exec 9>"$run.lock"
        if ! flock -n 9; then
            say "another \"scripts/cluster up\" or \"down\" is at work: waiting for it"
            flock 9
        fi
        # The one who had the lock may have removed its file.
        if [ /proc/self/fd/9 -ef "$run.lock" ]; then break; fi
    done
    "$1"
}

need_root() {
    [ "$(id -u)" = 0 ] || fail 1 "the cluster needs root" "it makes namespaces, cgroups and mounts" "sudo $0 $command"
}

need_node() {
    node_alive || fail 3 "there is no cluster" "" "scripts/cluster up"
}

# alive FILE NAME: the process of a pid file lives, and is not another one that got its number after a reboot.
alive() {
    local pid command_line
    pid=$(cat "$1" 2>/dev/null) && [ -n "$pid" ] || return 1
    { command_line=$(tr '\0' ' ' <"/proc/$pid/cmdline"); } 2>/dev/null || return 1
    [[ $command_line == *"$2"* ]]
}
