#!/bin/sh
# Runs inside the new Debian root: takes out what no rehearsal reads, and puts the kernel, the
# modules of the ramdisk's choice and busybox aside in /boot for the builder.
# With a machine without KVM every file and every xz stream costs seconds.
set -eu

keep_modules() { # the list's modules and what they depend on, unpacked
  version=$(ls /lib/modules)
  cd "/lib/modules/$version"
  sed -e 's/#.*//' -e '/^ *$/d' /trim/kernel-modules.list | while read -r path; do
    case $path in
    */) find "kernel/$path" -name '*.ko*' 2>/dev/null || true ;;
    *) ls "kernel/$path".ko* 2>/dev/null || true ;;
    esac
  done >/trim/wanted
  # modules.dep names all that a module needs, not only the next ones.
  awk 'NR == FNR { wanted[$1 ":"]; next }
    $1 in wanted { sub(":", ""); for (i = 1; i <= NF; i++) print $i }' \
    /trim/wanted modules.dep | sort -u >/trim/kept
  find kernel -name '*.ko*' | sort >/trim/all
  comm -23 /trim/all /trim/kept | xargs rm -f
  find kernel -name '*.ko.xz' -exec unxz {} +
  find kernel -name '*.ko.zst' -exec unzstd -q --rm {} +
  find kernel -type d -empty -delete
  depmod "$version"
  ramdisk_modules
  rm -f modules.symbols modules.dep modules.alias modules.builtin.alias.bin
  cd /
}

ramdisk_modules() { # in the order in which they can be loaded: modules.dep names the last need first
  mkdir -p /boot/modules
  sed -e 's/#.*//' -e '/^ *$/d' /trim/ramdisk-modules.list | while read -r path; do
    line=$(grep "^kernel/$path\.ko:" modules.dep) || continue
    echo "$line" | tr -d : | tr ' ' '\n' | tac
  done | awk '!seen[$0]++' | awk -F / '{ printf "%s %02d-%s\n", $0, NR, $NF }' |
    while read -r path numbered; do cp "$path" "/boot/modules/$numbered"; done
}

set_aside() { # what the builder takes from here
  version=$(ls /lib/modules)
  mv "/boot/vmlinuz-$version" /boot/vmlinuz
  echo "$version" >/boot/kernel-version
  cp -a /bin/busybox /boot/busybox
  rm -f /boot/System.map-* /boot/config-* /boot/initrd.img*
}

keep_modules
set_aside

