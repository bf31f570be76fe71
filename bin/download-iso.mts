#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// The NixOS installer ISO in images/: downloaded and verified, or a link to a file of yours.
import { createHash } from 'node:crypto'
import { createReadStream, existsSync } from 'node:fs'
import { mkdir, realpath, rename, rm, stat } from 'node:fs/promises'
import { basename, dirname, join, relative, resolve } from 'node:path'
import { pipeline } from 'node:stream/promises'
import { fileURLToPath } from 'node:url'
import { $, ProcessOutput, retry } from 'zx'
import { loadCluster } from '../lib/cluster.mts'
import { knownProblem, StepError } from '../lib/errors.mts'
import { readIfThere, writeFileAtomic } from '../lib/files.mts'
import { formatBytes, quote } from '../lib/format.mts'
import { detectArchitecture, detectSystem } from '../lib/host.mts'
import { interruption } from '../lib/interrupt.mts'
import { bsdtar, inspectIso, isoFile, isoRecord, recordIso } from '../lib/iso.mts'
import { withLock } from '../lib/lock.mts'
import { hostEnvironment } from '../lib/proxy.mts'
import { script } from '../lib/script.mts'
import { isLive, step } from '../lib/steps.mts'
import { assertDiskSpace } from '../lib/vm.mts'

const { flags } = script({
  does: `Provides the NixOS installer ISO in images/: downloads the minimal one of the channel
NIXOS_VERSION for this computer's processor and verifies its checksum. An interrupted download
continues where it stopped. A verified ISO is kept.`,
  reads: ['cluster.env'],
  writes: ['images/nixos-VERSION-ARCH.iso', 'images/nixos-VERSION-ARCH.iso.json (its record)'],
  flags: {
    'iso-url': {
      value: 'URL|FILE',
      help: 'another ISO, instead of NIXOS_ISO_URL; a file is linked, not copied',
    },
    force: { help: 'download even if there is a verified one' },
  },
  examples: ['./bin/download-iso.mts', './bin/download-iso.mts --iso-url ~/Downloads/nixos.iso'],
})

const cluster = loadCluster()
const { NIXOS_VERSION, NIXOS_ISO_URL } = cluster.settings
const arch = await detectArchitecture(detectSystem())
const channel = `https://channels.nixos.org/nixos-${NIXOS_VERSION}/latest-nixos-minimal-${arch}-linux.iso`
const chosen = flags['iso-url'] ?? NIXOS_ISO_URL
const { source, host, login } = readSource(chosen || channel)
const file = isoFile(cluster, arch)
const name = relative(cluster.root, file)
const partial = `${file}.partial`
const signal = interruption()
let shownTenths = 0

// Passwords stay out of the command line: a proxy's is in the environment, a server's on stdin.
const env = { ...$.env, ...(await hostEnvironment(cluster)) }
const $$ = $({ env, signal, nothrow: true, ...(login ? { input: login } : {}) })

await withLock(cluster.path('run', 'download-iso.lock'), 'downloading the ISO', async () => {
  const known = flags.force ? undefined : await isoRecord(file)
  if (known && (!chosen || known.source === source)) {
    return console.error(`✓ ${name} is there and verified (from ${known.source})`)
  }
  await mkdir(dirname(file), { recursive: true })
  if (host) await download()
  else await step(`check ${source}`, link)
  console.error(`✓ ${name} is there and verified`)
})

