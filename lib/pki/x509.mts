// Making X.509 certificates (RFC 5280) with node-forge: a request in, PEM out. No files here.
import { createPublicKey, createSign, type KeyObject, randomBytes } from 'node:crypto'
import { isIPv4 } from 'node:net'
import forge from 'node-forge'
import { type CertificateEntry, usages } from './certificates.mts'

/** What a CSR says: who, for what, under which other names, and the public key. */
export interface SigningRequest extends Pick<CertificateEntry, 'subject' | 'sans' | 'usages'> {
  publicKey: KeyObject
  /** Days until it ends. It never outlives the authority. */
  days: number
}

/** A certificate, as PEM, and the private key that belongs to it. */
export interface Credential {
  certificate: string
  key: KeyObject
}

// Machines whose clocks are a little behind would otherwise refuse a new certificate.
const backdate = 5 * 60_000
const day = 24 * 3600_000

/** A certificate authority's own certificate, signed with its own key, as PEM. */
export function selfSign(request: Omit<SigningRequest, 'publicKey'>, key: KeyObject): string {
  const certificate = draft({ ...request, publicKey: createPublicKey(key) })
  certificate.setIssuer(certificate.subject.attributes)
  return sign(certificate, key)
}

/** The certificate that the authority makes of a request, as PEM. */
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
  certificate.serialNumber = serialNumber()
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

/** The tags of GeneralName (RFC 5280, 4.2.1.6): 2 is a DNS name, 7 an address. */
function altName(san: string): object {
  return isIPv4(san) ? { type: 7, ip: san } : { type: 2, value: san }
}

/** 16 random bytes as hex. The first is 40 to 7f: a serial is positive and has no leading zeros. */
function serialNumber(): string {
  const bytes = randomBytes(16)
  bytes[0] = ((bytes[0] ?? 0) & 0x3f) | 0x40
  return bytes.toString('hex')
}

/** Signs by node:crypto, in a millisecond; forge's own RSA is JavaScript and takes 30. */
function sign(certificate: forge.pki.Certificate, key: KeyObject): string {
  const signer = createSign('sha256')
  // forge hands the digest the bytes to be signed, then the digest to the key.
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
