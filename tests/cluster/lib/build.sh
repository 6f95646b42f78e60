# What the machine must have, and what is built from Go modules.
# shellcheck shell=bash disable=SC2034,SC2154 # the files share their variables

packages=(containerd runc containernetworking-plugins iptables nftables conntrack iproute2 procps sudo uidmap util-linux)

install_packages() {
    local tool missing=
    for tool in containerd runc iptables nft conntrack ip pgrep sudo newuidmap nsenter setpriv flock; do
        PATH=$system_path command -v "$tool" >/dev/null || missing="$missing $tool"
    done
    [ -x /usr/lib/cni/bridge ] || missing="$missing cni"
    [ -n "$missing" ] || return 0
    say "install from Debian:$missing"
    if ! { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${packages[@]}"; } \
        >"/tmp/forkd-cluster-apt.log" 2>&1; then
        tail -n 15 /tmp/forkd-cluster-apt.log >&2
        fail 1 "cannot install$missing" "apt-get failed" "less /tmp/forkd-cluster-apt.log"
    fi
}

build_binaries() {
    local version=k8s.io/component-base/version
    kubernetes_binary=$(build_once kubernetes "-s -w -X $version.gitVersion=$kubernetes_version -X $version.gitMajor=1 -X $version.gitMinor=35 -X $version.gitTreeState=clean" "about 8 minutes")
    coredns_binary=$(build_once coredns "-s -w" "about 2 minutes")
    pki_tool=$(build_once tools/pki "-s -w" "")
    ociimage_tool=$(build_once tools/ociimage "-s -w" "")
    pause_binary=$(build_once tools/pause "-s -w" "")
}

# build_once DIR LDFLAGS HOW_LONG: prints the path of the binary built from tests/cluster/DIR, kept by what it is built from.
build_once() {
    local dir=$here/$1 name=${1##*/} key binary
    key=$({ cat "$dir"/*.go "$dir"/go.* "$dir/../go.mod" 2>/dev/null || true; echo "$2"; } | sha256sum | cut -c1-12)
    binary=$cache/cluster/$name-$key/$name
    if [ ! -x "$binary" ]; then
        command -v go >/dev/null || fail 1 "cannot build $name" "there is no go command in PATH" "install Go 1.26 or newer"
        say "build $name${3:+ (once, $3 on 2 cores; then it is kept in $cache)}"
        mkdir -p "$cache/cluster"
        if ! (cd "$dir" && CGO_ENABLED=0 GOFLAGS=-buildvcs=false GOCACHE=$cache/go-build \
            go build -trimpath -ldflags "$2" -o "$binary.$$" . >"$cache/cluster/$name.log" 2>&1); then
            tail -n 15 "$cache/cluster/$name.log" >&2
            fail 1 "cannot build $name" "go build failed in tests/cluster/$1" "less $cache/cluster/$name.log"
        fi
        mv "$binary.$$" "$binary"
    fi
    echo "$binary"
}

# The images that the cluster itself runs. Names are full ones, as containerd and the kubelet compare them.
import_own_images() {
    "$ociimage_tool" --out "$run/pause.tar" --name docker.io/forkd/pause:cluster --entrypoint /pause \
        --user 65535:65535 "$pause_binary=/pause" >/dev/null
    "$ociimage_tool" --out "$run/coredns.tar" --name docker.io/forkd/coredns:cluster --entrypoint /coredns \
        "$coredns_binary=/coredns" >/dev/null
    load "$run/pause.tar"
    load "$run/coredns.tar"
    rm "$run/pause.tar" "$run/coredns.tar"
}
