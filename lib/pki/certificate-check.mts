// Whether a certificate that is there may stay: what it says against the table, and who signed it.
import type { X509Certificate } from 'node:crypto'
import { StepError } from '../errors.mts'
import { type CertificateEntry, type Usage, usages } from './certificates.mts'
import { type Pair, pairFiles } from './pki.mts'
import type { Credential } from './x509.mts'

const day = 24 * 3600_000

/** What a certificate is judged by, beside its row of the table. */
export interface Measure {
  /** The certificate that has to have signed it; the authority's own is signed by itself. */
  authority: X509Certificate | undefined
  /** With fewer days left it counts as stale. */
  renewDays: number
}

/** Everything wrong with a pair, in words; nothing if it may stay. */
export function problemsOf(pair: Pair, entry: CertificateEntry, measure: Measure): string[] {
  const { certificate, key } = pair
  if (!certificate && !key && pair.unreadable.length === 0) return ['missing']
  const problems = [...pair.unreadable]
  const files = pairFiles(entry.name)
  for (const file of [!certificate && files.certificate, !key && files.key]) {
    const unreadable = pair.unreadable.some((text) => text.startsWith(`${file} `))
    if (file && !unreadable) problems.push(`${file} is missing`)
  }
  if (!certificate) return problems

  if (key && !certificate.checkPrivateKey(key)) problems.push('the key does not match')
  if (certificate.ca !== entry.usages.includes('certificates')) {
    problems.push(certificate.ca ? 'it is an authority' : 'it is no authority')
  }
  if (!measure.authority || !isSignedBy(certificate, measure.authority)) {
    problems.push('tls/ca.pem has not signed it')
  }
  for (const [what, found, wanted] of [
    [
      'subject',
      subjectOf(certificate),
      Object.entries(entry.subject).map((part) => part.join('=')),
    ],
    ['SANs', sansOf(certificate), entry.sans],
    ['usages', certificate.keyUsage ?? [], oidsOf(entry.usages)],
  ] as const) {
    if (isSameSet(found, wanted)) continue
    const missing = wanted.filter((part) => !found.includes(part))
    const extra = found.filter((part) => !wanted.includes(part))
    const changes = [...missing.map((part) => `+${part}`), ...extra.map((part) => `-${part}`)]
    problems.push(`${what} changed (${changes.join(' ')})`)
  }
  const left = daysLeft(certificate)
  if (left < 0) problems.push(`it ended ${certificate.validTo}`)
  else if (left < measure.renewDays) problems.push(`it ends in ${Math.floor(left)} days`)
  if (Date.parse(certificate.validFrom) > Date.now()) {
    problems.push(`it is not valid before ${certificate.validFrom}`)
  }
  return problems
}

/**
 * The authority, if there is one and it may go on signing.
 *
 * @returns undefined if there is no certificate of one
 * @throws StepError for one that cannot be used; another in its place would make worthless what
 *   it has signed, so that is left to the user
 */
export function usableAuthority(
  pair: Pair,
  entry: CertificateEntry,
  renewDays: number,
): Credential | undefined {
  if (!pair.certificate && pair.unreadable.length === 0) return undefined
  const problems = problemsOf(pair, entry, { authority: pair.certificate, renewDays })
  if (problems.length === 0 && pair.key && pair.pem) return { certificate: pair.pem, key: pair.key }
  throw new StepError(`the certificate authority cannot be used: ${problems.join('; ')}`, {
    hint:
      'put tls/ca.pem and tls/ca-key.pem back from a copy, or make the authority and all\n' +
      'certificates anew: ./bin/generate-certs.mts --force',
  })
}

/** What a certificate says of itself, for people. */
export interface Statement {
  subject: string[]
  sans: string[]
  usages: string[]
  expires: Date
  daysLeft: number
}

/** Subject, SANs, usages and end of a certificate. */
export function describeCertificate(certificate: X509Certificate): Statement {
  const extended = certificate.keyUsage ?? []
  const known = Object.entries(usages).filter(
    ([, { extended: eku }]) => eku && extended.includes(eku.oid),
  )
  return {
    subject: subjectOf(certificate),
    sans: sansOf(certificate),
    usages: certificate.ca ? ['certificates'] : known.map(([usage]) => usage),
    expires: new Date(certificate.validTo),
    daysLeft: Math.floor(daysLeft(certificate)),
  }
}

function isSignedBy(certificate: X509Certificate, authority: X509Certificate): boolean {
  return certificate.checkIssued(authority) && certificate.verify(authority.publicKey)
}

/** "CN=admin" and so on, in the certificate's order. */
function subjectOf(certificate: X509Certificate): string[] {
  return (certificate.subject ?? '').split('\n').filter(Boolean)
}

/** Node tells them as "DNS:alpha, IP Address:10.32.0.1". */
function sansOf(certificate: X509Certificate): string[] {
  const text = certificate.subjectAltName
  return text ? text.split(', ').map((san) => san.replace(/^(DNS|IP Address):/, '')) : []
}

function oidsOf(wanted: readonly Usage[]): string[] {
  return wanted.flatMap((usage) => usages[usage].extended?.oid ?? [])
}

function isSameSet(one: readonly string[], other: readonly string[]): boolean {
  const [a, b] = [new Set(one), new Set(other)]
  return a.size === b.size && [...a].every((part) => b.has(part))
}

function daysLeft(certificate: X509Certificate): number {
  return (Date.parse(certificate.validTo) - Date.now()) / day
}
