#!/usr/bin/env bash
# First process of the node's namespaces.
set -euo pipefail
# The script that starts this one passes these.
: "${cluster:?}" "${state:?}" "${run:?}"

# Until the node has its own /proc, this shows the id that the host knows the process by.
read -r outside_pid _ </proc/self/stat

mount --make-rprivate /
mount -t proc proc /proc

# A fresh /sys shows the node's network devices; cgroups stay the machine's.
mkdir -p "$run/cgroup"
mount --rbind /sys/fs/cgroup "$run/cgroup"
mount -t sysfs sysfs /sys
mount --rbind "$run/cgroup" /sys/fs/cgroup
umount --lazy --recursive "$run/cgroup" 2>/dev/null || umount --lazy "$run/cgroup"

# Fixed paths of containerd, CNI and the kubelet lead into the cluster's own directories.
mkdir -p /run/netns /run/containerd "$run/containerd" /var/lib/kubelet /var/log/pods /var/log/containers /var/lib/cni
mount -t tmpfs tmpfs /run/netns
mount --bind "$run/containerd" /run/containerd
mount --bind "$state/kubelet" /var/lib/kubelet
mount --bind "$state/pods-log" /var/log/pods
mount -t tmpfs tmpfs /var/log/containers
mount -t tmpfs tmpfs /var/lib/cni

mount --make-rshared / # the kubelet and runc propagate mounts within the node

# The kubelet sets these for the whole machine, unless it finds what it wants.
while read -r name value; do
    echo "$value" >"$run/sysctl-${name//\//.}"
    mount --bind "$run/sysctl-${name//\//.}" "/proc/sys/$name"
done <<'EOF'
kernel/keys/root_maxbytes 25000000
kernel/keys/root_maxkeys 1000000
kernel/panic 10
kernel/panic_on_oops 1
vm/overcommit_memory 1
vm/panic_on_oom 0
EOF

ip link set lo up
sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.all.rp_filter=0

echo "$outside_pid" >"$run/node.pid"
touch "$run/node.ready"
# bash reaps every orphan; the name is how the script recognises this process.
exec -a "$cluster-node" bash -c 'while :; do sleep 1d & wait $!; done'
