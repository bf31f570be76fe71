#!/bin/sh
# /init of the ramdisk, for the installer's CD and for an installed disk: finds the root file
# system, mounts the layers under it and hands over to the init= of the command line.
export PATH=/bin
mkdir -p /proc /sys /dev /run /root
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs -o mode=755,nosuid,nodev tmpfs /run
exec </dev/console >/dev/console 2>&1
printf '\n<<< NixOS Stage 1 >>>\n\n'

fail() {
  echo "An error occurred in stage 1 of the boot process: $*"
  # The kernel's panic= decides what then happens.
  exit 1
}

init= root= fstype=ext4 drivers=
for word in $(cat /proc/cmdline); do
  case $word in
  init=*) init=${word#init=} ;;
  root=*) root=${word#root=} ;;
  rootfstype=*) fstype=${word#rootfstype=} ;;
  stage1.modules=*) drivers=,${word#stage1.modules=}, ;;
  esac
done

for module in /modules/*.ko; do
  name=${module##*-}
  # NixOS' ramdisk of an installed system has no virtio driver unless the configuration says so.
  case $name,$drivers in
  virtio_*.ko,,*) case $drivers in *,${name%.ko},*) ;; *) continue ;; esac ;;
  esac
  insmod "$module" || echo "stage 1: no $name"
done
[ "$init" ] || fail 'no init= on the kernel command line'

find_device() { # LABEL=… , UUID=… or a path
  case $1 in
  LABEL=* | UUID=*) findfs "$1" 2>/dev/null ;;
  /dev/disk/by-label/*) findfs "LABEL=${1#/dev/disk/by-label/}" 2>/dev/null ;;
  /dev/disk/by-uuid/*) findfs "UUID=${1#/dev/disk/by-uuid/}" 2>/dev/null ;;
  /dev/*) [ -b "$1" ] && echo "$1" ;;
  esac
}
tries=0
until device=$(find_device "$root") && [ "$device" ]; do
  tries=$((tries + 1))
  [ "$tries" -lt 300 ] || fail "no device for root=$root"
  sleep 0.1
done

if [ "$(dd if="$device" bs=1 skip=32769 count=5 2>/dev/null)" = CD001 ]; then
  mount -t tmpfs -o mode=755 tmpfs /root || fail 'no memory for the root file system'
  mkdir -p /root/iso
  mount -t iso9660 -o ro "$device" /root/iso || fail "cannot mount $device"
  layers=/root/iso/layers
else
  mount -t "$fstype" "$device" /root || fail "cannot mount $device"
  layers=/root/nix/.images
fi

cd /root
mkdir -p bin dev etc home mnt nix/store nix/var proc root run sys tmp usr var/lib var/log var/cache var/tmp
chmod 700 root
chmod 1777 tmp var/tmp
for image in "$layers"/*.squashfs; do
  layer=${image##*/}
  mkdir -p "nix/.layers/${layer%.squashfs}"
  mount -t squashfs -o ro,loop "$image" "nix/.layers/${layer%.squashfs}" || fail "cannot mount $image"
done
mount --bind nix/.layers/debian/usr usr || fail 'the Debian layer is missing'
# Of the places other systems have, NixOS has these two: /bin/sh and (in every session) /usr/bin/env.
ln -sfn ../nix/.layers/debian/usr/bin/bash bin/sh
ln -sfn usr/lib lib
[ ! -d usr/lib64 ] || ln -sfn usr/lib64 lib64
ln -sfn ../run var/run
cd /

[ "$layers" = /root/nix/.images ] || mount --bind /root/nix/.layers/stand-in/live/store /root/nix/store
[ -e "/root$init" ] || [ -L "/root$init" ] || fail "$init is not there"
for mounted in proc sys dev run; do mount --move "/$mounted" "/root/$mounted"; done
exec switch_root /root "$init"
