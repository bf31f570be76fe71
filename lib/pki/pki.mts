// The files of tls/: for every row of the table a certificate and its key, read and written.
import { createPrivateKey, type KeyObject, X509Certificate } from 'node:crypto'
import { chmod, rm, stat } from 'node:fs/promises'
import type { Cluster } from '../cluster.mts'
import { readIfThere, writeFileAtomic } from '../files.mts'
import type { Credential } from './x509.mts'

/** What the two files of a name hold. A part that is missing or unreadable is undefined. */
export interface Pair {
  name: string
  certificate?: X509Certificate
  /** The certificate as its file has it. */
  pem?: string
  key?: KeyObject
  /** The key as its file has it. */
  keyPem?: string
  /** Permission bits of the key's file. */
  keyMode?: number
  /** Files that are there and hold something else, with what they should hold. */
  unreadable: string[]
}

/** The files of a certificate and its key, below the project's folder. */
export function pairFiles(name: string): { certificate: string; key: string } {
  return { certificate: `tls/${name}.pem`, key: `tls/${name}-key.pem` }
}

/**
 * Reads certificate and key. What is missing or not readable stands in the result.
 *
 * @throws the file system's error if a file is there and must not be read
 */
export async function readPair(cluster: Cluster, name: string): Promise<Pair> {
  const files = pairFiles(name)
  const pair: Pair = { name, unreadable: [] }
  const pem = await readIfThere(cluster.path(files.certificate))
  if (pem !== undefined) {
    try {
      pair.certificate = new X509Certificate(pem)
      pair.pem = pem
    } catch {
      pair.unreadable.push(`${files.certificate} holds no certificate`)
    }
  }
  const keyPem = await readIfThere(cluster.path(files.key))
  if (keyPem !== undefined) {
    pair.keyMode = (await stat(cluster.path(files.key))).mode & 0o777
    const key = rsaKey(keyPem)
    if (key) Object.assign(pair, { key, keyPem })
    else pair.unreadable.push(`${files.key} holds no RSA key`)
  }
  return pair
}

/**
 * Writes a certificate (PEM) and its key (PKCS #8), the key first: an interruption leaves at
 * worst a key beside another one's certificate, which the next run sees and makes anew.
 */
export async function writePair(
  cluster: Cluster,
  name: string,
  { certificate, key }: Credential,
): Promise<void> {
  const files = pairFiles(name)
  const keyPem = key.export({ type: 'pkcs8', format: 'pem' })
  await writeFileAtomic(cluster.path(files.key), keyPem.toString(), 0o600)
  await writeFileAtomic(cluster.path(files.certificate), certificate)
}

/** Whether others may read the key's file. */
export function isExposed({ keyMode = 0o600 }: Pair): boolean {
  return (keyMode & 0o077) !== 0
}

/** Makes the key's file its owner's alone. */
export async function protectKey(cluster: Cluster, name: string): Promise<void> {
  await chmod(cluster.path(pairFiles(name).key), 0o600)
}

/**
 * Takes a certificate away and leaves its key. Done before a new authority is written: nothing
 * then ever sees the old certificate beside the new key, which would count as a mix-up.
 */
export async function removeCertificate(cluster: Cluster, name: string): Promise<void> {
  await rm(cluster.path(pairFiles(name).certificate), { force: true })
}

function rsaKey(pem: string): KeyObject | undefined {
  try {
    const key = createPrivateKey(pem)
    return key.asymmetricKeyType === 'rsa' ? key : undefined
  } catch {
    return undefined
  }
}
