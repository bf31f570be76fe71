#!/usr/bin/env bash
# The installer's live system for tests: a real shell with real files, in a mount namespace of its
# own. Only what needs a disk or NixOS is simulated. Started under the name of a QEMU it is a whole
# machine, which ignores QEMU's arguments except -pidfile and -name.
#
# LIVE_SYSTEM: a folder for what tests check: calls, environment, installed/NAME/.
# LIVE_FAULTS: words for what goes wrong, each of them used below; "sigma:WORD" for one machine.
set -u

faulty() { [[ " ${LIVE_FAULTS:-} " == *" $1 "* || " ${LIVE_FAULTS:-} " == *" $LIVE_NAME:$1 "* ]]; }

# ── Power-on ─────────────────────────────────────────────────────────────────────────────────
# Its processes are in their own namespace and all end with it, as a machine's do with its QEMU.
machine() {
  local namespace=(--mount --pid --fork --kill-child)
  export LIVE_NAME=$2
  [ "$(id -u)" = 0 ] || namespace+=(--user --map-root-user)
  echo "machine $$" >> "$LIVE_SYSTEM/calls"
  local pidfile
  pidfile=$(sed -nE 's/.* -pidfile (.*\.pid) .*/\1/p' <<< " $* ")
  [ -z "$pidfile" ] || echo $$ > "$pidfile"
  exec unshare "${namespace[@]}" "$0" power-on "$@"
}

boot() {
  # The system's own programs hide those of this computer. /tmp is replaced, so they move first.
  mount --bind "$LIVE_SYSTEM" /srv
  mount -t tmpfs none /mnt
  mount -t tmpfs none /tmp
  export LIVE_SYSTEM=/srv PATH="/srv/bin:$PATH"
  echo $$ > /tmp/pid
  cd /
  printf '\033[2J\033[01;01H\033[=3hBdsDxe: starting Boot0001\r\n'
  printf '[    0.000000] Linux version 6.12.0\r\n[\033[0;32m  OK  \033[0m] Reached target\r\n'
  faulty emergency && printf 'You are in emergency mode. After logging in, type "journalctl -xb"\r\n' && exec sleep 1000
  faulty panic && printf '[ 3.1] Kernel panic - not syncing: VFS: no root\r\n[ 3.1] CPU: 0\r\n' && exec sleep 1000
  faulty silence && exec sleep 1000
  printf '\r\n<<< Welcome to NixOS 26.05 (x86_64) - ttyS0 >>>\r\n\r\nnixos login: nixos (automatic login)\r\n'
  if faulty noise; then
    (while :; do printf '[   12.345678] audit: type=1400 audit(0.0:1): a message\r\n'; sleep 0.003; done) &
    echo $! > /tmp/noise
  fi
  shell nixos '$'
}

# The prompt of the NixOS installer, with a title in its middle.
shell() {
  export PS1="\n\[\e[1;32m\][\[\e]0;$1@nixos: \w\a\]$1@nixos:\w]$2\[\e[0m\] "
  exec bash --noprofile --norc
}

# ── Programs ─────────────────────────────────────────────────────────────────────────────────
program() {
  local name=$1
  shift
  echo "$name $*" >> "$LIVE_SYSTEM/calls"
  case $name in
    sudo) shell root '#' ;;
    dmesg) faulty noise && kill "$(cat /tmp/noise)"; true ;;
    nixos-version) if faulty release; then echo '25.11.1.abc (Xantusia)'; else echo '26.05.20260701.abcdef0 (Yarara)'; fi ;;
    parted)
      faulty disk && echo 'Error: Could not stat device /dev/vda - No such file or directory.' && exit 1
      true
      ;;
    udevadm | mkfs.fat | mkfs.ext4 | mount) true ;;
    findmnt) faulty esp || echo vfat ;;
    nixos-install) nixos-install ;;
    umount) mkdir -p "$LIVE_SYSTEM/installed" && cp -a /mnt "$LIVE_SYSTEM/installed/$LIVE_NAME" ;;
    poweroff) kill -9 "$(cat /tmp/pid)" ;;
  esac
}

nixos-install() {
  env > "$LIVE_SYSTEM/environment"
  echo 'copying channel...'
  echo 'building the configuration in /mnt/etc/nixos/configuration.nix...'
  if faulty evaluation; then
    echo "error: The option \`services.kubelet' does not exist. Definition values:" >&2
    echo "       - In \`/mnt/etc/nixos/worker.nix'" >&2
    exit 1
  fi
  if faulty network; then
    echo "error: unable to download 'https://cache.nixos.org/nix-cache-info': Could not resolve hostname" >&2
    exit 1
  fi
  for path in linux systemd kubernetes; do
    echo "copying path '/nix/store/0123456789-$path' from 'https://cache.nixos.org'..."
    sleep 0.1
  done
  faulty stuck-once && mkdir "$LIVE_SYSTEM/stuck" 2>/dev/null && LIVE_FAULTS=stuck
  faulty stuck && echo 'stuck here' && exec sleep 1000
  mkdir -p /mnt/boot/EFI/{BOOT,nixos} /mnt/boot/loader/entries
  faulty loader || echo loader > /mnt/boot/EFI/BOOT/BOOTX64.EFI
  faulty kernel || echo kernel > /mnt/boot/EFI/nixos/0123-bzImage.efi
  echo initrd > /mnt/boot/EFI/nixos/0123-initrd.efi
  faulty entry || printf '%s\n' 'title NixOS' 'linux /EFI/nixos/0123-bzImage.efi' \
    'initrd /EFI/nixos/0123-initrd.efi' > /mnt/boot/loader/entries/nixos-generation-1.conf
  echo 'installation finished!'
}

name=$(basename "$0")
case $name:${1:-} in
  qemu-system-*:--version) echo 'QEMU emulator version 9.9.9' ;;
  # A session of its own: a machine's shells get no signals from the terminal of its QEMU.
  qemu-system-*:power-on) setsid --wait "$0" boot || echo 'reboot: Power down' ;;
  qemu-system-*:boot) boot ;;
  qemu-system-*) machine "$@" ;;
  *) program "$name" "$@" ;;
esac
