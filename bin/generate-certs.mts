#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// The cluster's certificates (the table is lib/certificates.mts) and ssh keys, in tls/.
import { createPublicKey } from 'node:crypto'
import { chmod, rename, rm } from 'node:fs/promises'
import { $ } from 'zx/core'
import { certificatesOf, pairFiles } from '../lib/certificates.mts'
import { loadCluster } from '../lib/cluster.mts'
import { StepError } from '../lib/errors.mts'
import { privateFolder, readIfThere, writeFileAtomic } from '../lib/files.mts'
import { formatTable } from '../lib/format.mts'
import { withLock } from '../lib/lock.mts'
import { refuseIf, script } from '../lib/script.mts'
import { step } from '../lib/steps.mts'
import * as tls from '../lib/tls.mts'
import type { Credential } from '../lib/x509.mts'

const { flags } = script({
  does: `Generates the certificate authority, the certificates it signs and the ssh keys, in tls/.
What exists and is right is kept; what is missing, changed or about to expire is renewed.`,
  reads: ['cluster.env', 'tls/'],
  writes: ['tls/'],
  flags: {
    force: { help: 'replace the CA and all certificates; the ssh keys are kept' },
    renew: { value: 'NAME', help: 'renew this certificate, whatever its state' },
    check: { help: 'change nothing; show everything, and exit with 1 if anything is wrong' },
    json: { help: 'with --check: as JSON' },
  },
  examples: ['./bin/generate-certs.mts', './bin/generate-certs.mts --renew sigma'],
})
const modes = [flags.force, flags.renew, flags.check].filter(Boolean)
refuseIf(modes.length > 1, 'only one of --force, --renew and --check at a time')
refuseIf(flags.json && !flags.check, '--json goes with --check')

const cluster = loadCluster()
const { CLUSTER_NAME, CA_DAYS, CERT_DAYS, CERT_RENEW_DAYS } = cluster.settings
const leafNames = certificatesOf(cluster).map(({ name }) => name)
if (flags.renew && !leafNames.includes(flags.renew)) {
  const hint = `one of ${leafNames.join(', ')}`
  throw new StepError(`there is no certificate "${flags.renew}" to renew`, { hint, exitCode: 2 })
}

// The ssh keys: one to log in with, then the host key of each node.
const sshKeys = [
  { name: 'ssh_ed25519', comment: CLUSTER_NAME, usedBy: 'you and the scripts, to log in as root' },
  ...cluster.nodes.map(({ name: comment }) => {
    const usedBy = `sshd on ${comment}, to authenticate itself`
    return { name: `ssh_host_${comment}_ed25519`, comment, usedBy }
  }),
]

if (flags.check) await check()
else
  await withLock(cluster.path('run', 'pki.lock'), 'generating certificates', generate, { wait: 5 })

async function generate(): Promise<void> {
  if (Math.min(CA_DAYS, CERT_DAYS) <= CERT_RENEW_DAYS) {
    throw new StepError('CA_DAYS and CERT_DAYS have to be more than CERT_RENEW_DAYS', {
      hint: 'a new certificate would be due for renewal at once: change them in cluster.env',
    })
  }

  // 1. The folder is private whatever the umask. Files that other users can write are refused.
  await privateFolder(cluster.path('tls'))
  if ((await tls.accessOf(cluster, 'tls')) !== 'private') {
    throw new StepError('tls/ is open to other users, and chmod does not change that', {
      hint: 'its file system has no permissions: move the project to one that has (on WSL: not below /mnt)',
    })
  }
  const pairs = ['ca', ...leafNames].map(pairFiles)
  const sshFiles = sshKeys.map(({ name }) => `tls/${name}`)
  const used = flags.force ? [] : pairs.flatMap((files) => Object.values(files))
  await tls.assertUnchanged(cluster, [...used, ...sshFiles])

  // 2. Valid certificates are kept, above all the CA: a new one invalidates all that it has signed.
  const { authority, leaves } = await tls.inspectPairs(cluster)
  refuseEarly([authority, ...leaves])
  const present = usableAuthority(authority)
  const due = leaves.flatMap((row) => {
    const isWanted = flags.force || flags.renew === row.entry.name
    const why = isWanted ? 'as requested' : row.problems.join('; ')
    return why ? { ...row, why } : []
  })
  for (const file of [...pairs.map(({ key }) => key), ...sshFiles]) {
    if ((await tls.accessOf(cluster, file)) === 'readable') await chmod(cluster.path(file), 0o600)
  }
  const keys = await Promise.all(sshKeys.map((key) => tls.readSshKey(cluster, key)))
  const odd = keys.find(({ publicKey, isMissing }) => !publicKey && !isMissing)
  // It may be needed to log in to a node.
  const hint = 'restore it from a copy. If no node uses it, move it away to get a new one'
  if (odd) throw new StepError(odd.problems.join('; '), { hint })

  // 3. The rest is generated in parallel, on other threads and by ssh-keygen.
  const [issued, publicKeys] = await step(
    `${leaves.length - due.length} certificates kept, ${due.length} to issue`,
    () => Promise.all([issue(authority, present, due), Promise.all(keys.map(repairSshKey))]),
  )

  // 4. The files, the CA's first: after an interruption, the next run finds what it has not signed.
  for (const { name, title, credential } of issued) {
    await step(title, () => writePair(name, credential))
  }

  // 5. How ssh finds the nodes, and verifies them from the first connection on.
  await step('tls/ssh_config and tls/known_hosts', async () => {
    for (const { name, text, problems } of await inspectSshFiles(publicKeys)) {
      if (problems.length > 0) await writeFileAtomic(cluster.path('tls', name), text)
    }
  })
}

