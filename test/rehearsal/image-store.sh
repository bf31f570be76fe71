#!/bin/sh
# Fills a folder as containerd's root: imports docker archives and unpacks them, by the containerd of
# the Debian layer, in a mount namespace.
#   image-store.sh FOLDER DEBIAN_SQUASHFS ARCHIVE...
set -eu
into=$1 debian=$2
shift 2
mount --make-rprivate /
root=$into.root
mkdir "$root"
mount -t tmpfs tmpfs "$root"
cd "$root"
mkdir dev etc layer proc run store sys tmp usr
mount -t squashfs -o ro,loop "$debian" layer
mount --bind layer/usr usr
for name in bin lib lib64 sbin; do ln -s "usr/$name" "$name"; done
mount -t proc proc proc
mount --rbind /sys sys
mount --bind /dev dev
mount --bind "$into" store
export PATH=/usr/bin:/usr/sbin
echo 'version = 2' >etc/containerd.toml
chroot . containerd --config /etc/containerd.toml --root /store --state /run/containerd \
  --address /run/containerd/containerd.sock --log-level warn &
trap 'kill $!; wait' EXIT
until chroot . ctr version >/dev/null 2>&1; do kill -0 $!; sleep 0.1; done
for archive; do chroot . ctr --namespace k8s.io images import --local - <"$archive" >/dev/null; done
