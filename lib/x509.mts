// RSA keys (primes of OpenSSL, RFC 8017) and X.509 certificates (node-forge, RFC 5280). No files.
import {
  createPrivateKey,
  createPublicKey,
  createSign,
  generatePrime,
  type KeyObject,
  randomBytes,
} from 'node:crypto'
import { isIPv4 } from 'node:net'
import { promisify } from 'node:util'
import forge from 'node-forge'
import { type CertificateEntry, usages } from './certificates.mts'

/** What a CSR says: subject, names, uses and the public key. */
export interface SigningRequest extends Pick<CertificateEntry, 'subject' | 'sans' | 'usages'> {
  publicKey: KeyObject
  /** Days until it expires; never after its authority. */
  days: number
}

/** A certificate, as PEM, and its private key. */
export interface Credential {
  certificate: string
  key: KeyObject
}

// A machine whose clock is slightly behind would otherwise reject a new certificate.
const backdate = 5 * 60_000
const day = 24 * 3600_000

/** The certificate of an authority, signed with its own key, as PEM. */
export function selfSign(request: Omit<SigningRequest, 'publicKey'>, key: KeyObject): string {
  const certificate = draft({ ...request, publicKey: createPublicKey(key) })
  certificate.setIssuer(certificate.subject.attributes)
  return sign(certificate, key)
}

/** The certificate that the authority issues for a request, as PEM. */
export function signCertificate(request: SigningRequest, authority: Credential): string {
  const issuer = forge.pki.certificateFromPem(authority.certificate)
  const certificate = draft(request)
  certificate.setIssuer(issuer.subject.attributes)
  if (certificate.validity.notAfter > issuer.validity.notAfter) {
    certificate.validity.notAfter = issuer.validity.notAfter
  }
  const issuerKey = issuer.getExtension('subjectKeyIdentifier') as
    | { subjectKeyIdentifier: string }
    | undefined
  if (issuerKey) {
    const keyIdentifier = forge.util.hexToBytes(issuerKey.subjectKeyIdentifier)
    const authorityKey = { name: 'authorityKeyIdentifier', keyIdentifier }
    certificate.setExtensions([...certificate.extensions, authorityKey])
  }
  return sign(certificate, authority.key)
}

/** Everything but issuer and signature. */
function draft(request: SigningRequest): forge.pki.Certificate {
  const certificate = forge.pki.createCertificate()
  const publicKey = request.publicKey.export({ type: 'spki', format: 'pem' })
  certificate.publicKey = forge.pki.publicKeyFromPem(String(publicKey))
  const serial = randomBytes(16)
  serial[0] = ((serial[0] ?? 0) & 0x3f) | 0x40 // positive, and without a leading zero
  certificate.serialNumber = serial.toString('hex')
  certificate.validity.notBefore = new Date(Date.now() - backdate)
  certificate.validity.notAfter = new Date(Date.now() + request.days * day)
  certificate.setSubject(
    Object.entries(request.subject).map(([shortName, value]) => ({ shortName, value })),
  )
  certificate.setExtensions(extensions(request))
  return certificate
}

function extensions({ usages: wanted, sans }: SigningRequest): object[] {
  const bits = wanted.flatMap((usage) => usages[usage].bits)
  const extended = wanted.flatMap((usage) => usages[usage].extended?.name ?? [])
  const cA = wanted.includes('certificates')
  return [
    { name: 'basicConstraints', critical: true, cA },
    { name: 'keyUsage', critical: true, ...flags(bits) },
    ...(extended.length > 0 ? [{ name: 'extKeyUsage', ...flags(extended) }] : []),
    { name: 'subjectKeyIdentifier' },
    ...(sans.length > 0 ? [{ name: 'subjectAltName', altNames: sans.map(altName) }] : []),
  ]
}

function flags(names: readonly string[]): Record<string, true> {
  return Object.fromEntries(names.map((name) => [name, true]))
}

/** The tags of GeneralName (RFC 5280, 4.2.1.6): 2 is a DNS name, 7 an IP address. */
function altName(san: string): object {
  return isIPv4(san) ? { type: 7, ip: san } : { type: 2, value: san }
}

/** Signs with node:crypto, which takes a millisecond; forge's own RSA is JavaScript and takes 30. */
function sign(certificate: forge.pki.Certificate, key: KeyObject): string {
  const signer = createSign('sha256')
  // forge passes the bytes to the digest, then the digest to the key.
  const digest = {
    algorithm: 'sha256',
    update: (bytes: string) => signer.update(bytes, 'latin1'),
  } as unknown as forge.md.MessageDigest
  const signature = {
    sign: () => signer.sign(key).toString('latin1'),
  } as unknown as forge.pki.rsa.PrivateKey
  certificate.sign(signature, digest)
  return forge.pki.certificateToPem(certificate).replaceAll('\r', '')
}

const publicExponent = 65537n
const nextPrime = promisify((bits: number, done: (error: Error | null, prime: bigint) => void) =>
  generatePrime(bits, { bigint: true }, done),
)

/**
 * A new RSA private key; createPublicKey() derives the public half.
 *
 * The primes are OpenSSL's, found on Node's thread pool. OpenSSL's own generateKeyPair() derives
 * each of them from further primes (FIPS 186-4, B.3.6), which takes 2.5 times as long.
 *
 * @param bits length of the modulus, even
 */
export async function generateRsaKey(bits = 2048): Promise<KeyObject> {
  const primes = await Promise.all([factor(bits / 2), factor(bits / 2)])
  const [q, p] = primes.sort((a, b) => (a < b ? -1 : 1))
  // Primes that are close together are found by Fermat's method (the bound of FIPS 186-4, B.3.3).
  if ((p - q) >> BigInt(bits / 2 - 100) === 0n) return generateRsaKey(bits)
  const d = inverse(publicExponent, (p - 1n) * (q - 1n))
  const [dp, dq, qi] = [d % (p - 1n), d % (q - 1n), inverse(q, p)]
  const numbers = Object.entries({ n: p * q, e: publicExponent, d, p, q, dp, dq, qi })
  const jwk = Object.fromEntries(numbers.map(([name, value]) => [name, base64url(value)]))
  return createPrivateKey({ key: { kty: 'RSA', ...jwk }, format: 'jwk' })
}

/** A prime with its two highest bits set, so that the product of two has twice its length. */
async function factor(bits: number): Promise<bigint> {
  const prime = await nextPrime(bits)
  // The public exponent has an inverse only if it does not divide p - 1.
  return prime % publicExponent === 1n ? factor(bits) : prime
}

/** The x with number * x = 1 (mod modulus), by Euclid's algorithm. */
function inverse(number: bigint, modulus: bigint): bigint {
  let [a, b, x, y] = [modulus, number % modulus, 0n, 1n]
  while (b !== 0n) {
    const quotient = a / b
    ;[a, b, x, y] = [b, a - quotient * b, y, x - quotient * y]
  }
  return x < 0n ? x + modulus : x
}

function base64url(value: bigint): string {
  const hex = value.toString(16)
  return Buffer.from(hex.padStart(hex.length + (hex.length % 2), '0'), 'hex').toString('base64url')
}
