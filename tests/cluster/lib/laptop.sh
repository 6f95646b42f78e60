# The laptop: a network and a mount namespace that live as long as one sleeping process.
# shellcheck shell=bash disable=SC2034,SC2154 # the files share their variables

laptop_alive() { alive "$run/laptop.pid" "$cluster-laptop"; }
laptop_pid() { cat "$run/laptop.pid"; }
in_laptop() { nsenter --target "$(laptop_pid)" --net --mount --wdns=/ -- "$@"; }

start_laptop() {
    local i
    cluster=$cluster run=$run outside_dns_ip=$outside_dns_ip setsid unshare --net --mount -- \
        bash "$here/lib/laptop-init.sh" >"$state/logs/laptop.log" 2>&1 </dev/null 9>&- &
    for ((i = 0; i < 200; i++)); do
        [ -e "$run/laptop.ready" ] && break
        sleep 0.05
    done
    [ -e "$run/laptop.ready" ] || fail 1 "the laptop did not come up" "$(tail -n 3 "$state/logs/laptop.log")" ""
}

# Ends every process in the laptop's network: daemons and test servers that were started there, too.
stop_laptop() {
    local net pids
    net=$(readlink "/proc/$1/ns/net") || return 0
    net=${net//[\[\]]/?} # -lname takes a pattern
    while true; do
        pids=$(find /proc/[0-9]*/ns/net -maxdepth 0 -lname "$net" 2>/dev/null | cut -d/ -f3) || true # other processes end meanwhile
        [ -n "$pids" ] || break
        # shellcheck disable=SC2086
        kill -9 $pids 2>/dev/null || true
        sleep 0.05
    done
}

# laptop [--user NAME] [--] CMD...: becomes the command, so that signals, terminal and exit code are its own.
laptop() {
    local user=root home=/root id
    if [ "${1:-}" = --user ]; then
        user=${2:?--user needs a name}
        shift 2
    fi
    if [ "${1:-}" = -- ]; then shift; fi
    [ $# -gt 0 ] || set -- bash
    laptop_alive || fail 3 "there is no laptop" "" "scripts/cluster up"
    id=$(in_laptop id -u "$user") || fail 2 "the laptop has no user $user" "" "--user dev"
    [ "$user" = root ] || home=/home/$user
    local enter=(nsenter --target "$(laptop_pid)" --net --mount)
    if in_laptop test -d "$PWD"; then enter+=(--wdns="$PWD"); else enter+=(--wdns="$home"); fi
    local environment=(KUBECONFIG="$admin_kubeconfig" PATH="${FORKD_BIN_DIR:+$FORKD_BIN_DIR:}$bin:$PATH"
        HOME="$home" USER="$user" LOGNAME="$user" XDG_RUNTIME_DIR="/run/user/$id")
    local become=()
    [ "$user" = root ] || become=(setpriv --reuid="$user" --regid="$user" --init-groups --inh-caps=-all)
    # A user's own directories would lead into those of whoever called.
    exec "${enter[@]}" -- "${become[@]}" env -u XDG_CACHE_HOME -u XDG_CONFIG_HOME -u XDG_DATA_HOME -u XDG_STATE_HOME "${environment[@]}" "$@"
}