/** A clock that is behind makes good certificates invalid; renewing them would be wrong. */
function refuseEarly(findings: readonly tls.Finding[]): void {
  for (const { name, certificate } of findings.map(({ pair }) => pair)) {
    const early = certificate && tls.startsLater(certificate)
    if (!early || flags.force || name === flags.renew) continue
    const renewal = name === 'ca' ? '--force' : `--renew ${name}`
    throw new StepError('the clock of this computer is behind, so nothing was renewed', {
      output: `tls/${name}.pem: ${early}`,
      hint: `set the clock (timedatectl set-ntp true; macOS: sudo sntp -sS time.apple.com). If it is right,
the certificate was issued with a wrong one: ./bin/generate-certs.mts ${renewal}`,
    })
  }
}

/** The CA; undefined if it has to be created. Replacing an unusable one is left to the user. */
function usableAuthority({ pair, problems }: tls.Finding): Credential | undefined {
  const { certificate, key } = pair
  if (flags.force || (!certificate && pair.problems.length === 0)) return undefined
  if (certificate && key && problems.length === 0) return { certificate: `${certificate}`, key }
  throw new StepError(`the certificate authority cannot be used: ${problems.join('; ')}`, {
    hint: `restore tls/ca.pem and tls/ca-key.pem from a copy. Without one, replace all certificates, then delete all pods, as their tokens become invalid (pods without a controller are lost):
./bin/generate-certs.mts --force && make kubeconfigs reconfig
KUBECONFIG=configs/admin.kubeconfig kubectl delete pods --all --all-namespaces && make metrics`,
  })
}

type Due = tls.Finding & { why: string }

/** Creates keys and certificates, the CA's first; no files. */
async function issue(authority: tls.Finding, present: Credential | undefined, due: Due[]) {
  if (present && due.length === 0) return []
  // node-forge is loaded only if there is something to issue.
  const { generateRsaKey, selfSign, signCertificate } = await import('../lib/x509.mts')
  const keyFor = async ({ entry, pair }: tls.Finding) =>
    (entry.keepsKey && !flags.force && pair.key) || generateRsaKey()
  const ca =
    present ??
    keyFor(authority).then((key) => {
      return { key, certificate: selfSign({ ...authority.entry, days: CA_DAYS }, key) }
    })
  const issued = due.map(async (row) => {
    const { name } = row.entry
    const key = await keyFor(row)
    // What a CSR says (openssl req -new), then its certificate (openssl x509 -req): docs/certificates.md
    const request = { ...row.entry, publicKey: createPublicKey(key), days: CERT_DAYS }
    const credential = { key, certificate: signCertificate(request, await ca) }
    return { name, title: `${name} · ${row.why}`, credential }
  })
  const first = { name: 'ca', title: 'certificate authority', credential: await ca }
  return [...(present ? [] : [first]), ...(await Promise.all(issued))]
}

/** The key first, never next to another key's certificate: what an interruption leaves is renewed. */
async function writePair(name: string, { certificate, key }: Credential): Promise<void> {
  const files = pairFiles(name)
  const keyPem = key.export({ type: 'pkcs8', format: 'pem' })
  await rm(cluster.path(files.certificate), { force: true })
  await writeFileAtomic(cluster.path(files.key), String(keyPem), 0o600)
  await writeFileAtomic(cluster.path(files.certificate), certificate)
}

/** Writes the public half again, or a new key, complete or not at all. @returns its public half */
async function repairSshKey({ name, comment, publicKey, problems }: tls.SshKey): Promise<string> {
  const [file, temporary] = [`tls/${name}`, `tls/.${name}.tmp-${process.pid}`]
  if (publicKey) {
    if (problems.length > 0) await writeFileAtomic(cluster.path(`${file}.pub`), `${publicKey}\n`)
    return publicKey
  }
  await $`rm -f tls/.${name}.tmp-*`
  await $`ssh-keygen -q -t ed25519 -N '' -C ${comment} -f ${temporary}`
  for (const suffix of ['.pub', '']) {
    await rename(cluster.path(temporary + suffix), cluster.path(file + suffix))
  }
  return (await readIfThere(cluster.path(`${file}.pub`))) ?? ''
}

