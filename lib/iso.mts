// The installer ISO: where it is kept, which one was verified, and its kernel, which QEMU starts
// directly: the ISO's own boot menu has a serial console only in a submenu on a graphical screen.
import { existsSync } from 'node:fs'
import { open, readFile, stat } from 'node:fs/promises'
import { basename, join } from 'node:path'
import { $, type ProcessOutput, which } from 'zx/core'
import type { Cluster } from './cluster.mts'
import { StepError } from './errors.mts'
import { writeFileAtomic } from './files.mts'
import type { Architecture } from './firmware.mts'

/** What was verified, kept in ISO.json. `source` is an address without passwords, or a file. */
type IsoRecord = { source: string; sha256?: string | undefined; size: number; modified: number }

/** Where the ISO for this cluster and processor is kept, whether or not it exists. */
export function isoFile(cluster: Cluster, arch: Architecture): string {
  return cluster.path('images', `nixos-${cluster.settings.NIXOS_VERSION}-${arch}.iso`)
}

/** The ISO that download-iso verified. @throws StepError if it is missing or has changed since */
export async function verifiedIso(cluster: Cluster, arch: Architecture): Promise<string> {
  const file = isoFile(cluster, arch)
  if (await isoRecord(file)) return file
  const changed = `${file} has changed since ./bin/download-iso.mts verified it`
  const reason = existsSync(file) ? changed : `there is no installer ISO: ${file}`
  throw new StepError(reason, { hint: './bin/download-iso.mts' })
}

/** The record of a verified ISO; undefined if its size or time are not those of the record. */
export async function isoRecord(file: string): Promise<IsoRecord | undefined> {
  try {
    const record: IsoRecord = JSON.parse(await readFile(`${file}.json`, 'utf8'))
    const { size, mtimeMs } = await stat(file)
    return size === record.size && mtimeMs === record.modified ? record : undefined
  } catch {
    return undefined
  }
}

/** Records that the ISO as it is now was verified. */
export async function recordIso(file: string, source: string, sha256?: string): Promise<void> {
  const { size, mtimeMs } = await stat(file)
  const record: IsoRecord = { source, sha256, size, modified: mtimeMs }
  await writeFileAtomic(`${file}.json`, `${JSON.stringify(record, null, 2)}\n`)
}

/** The tar that reads ISO images; on macOS it is the system's tar. @throws StepError without it */
export async function bsdtar(): Promise<string> {
  if (await which('bsdtar', { nothrow: true })) return 'bsdtar'
  if (process.platform === 'darwin') return 'tar'
  const hint = './bin/check-prereqs.mts names the package (Debian, Ubuntu: libarchive-tools)'
  throw new StepError('bsdtar is not installed: it reads the installer ISO', { hint })
}

function refuse(iso: string, reason: string): never {
  const expected = 'expected: a NixOS installer, such as the minimal ISO image of nixos.org'
  const hint = `${expected}\n./bin/download-iso.mts --force downloads it again`
  throw new StepError(`${basename(iso, '.partial')} ${reason}`, { hint })
}

/**
 * Checks that a file can be the installer: a whole ISO 9660 image with a boot loader for UEFI
 * machines of this architecture. @throws StepError with what is wrong with it
 */
export async function inspectIso(file: string, arch: Architecture): Promise<void> {
  // The primary volume descriptor has the image's number of blocks and their size (ECMA-119, 8.4).
  const descriptor = Buffer.alloc(2048)
  const handle = await open(file)
  const { size } = await handle.stat()
  await handle.read(descriptor, 0, 2048, 16 * 2048).catch(() => {})
  await handle.close()
  if (descriptor.toString('latin1', 0, 6) !== '\x01CD001') refuse(file, 'is not an ISO 9660 image')
  const volume = descriptor.readUInt32LE(80) * descriptor.readUInt16LE(128)
  if (size < volume) refuse(file, `is cut off: ${size} of ${volume} bytes are there`)

  const { stdout } = await $`${await bsdtar()} -tf ${file}`
  const has = (path: string) => new RegExp(`^(\\./)?EFI/BOOT/${path}$`, 'im').test(stdout)
  if (!has('grub\\.cfg')) refuse(file, 'is not a NixOS installer: it has no EFI/BOOT/grub.cfg')
  const [own, other] = arch === 'x86_64' ? ['x64', 'aa64'] : ['aa64', 'x64']
  if (!has(`boot${other}\\.efi`) || has(`boot${own}\\.efi`)) return
  refuse(file, `is an installer for another processor than ${arch}`)
}

const consoles = { x86_64: 'console=ttyS0,115200n8', aarch64: 'console=ttyAMA0' }
// Default: 90 s. On an emulated machine udev may find the console later; there would be no login.
const deviceTimeout = 'systemd.default_device_timeout_sec=15min'

/**
 * Extracts kernel and initrd to a folder, to be started as the boot menu would, but on the serial
 * console. @throws StepError if the ISO has no boot menu, or not the files that it names
 */
export async function extractKernel(iso: string, folder: string, arch: Architecture) {
  const [tar, menu, quiet] = [await bsdtar(), 'EFI/BOOT/grub.cfg', { nothrow: true }]
  const fail = (reason: string) => refuse(iso, `is not a NixOS installer: ${reason}`)
  const isMissing = (result: ProcessOutput) => /Not found in archive/.test(result.stderr)
  // Older ISOs have EFI/boot.
  const found = await $(quiet)`${tar} -xOf ${iso} 'EFI/[Bb][Oo][Oo][Tt]/grub.cfg'`
  if (!found.stdout) fail(isMissing(found) ? `it has no ${menu}` : found.stderr.trim())
  const entry = firstEntry(found.stdout) ?? fail(`its ${menu} starts no kernel`)
  for (const name of ['kernel', 'initrd'] as const) {
    // -n: where the path is a folder, it would print all that is in it.
    const result = await $(quiet)`${tar} -xnOf ${iso} ${entry[name]} > ${folder}/${name}`
    if (result.exitCode !== 0 && !isMissing(result)) throw result
    const { size } = await stat(join(folder, name))
    if (size === 0) fail(`${entry[name]}, which its ${menu} names, is missing`)
  }
  const append = `${entry.append} ${consoles[arch]} ${deviceTimeout}`.trim()
  return { kernel: join(folder, 'kernel'), initrd: join(folder, 'initrd'), append }
}

/** The first `linux` and `initrd` of a GRUB menu, as paths in the ISO; undefined without a pair. */
export function firstEntry(menu: string) {
  const [, linux, words = '', initrd] =
    menu.match(/^\s*linux\s+(\S+)(.*)\n(?:.*\n)*?\s*initrd\s+(\S+)/m) ?? []
  if (!linux || !initrd) return undefined
  // "/boot//nix/store/…" is "boot/nix/store/…" in the archive.
  const inArchive = (path: string) => path.replace(/\/+/g, '/').slice(1)
  // isoboot: set by GRUB when it starts the ISO from a file on another disk.
  const append = words.replace(/\s*\$\{?isoboot\}?|(\s)\s+/g, '$1').trim()
  return { kernel: inArchive(linux), initrd: inArchive(initrd), append }
}
