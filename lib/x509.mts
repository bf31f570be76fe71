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
export type Credential = { certificate: string; key: KeyObject }

/** The certificate of an authority, signed with its own key, as PEM. */
export function selfSign(request: Omit<SigningRequest, 'publicKey'>, key: KeyObject): string {
  return issue({ ...request, publicKey: createPublicKey(key) }, key)
}

/** The certificate that the authority issues for a request, as PEM. */
export function signCertificate(request: SigningRequest, authority: Credential): string {
  return issue(request, authority.key, forge.pki.certificateFromPem(authority.certificate))
}

/** @param issuer its authority; without one it is self-signed */
function issue(request: SigningRequest, key: KeyObject, issuer?: forge.pki.Certificate): string {
  const certificate = forge.pki.createCertificate()
  const publicKey = request.publicKey.export({ type: 'spki', format: 'pem' })
  certificate.publicKey = forge.pki.publicKeyFromPem(String(publicKey))
  // Positive, and without a leading zero.
  certificate.serialNumber = `4${randomBytes(16).toString('hex').slice(1)}`
  // A machine whose clock is slightly behind would otherwise reject a new certificate.
  certificate.validity.notBefore = new Date(Date.now() - 5 * 60_000)
  const wanted = Date.now() + request.days * 24 * 3600_000
  const limit = issuer?.validity.notAfter.getTime() ?? Infinity
  certificate.validity.notAfter = new Date(Math.min(wanted, limit))
  const subject = Object.entries(request.subject)
  certificate.setSubject(subject.map(([shortName, value]) => ({ shortName, value })))
  certificate.setIssuer((issuer ?? certificate).subject.attributes)
  certificate.setExtensions(extensions(request, issuer))

  // Signs with node:crypto, which takes a millisecond; forge's own RSA is JavaScript and takes 30.
  // forge passes the bytes to the digest, then the digest to the key.
  const signer = createSign('sha256')
  const update = (bytes: string) => signer.update(bytes, 'latin1')
  const digest = { algorithm: 'sha256', update } as unknown as forge.md.MessageDigest
  const sign = () => signer.sign(key).toString('latin1')
  certificate.sign({ sign } as unknown as forge.pki.rsa.PrivateKey, digest)
  return forge.pki.certificateToPem(certificate).replaceAll('\r', '')
}

function extensions(request: SigningRequest, issuer?: forge.pki.Certificate): object[] {
  const flags = (names: string[]) => Object.fromEntries(names.map((name) => [name, true]))
  const bits = request.usages.flatMap((usage) => usages[usage].bits)
  const oids = request.usages.flatMap((usage) => usages[usage].extended ?? [])
  const extended = oids.flatMap((oid) => forge.pki.oids[oid] ?? [])
  // The tags of GeneralName (RFC 5280, 4.2.1.6): 2 is a DNS name, 7 an IP address.
  const altNames = request.sans.map((san) =>
    isIPv4(san) ? { type: 7, ip: san } : { type: 2, value: san },
  )
  const { subjectKeyIdentifier: issuerKey }: { subjectKeyIdentifier?: string } =
    issuer?.getExtension('subjectKeyIdentifier') ?? {}
  const keyIdentifier = issuerKey && forge.util.hexToBytes(issuerKey)
  return [
    { name: 'basicConstraints', critical: true, cA: request.usages.includes('certificates') },
    { name: 'keyUsage', critical: true, ...flags(bits) },
    ...(extended.length > 0 ? [{ name: 'extKeyUsage', ...flags(extended) }] : []),
    { name: 'subjectKeyIdentifier' },
    ...(altNames.length > 0 ? [{ name: 'subjectAltName', altNames }] : []),
    ...(keyIdentifier ? [{ name: 'authorityKeyIdentifier', keyIdentifier }] : []),
  ]
}

const publicExponent = 65537n
const nextPrime = promisify((bits: number, done: (error: Error | null, prime: bigint) => void) =>
  generatePrime(bits, { bigint: true }, done),
)

/**
 * A new RSA private key; createPublicKey() derives the public half.
 * The primes are OpenSSL's, found on Node's thread pool. OpenSSL's own generateKeyPair() derives
 * each of them from further primes (FIPS 186-4, B.3.6), which takes 2.5 times as long.
 * @param bits length of the modulus, a multiple of 8
 */
export async function generateRsaKey(bits = 2048): Promise<KeyObject> {
  // Each has its two highest bits set, so that their product has twice their length.
  const primes = await Promise.all([nextPrime(bits / 2), nextPrime(bits / 2)])
  const [q, p] = primes.sort((a, b) => (a < b ? -1 : 1))
  // Primes that are close together are found by Fermat's method (the bound of FIPS 186-4, B.3.3).
  const areClose = (p - q) >> BigInt(bits / 2 - 100) === 0n
  // The public exponent has an inverse only if it divides neither p - 1 nor q - 1.
  if (areClose || primes.some((prime) => prime % publicExponent === 1n)) return generateRsaKey(bits)
  const d = inverse(publicExponent, (p - 1n) * (q - 1n))
  const [dp, dq, qi] = [d % (p - 1n), d % (q - 1n), inverse(q, p)]
  const numbers = Object.entries({ n: p * q, e: publicExponent, d, p, q, dp, dq, qi })
  const base64url = (value: bigint) =>
    Buffer.from(value.toString(16).padStart(bits / 4, '0'), 'hex').toString('base64url')
  const jwk = Object.fromEntries(numbers.map(([name, value]) => [name, base64url(value)]))
  return createPrivateKey({ key: { kty: 'RSA', ...jwk }, format: 'jwk' })
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
