// The certificates and the keys in tls/: reading and validating them.
import { createPrivateKey, X509Certificate } from 'node:crypto'
import { stat } from 'node:fs/promises'
import { $ } from 'zx/core'
import type { CertificateEntry } from './certificates.mts'
import { authorityOf, certificatesOf, pairFiles, usages } from './certificates.mts'
import type { Cluster } from './cluster.mts'
import { StepError } from './errors.mts'
import { readIfThere } from './files.mts'

/**
 * Who besides its owner can access a file or a folder, given relative to the project's root. One that
 * belongs to another user than us, root or the owner of the project is writable.
 */
export async function accessOf({ root, path }: Cluster, file: string) {
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

export type Pair = Awaited<ReturnType<typeof readPair>>

/**
 * What the two files of a row hold; a part that is missing or unreadable is undefined. `problems`:
 * their content, or that other users can change them. @throws the file system's error
 */
export async function readPair(cluster: Cluster, name: string) {
  const files = pairFiles(name)
  const problems: string[] = []
  const read = async <T,>(file: string, what: string, parse: (pem: string) => T) => {
    const pem = await readIfThere(cluster.path(file))
    try {
      return pem === undefined ? undefined : parse(pem)
    } catch {
      problems.push(`${file} does not contain ${what}`)
    }
  }
  for (const file of Object.values(files)) {
    if ((await accessOf(cluster, file)) !== 'writable') continue
    problems.push(`${file} can be changed by other users`)
  }
  const certificate = await read(files.certificate, 'a certificate', (p) => new X509Certificate(p))
  const key = await read(files.key, 'an RSA key', (pem) => {
    const key = createPrivateKey(pem)
    if (key.asymmetricKeyType === 'rsa') return key
    throw new Error('another kind of key')
  })
  return { name, certificate, key, problems }
}

/** A row of the table, what its files hold, and everything that is wrong with it. */
export type Finding = Awaited<ReturnType<typeof inspectPairs>>['authority']

/** Reads and validates every row of the table. */
export async function inspectPairs(cluster: Cluster) {
  const ca = await readPair(cluster, 'ca')
  const measure = { authority: ca.certificate, renewDays: cluster.settings.CERT_RENEW_DAYS }
  const finding = (entry: CertificateEntry, pair: Pair) => {
    return { entry, pair, problems: problemsOf(pair, entry, measure) }
  }
  const leaves = certificatesOf(cluster).map(async (entry) =>
    finding(entry, await readPair(cluster, entry.name)),
  )
  return { authority: finding(authorityOf(cluster), ca), leaves: await Promise.all(leaves) }
}

/**
 * Everything that is wrong with a pair; nothing if it can be kept.
 * @param authority that has to have signed it; the authority's own certificate is signed by itself
 * @param renewDays with fewer days left it has to be renewed
 */
export function problemsOf(
  { certificate, key, problems }: Pair,
  { name, ...entry }: CertificateEntry,
  { authority, renewDays }: { authority: X509Certificate | undefined; renewDays: number },
): string[] {
  const files = pairFiles(name)
  const missing = [!certificate && files.certificate, !key && files.key].flatMap((file) =>
    file && !problems.some((problem) => problem.startsWith(`${file} `)) ? `${file} is missing` : [],
  )
  if (!certificate) return [...problems, ...(missing.length === 2 ? ['missing'] : missing)]
  const { subject, sans, oids, daysLeft } = contentOf(certificate)
  const wantedSubject = Object.entries(entry.subject).map((part) => part.join('='))
  const wantedOids = entry.usages.flatMap((usage) => usages[usage].extended ?? [])
  const isSigned =
    authority && certificate.checkIssued(authority) && certificate.verify(authority.publicKey)
  return [
    ...[...problems, ...missing],
    key && !certificate.checkPrivateKey(key) && 'the key does not match',
    certificate.ca !== entry.usages.includes('certificates') &&
      `it is ${certificate.ca ? 'a' : 'not a'} CA certificate`,
    !isSigned && 'tls/ca.pem has not signed it',
    changes('subject', subject, wantedSubject),
    changes('SANs', sans, entry.sans),
    changes('usages', oids, wantedOids),
    Number.isNaN(daysLeft) && 'its dates are invalid',
    daysLeft < 0 && `it expired on ${certificate.validTo}`,
    daysLeft >= 0 && daysLeft < renewDays && `it expires in ${Math.floor(daysLeft)} days`,
    startsLater(certificate),
  ].filter((problem) => typeof problem === 'string')
}

function changes(what: string, found: readonly string[], wanted: readonly string[]) {
  const missing = wanted.filter((part) => !found.includes(part)).map((part) => `+${part}`)
  const extra = found.filter((part) => !wanted.includes(part)).map((part) => `-${part}`)
  const all = [...missing, ...extra].join(' ')
  return all !== '' && `${what} changed (${all})`
}

/** Why a certificate is not valid yet, mostly for a wrong clock; undefined if it is. */
export function startsLater({ validFrom }: X509Certificate): string | undefined {
  if (!(Date.parse(validFrom) > Date.now())) return undefined
  return `it is valid from ${validFrom} on, and the clock of this computer is at ${new Date().toUTCString()}`
}

/** What a certificate says, part by part; days left are NaN for a date beyond X.509's. */
export function contentOf({ ca, subject, subjectAltName, keyUsage, validTo }: X509Certificate) {
  const oids = keyUsage ?? []
  const extended = Object.entries(usages).filter(([, use]) => oids.includes(use.extended ?? ''))
  return {
    subject: (subject ?? '').split('\n').filter(Boolean),
    // Node's text is "DNS:alpha, IP Address:10.32.0.1".
    sans: subjectAltName?.split(', ').map((san) => san.replace(/^(DNS|IP Address):/, '')) ?? [],
    usages: ca ? ['certificates'] : extended.map(([usage]) => usage),
    oids,
    daysLeft: (Date.parse(validTo) - Date.now()) / (24 * 3600_000),
  }
}

type SshKeyEntry = Readonly<Record<'name' | 'comment' | 'usedBy', string>>
export type SshKey = Awaited<ReturnType<typeof readSshKey>>

/** Reads and validates an ssh key. Its public half ("ssh-ed25519 AAAA… comment") is empty without one. */
export async function readSshKey(cluster: Cluster, entry: SshKeyEntry) {
  const file = `tls/${entry.name}`
  const access = await accessOf(cluster, file)
  const found = (publicKey: string, problem: string) => {
    const problems = problem ? [`${file}${problem}`] : []
    return { ...entry, publicKey, problems, isMissing: access === 'missing' }
  }
  if (access === 'missing') return found('', ' is missing')
  const publicFile = ((await readIfThere(cluster.path(`${file}.pub`))) ?? '').trim()
  // ssh-keygen refuses to read it.
  if (access === 'readable') return found(publicFile, ' can be read by other users')
  if (access === 'writable') return found(publicFile, ' can be changed by other users')
  const { stdout } = await $({ cwd: cluster.root, nothrow: true })`ssh-keygen -y -P '' -f ${file}`
  const [algorithm, key] = stdout.trim().split(' ')
  if (algorithm !== 'ssh-ed25519') return found('', ' is not an ed25519 key without a passphrase')
  const matches = publicFile.startsWith(`${algorithm} ${key}`)
  return found(stdout.trim(), matches ? '' : '.pub does not match the key')
}
