#!/bin/sh
# Puts the files of a machine in place before its first start: those that all machines have, its
# staged configuration, and on a worker the images of pods.
#   lay-out.sh CLUSTER NAME STAGED
set -eu
root=$1/machines/$2
[ -e "$3/etc/nixos/cluster.json" ] || { echo "lay-out: no configuration in $3" >&2; exit 1; }
rm -rf "$root"
mkdir -p "$root"
cp -a "$1/blank/." "$3/." "$root"
chmod 755 "$root"
[ -e "$root/etc/nixos/worker.nix" ] || exit 0

images=$root/var/lib/containerd
mkdir -p "$root/var/lib"
# Files of images never change, so machines share them where a file system has both folders; but
# each has databases of its own.
if cp -al "$1/images/." "$images" 2>/dev/null; then
  find "$images" -name '*.db' -exec sh -c 'cp "$1" "$1.own" && mv "$1.own" "$1"' - {} \;
else
  rm -rf "$images"
  cp -a --reflink=auto "$1/images/." "$images"
fi
