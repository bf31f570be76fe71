// ISO images for tests, made by libarchive's tar (macOS: tar, Debian: bsdtar).
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

/** Why a test that makes an image has to be skipped; false: it has not. */
export const noIsoTool = tar ? false : 'bsdtar (libarchive-tools) is not installed'

/** What an installer for x86_64 has, beside its bulk. */
export const installerFiles: Record<string, string | Buffer> = {
  'EFI/BOOT/grub.cfg': 'menuentry "NixOS" { linux /boot/bzImage }\n',
  'EFI/BOOT/BOOTX64.EFI': 'MZ',
  'nix-store.squashfs': randomBytes(1_500_000),
}

/** Writes an ISO 9660 image that holds these files, by path. */
export async function makeIso(
  path: string,
  files: Record<string, string | Buffer> = installerFiles,
): Promise<void> {
  const folder = await mkdtemp(join(tmpdir(), 'iso-'))
  for (const [name, content] of Object.entries(files)) {
    await mkdir(dirname(join(folder, name)), { recursive: true })
    await writeFile(join(folder, name), content)
  }
  execFileSync(tar ?? 'bsdtar', ['-cf', path, '--format', 'iso9660', '-C', folder, '.'])
  await rm(folder, { recursive: true })
}
