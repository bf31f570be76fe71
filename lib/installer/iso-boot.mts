// The kernel of an installer ISO, to be started by QEMU directly: on x86 the ISO's own boot menu
// gives the serial console only in a submenu, on a graphical screen that no script can drive.
import { open } from 'node:fs/promises'
import { basename, join } from 'node:path'
import { $, which } from 'zx/core'
import { StepError } from '../errors.mts'

export interface IsoKernel {
  /** Files on this computer. */
  kernel: string
  initrd: string
  /** The kernel's command line. */
  append: string
}

/** What the boot menu's first entry starts: paths in the ISO. */
export interface BootEntry {
  kernel: string
  initrd: string
  append: string
}

const parameters = [
  'console=ttyS0,115200n8',
  // Of 90 seconds an emulated machine may need more until udev has the console, which then gets no
  // login at all.
  'systemd.default_device_timeout_sec=15min',
]

const menus = ['EFI/BOOT/grub.cfg', 'EFI/boot/grub.cfg']

/**
 * Takes kernel and initrd out of an ISO of NixOS, to be started as its boot menu would, but with
 * the console on the first serial port.
 *
 * @param folder where the two files are put; the caller's to remove
 * @throws StepError if the ISO has no boot menu, or not the files that it names
 */
export async function extractKernel(iso: string, folder: string): Promise<IsoKernel> {
  const files = await listFiles(iso)
  const menu = menus.find((path) => files.has(path))
  if (!menu) throw noInstaller(iso, `it has no ${menus[0]}`)
  const entry = firstEntry(await contentOf(iso, menu))
  if (!entry) throw noInstaller(iso, `its ${menu} starts no kernel`)

  const kernel = join(folder, 'kernel')
  const initrd = join(folder, 'initrd')
  for (const [path, target] of [
    [entry.kernel, kernel],
    [entry.initrd, initrd],
  ] as const) {
    if (!files.get(path)) throw noInstaller(iso, `${path}, which its ${menu} names, is not there`)
    await extract(iso, path, target)
  }
  return { kernel, initrd, append: [entry.append, ...parameters].join(' ') }
}

/** The first `linux` and `initrd` of a GRUB menu; undefined if there is no such pair. */
export function firstEntry(menu: string): BootEntry | undefined {
  const match = menu.match(/^\s*linux\s+(\S+)(.*)\n(?:.*\n)*?\s*initrd\s+(\S+)/m)
  const [, kernel, append, initrd] = match ?? []
  if (!kernel || !initrd) return undefined
  return {
    kernel: inArchive(kernel),
    initrd: inArchive(initrd),
    // Set by GRUB when it starts the ISO from a file on another disk.
    append: (append ?? '')
      .replaceAll(/\$\{?isoboot\}?/g, '')
      .trim()
      .replaceAll(/\s+/g, ' '),
  }
}

/** "/boot//nix/store/…" as the archive names it: "boot/nix/store/…". */
function inArchive(path: string): string {
  return path.replaceAll(/\/+/g, '/').replace(/^\//, '')
}

/** The ISO's files and their sizes; folders are left out, asked for one bsdtar gives all in it. */
async function listFiles(iso: string): Promise<Map<string, number>> {
  // The listing's dates follow the language otherwise.
  const env = { ...process.env, LC_ALL: 'C' }
  const listing = await $({ quiet: true, nothrow: true, env })`${await bsdtar()} -tvf ${iso}`
  if (listing.exitCode !== 0) throw noInstaller(iso, listing.stderr.trim())
  const files = new Map<string, number>()
  for (const line of listing.stdout.split('\n')) {
    const match = line.match(/^-\S+\s+\d+\s+\S+\s+\S+\s+(\d+)\s+\S+\s+\d+\s+\S+\s(.*)$/)
    if (match?.[2]) files.set(match[2].replace(/^\.\//, ''), Number(match[1]))
  }
  return files
}

async function contentOf(iso: string, path: string): Promise<string> {
  const { stdout } = await $({ quiet: true })`${await bsdtar()} -xOf ${iso} ${path}`
  return stdout
}

async function extract(iso: string, path: string, target: string): Promise<void> {
  const file = await open(target, 'w', 0o600)
  try {
    const stdio: ['ignore', number, 'pipe'] = ['ignore', file.fd, 'pipe']
    await $({ quiet: true, stdio })`${await bsdtar()} -xOf ${iso} ${path}`
  } finally {
    await file.close()
  }
}

/** The tar that reads ISO images: macOS' own, elsewhere it has its own name. */
async function bsdtar(): Promise<string> {
  const path = await which('bsdtar', { nothrow: true })
  if (path) return path
  if (process.platform === 'darwin') return 'tar'
  throw new StepError('bsdtar is not installed: it reads the kernel out of the installer ISO', {
    hint: './bin/check-prereqs.mts names the package (Debian, Ubuntu: libarchive-tools)',
  })
}

function noInstaller(iso: string, reason: string): StepError {
  return new StepError(`${basename(iso)} is no NixOS installer: ${reason}`, {
    hint: `the file is ${iso}; ./bin/download-iso.mts --force downloads it anew`,
  })
}
