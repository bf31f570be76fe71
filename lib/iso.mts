// The installer ISO: where it is kept, which one was verified, and its kernel, which QEMU starts
// directly: the ISO's own boot menu has a serial console only in a submenu on a graphical screen.
import { existsSync } from 'node:fs'
import { open, readFile, stat } from 'node:fs/promises'
import { basename, join } from 'node:path'
import { $, which } from 'zx/core'
import type { Cluster } from './cluster.mts'
import { StepError } from './errors.mts'
import { writeFileAtomic } from './files.mts'
import type { Architecture } from './firmware.mts'

/** What was verified, kept in ISO.json. `source` is an address without passwords, or a file. */
export interface IsoRecord {
  source: string
  sha256?: string
  size: number
  /** Modification time in milliseconds. */
  modified: number
}

/** Where the ISO for this cluster and processor is kept, whether or not it exists. */
export function isoFile(cluster: Cluster, arch: Architecture): string {
  return cluster.path('images', `nixos-${cluster.settings.NIXOS_VERSION}-${arch}.iso`)
}

/** The ISO that download-iso verified. @throws StepError if it is missing or has changed since */
export async function verifiedIso(cluster: Cluster, arch: Architecture): Promise<string> {
  const file = isoFile(cluster, arch)
  if (await isoRecord(file)) return file
  const changed = `${file} has changed since ./bin/download-iso.mts verified it`
  throw new StepError(existsSync(file) ? changed : `there is no installer ISO: ${file}`, {
    hint: './bin/download-iso.mts',
  })
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
  const { size, mtimeMs: modified } = await stat(file)
  const record = { source, sha256, size, modified }
  await writeFileAtomic(`${file}.json`, `${JSON.stringify(record, null, 2)}\n`)
}

/**
 * Checks that a file can be the installer: a whole ISO 9660 image with a boot loader for UEFI
 * machines of this architecture.
 *
 * @throws StepError with what is wrong with it
 */
export async function inspectIso(file: string, arch: Architecture): Promise<void> {
  const fail = (reason: string) => {
    const hint = 'expected: a NixOS installer, such as the minimal ISO image of nixos.org'
    throw new StepError(`${basename(file, '.partial')} ${reason}`, { hint })
  }
  // The primary volume descriptor has the image's number of blocks and their size (ECMA-119, 8.4).
  const descriptor = Buffer.alloc(2048)
  const { size } = await stat(file)
  const handle = await open(file)
  await handle.read(descriptor, 0, 2048, 16 * 2048).catch(() => {})
  await handle.close()
  if (descriptor.toString('latin1', 0, 6) !== '\x01CD001') fail('is not an ISO 9660 image')
  const volume = descriptor.readUInt32LE(80) * descriptor.readUInt16LE(128)
  if (size < volume) fail(`is cut off: ${size} of ${volume} bytes are there`)

  const { stdout } = await $`${await bsdtar()} -tf ${file}`
  const has = (path: string) => new RegExp(`^(\\./)?EFI/BOOT/${path}$`, 'im').test(stdout)
  if (!has('grub\\.cfg')) fail('is not a NixOS installer: it has no EFI/BOOT/grub.cfg')
  const [own, other] = arch === 'x86_64' ? ['x64', 'aa64'] : ['aa64', 'x64']
  if (has(`boot${other}\\.efi`) && !has(`boot${own}\\.efi`)) {
    fail(`is an installer for another processor than ${arch}`)
  }
}

/** The tar that reads ISO images; on macOS it is the system's tar. @throws StepError without it */
export async function bsdtar(): Promise<string> {
  if (await which('bsdtar', { nothrow: true })) return 'bsdtar'
  if (process.platform === 'darwin') return 'tar'
  throw new StepError('bsdtar is not installed: it reads the installer ISO', {
    hint: './bin/check-prereqs.mts names the package (Debian, Ubuntu: libarchive-tools)',
  })
}

/** What the boot menu starts: files, and the kernel's command line. */
export interface BootEntry {
  kernel: string
  initrd: string
  append: string
}

const consoles = { x86_64: 'console=ttyS0,115200n8', aarch64: 'console=ttyAMA0' }

// An emulated machine may need more than the default 90 seconds until udev has found the console;
// it would then get no login.
const deviceTimeout = 'systemd.default_device_timeout_sec=15min'

/**
 * Extracts kernel and initrd, to be started as the boot menu would, but on the serial console.
 *
 * @param folder for the two files; the caller removes it
 * @throws StepError if the ISO has no boot menu, or not the files that it names
 */
export async function extractKernel(
  iso: string,
  folder: string,
  arch: Architecture,
): Promise<BootEntry> {
  const refuse = (reason: string) => {
    const hint = `the file is ${iso}; ./bin/download-iso.mts --force downloads it again`
    return new StepError(`${basename(iso)} is not a NixOS installer: ${reason}`, { hint })
  }
  const tar = await bsdtar()
  const listing = await $({ nothrow: true })`${tar} -tvf ${iso}`
  if (listing.exitCode !== 0) throw refuse(listing.stderr.trim())
  // Regular files that are not empty: asked for a folder, bsdtar prints all that is in it.
  const isFile = (path: string) =>
    listing.stdout
      .split('\n')
      .some((line) => /^-(\S+\s+){4}0*[1-9]/.test(line) && line.endsWith(` ${path}`))

  const menu = ['EFI/BOOT/grub.cfg', 'EFI/boot/grub.cfg'].find(isFile)
  if (!menu) throw refuse('it has no EFI/BOOT/grub.cfg')
  const entry = firstEntry((await $`${tar} -xOf ${iso} ${menu}`).stdout)
  if (!entry) throw refuse(`its ${menu} starts no kernel`)
  for (const name of ['kernel', 'initrd'] as const) {
    const path = entry[name]
    if (!isFile(path)) throw refuse(`${path}, which its ${menu} names, is missing`)
    await $`${tar} -xOf ${iso} ${path} > ${join(folder, name)}`
  }
  const append = `${entry.append} ${consoles[arch]} ${deviceTimeout}`.trim()
  return { kernel: join(folder, 'kernel'), initrd: join(folder, 'initrd'), append }
}

/** The first `linux` and `initrd` of a GRUB menu, as paths in the ISO; undefined without a pair. */
export function firstEntry(menu: string): BootEntry | undefined {
  const match = menu.match(/^\s*linux\s+(\S+)(.*)\n(?:.*\n)*?\s*initrd\s+(\S+)/m)
  const [, kernel, append = '', initrd] = match ?? []
  if (!kernel || !initrd) return undefined
  // "/boot//nix/store/…" is "boot/nix/store/…" in the archive.
  const [kernelPath, initrdPath] = [kernel, initrd].map((path) =>
    path.replace(/\/+/g, '/').slice(1),
  )
  // isoboot: set by GRUB when it starts the ISO from a file on another disk.
  const words = append.replace(/\$\{?isoboot\}?/g, '').split(/\s+/)
  return {
    kernel: kernelPath ?? '',
    initrd: initrdPath ?? '',
    append: words.filter(Boolean).join(' '),
  }
}
