#!/usr/bin/env bash
# First process of the laptop's namespaces: makes private what a program on a laptop changes or reads.
set -euo pipefail
# The script that starts this one passes these.
: "${cluster:?}" "${run:?}" "${outside_dns_ip:?}"

mount --make-rprivate /

# /etc is a copy in memory, so that a resolv.conf can be replaced by rename, as every tool does it.
mkdir -p "$run/etc"
mount -t tmpfs -o mode=755 tmpfs "$run/etc"
cp -a /etc/. "$run/etc/"
mount --move "$run/etc" /etc
rm -f /etc/resolv.conf
printf 'nameserver %s\nsearch outside.test\n' "$outside_dns_ip" >/etc/resolv.conf
grep -qw "$(hostname)" /etc/hosts || echo "127.0.1.1 $(hostname)" >>/etc/hosts

mount -t tmpfs -o mode=755 tmpfs /home
mkdir -p /run/user
mount -t tmpfs -o mode=755 tmpfs /run/user
useradd --create-home --shell /bin/bash --no-log-init dev
for user in root dev; do
    install -d -m 700 -o "$user" -g "$user" "/run/user/$(id -u "$user")"
done
mkdir -p /etc/sudoers.d
echo 'dev ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/dev
chmod 440 /etc/sudoers.d/dev
# Without CAP_SYS_RESOURCE sudo cannot set the core limit, and says so on every call.
echo 'Set disable_coredump false' >>/etc/sudo.conf

# udev makes this device usable by everyone; here there is no udev.
mkdir -p "$run/dev"
mount -t tmpfs -o mode=755 tmpfs "$run/dev"
mknod -m 666 "$run/dev/tun" c 10 200
mkdir -p /dev/net
[ -e /dev/net/tun ] || touch /dev/net/tun
mount --bind "$run/dev/tun" /dev/net/tun
umount --lazy "$run/dev"

# A fresh /sys shows the laptop's network devices; cgroups stay the machine's.
mkdir -p "$run/laptop-cgroup"
mount --rbind /sys/fs/cgroup "$run/laptop-cgroup"
mount -t sysfs sysfs /sys
mount --rbind "$run/laptop-cgroup" /sys/fs/cgroup
umount --lazy --recursive "$run/laptop-cgroup" 2>/dev/null || umount --lazy "$run/laptop-cgroup"

ip link set lo up

echo $$ >"$run/laptop.pid"
touch "$run/laptop.ready"
exec -a "$cluster-laptop" sleep infinity
