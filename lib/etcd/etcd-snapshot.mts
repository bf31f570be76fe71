// An etcd snapshot as a file: a bbolt database with its SHA-256 behind it (etcd's snapshot API
// sends both, `etcdctl snapshot save` writes them as they come).
import { createHash } from 'node:crypto'
import { createReadStream } from 'node:fs'
import { open, readFile, stat } from 'node:fs/promises'
import type { Cluster } from '../cluster.mts'
import { StepError } from '../errors.mts'

const digestSize = 32
// bbolt: the header of the first page takes 16 bytes, then stands 0xed0cdaed, little endian.
const magic = Buffer.from('edda0ced', 'hex')
const magicAt = 16

/**
 * Makes sure that a file is an etcd snapshot, from its first byte to its last. (`etcdutl snapshot
 * status` does not notice when the end is missing.)
 *
 * @throws StepError that says what is wrong
 */
export async function assertWhole(path: string): Promise<void> {
  const found = await stat(path).catch(() => undefined)
  if (!found?.isFile()) throw new StepError(`there is no file ${path}`)
  const wrong = (reason: string) =>
    new StepError(`${path} is no whole etcd snapshot: ${reason}`, {
      hint: 'nothing was touched; take another file of backups/',
    })
  const size = found.size - digestSize
  const file = await open(path)
  try {
    const { buffer: start } = await file.read(Buffer.alloc(4), 0, 4, magicAt)
    if (!start.equals(magic)) throw wrong('it does not begin as a database of etcd does')
    if (size <= 0 || size % 512 !== 0) throw wrong('it does not end with a checksum')
    const { buffer: wanted } = await file.read(Buffer.alloc(digestSize), 0, digestSize, size)
    const hash = createHash('sha256')
    for await (const chunk of createReadStream(path, { end: size - 1 })) hash.update(chunk)
    if (!hash.digest().equals(wanted)) throw wrong('its checksum does not fit')
  } finally {
    await file.close()
  }
}

/**
 * Makes sure that a snapshot is of this cluster: every namespace has the CA's certificate in its
 * ConfigMap kube-root-ca.crt, which is not encrypted.
 *
 * @throws StepError if tls/ca.pem is not in it
 */
export async function assertOfThisCluster(cluster: Cluster, path: string): Promise<void> {
  const certificate = await readFile(cluster.path('tls', 'ca.pem')).catch((cause) => {
    throw new StepError('tls/ca.pem is missing', { hint: 'make certs', cause })
  })
  const wanted = Buffer.from(certificate.toString().trim())
  let rest = Buffer.alloc(0)
  for await (const chunk of createReadStream(path, { highWaterMark: 2 ** 20 })) {
    const part = Buffer.concat([rest, chunk as Buffer])
    if (part.includes(wanted)) return
    // It may begin in this part and end in the next.
    rest = part.subarray(Math.max(0, part.length - wanted.length))
  }
  throw new StepError(`${path} is of another cluster: the certificate tls/ca.pem is not in it`, {
    hint: 'tokens and Secrets in it could not be used here. --force restores it all the same',
  })
}
