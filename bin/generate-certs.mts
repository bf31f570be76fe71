#!/usr/bin/env -S sh -c 'exec node --disable-warning=ExperimentalWarning "$(dirname "$0")/../lib/launch.mjs" "$0" "$@"'
// The cluster's public key infrastructure: an authority, a certificate for everyone who talks to
// anyone (the table is in lib/certificates.mts), and the ssh keys.
import { createPublicKey, X509Certificate } from 'node:crypto'
import { writeFileAtomic } from '../lib/atomic-write.mts'
import { problemsOf, usableAuthority } from '../lib/certificate-check.mts'
import { authorityOf, certificatesOf } from '../lib/certificates.mts'
import { loadCluster } from '../lib/cluster.mts'
import { withLock } from '../lib/lock.mts'
import { readIfThere } from '../lib/optional-file.mts'
import { isExposed, protectKey, readPair, removeCertificate, writePair } from '../lib/pki.mts'
import { generateRsaKey } from '../lib/rsa-key.mts'
import { script } from '../lib/script.mts'
import { generateSshKey } from '../lib/ssh-key.mts'
import { keepSshKey, knownHosts, sshKeysOf, writeSshKey } from '../lib/ssh-keys.mts'
import { StepError } from '../lib/step-error.mts'
import { inParallel, type Row, step } from '../lib/steps.mts'
import { formatReport, inspectTls, isSound } from '../lib/tls-report.mts'
import { selfSign, signCertificate } from '../lib/x509.mts'

const { flags } = script({
  does:
    'Makes the certificate authority, the certificates it signs, and the ssh keys, in tls/.\n' +
    'What is there and right stays; what is missing, changed or about to end is made anew.',
  reads: ['cluster.env', 'tls/'],
  writes: ['tls/'],
  flags: {
    force: { help: 'make the authority and all certificates anew; the ssh keys stay' },
    renew: { value: 'NAME', help: 'make this certificate anew, whatever its state' },
    check: { help: 'change nothing; show all, and end with status 1 if anything is wrong' },
    json: { help: 'with --check: as JSON' },
  },
  examples: ['./bin/generate-certs.mts', './bin/generate-certs.mts --renew sigma'],
})
if ([flags.force, flags.renew, flags.check].filter(Boolean).length > 1) {
  throw new StepError('only one of --force, --renew and --check at a time', { exitCode: 2 })
}
if (flags.json && !flags.check) throw new StepError('--json goes with --check', { exitCode: 2 })

const cluster = loadCluster()
const { CA_DAYS, CERT_DAYS, CERT_RENEW_DAYS } = cluster.settings
const authorityEntry = authorityOf(cluster)
const entries = certificatesOf(cluster)
if (flags.renew && !entries.some(({ name }) => name === flags.renew)) {
  const names = entries.map(({ name }) => name).join(', ')
  throw new StepError(`there is no certificate "${flags.renew}" to renew`, {
    hint: `one of ${names}`,
    exitCode: 2,
  })
}
if (Math.min(CA_DAYS, CERT_DAYS) <= CERT_RENEW_DAYS) {
  throw new StepError('CA_DAYS and CERT_DAYS have to be more than CERT_RENEW_DAYS', {
    hint: 'a new certificate would count as stale at once: change them in cluster.env',
  })
}

if (flags.check) {
  const report = await inspectTls(cluster)
  console.log(flags.json ? JSON.stringify(report, null, 2) : formatReport(report))
  process.exit(isSound(report) ? 0 : 1)
}

await withLock(cluster.path('run', 'pki.lock'), 'making certificates', generate, { wait: 5 })

async function generate(): Promise<void> {
  // 1. The authority: a key, and a certificate that says so, signed with that very key. One that
  //    is there stays, as what it has signed is worth nothing beside another.
  const authority = await step('certificate authority', async () => {
    const pair = await readPair(cluster, authorityEntry.name)
    const kept = flags.force ? undefined : usableAuthority(pair, authorityEntry, CERT_RENEW_DAYS)
    if (kept) return kept
    // A key without certificate is what an interruption leaves: it is as good as a new one.
    const key = (!flags.force && pair.key) || (await generateRsaKey())
    const certificate = selfSign({ ...authorityEntry, days: CA_DAYS }, key)
    await removeCertificate(cluster, authorityEntry.name)
    await writePair(cluster, authorityEntry.name, certificate, key)
    return { certificate, key }
  })

  // 2. What is there may stay if it is right. For the others: a key, and a certificate. Their row
  //    of the table and the public key are what a CSR would say; the authority signs it.
  const signedBy = new X509Certificate(authority.certificate)
  const due = new Map<string, (row: Row) => Promise<void>>()
  await step(`looking at ${entries.length} certificates`, async () => {
    for (const entry of entries) {
      const pair = await readPair(cluster, entry.name)
      const problems = problemsOf(pair, entry, { authority: signedBy, renewDays: CERT_RENEW_DAYS })
      if (flags.force || flags.renew === entry.name) problems.push('wanted anew')
      if (problems.length === 0 && isExposed(pair)) await protectKey(cluster, entry.name)
      if (problems.length === 0) continue
      due.set(entry.name, async (row) => {
        row.step(problems.join('; '))
        const key = (!flags.force && entry.keepsKey && pair.key) || (await generateRsaKey())
        const request = { ...entry, publicKey: createPublicKey(key), days: CERT_DAYS }
        await writePair(cluster, entry.name, signCertificate(request, authority), key)
      })
    }
  })
  await inParallel([...due.keys()], async (name, row) => due.get(name)?.(row))

  // 3. The ssh keys, and the file by which ssh knows the machines from the first time on.
  await step('ssh keys', async () => {
    const publicKeys = new Map<string, string>()
    for (const entry of sshKeysOf(cluster)) {
      const publicKey =
        (await keepSshKey(cluster, entry)) ??
        (await writeSshKey(cluster, entry, await generateSshKey(entry.comment)))
      publicKeys.set(entry.name, publicKey)
    }
    const pinned = knownHosts(cluster, publicKeys)
    const file = cluster.path('tls', 'known_hosts')
    if ((await readIfThere(file)) !== pinned) await writeFileAtomic(file, pinned)
  })
}
