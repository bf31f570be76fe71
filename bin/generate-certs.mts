#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// The cluster's public key infrastructure: an authority, a certificate for everyone who talks to
// anyone (the table is in lib/pki/certificates.mts), and the ssh keys.
import { createPublicKey, type KeyObject } from 'node:crypto'
import { loadCluster } from '../lib/cluster.mts'
import { StepError } from '../lib/errors.mts'
import { readIfThere, writeFileAtomic } from '../lib/files.mts'
import { withLock } from '../lib/lock.mts'
import { problemsOf, usableAuthority } from '../lib/pki/certificate-check.mts'
import { authorityOf, type CertificateEntry, certificatesOf } from '../lib/pki/certificates.mts'
import {
  isExposed,
  type Pair,
  protectKey,
  readPair,
  removeCertificate,
  writePair,
} from '../lib/pki/pki.mts'
import { generateRsaKey } from '../lib/pki/rsa-key.mts'
import {
  keepSshKey,
  knownHosts,
  makeSshKey,
  type SshKeyEntry,
  sshKeysOf,
} from '../lib/pki/ssh-keys.mts'
import { formatReport, inspectTls, isSound } from '../lib/pki/tls-report.mts'
import type { Credential } from '../lib/pki/x509.mts'
import { script } from '../lib/script.mts'
import { step } from '../lib/steps.mts'

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
  const hint = `one of ${entries.map(({ name }) => name).join(', ')}`
  throw new StepError(`there is no certificate "${flags.renew}" to renew`, { hint, exitCode: 2 })
}
if (Math.min(CA_DAYS, CERT_DAYS) <= CERT_RENEW_DAYS) {
  throw new StepError('CA_DAYS and CERT_DAYS have to be more than CERT_RENEW_DAYS', {
    hint: 'a new certificate would count as stale at once: change them in cluster.env',
  })
}

if (flags.check) {
  const report = await inspectTls(cluster)
  console.log(flags.json ? JSON.stringify(report, null, 2) : formatReport(report))
  process.exitCode = isSound(report) ? 0 : 1
} else {
  await withLock(cluster.path('run', 'pki.lock'), 'making certificates', generate, { wait: 5 })
}

async function generate(): Promise<void> {
  // 1. What is there and right stays; first of all the authority, as whatever it has signed is
  //    worth nothing beside another.
  const authorityPair = await readPair(cluster, authorityEntry.name)
  const present = flags.force
    ? undefined
    : usableAuthority(authorityPair, authorityEntry, CERT_RENEW_DAYS)
  if (present && isExposed(authorityPair)) await protectKey(cluster, authorityEntry.name)
  const sshKeys = new Map<SshKeyEntry, string | undefined>()
  for (const entry of sshKeysOf(cluster)) sshKeys.set(entry, await keepSshKey(cluster, entry))
  const due: { entry: CertificateEntry; pair: Pair; why: string }[] = []
  for (const entry of entries) {
    const pair = await readPair(cluster, entry.name)
    const measure = { authority: authorityPair.certificate, renewDays: CERT_RENEW_DAYS }
    const wanted = flags.force || flags.renew === entry.name
    const problems = wanted ? ['wanted anew'] : problemsOf(pair, entry, measure)
    if (problems.length > 0) due.push({ entry, pair, why: problems.join('; ') })
    else if (isExposed(pair)) await protectKey(cluster, entry.name)
  }

  // 2. The others are made: all at once, as finding primes takes time and other threads do it.
  const stay = entries.length - due.length
  const authority = Promise.resolve(present ?? makeAuthority(authorityPair))
  const made = await step(`${stay} certificates stay, ${due.length} are made`, () =>
    Promise.all(
      due.map(async ({ entry, pair, why }) => {
        return { entry, why, credential: await makeCertificate(entry, pair, authority) }
      }),
    ),
  )

  // 3. They are written, the authority first. After an interruption the next run goes on: it
  //    finds that the authority has not signed the rest.
  if (!present) {
    await step('certificate authority', async () => {
      await removeCertificate(cluster, authorityEntry.name)
      await writePair(cluster, authorityEntry.name, await authority)
    })
  }
  for (const { entry, why, credential } of made) {
    await step(`${entry.name} · ${why}`, () => writePair(cluster, entry.name, credential))
  }

  // 4. The ssh keys, and the file by which ssh knows the machines from the first time on.
  await step('ssh keys', async () => {
    const publicKeys = new Map<string, string>()
    for (const [entry, kept] of sshKeys) {
      publicKeys.set(entry.name, kept ?? (await makeSshKey(cluster, entry)))
    }
    const pinned = knownHosts(cluster, publicKeys)
    const file = cluster.path('tls', 'known_hosts')
    if ((await readIfThere(file)) !== pinned) await writeFileAtomic(file, pinned)
  })
}

/** An authority is a certificate that says that it is one, signed with its own key. */
async function makeAuthority(pair: Pair): Promise<Credential> {
  const [key, { selfSign }] = await Promise.all([keyFor(authorityEntry, pair), x509()])
  return { key, certificate: selfSign({ ...authorityEntry, days: CA_DAYS }, key) }
}

/** A row of the table and a public key are what a CSR would say; the authority signs it. */
async function makeCertificate(
  entry: CertificateEntry,
  pair: Pair,
  authority: Promise<Credential>,
): Promise<Credential> {
  const [key, { signCertificate }] = await Promise.all([keyFor(entry, pair), x509()])
  const request = { ...entry, publicKey: createPublicKey(key), days: CERT_DAYS }
  return { key, certificate: signCertificate(request, await authority) }
}

function keyFor({ keepsKey }: CertificateEntry, { key }: Pair): KeyObject | Promise<KeyObject> {
  return keepsKey && key && !flags.force ? key : generateRsaKey()
}

/** Not loaded before the keys are under way, nor if there is nothing to make. */
function x509() {
  return import('../lib/pki/x509.mts')
}
