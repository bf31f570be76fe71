#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// The cluster's certificates (the table is lib/certificates.mts) and ssh keys, in tls/.
import { createPublicKey, type KeyObject } from 'node:crypto'
import { chmod, rename, rm } from 'node:fs/promises'
import { $ } from 'zx/core'
import {
  authorityOf,
  type CertificateEntry,
  certificatesOf,
  pairFiles,
} from '../lib/certificates.mts'
import { loadCluster } from '../lib/cluster.mts'
import { StepError } from '../lib/errors.mts'
import { privateFolder, readIfThere, writeFileAtomic } from '../lib/files.mts'
import { formatTable } from '../lib/format.mts'
import { withLock } from '../lib/lock.mts'
import { script } from '../lib/script.mts'
import { step } from '../lib/steps.mts'
import * as tls from '../lib/tls.mts'
import type { Credential } from '../lib/x509.mts'

const { flags } = script({
  does:
    'Generates the certificate authority, the certificates it signs and the ssh keys, in tls/.\n' +
    'What exists and is right is kept; what is missing, changed or about to expire is renewed.',
  reads: ['cluster.env', 'tls/'],
  writes: ['tls/'],
  flags: {
    force: { help: 'replace the authority and all certificates; the ssh keys are kept' },
    renew: { value: 'NAME', help: 'renew this certificate, whatever its state' },
    check: { help: 'change nothing; show everything, and exit with 1 if anything is wrong' },
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
const sshKeys = tls.sshKeysOf(cluster)
if (flags.renew && !entries.some(({ name }) => name === flags.renew)) {
  const hint = `one of ${entries.map(({ name }) => name).join(', ')}`
  throw new StepError(`there is no certificate "${flags.renew}" to renew`, { hint, exitCode: 2 })
}
if (Math.min(CA_DAYS, CERT_DAYS) <= CERT_RENEW_DAYS) {
  throw new StepError('CA_DAYS and CERT_DAYS have to be more than CERT_RENEW_DAYS', {
    hint: 'a new certificate would be due for renewal at once: change them in cluster.env',
  })
}
if (flags.check) await check()
else
  await withLock(cluster.path('run', 'pki.lock'), 'generating certificates', generate, { wait: 5 })

async function generate(): Promise<void> {
  // 1. The folder is private whatever the umask. What other users could change is not used.
  await privateFolder(cluster.path('tls'))
  if ((await tls.accessOf(cluster, 'tls')) !== 'private') {
    throw new StepError('tls/ is open to other users, and chmod does not change that', {
      hint: 'its file system has no permissions: move the project to one that has (on WSL: not below /mnt)',
    })
  }
  const pairFilesOf = ({ name }: CertificateEntry) => Object.values(pairFiles(name))
  const files = flags.force ? [] : [authorityEntry, ...entries].flatMap(pairFilesOf)
  await tls.assertUnchanged(cluster, [...files, ...sshKeys.map(({ name }) => `tls/${name}`)])

  // 2. What exists and is right is kept; above all the authority, because what it has signed is
  //    worthless with another one.
  const read = ({ name }: CertificateEntry) => tls.readPair(cluster, name)
  const [authorityPair, pairs] = await Promise.all([
    read(authorityEntry),
    Promise.all(entries.map(read)),
  ])
  refuseEarly([authorityPair, ...pairs])
  const present = usableAuthority(authorityPair)
  const measure = { authority: authorityPair.certificate, renewDays: CERT_RENEW_DAYS }
  const due = pairs.flatMap((pair, index) => {
    const entry = entries[index] as CertificateEntry
    const isWanted = flags.force || flags.renew === entry.name
    const why = isWanted ? ['as requested'] : tls.problemsOf(pair, entry, measure)
    return why.length > 0 ? { entry, pair, why: why.join('; ') } : []
  })
  const keptKeys = await Promise.all(sshKeys.map(keepSshKey))
  for (const { name, isExposed } of [authorityPair, ...pairs]) {
    if (isExposed) await chmod(cluster.path(pairFiles(name).key), 0o600)
  }

  // 3. The rest is generated, all at once: other threads and ssh-keygen find the numbers.
  const kept = entries.length - due.length
  const [{ authority, issued }, publicKeys] = await step(
    `${kept} certificates kept, ${due.length} to issue`,
    () =>
      Promise.all([
        issue(authorityPair, present, due),
        Promise.all(sshKeys.map((entry, index) => keptKeys[index] ?? generateSshKey(entry))),
      ]),
  )

  // 4. The files, the authority first. After an interruption the next run continues: it finds that
  //    the authority has not signed the rest.
  if (!present) {
    await step('certificate authority', async () => {
      // The old certificate never lies next to the new key, which would look like a mistake.
      await rm(cluster.path(pairFiles('ca').certificate), { force: true })
      await writePair('ca', authority)
    })
  }
  for (const { entry, why, credential } of issued) {
    await step(`${entry.name} · ${why}`, () => writePair(entry.name, credential))
  }

  // 5. How ssh finds the nodes, and verifies them from the first connection on.
  await step('tls/ssh_config and tls/known_hosts', async () => {
    for (const [name, text] of Object.entries(sshFiles(publicKeys))) {
      const file = cluster.path('tls', name)
      const isOpen = (await tls.accessOf(cluster, `tls/${name}`)) === 'writable'
      if (isOpen || (await readIfThere(file)) !== text) await writeFileAtomic(file, text)
    }
  })
}

/** A clock that is behind makes good certificates invalid; renewing them would be wrong. */
function refuseEarly(pairs: readonly tls.Pair[]): void {
  for (const { name, certificate } of pairs) {
    const early = certificate && tls.startsLater(certificate)
    if (!early || flags.force || name === flags.renew) continue
    const renewal = name === 'ca' ? '--force' : `--renew ${name}`
    throw new StepError('the clock of this computer is behind, so nothing was renewed', {
      output: `tls/${name}.pem: ${early}`,
      hint:
        'set the clock (timedatectl set-ntp true; macOS: sudo sntp -sS time.apple.com). If it is right,\n' +
        `the certificate was issued with a wrong one: ./bin/generate-certs.mts ${renewal}`,
    })
  }
}

/**
 * The authority if there is one, undefined if it has to be created.
 *
 * @throws StepError for one that cannot be used: replacing it is left to the user
 */
function usableAuthority(pair: tls.Pair): Credential | undefined {
  const { certificate, pem, key } = pair
  if (flags.force || (!certificate && pair.problems.length === 0)) return undefined
  const measure = { authority: certificate, renewDays: CERT_RENEW_DAYS }
  const problems = tls.problemsOf(pair, authorityEntry, measure)
  if (problems.length === 0 && key && pem) return { certificate: pem, key }
  throw new StepError(`the certificate authority cannot be used: ${problems.join('; ')}`, {
    hint:
      'restore tls/ca.pem and tls/ca-key.pem from a copy. Without one, replace the authority and all\n' +
      'certificates (then make kubeconfigs, make reconfig): ./bin/generate-certs.mts --force',
  })
}

/** Creates keys and certificates; no files. */
async function issue(
  authorityPair: tls.Pair,
  present: Credential | undefined,
  due: readonly { entry: CertificateEntry; pair: tls.Pair; why: string }[],
) {
  if (present && due.length === 0) return { authority: present, issued: [] }
  // node-forge is loaded only if there is something to issue.
  const { generateRsaKey, selfSign, signCertificate } = await import('../lib/x509.mts')
  const keyFor = (
    { keepsKey }: CertificateEntry,
    { key }: tls.Pair,
  ): KeyObject | Promise<KeyObject> => (keepsKey && key && !flags.force ? key : generateRsaKey())
  const createAuthority = async () => {
    const key = await keyFor(authorityEntry, authorityPair)
    return { key, certificate: selfSign({ ...authorityEntry, days: CA_DAYS }, key) }
  }
  const authority = present ?? createAuthority()
  const issued = due.map(async ({ entry, pair, why }) => {
    const key = await keyFor(entry, pair)
    // A row of the table and a public key are what a CSR would say.
    const request = { ...entry, publicKey: createPublicKey(key), days: CERT_DAYS }
    return {
      entry,
      why,
      credential: { key, certificate: signCertificate(request, await authority) },
    }
  })
  return { authority: await authority, issued: await Promise.all(issued) }
}

/** The key first: an interruption leaves at worst a pair that does not match, which is renewed. */
async function writePair(name: string, { certificate, key }: Credential): Promise<void> {
  const files = pairFiles(name)
  const keyPem = key.export({ type: 'pkcs8', format: 'pem' })
  await writeFileAtomic(cluster.path(files.key), keyPem.toString(), 0o600)
  await writeFileAtomic(cluster.path(files.certificate), certificate)
}

/** Writes a new key, complete or not at all. @returns its public half */
async function generateSshKey({ name, comment }: tls.SshKeyEntry): Promise<string> {
  const temporary = `tls/.${name}.new`
  for (const suffix of ['', '.pub']) await rm(cluster.path(temporary + suffix), { force: true })
  await $`ssh-keygen -q -t ed25519 -N '' -C ${comment} -f ${temporary}`
  for (const suffix of ['.pub', '']) {
    await rename(cluster.path(temporary + suffix), cluster.path('tls', name + suffix))
  }
  return (await readIfThere(cluster.path('tls', `${name}.pub`))) ?? ''
}

/**
 * Keeps the key that exists, and corrects the mode and the public half of its files.
 *
 * @returns its public half; undefined if there is no key
 * @throws StepError if the file holds something else, which may be needed to log in to a node
 */
async function keepSshKey(entry: tls.SshKeyEntry): Promise<string | undefined> {
  const file = `tls/${entry.name}`
  const access = await tls.accessOf(cluster, file)
  if (access === 'missing') return undefined
  if (access === 'readable') await chmod(cluster.path(file), 0o600)
  const { publicKey, problems } = await tls.readSshKey(cluster, entry)
  if (!publicKey) {
    const hint = 'restore it from a copy. If no node uses it, move it away to get a new one'
    throw new StepError(problems.join('; '), { hint })
  }
  if (problems.length > 0) await writeFileAtomic(cluster.path(`${file}.pub`), `${publicKey}\n`)
  return publicKey
}

/** What ssh needs to know of the nodes. Paths are relative: it runs in the project's root. */
function sshFiles([, ...hostKeys]: readonly string[]) {
  const { nodes } = cluster
  const pinned = nodes.map(({ sshPort }, index) => {
    const [algorithm, key] = hostKeys[index]?.split(' ') ?? []
    return `[127.0.0.1]:${sshPort} ${algorithm} ${key?.trim()}\n`
  })
  const ports = nodes.map(({ name, sshPort }) => `Host ${name}\n  Port ${sshPort}\n`)
  const config = `# Generated by bin/generate-certs.mts. In the project's root: ssh -F tls/ssh_config ${nodes[0]?.name}
${ports.join('')}
Host ${nodes.map(({ name }) => name).join(' ')}
  HostName 127.0.0.1
  User root
  IdentityFile tls/ssh_ed25519
  IdentitiesOnly yes
  IdentityAgent none
  UserKnownHostsFile tls/known_hosts
  GlobalKnownHostsFile /dev/null
  StrictHostKeyChecking yes
  UpdateHostKeys no
  HostKeyAlgorithms ssh-ed25519
  BatchMode yes
  ConnectTimeout 10
  ServerAliveInterval 10
  LogLevel ERROR
  # Uses the connection that "ssh -fNM" has opened, if there is one.
  ControlMaster no
  ControlPath run/%n.ssh
  ControlPersist 60
`
  return { known_hosts: pinned.join(''), ssh_config: config }
}

/** --check: everything in tls/ as tables or as JSON. */
async function check(): Promise<void> {
  const { certificates } = await tls.inspectTls(cluster)
  const ssh = await inspectSsh()
  process.exitCode = [...certificates, ...ssh].every(({ state }) => state === 'ok') ? 0 : 1
  if (flags.json) return console.log(JSON.stringify({ certificates, ssh }, null, 2))
  const rows = certificates.map(({ name, subject, sans, usages, expires, daysLeft, problems }) => [
    name,
    // What all subjects have in common is left out.
    subject.replaceAll(/\b(C|ST|L|OU)=[^,]*, /g, '').replaceAll(', ', '\n') || '-',
    sans.join('\n') || '-',
    usages.join('\n') || '-',
    expires ? `${expires.slice(0, 10)}\n${daysLeft} days` : '-',
    problems.join('\n') || 'ok',
  ])
  const sshRows = ssh.map(({ name, fingerprint, problems }) => [
    ...[name, fingerprint ?? '-', problems.join('\n') || 'ok'],
  ])
  console.log(formatTable(['NAME', 'SUBJECT', 'SANS', 'USAGES', 'EXPIRES', 'STATE'], rows))
  console.log(`\n${formatTable(['NAME', 'FINGERPRINT', 'STATE'], sshRows)}`)
}

async function inspectSsh() {
  const keys = await Promise.all(sshKeys.map((entry) => tls.readSshKey(cluster, entry)))
  const publicKeys = keys.map(({ publicKey }) => publicKey)
  const findings = await Promise.all(
    sshKeys.map(async ({ name, usedBy }, index) => {
      const input = publicKeys[index] ?? ''
      // "256 SHA256:… comment (ED25519)"
      const { stdout } = await $({ input, nothrow: true })`ssh-keygen -l -f -`
      const problems = keys[index]?.problems ?? []
      return { name, usedBy, problems, fingerprint: stdout.split(' ')[1] ?? null }
    }),
  )
  for (const [name, wanted] of Object.entries(sshFiles(publicKeys))) {
    const file = `tls/${name}`
    const problems: string[] = []
    const isRight = (await readIfThere(cluster.path(file))) === wanted
    const isOpen = (await tls.accessOf(cluster, file)) === 'writable'
    if (!isRight) problems.push(`${file} does not match the host keys and ports`)
    if (isOpen) problems.push(`${file} can be changed by other users`)
    const usedBy = 'ssh, to find the nodes and to verify them'
    findings.push({ name, usedBy, problems, fingerprint: null })
  }
  return findings.map((found) => ({ ...found, state: found.problems.length > 0 ? 'wrong' : 'ok' }))
}
