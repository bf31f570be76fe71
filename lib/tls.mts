// The certificates and the ssh keys in tls/: reading and judging them.
import { createPrivateKey, type KeyObject, X509Certificate } from 'node:crypto'
import { stat } from 'node:fs/promises'
import { $ } from 'zx/core'
import {
  authorityOf,
  type CertificateEntry,
  certificatesOf,
  pairFiles,
  type Usage,
  usages,
} from './certificates.mts'
import type { Cluster } from './cluster.mts'
import { StepError } from './errors.mts'
import { readIfThere } from './files.mts'

/** Who can access a file or a folder besides its owner: 'writable' means that they can change it. */
export type Access = 'missing' | 'private' | 'readable' | 'writable'

/**
 * Who can access a file or a folder of the project. One that belongs to another user than us, root
 * or the owner of the project is writable.
 *
 * @param file relative to the project's root
 */
export async function accessOf({ root, path }: Cluster, file: string): Promise<Access> {
  const found = await stat(path(file)).catch(() => undefined)
  if (!found) return 'missing'
  const owners = [0, process.getuid?.(), (await stat(root)).uid]
  if (found.mode & 0o022 || !owners.includes(found.uid)) return 'writable'
  return found.mode & 0o077 ? 'readable' : 'private'
}

/** Refuses files that other users could have changed. @throws StepError with the command for it */
export async function assertUnchanged(cluster: Cluster, files: readonly string[]): Promise<void> {
  const access = await Promise.all(files.map((file) => accessOf(cluster, file)))
  const open = files.filter((_, index) => access[index] === 'writable').join(' ')
  if (!open) return
  throw new StepError(`other users can change ${open}, so nothing was done`, {
    hint: `if you know that nobody has: chown "$(id -u)" ${open} && chmod go-w ${open}`,
  })
}

/** What the two files of a row hold. A part that is missing or unreadable is undefined. */
export interface Pair {
  name: string
  certificate?: X509Certificate
  /** Certificate and key as their files have them. */
  pem?: string
  key?: KeyObject
  keyPem?: string
  /** Other users can read the key. */
  isExposed?: boolean
  /** What is wrong with the files: content, or that other users can change them. */
  problems: string[]
}

/**
 * Reads a certificate and its key.
 *
 * @throws the file system's error if a file exists and cannot be read
 */
export async function readPair(cluster: Cluster, name: string): Promise<Pair> {
  const files = pairFiles(name)
  const pair: Pair = { name, problems: [] }
  for (const file of [files.certificate, files.key]) {
    const access = await accessOf(cluster, file)
    if (access === 'writable') pair.problems.push(`${file} can be changed by other users`)
    if (file === files.key && access === 'readable') pair.isExposed = true
  }
  const pem = await readIfThere(cluster.path(files.certificate))
  const keyPem = await readIfThere(cluster.path(files.key))
  try {
    if (pem !== undefined) Object.assign(pair, { certificate: new X509Certificate(pem), pem })
  } catch {
    pair.problems.push(`${files.certificate} does not contain a certificate`)
  }
  try {
    if (keyPem !== undefined) {
      const key = createPrivateKey(keyPem)
      if (key.asymmetricKeyType !== 'rsa') throw new Error('another kind of key')
      Object.assign(pair, { key, keyPem })
    }
  } catch {
    pair.problems.push(`${files.key} does not contain an RSA key`)
  }
  return pair
}

/**
 * Everything that is wrong with a pair; nothing if it can be kept.
 *
 * @param authority that has to have signed it; the authority's own certificate is signed by itself
 * @param renewDays with fewer days left it has to be renewed
 */
export function problemsOf(
  pair: Pair,
  entry: CertificateEntry,
  { authority, renewDays }: { authority: X509Certificate | undefined; renewDays: number },
): string[] {
  const { certificate, key } = pair
  if (!certificate && !key && pair.problems.length === 0) return ['missing']
  const problems = [...pair.problems]
  const files = pairFiles(entry.name)
  for (const file of [!certificate && files.certificate, !key && files.key]) {
    const isKnown = problems.some((problem) => problem.startsWith(`${file} `))
    if (file && !isKnown) problems.push(`${file} is missing`)
  }
  if (!certificate) return problems

  if (key && !certificate.checkPrivateKey(key)) problems.push('the key does not match')
  if (certificate.ca !== entry.usages.includes('certificates')) {
    problems.push(certificate.ca ? 'it is a CA certificate' : 'it is not a CA certificate')
  }
  if (!authority || !certificate.checkIssued(authority) || !certificate.verify(authority.publicKey))
    problems.push('tls/ca.pem has not signed it')

  const wantedUsages = entry.usages.flatMap((usage) => usages[usage].extended?.oid ?? [])
  const wantedSubject = Object.entries(entry.subject).map((part) => part.join('='))
  for (const [what, found, wanted] of [
    ['subject', subjectOf(certificate), wantedSubject],
    ['SANs', sansOf(certificate), entry.sans],
    ['usages', certificate.keyUsage ?? [], wantedUsages],
  ] as const) {
    const missing = wanted.filter((part) => !found.includes(part)).map((part) => `+${part}`)
    const extra = found.filter((part) => !wanted.includes(part)).map((part) => `-${part}`)
    const changes = [...missing, ...extra].join(' ')
    if (changes) problems.push(`${what} changed (${changes})`)
  }
  const left = daysLeft(certificate)
  if (Number.isNaN(left)) problems.push('its dates are invalid')
  else if (left < 0) problems.push(`it expired on ${certificate.validTo}`)
  else if (left < renewDays) problems.push(`it expires in ${Math.floor(left)} days`)
  const early = startsLater(certificate)
  if (early) problems.push(early)
  return problems
}

