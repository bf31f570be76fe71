// What is in tls/ and what is wrong with it, as data and as a table.

import type { Cluster } from '../cluster.mts'
import { readIfThere } from '../files.mts'
import { formatTable } from '../format.mts'
import { describeCertificate, problemsOf } from './certificate-check.mts'
import { authorityOf, certificatesOf } from './certificates.mts'
import { isExposed, pairFiles, readPair } from './pki.mts'
import { fingerprint } from './ssh-key.mts'
import { knownHosts, readSshKey, sshKeysOf } from './ssh-keys.mts'

interface Finding {
  name: string
  usedBy: string
  state: 'ok' | 'wrong'
  problems: string[]
}

/** A certificate as its file has it; null and empty where there is none. */
export interface CertificateFinding extends Finding {
  subject: string
  sans: string[]
  usages: string[]
  /** ISO 8601. */
  expires: string | null
  daysLeft: number | null
}

export interface SshFinding extends Finding {
  fingerprint: string | null
}

export interface TlsReport {
  certificates: CertificateFinding[]
  ssh: SshFinding[]
}

/** Looks at every file that generate-certs makes, and changes none. */
export async function inspectTls(cluster: Cluster): Promise<TlsReport> {
  return { certificates: await inspectCertificates(cluster), ssh: await inspectSsh(cluster) }
}

/** Whether everything is there and right. */
export function isSound({ certificates, ssh }: TlsReport): boolean {
  return [...certificates, ...ssh].every(({ state }) => state === 'ok')
}

/** The report for people. What all subjects have in common (place, OU) is left out. */
export function formatReport({ certificates, ssh }: TlsReport): string {
  const certificateTable = formatTable(
    ['NAME', 'SUBJECT', 'SANS', 'USAGES', 'EXPIRES', 'STATE'],
    certificates.map(({ name, subject, sans, usages, expires, daysLeft, problems }) => [
      name,
      subject.replaceAll(/\b(C|ST|L|OU)=[^,]*, /g, '').replaceAll(', ', '\n') || '-',
      sans.join('\n') || '-',
      usages.join('\n') || '-',
      expires ? `${expires.slice(0, 10)}\n${daysLeft} days` : '-',
      problems.join('\n') || 'ok',
    ]),
  )
  const sshTable = formatTable(
    ['NAME', 'FINGERPRINT', 'STATE'],
    ssh.map(({ name, fingerprint: print, problems }) => [
      name,
      print ?? '-',
      problems.join('\n') || 'ok',
    ]),
  )
  return `${certificateTable}\n\n${sshTable}`
}

async function inspectCertificates(cluster: Cluster): Promise<CertificateFinding[]> {
  const authorityEntry = authorityOf(cluster)
  const authority = (await readPair(cluster, authorityEntry.name)).certificate
  const measure = { authority, renewDays: cluster.settings.CERT_RENEW_DAYS }
  return Promise.all(
    [authorityEntry, ...certificatesOf(cluster)].map(async (entry) => {
      const pair = await readPair(cluster, entry.name)
      const problems = problemsOf(pair, entry, measure)
      if (isExposed(pair)) problems.push(`${pairFiles(entry.name).key} can be read by others`)
      const found = pair.certificate && describeCertificate(pair.certificate)
      return {
        ...finding(entry.name, entry.usedBy, problems),
        subject: found?.subject.join(', ') ?? '',
        sans: found?.sans ?? [],
        usages: found?.usages ?? [],
        expires: found?.expires.toISOString() ?? null,
        daysLeft: found?.daysLeft ?? null,
      }
    }),
  )
}

async function inspectSsh(cluster: Cluster): Promise<SshFinding[]> {
  const publicKeys = new Map<string, string>()
  const findings: SshFinding[] = []
  for (const entry of sshKeysOf(cluster)) {
    const { publicKey, problems } = await readSshKey(cluster, entry)
    if (publicKey) publicKeys.set(entry.name, publicKey)
    const print = publicKey ? fingerprint(publicKey) : null
    findings.push({ ...finding(entry.name, entry.usedBy, problems), fingerprint: print })
  }
  const pinned = await readIfThere(cluster.path('tls', 'known_hosts'))
  const wanted = knownHosts(cluster, publicKeys)
  const problems = pinned === wanted ? [] : ['tls/known_hosts does not fit the host keys and ports']
  findings.push({
    ...finding('known_hosts', 'ssh, to know the machines', problems),
    fingerprint: null,
  })
  return findings
}

function finding(name: string, usedBy: string, problems: string[]): Finding {
  return { name, usedBy, state: problems.length > 0 ? 'wrong' : 'ok', problems }
}