/** What ssh needs to know of the nodes. Paths are relative: it runs in the project's root. */
async function inspectSshFiles([, ...hostKeys]: readonly string[]) {
  const { nodes } = cluster
  const pinned = nodes.map(({ sshPort }, index) => {
    const [algorithm, key] = hostKeys[index]?.trim().split(' ') ?? []
    return `[127.0.0.1]:${sshPort} ${algorithm} ${key}\n`
  })
  const config = `# Generated by bin/generate-certs.mts. In the project's root: ssh -F tls/ssh_config ${nodes[0]?.name}
${nodes.map(({ name, sshPort }) => `Host ${name}\n  Port ${sshPort}\n`).join('')}
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
  const usedBy = 'ssh, to find the nodes and to verify them'
  const texts = Object.entries({ known_hosts: pinned.join(''), ssh_config: config })
  return Promise.all(
    texts.map(async ([name, text]) => {
      const file = `tls/${name}`
      const isRight = (await readIfThere(cluster.path(file))) === text
      const isOpen = (await tls.accessOf(cluster, file)) === 'writable'
      const problems = [
        ...(isRight ? [] : [`${file} does not match the host keys and ports`]),
        ...(isOpen ? [`${file} can be changed by other users`] : []),
      ]
      return { ...{ name, usedBy, text, problems }, publicKey: '' }
    }),
  )
}

/** --check: everything in tls/ as tables or as JSON. */
async function check(): Promise<void> {
  const { authority, leaves } = await tls.inspectPairs(cluster)
  const isOpen = (await tls.accessOf(cluster, 'tls')) === 'writable'
  if (isOpen) authority.problems.push('tls/ can be changed by other users')
  const row = (name: string, usedBy: string, problems: string[]) => {
    return { name, usedBy, state: problems.length > 0 ? 'wrong' : 'ok', problems }
  }
  const certificateFindings = [authority, ...leaves].map(async ({ entry, pair, problems }) => {
    const { certificate } = pair
    const { key } = pairFiles(entry.name)
    const isExposed = (await tls.accessOf(cluster, key)) === 'readable'
    if (isExposed) problems.push(`${key} can be read by other users`)
    const found = certificate && tls.contentOf(certificate)
    return {
      ...row(entry.name, entry.usedBy, problems),
      subject: found?.subject.join(', ') ?? '',
      ...{ sans: found?.sans ?? [], usages: found?.usages ?? [] },
      // Without a date both are null in JSON.
      expires: new Date(certificate?.validTo ?? Number.NaN),
      daysLeft: Math.floor(found?.daysLeft ?? Number.NaN),
    }
  })
  const certificates = await Promise.all(certificateFindings)

  const keys = await Promise.all(sshKeys.map((key) => tls.readSshKey(cluster, key)))
  const files = await inspectSshFiles(keys.map(({ publicKey }) => publicKey))
  const sshFindings = [...keys, ...files].map(async ({ name, usedBy, problems, publicKey }) => {
    // "256 SHA256:… comment (ED25519)"
    const { stdout } = await $({ input: publicKey, nothrow: true })`ssh-keygen -l -f -`
    return { ...row(name, usedBy, problems), fingerprint: stdout.split(' ')[1] ?? null }
  })
  const ssh = await Promise.all(sshFindings)

  process.exitCode = [...certificates, ...ssh].every(({ state }) => state === 'ok') ? 0 : 1
  if (flags.json) return console.log(JSON.stringify({ certificates, ssh }, null, 2))
  const rows = certificates.map(({ name, subject, sans, usages, expires, daysLeft, problems }) => [
    name,
    // What all subjects have in common is left out.
    subject.replaceAll(/\b(C|ST|L|OU)=[^,]*, /g, '').replaceAll(', ', '\n') || '-',
    ...[sans.join('\n') || '-', usages.join('\n') || '-'],
    Number.isNaN(daysLeft) ? '-' : `${expires.toISOString().slice(0, 10)}\n${daysLeft} days`,
    problems.join('\n') || 'ok',
  ])
  const sshRows = ssh.map(({ name, fingerprint, problems }) => {
    return [name, fingerprint ?? '-', problems.join('\n') || 'ok']
  })
  console.log(formatTable(['NAME', 'SUBJECT', 'SANS', 'USAGES', 'EXPIRES', 'STATE'], rows))
  console.log(`\n${formatTable(['NAME', 'FINGERPRINT', 'STATE'], sshRows)}`)
}