/** That a certificate is not valid yet, which this computer's clock is to blame for most often. */
export function startsLater({ validFrom }: X509Certificate): string | undefined {
  if (!(Date.parse(validFrom) > Date.now())) return undefined
  return `it is valid from ${validFrom} on, and the clock of this computer is at ${new Date().toUTCString()}`
}

function subjectOf(certificate: X509Certificate): string[] {
  return (certificate.subject ?? '').split('\n').filter(Boolean)
}

/** Node's text is "DNS:alpha, IP Address:10.32.0.1". */
function sansOf({ subjectAltName }: X509Certificate): string[] {
  return subjectAltName?.split(', ').map((san) => san.replace(/^(DNS|IP Address):/, '')) ?? []
}

function daysLeft({ validTo }: X509Certificate): number {
  return (Date.parse(validTo) - Date.now()) / (24 * 3600_000)
}

/** A certificate as its file has it, null and empty where there is none, and its problems. */
export interface CertificateFinding {
  name: string
  usedBy: string
  state: 'ok' | 'wrong'
  problems: string[]
  subject: string
  sans: string[]
  usages: string[]
  /** ISO 8601. */
  expires: string | null
  daysLeft: number | null
}

/** Judges every certificate of the table and its key, and changes nothing. */
export async function inspectTls(
  cluster: Cluster,
): Promise<{ certificates: CertificateFinding[] }> {
  const entries = [authorityOf(cluster), ...certificatesOf(cluster)]
  const pairs = await Promise.all(entries.map(({ name }) => readPair(cluster, name)))
  if ((await accessOf(cluster, 'tls')) === 'writable') {
    pairs[0]?.problems.push('tls/ can be changed by other users')
  }
  const measure = { authority: pairs[0]?.certificate, renewDays: cluster.settings.CERT_RENEW_DAYS }
  const certificates = pairs.map((pair, index) => {
    const entry = entries[index] as CertificateEntry
    const problems = problemsOf(pair, entry, measure)
    if (pair.isExposed) problems.push(`${pairFiles(entry.name).key} can be read by other users`)
    const state = problems.length > 0 ? ('wrong' as const) : ('ok' as const)
    const { name, usedBy } = entry
    return { name, usedBy, state, problems, ...contentOf(pair.certificate) }
  })
  return { certificates }
}

function contentOf(certificate: X509Certificate | undefined) {
  if (!certificate) return { subject: '', sans: [], usages: [], expires: null, daysLeft: null }
  const oids = certificate.keyUsage ?? []
  const known = Object.keys(usages) as Usage[]
  const extended = known.filter((usage) => oids.includes(usages[usage].extended?.oid ?? ''))
  const left = daysLeft(certificate)
  const isDated = !Number.isNaN(left)
  return {
    subject: subjectOf(certificate).join(', '),
    sans: sansOf(certificate),
    usages: certificate.ca ? ['certificates'] : extended,
    expires: isDated ? new Date(certificate.validTo).toISOString() : null,
    daysLeft: isDated ? Math.floor(left) : null,
  }
}

/** One row of the table of ssh keys: the files `tls/NAME` and `tls/NAME.pub`. */
export interface SshKeyEntry {
  name: string
  comment: string
  usedBy: string
}

/** Every ssh key of the cluster: one to log in with, then the host key of each node. */
export function sshKeysOf({ settings, nodes }: Cluster): SshKeyEntry[] {
  const usedBy = 'you and the scripts, to log in as root'
  const hostKeys = nodes.map(({ name }) => {
    const usedBy = `sshd on ${name}, to authenticate itself`
    return { name: `ssh_host_${name}_ed25519`, comment: name, usedBy }
  })
  return [{ name: 'ssh_ed25519', comment: settings.CLUSTER_NAME, usedBy }, ...hostKeys]
}

/**
 * Reads a key with ssh-keygen, and judges its files.
 *
 * @returns its public half ("ssh-ed25519 AAAA… comment"), empty if there is no usable key
 */
export async function readSshKey(
  cluster: Cluster,
  { name }: SshKeyEntry,
): Promise<{ publicKey: string; problems: string[] }> {
  const file = `tls/${name}`
  const access = await accessOf(cluster, file)
  if (access === 'missing') return { publicKey: '', problems: [`${file} is missing`] }
  const publicFile = ((await readIfThere(cluster.path(`${file}.pub`))) ?? '').trim()
  if (access !== 'private') {
    // ssh-keygen refuses to read it.
    const problem = `${file} can be ${access === 'readable' ? 'read' : 'changed'} by other users`
    return { publicKey: publicFile, problems: [problem] }
  }
  const { stdout } = await $({ cwd: cluster.root, nothrow: true })`ssh-keygen -y -P '' -f ${file}`
  const publicKey = stdout.trim()
  if (!publicKey.startsWith('ssh-ed25519 ')) {
    return { publicKey: '', problems: [`${file} is not an ed25519 key without a passphrase`] }
  }
  const [algorithm, key] = publicKey.split(' ')
  const matches = publicFile.startsWith(`${algorithm} ${key}`)
  const problems = matches ? [] : [`${file}.pub does not match the key`]
  return { publicKey, problems }
}
