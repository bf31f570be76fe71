// The installer ISO: where it comes from, where it is kept, and what makes it one.
import { randomBytes } from 'node:crypto'
import { existsSync } from 'node:fs'
import { mkdir, readFile, realpath, rename, rm, stat, symlink } from 'node:fs/promises'
import { basename, dirname, isAbsolute, join, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'
import type { Cluster } from '../cluster.mts'
import { StepError } from '../errors.mts'
import { writeFileAtomic } from '../files.mts'
import type { Architecture } from '../qemu/firmware.mts'
import { sha256Of } from './download.mts'
import { type RequestOptions, request, requestText, shown } from './http.mts'
import { readIso } from './iso9660.mts'

export type IsoSource =
  /** `official`: the channel's own, which always comes with a checksum. */
  { kind: 'url'; url: string; official: boolean } | { kind: 'file'; path: string }

/** What was verified, beside the ISO as ISO.json. */
export interface IsoRecord {
  /** The address it was downloaded from, or the user's own file. */
  source: string
  sha256?: string | undefined
  size: number
  /** Modification time in milliseconds. */
  modified: number
}

type Arch = { arch: Architecture }

/** Where the ISO for this cluster and processor is kept, there or not. */
export function isoFile(cluster: Cluster, { arch }: Arch): string {
  return cluster.path('images', `nixos-${cluster.settings.NIXOS_VERSION}-${arch}.iso`)
}

/**
 * The ISO to install from. Cheap: that it is still what `download-iso` verified is told by its
 * size and time.
 *
 * @throws StepError if it is missing or has changed since
 */
export async function verifiedIso(cluster: Cluster, host: Arch): Promise<string> {
  const file = isoFile(cluster, host)
  if (await isoRecord(file)) return file
  const reason = existsSync(file)
    ? `${file} is not as ./bin/download-iso.mts left it`
    : `there is no installer ISO: ${file}`
  throw new StepError(reason, { hint: 'run ./bin/download-iso.mts' })
}

/** What is known of a verified ISO; undefined if it is not there, or not as it was then. */
export async function isoRecord(file: string): Promise<IsoRecord | undefined> {
  try {
    const record: IsoRecord = JSON.parse(await readFile(`${file}.json`, 'utf8'))
    const { size, mtimeMs } = await stat(file)
    return size === record.size && mtimeMs === record.modified ? record : undefined
  } catch {
    return undefined
  }
}

/** Notes that the ISO was verified as it is now. */
export async function recordIso(file: string, source: string, sha256?: string): Promise<void> {
  const { size, mtimeMs: modified } = await stat(file)
  const record: IsoRecord = { source, sha256, size, modified }
  await writeFileAtomic(`${file}.json`, `${JSON.stringify(record, null, 2)}\n`)
}

/**
 * Where the ISO comes from: what was given, else NIXOS_ISO_URL, else the channel.
 *
 * @param given a URL or a file, relative to the current folder
 * @throws StepError for an address that is neither http:, https: nor a file
 */
export function isoSource(cluster: Cluster, { arch }: Arch, given?: string): IsoSource {
  const { NIXOS_ISO_URL, NIXOS_VERSION } = cluster.settings
  const chosen = given ?? NIXOS_ISO_URL
  if (!chosen) {
    const name = `latest-nixos-minimal-${arch}-linux.iso`
    const url = `https://channels.nixos.org/nixos-${NIXOS_VERSION}/${name}`
    return { kind: 'url', url, official: true }
  }
  const scheme = chosen.match(/^([a-z][a-z0-9+.-]*):\/\//i)?.[1]?.toLowerCase()
  if (scheme === undefined) {
    const folder = given === undefined ? cluster.root : process.cwd()
    return { kind: 'file', path: isAbsolute(chosen) ? chosen : resolve(folder, chosen) }
  }
  if (!URL.canParse(chosen)) throw new StepError(`"${chosen}" is no address`)
  if (scheme === 'file') return { kind: 'file', path: fileURLToPath(chosen) }
  if (scheme === 'http' || scheme === 'https') return { kind: 'url', url: chosen, official: false }
  throw new StepError(`the ISO cannot come from ${scheme}://`, {
    hint: 'an http:// or https:// address, or a file, can be its source',
  })
}

/**
 * Follows a channel's "latest" address to the release it means today, and reads the checksum
 * there: both are then of the same release, however soon the channel moves on.
 *
 * @returns the checksum in hex; undefined if there is no .sha256 file beside the ISO
 * @throws StepError if there is no ISO at that address, or it cannot be reached
 */
export async function findRelease(
  url: string,
  options: RequestOptions,
): Promise<{ url: string; sha256: string | undefined }> {
  const { response, url: release } = await request(url, { ...options, method: 'HEAD' })
  response.destroy()
  if (response.statusCode === 404 || response.statusCode === 410) {
    throw new StepError(`there is no ${shown(release)}`, {
      hint: 'NIXOS_VERSION and NIXOS_ISO_URL of cluster.env say where the ISO comes from',
    })
  }
  for (const address of new Set([release.href, url])) {
    const beside = new URL(address)
    beside.pathname += '.sha256'
    const text = await requestText(beside, options)
    const sha256 = text && checksumIn(text, basename(beside.pathname, '.sha256'))
    if (sha256) return { url: address, sha256 }
  }
  return { url, sha256: undefined }
}

/** The checksum of `name` in what sha256sum prints, or a single checksum; undefined: neither. */
export function checksumIn(text: string, name: string): string | undefined {
  const lines = [...text.matchAll(/^([0-9a-f]{64})(?:[ \t]+\*?(.+?))?[ \t]*\r?$/gim)]
  const [only] = lines
  const line = lines.length === 1 ? only : lines.find(([, , file]) => file === name)
  return line?.[1]?.toLowerCase()
}

/**
 * Looks whether a file can be the installer: an ISO 9660 image, whole, that GRUB starts on UEFI
 * machines of this architecture.
 *
 * @throws StepError with what is wrong with it
 */
export async function inspectIso(file: string, { arch }: Arch): Promise<void> {
  const name = basename(file, '.partial')
  const status = await stat(file)
  const hint = 'expected: a NixOS installer, such as the minimal ISO image of nixos.org'
  const found =
    status.isFile() &&
    (await readIso(file, async (image) => ({
      size: image.size,
      boot: await image.list('EFI', 'BOOT'),
    })))
  if (!found) throw new StepError(`${name} is no ISO 9660 image`, { hint })
  if (status.size < found.size) {
    throw new StepError(`${name} is cut off: ${status.size} of ${found.size} bytes are there`)
  }
  if (!found.boot.includes('GRUB.CFG')) {
    throw new StepError(`${name} is no NixOS installer: it has no EFI/BOOT/grub.cfg`, { hint })
  }
  const [own, other] = arch === 'x86_64' ? ['X64', 'AA64'] : ['AA64', 'X64']
  if (found.boot.includes(`BOOT${other}.EFI`) && !found.boot.includes(`BOOT${own}.EFI`)) {
    throw new StepError(`${name} is an installer for another processor than ${arch}`)
  }
}

/**
 * Takes a file of the user for the ISO, by a symbolic link: it is 1.5 GB, and not ours to change.
 *
 * @returns its checksum, if a .sha256 file beside it has one and it was compared
 * @throws StepError if it is missing, no installer, or not what the .sha256 file says
 */
export async function adoptIso(
  path: string,
  file: string,
  host: Arch,
  signal?: AbortSignal,
): Promise<string | undefined> {
  if (!existsSync(path)) throw new StepError(`the ISO ${path} is not there`)
  await inspectIso(path, host)
  const text = await readFile(`${path}.sha256`, 'utf8').catch(() => '')
  const sha256 = checksumIn(text, basename(path))
  if (sha256 && (await sha256Of(path, signal)) !== sha256) {
    throw new StepError(`${path} is not what ${path}.sha256 says: its checksum differs`)
  }
  await mkdir(dirname(file), { recursive: true })
  const target = await realpath(path)
  // Given the ISO at its own place, a link to itself would be the end of it.
  if (target !== (await realpath(dirname(file)).then((folder) => join(folder, basename(file))))) {
    const beside = join(dirname(file), `.${basename(file)}.tmp-${randomBytes(4).toString('hex')}`)
    await symlink(target, beside)
    await rename(beside, file).catch(async (error) => {
      await rm(beside, { force: true })
      throw error
    })
  }
  return sha256
}

/** A source as a person would name it, without passwords. */
export function sourceName(source: IsoSource): string {
  return source.kind === 'file' ? source.path : shown(source.url)
}