/** Downloads the ISO, which is called images/….iso.partial until it is verified. */
async function download(): Promise<void> {
  // Without it the ISO could not be verified: fails before the download.
  await bsdtar()
  const release = await step(`find ${source}`, findRelease)
  const { address, sha256, validator, size } = release
  if (!sha256) {
    const reason = `there is no checksum file ${source}.sha256`
    if (!chosen) throw new StepError(`${reason}: the ISO cannot be verified`)
    console.error(`! ${reason}: it can only be verified that it is a complete installer ISO`)
  }

  // What an earlier run received is continued if the server still has the same file.
  const note = JSON.stringify({ address, sha256, validator })
  if ((await readIfThere(`${partial}.json`)) !== note) await rm(partial, { force: true })
  await writeFileAtomic(`${partial}.json`, note)
  const received = await sizeOf(partial)
  const needed = Math.max(size - received, received)
  const warning = await assertDiskSpace(dirname(file), needed, { what: ` for ${name}` })
  if (warning) console.error(`! ${warning}`)
  // In a copy, as the curl of a run that was killed may still write to this file.
  if (existsSync(partial)) {
    await $`cp ${name}.partial ${name}.copy && mv ${name}.copy ${name}.partial`
  }

  await step('download the ISO', async (detail) => {
    const progress = setInterval(showProgress, 200, size, detail)
    await receive(release).finally(() => clearInterval(progress))
    detail('verifying')
    const found = await sha256Of(partial)
    try {
      if (sha256 && found !== sha256) {
        throw new StepError(`the checksum of ${address} does not match, so it was deleted`, {
          output: `expected SHA-256 ${sha256}\nreceived SHA-256 ${found}`,
          hint: 'try again; if this persists, a proxy may be altering downloads',
        })
      }
      await inspectIso(partial, arch)
    } catch (error) {
      if (!signal.aborted) await rm(partial)
      throw error
    }
    await rename(partial, file)
    await rm(`${partial}.json`)
    await recordIso(file, source, found)
  })
}

type Release = Awaited<ReturnType<typeof findRelease>>

/**
 * Follows a channel's "latest" address to the release that it means today, and reads the checksum
 * there: ISO and checksum are then of the same release, even if the channel moves on.
 */
