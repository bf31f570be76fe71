// An ed25519 key in OpenSSH's own format (PROTOCOL.key in its sources), without passphrase.
import { createHash, generateKeyPair, randomBytes } from 'node:crypto'
import { promisify } from 'node:util'

const algorithm = 'ssh-ed25519'
const blobLength = 4 + algorithm.length + 4 + 32

// No cipher, no key derivation, one key.
const preamble = [
  Buffer.from('openssh-key-v1\0'),
  string('none'),
  string('none'),
  string(''),
  uint32(1),
]

/** A new private key, as the text of its file. */
export async function generateSshKey(comment: string): Promise<string> {
  const { privateKey } = await promisify(generateKeyPair)('ed25519')
  const { x = '', d = '' } = privateKey.export({ format: 'jwk' })
  const [point, seed] = [Buffer.from(x, 'base64url'), Buffer.from(d, 'base64url')]
  return armour(encode(point, seed, comment))
}

/**
 * The public half of a private key in OpenSSH's format, as it stands in a .pub file, without comment:
 * "ssh-ed25519 AAAA…". Undefined unless it is an ed25519 key without passphrase.
 */
export function publicHalf(privateKey: string): string | undefined {
  const body = privateKey.match(/^-----BEGIN OPENSSH PRIVATE KEY-----([\s\S]+)-----END/)?.[1]
  const bytes = Buffer.from(body ?? '', 'base64')
  const start = Buffer.concat([...preamble, uint32(blobLength)])
  if (!bytes.subarray(0, start.length).equals(start)) return undefined
  const blob = bytes.subarray(start.length, start.length + blobLength)
  const isEd25519 = blob.subarray(0, string(algorithm).length).equals(string(algorithm))
  return isEd25519 ? `${algorithm} ${blob.toString('base64')}` : undefined
}

/** The fingerprint of a public key's line, as `ssh-keygen -l` prints it. */
export function fingerprint(publicKey: string): string {
  const blob = Buffer.from(publicKey.split(' ')[1] ?? '', 'base64')
  const hash = createHash('sha256').update(blob).digest('base64')
  return `SHA256:${hash.replace(/=+$/, '')}`
}

/** @param point the public key, 32 bytes. @param seed the private key, 32 bytes (RFC 8032) */
function encode(point: Buffer, seed: Buffer, comment: string): Buffer {
  const blob = Buffer.concat([string(algorithm), string(point)])
  // Twice the same number: with a cipher, a wrong passphrase would show here.
  const check = randomBytes(4)
  const secret = Buffer.concat([
    check,
    check,
    blob,
    string(Buffer.concat([seed, point])),
    string(comment),
  ])
  const padding = Buffer.from([1, 2, 3, 4, 5, 6, 7].slice(0, (8 - (secret.length % 8)) % 8))
  return Buffer.concat([...preamble, string(blob), string(Buffer.concat([secret, padding]))])
}

function armour(bytes: Buffer): string {
  const lines = bytes.toString('base64').match(/.{1,70}/g) ?? []
  const [begin, end] = ['BEGIN', 'END'].map((word) => `-----${word} OPENSSH PRIVATE KEY-----`)
  return [begin, ...lines, end, ''].join('\n')
}

/** The wire format's string (RFC 4251, section 5): a length of 4 bytes, then the bytes. */
function string(content: string | Buffer): Buffer {
  const bytes = Buffer.from(content)
  return Buffer.concat([uint32(bytes.length), bytes])
}

function uint32(value: number): Buffer {
  const bytes = Buffer.alloc(4)
  bytes.writeUInt32BE(value)
  return bytes
}
