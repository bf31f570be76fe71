#!/bin/sh
# /init of an installed system: activates it, then starts systemd.
printf '\n<<< NixOS Stage 2 >>>\n\n'
export PATH=/nix/.layers/debian/usr/bin:/nix/.layers/debian/usr/sbin
echo /nix/.layers/debian/usr/sbin/modprobe >/proc/sys/kernel/modprobe
system=${0%/init}
ln -sfn "$system" /run/booted-system
python3 -IB /nix/.layers/stand-in/bin/activate "$system"
exec /usr/lib/systemd/systemd
