// ISO images for tests, made by libarchive's tar (macOS: tar, Debian: bsdtar), with Rock Ridge names.
import { execFileSync } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'

const tar = ['bsdtar', 'tar'].find((program) => {
  try {
    return execFileSync(program, ['--version'], { stdio: 'pipe' }).includes('libarchive')
  } catch {
    return false
  }
})

/** Why there can be none here; false if there can. */
export const noIso = tar ? false : 'bsdtar (libarchive-tools) is not installed'

export const store = '/nix/store/0123456789abcdfghijklmnpqrsvwxyz'

/** As NixOS writes it: a fallback console line, a variable of the menu, store paths below /boot. */
export const menu = `
set timeout=10
if [ \${iso_path} ] ; then
  set isoboot="findiso=\${iso_path}"
fi
menuentry 'NixOS 26.05 Installer '  --class installer {
  # Fallback to UEFI console for boot, efifb sometimes has difficulties.
  terminal_output console

  linux /boot/${store}-linux-6.18/bzImage \${isoboot} init=${store}-nixos/init  root=LABEL=nixos-minimal loglevel=4
  initrd /boot/${store}-initrd/initrd
}
menuentry 'NixOS (serial)' {
  linux /boot/other \${isoboot} console=ttyS0,115200n8
  initrd /boot/other-initrd
}
`

/** What the menu names. */
export const bootFiles = {
  [`boot${store}-linux-6.18/bzImage`]: 'the kernel',
  [`boot${store}-initrd/initrd`]: 'the initrd',
}

/** All that makes an ISO the installer, as far as one can see from outside. */
export const installerFiles = {
  ...bootFiles,
  'EFI/BOOT/grub.cfg': menu,
  'EFI/BOOT/BOOTX64.EFI': 'the loader',
  'EFI/BOOT/BOOTAA64.EFI': 'the loader',
}

/** The same, large enough that a transfer of it can be interrupted. */
export const largeInstaller = { ...installerFiles, 'nix-store.squashfs': randomBytes(1_500_000) }

/** Makes an ISO. @param files content by path @returns its path */
export async function makeIso(
  iso: string,
  files: Record<string, string | Buffer> = largeInstaller,
): Promise<string> {
  const tree = await mkdtemp(join(tmpdir(), 'iso-tree-'))
  try {
    for (const [path, content] of Object.entries(files)) {
      await mkdir(dirname(join(tree, path)), { recursive: true })
      await writeFile(join(tree, path), content)
    }
    execFileSync(tar ?? 'bsdtar', ['-cf', iso, '--format', 'iso9660', '-C', tree, '.'])
    return iso
  } finally {
    await rm(tree, { recursive: true })
  }
}
