// The ssh keys of the cluster: one to log in with, one that each machine proves itself by. Made
// beforehand, so that ssh knows a machine the first time it meets it.
import { chmod, stat } from 'node:fs/promises'
import type { Cluster } from '../cluster.mts'
import { StepError } from '../errors.mts'
import { readIfThere, writeFileAtomic } from '../files.mts'
import { generateSshKey, publicHalf } from './ssh-key.mts'

/** One row of the table: the files `tls/NAME` and `tls/NAME.pub`. */
export interface SshKeyEntry {
  name: string
  comment: string
  usedBy: string
}

/** Every ssh key of the cluster. */
export function sshKeysOf(cluster: Cluster): SshKeyEntry[] {
  const user = cluster.settings.CLUSTER_NAME
  return [
    { name: 'ssh_ed25519', comment: user, usedBy: 'you and the scripts, to log in as root' },
    ...cluster.nodes.map(({ name }) => ({
      name: hostKeyName(name),
      comment: name,
      usedBy: `sshd on ${name}, to prove that it is ${name}`,
    })),
  ]
}

/** What the files of one row hold. */
export interface SshKeyFiles {
  /** There is a file for the private key, whatever it holds. */
  present: boolean
  /** The public half of what it holds: "ssh-ed25519 AAAA…". */
  publicKey?: string
  /** What is wrong with the files; nothing if they may stay as they are. */
  problems: string[]
}

/** Reads a key and judges its files. */
export async function readSshKey(cluster: Cluster, { name }: SshKeyEntry): Promise<SshKeyFiles> {
  const path = cluster.path('tls', name)
  const privateKey = await readIfThere(path)
  if (privateKey === undefined) return { present: false, problems: [`tls/${name} is missing`] }

  const publicKey = publicHalf(privateKey)
  if (!publicKey) {
    const problem = `tls/${name} is no ed25519 key in OpenSSH's format without passphrase`
    return { present: true, problems: [problem] }
  }
  const problems: string[] = []
  if ((await stat(path)).mode & 0o077) problems.push(`tls/${name} can be read by others`)
  const beside = await readIfThere(`${path}.pub`)
  if (!beside?.startsWith(publicKey)) problems.push(`tls/${name}.pub is not its other half`)
  return { present: true, publicKey, problems }
}

/**
 * Keeps the key that is there, and puts right what can be about its files.
 *
 * @returns its public half; undefined if there is no key
 * @throws StepError if the file holds something else, which may well open a machine
 */
export async function keepSshKey(
  cluster: Cluster,
  entry: SshKeyEntry,
): Promise<string | undefined> {
  const { present, publicKey, problems } = await readSshKey(cluster, entry)
  if (!present) return undefined
  if (!publicKey) {
    throw new StepError(problems.join('; '), {
      hint: 'put it back from a copy, or move it away and a new one is made',
    })
  }
  if (problems.length > 0) {
    await chmod(cluster.path('tls', entry.name), 0o600)
    await writePublicHalf(cluster, entry, publicKey)
  }
  return publicKey
}

/**
 * Makes a new key and writes it: the private half, then the public one, which follows from it.
 *
 * @returns the public half: "ssh-ed25519 AAAA…"
 */
export async function makeSshKey(cluster: Cluster, entry: SshKeyEntry): Promise<string> {
  const privateKey = await generateSshKey(entry.comment)
  const publicKey = publicHalf(privateKey) ?? ''
  await writeFileAtomic(cluster.path('tls', entry.name), privateKey, 0o600)
  await writePublicHalf(cluster, entry, publicKey)
  return publicKey
}

/**
 * The lines of `tls/known_hosts`: each machine's host key, pinned to the port on this computer
 * that leads to it. The form is sshd(8)'s, "SSH_KNOWN_HOSTS FILE FORMAT".
 *
 * @param publicKeys public halves by the names of their files; machines without are left out
 */
export function knownHosts(cluster: Cluster, publicKeys: ReadonlyMap<string, string>): string {
  const lines = cluster.nodes.flatMap(({ name, sshPort }) => {
    const publicKey = publicKeys.get(hostKeyName(name))
    return publicKey ? `[127.0.0.1]:${sshPort} ${publicKey}\n` : []
  })
  return lines.join('')
}

function hostKeyName(node: string): string {
  return `ssh_host_${node}_ed25519`
}

async function writePublicHalf(
  cluster: Cluster,
  { name, comment }: SshKeyEntry,
  publicKey: string,
): Promise<void> {
  await writeFileAtomic(cluster.path('tls', `${name}.pub`), `${publicKey} ${comment}\n`)
}
