#!/bin/sh
# The first process of a machine, in namespaces of its own: lays out its root file system as the
# ramdisk of a real one does, and hands over to the system's /init.
set -eu
root=$1 layers=$2
# The network cards are plugged in.
read -r _ || exit 1

mount --make-rprivate /
mount --bind "$root" "$root"
cd "$root"
mkdir -p bin dev etc home nix/.layers nix/store nix/var proc root run sys tmp usr var/lib var/log var/cache var/tmp .old
chmod 700 root
chmod 1777 tmp var/tmp
for layer in "$layers"/*; do
  mkdir -p "nix/.layers/${layer##*/}"
  mount --bind "$layer" "nix/.layers/${layer##*/}"
done
mount --bind nix/.layers/debian/usr usr
ln -sfn ../nix/.layers/debian/usr/bin/bash bin/sh
ln -sfn usr/lib lib
[ ! -d usr/lib64 ] || ln -sfn usr/lib64 lib64
ln -sfn ../run var/run

mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t tmpfs -o mode=755,nosuid,nodev tmpfs run
mount -t tmpfs -o mode=755,nosuid tmpfs dev
for node in full kmsg null random tty urandom zero; do
  : >"dev/$node"
  mount --bind "/dev/$node" "dev/$node"
done
mkdir dev/pts dev/shm dev/mqueue
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts dev/pts
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs dev/shm
mount -t mqueue mqueue dev/mqueue
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
ln -s /proc/self/fd/0 dev/stdin
ln -s /proc/self/fd/1 dev/stdout
ln -s /proc/self/fd/2 dev/stderr
: >dev/console
mount --bind /dev/null dev/console

# Settings that this computer has only once are copies: what a machine sets there concerns no other.
for part in kernel vm; do
  mkdir "run/$part"
  mount -t tmpfs -o mode=755 tmpfs "run/$part"
  cp -r "/proc/sys/$part/." "run/$part" 2>/dev/null || true
  chmod -R u+w "run/$part"
  [ "$part" != kernel ] || cat /proc/sys/kernel/random/uuid >run/kernel/random/boot_id
  mount --move "run/$part" "proc/sys/$part"
  rmdir "run/$part"
done

# The machine's own cgroups, which the namespace shows as the whole.
awk '$3 == "cgroup" || $3 == "cgroup2" { print $2, $3, $4 }' /proc/self/mounts |
  grep '^/sys/fs/cgroup' >run/.cgroups
if grep -q '^/sys/fs/cgroup cgroup2 ' run/.cgroups; then
  mount -t cgroup2 cgroup2 sys/fs/cgroup
else
  mount -t tmpfs -o mode=755,nosuid,nodev tmpfs sys/fs/cgroup
  while read -r path kind options; do
    mkdir "sys/fs/cgroup/${path##*/}"
    # The last of the options is the controller, or name=systemd.
    if [ "$kind" = cgroup ]; then
      mount -t cgroup -o "${options##*relatime,}" cgroup "sys/fs/cgroup/${path##*/}"
    else
      mount -t cgroup2 cgroup2 "sys/fs/cgroup/${path##*/}"
    fi
  done <run/.cgroups
fi
rm run/.cgroups
mount -t bpf -o mode=700 bpf sys/fs/bpf
# By this udev, and systemd's unit for it, know that there is no hardware.
mount -o remount,bind,ro sys

# https://systemd.io/CONTAINER_INTERFACE/
mkdir -p run/host
echo namespaces >run/host/container-manager
cp -r nix/machine/systemd run/

pivot_root . .old
umount -l /.old
rmdir /.old
mount --make-rshared /
export container=namespaces PATH=/nix/.layers/debian/usr/bin:/nix/.layers/debian/usr/sbin
# systemd wants to be asked for cgroups of version 1, where this computer has no others.
if [ -d /sys/fs/cgroup/systemd ]; then
  SYSTEMD_PROC_CMDLINE='systemd.unified_cgroup_hierarchy=0 SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1'
  export SYSTEMD_PROC_CMDLINE
fi
[ -L /nix/var/nix/profiles/system ] || python3 -IB /nix/machine/install.py
exec "$(readlink -f /nix/var/nix/profiles/system)/init" </dev/null