# Debian's ways to start and to name things: units, users and keys are the configuration's matter.
rm -rf /etc/systemd/system/* /etc/rc?.d /etc/init.d /etc/ssh/* /etc/network /etc/cron.* \
  /etc/fstab /etc/hostname /etc/hosts /etc/resolv.conf /etc/motd /etc/issue* /etc/update-motd.d \
  /etc/passwd* /etc/shadow* /etc/group* /etc/gshadow* /etc/subuid* /etc/subgid* /etc/sudoers* /etc/pam* \
  /etc/profile* /etc/bash.bashrc /etc/skel /etc/environment /etc/default /etc/containerd \
  /etc/dpkg /etc/apt /etc/kernel /etc/initramfs-tools /etc/machine-id /etc/python3* /etc/perl \
  /etc/udev/hwdb.d /etc/os-release /etc/sysctl.d /etc/modules* /etc/nftables.conf /etc/e2scrub.conf \
  /etc/.resolv.conf* /etc/.pwd.lock /etc/ufw /etc/sv /etc/*user.conf /etc/logrotate.d /etc/dhcp \
  /etc/debconf.conf /etc/ucf.conf /etc/debian_version /etc/selinux /etc/rmt /etc/gss /etc/opt \
  /etc/binfmt.d /etc/credstore* /etc/X11 /etc/runit /etc/fonts
cd /usr/lib/systemd/system
rm -rf ssh.service ssh.socket sshd@.service sshd-keygen.service ssh.service.d rescue-ssh.target \
  etcd.service containerd.service nftables.service rsync.service cni-dhcp.* e2scrub* dpkg-db-* \
  fstrim.* getty-static.service rc-local* cryptdisks* hwclock.service x11-common.service \
  getty@.service serial-getty@.service autovt@.service console-getty.service container-getty@.service
# /etc/systemd/system would not reach these: they are links in the vendor's own .wants folders.
rm -f tmp.mount ../system-generators/systemd-ssh-generator sysinit.target.wants/systemd-pcr* sysinit.target.wants/systemd-tpm2* \
  sysinit.target.wants/systemd-hwdb-update.service sysinit.target.wants/ldconfig.service \
  sysinit.target.wants/systemd-journal-catalog-update.service \
  sysinit.target.wants/systemd-firstboot.service sysinit.target.wants/systemd-sysusers.service \
  sysinit.target.wants/systemd-update-done.service sysinit.target.wants/systemd-machine-id-commit.service \
  sysinit.target.wants/dev-hugepages.mount sysinit.target.wants/sys-kernel-tracing.mount \
  sysinit.target.wants/systemd-boot-random-seed.service sockets.target.wants/systemd-pcr* \
  sockets.target.wants/systemd-creds.socket sockets.target.wants/systemd-sysext.socket \
  sysinit.target.wants/systemd-binfmt.service sysinit.target.wants/proc-sys-fs-binfmt_misc.automount \
  local-fs.target.wants/tmp.mount timers.target.wants/*

# One file of authorities, as NixOS has it.
find /etc/ssl/certs -type l -delete
# Programs by their own names: a session has neither /etc/alternatives nor the rest of /usr/bin.
for program in $(find /usr/bin /usr/sbin -type l -lname '/etc/alternatives/*'); do
  ln -sfn "$(readlink -f "$program")" "$program"
done
rm -rf /etc/alternatives
for program in $(find /usr/bin /usr/sbin -type l -lname '/*'); do
  target=$(readlink "$program")
  [ ! -e "$target" ] || ln -sfn "$(realpath --relative-to "${program%/*}" "$target")" "$program"
done

cd /usr
rm -rf share/doc share/man share/info share/locale share/bash-completion share/zsh share/perl* \
  share/zoneinfo/right share/zoneinfo/posix share/common-licenses share/lintian share/bug \
  share/initramfs-tools share/i18n share/debconf share/dpkg share/nix/doc share/pixmaps share/vim \
  lib/udev/hwdb.d lib/udev/hwdb.bin lib/systemd/catalog lib/dracut lib/klibc* lib/locale/C.utf8/LC_COLLATE \
  lib/*-linux-gnu/gconv lib/*-linux-gnu/perl* lib/valgrind lib/sysctl.d/*protect-links* \
  lib/python3*/ensurepip lib/python3*/idlelib lib/python3*/pydoc_data lib/python3*/test \
  lib/python3*/lib2to3 lib/python3*/tkinter lib/python3*/turtle* lib/python3*/unittest \
  lib/python3*/asyncio lib/python3*/xml lib/python3*/email/test* lib/python3*/config-* \
  lib/python3*/sqlite3 lib/python3*/multiprocessing lib/python3*/curses lib/python3*/wsgiref* \
  bin/perl* bin/bash-static bin/openssl bin/containerd-shim bin/containerd-shim-runc-v1 bin/ssh-keyscan \
  bin/sudo_* sbin/sudo_* games include src local
# rm of the package manager comes last: nothing after it can install anything.
rm -rf /var/lib/dpkg /var/lib/apt /var/cache/* /var/log/* /usr/lib/apt /usr/lib/dpkg
rm -f /usr/bin/apt* /usr/bin/dpkg* /usr/bin/debconf* /usr/bin/deb-systemd* /usr/sbin/dpkg* \
  /usr/bin/update-alternatives /usr/sbin/update-* /usr/sbin/invoke-rc.d /usr/sbin/policy-rc.d
(cd / && ls -d usr/bin/* usr/sbin/*) >/boot/programs
rm -rf /trim