async function findRelease() {
  const head =
    await $$`curl -q -sSIL ${optionsFor(source)} -w '%{http_code} %{url_effective}' ${source}`
  if (head.exitCode !== 0) throw failure(head, source)
  const [headers = '', last = ''] = head.stdout.split('\r\n\r\n').slice(-2)
  const [status, release = source] = last.split(' ')
  if (status === '404' || status === '410') {
    const hint = 'NIXOS_VERSION and NIXOS_ISO_URL of cluster.env say where the ISO comes from'
    throw new StepError(`there is no ${release}`, { hint })
  }
  const about = {
    /** Bytes; 0 if the server does not say. */
    size: Number(headers.match(/^content-length: (\d+)/im)?.[1] ?? 0),
    // Shows whether a file without checksum has changed. Not a weak ETag, W/"…" (RFC 9110, 8.8.1).
    validator: headers.match(/^(?:etag: (?=")|last-modified: )(.*\S)/im)?.[1],
  }
  for (const address of new Set([release, source])) {
    const beside = new URL(address)
    beside.pathname += '.sha256'
    const answer = await $$`curl -q -fsSL ${optionsFor(address)} ${beside.href}`
    // Some servers answer 403 for what does not exist.
    const missing = /error: (403|404|410)/.test(answer.stderr)
    if (answer.exitCode !== 0 && !missing) throw failure(answer, beside.href)
    const sha256 = checksumIn(answer.stdout, basename(beside.pathname, '.sha256'))
    if (sha256) return { address, sha256, ...about }
  }
  return { address: source, sha256: undefined, ...about }
}

/** Receives the ISO, or what is missing at its end; resumes after a lost connection. */
async function receive({ address, sha256, validator, size }: Release): Promise<void> {
  // Without a checksum only the server can tell that its file has changed.
  const same = validator && !sha256 ? ['--header', `If-Range: ${validator}`] : []
  const options = [...optionsFor(address), '--speed-limit', '1', '--speed-time', '60', ...same]
  let most = await sizeOf(partial)
  if (most > 0 && most === size) return
  // Five failures without a new byte end it. (curl's own --retry would delete the part.)
  const last = await retry(5, '2s', async () => {
    for (;;) {
      if (!sha256 && !validator) await rm(partial, { force: true })
      const result = await $$`curl -q -fsSL ${options} -C - -o ${name}.partial ${address}`
      // Not worth another attempt: refused by the server, or not written (23).
      const final = /error: 4(?!08|16|25|29)/.test(result.stderr) || result.exitCode === 23
      if (result.exitCode === 0 || signal.aborted || final) return result
      // The server cannot continue the part (33), or not this one (416).
      if (result.exitCode === 33 || /error: 416/.test(result.stderr)) await rm(partial)
      const received = await sizeOf(partial)
      if (received <= most) throw result
      most = received
    }
  }).catch((error) => (error instanceof ProcessOutput ? error : Promise.reject(error)))
  signal.throwIfAborted()
  if (last.exitCode !== 0) throw failure(last, address)
}

/** Options of every call. */
function optionsFor(address: string): string[] {
  return [
    ...['--globoff', '--connect-timeout', '30'],
    ...(address.startsWith('https:') ? ['--proto-redir', '-all,https'] : []),
    // Not for a host that the server redirects to.
    ...(login && new URL(address).host === host ? ['--config', '-'] : []),
  ]
}

function failure({ stderr, exitCode }: ProcessOutput, address: string): StepError {
  // curl repeats the address of a proxy that it does not understand, with the password.
  const said = stderr.trim().replace(/:\/\/.*@/g, '://') || `curl ended with status ${exitCode}`
  const { reason = `${address} cannot be downloaded`, hint } = knownProblem('curl', said) ?? {}
  return new StepError(reason, { output: said, command: `curl -fLO ${quote(address)}`, hint })
}

/** Shows what has arrived: live on a terminal, else a line for each tenth. */
async function showProgress(total: number, detail: (text: string) => void): Promise<void> {
  const size = await sizeOf(partial)
  if (total === 0) return detail(formatBytes(size))
  const tenths = Math.floor((10 * size) / total)
  const bar = '█'.repeat(tenths).padEnd(10, '░')
  const text = `${bar} ${Math.floor((100 * size) / total)} % of ${formatBytes(total)}`
  if (isLive()) detail(text)
  else if (tenths > shownTenths) console.error(text)
  shownTenths = tenths
}

/** Accepts a file of the user's as the ISO, by a link: it is 1.5 GB, and not ours to change. */
async function link(): Promise<void> {
  if (!existsSync(source)) throw new StepError(`the ISO ${source} does not exist`)
  await inspectIso(source, arch)
  const expected = checksumIn((await readIfThere(`${source}.sha256`)) ?? '', basename(source))
  if (expected && (await sha256Of(source)) !== expected) {
    throw new StepError(`the checksum of ${source} is not the one in ${source}.sha256`)
  }
  // The file itself may already be at the ISO's place.
  const target = await realpath(source)
  if (target !== join(await realpath(dirname(file)), basename(file))) {
    await $`ln -sfn ${target} ${name}`
  }
  await recordIso(file, source, expected)
}

/**
 * An address, or a file: in cluster.env relative to the project, else to the current folder.
 * @returns the address without user and password, its host, and these two for curl's --config;
 *   or the absolute path of the file
 */
function readSource(text: string): { source: string; host?: string; login?: string } {
  const scheme = text.match(/^([a-z][a-z0-9+.-]*):\/\//i)?.[1]?.toLowerCase()
  const folder = flags['iso-url'] === undefined ? cluster.root : process.cwd()
  if (scheme === undefined) return { source: resolve(folder, text) }
  if (!URL.canParse(text)) throw new StepError(`the address ${scheme}://… of the ISO is not valid`)
  if (scheme === 'file') return { source: fileURLToPath(text) }
  if (scheme !== 'http' && scheme !== 'https') {
    const hint = 'its source can be an http:// or https:// address, or a file'
    throw new StepError(`the ISO cannot come from ${scheme}://`, { hint })
  }
  const url = new URL(text)
  const account = [url.username, url.password].map(decodeURIComponent).join(':')
  const login = url.username ? `user = ${JSON.stringify(account)}` : ''
  Object.assign(url, { username: '', password: '' })
  return { source: url.href, host: url.host, login }
}

/** The checksum of `wanted` in what sha256sum prints, or the only checksum of a text. */
function checksumIn(text: string, wanted: string): string | undefined {
  const lines = [...text.matchAll(/^([0-9a-f]{64})(?:[ \t]+\*?(.+?))?[ \t]*\r?$/gim)]
  const line = lines.length === 1 ? lines[0] : lines.find(([, , listed]) => listed === wanted)
  return line?.[1]?.toLowerCase()
}

async function sha256Of(path: string): Promise<string> {
  const hash = createHash('sha256')
  await pipeline(createReadStream(path, { highWaterMark: 2 ** 20 }), hash, { signal })
  return hash.digest('hex')
}

/** Bytes of a file; 0 if it does not exist. */
async function sizeOf(path: string): Promise<number> {
  return (await stat(path).catch(() => undefined))?.size ?? 0
}
