import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { createPublicKey, type KeyObject, sign, verify, X509Certificate } from 'node:crypto'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import type { Subject } from '../../lib/certificates.mts'
import {
  type Credential,
  generateRsaKey,
  type SigningRequest,
  selfSign,
  signCertificate,
} from '../../lib/x509.mts'
import { missing } from '../tools.mts'

const place = { C: 'US', ST: 'Oregon', L: 'Portland', OU: 'Tests' }
const subject: Subject = { ...place, O: 'system:nodes', CN: 'system:node:sigma' }
const authoritySubject: Subject = { ...place, O: 'Kubernetes', CN: 'Kubernetes' }
const minute = 60_000
const day = 24 * 60 * minute

describe('a certificate', () => {
  let folder: string
  let authority: Credential
  let key: KeyObject
  before(async () => {
    folder = mkdtempSync(join(tmpdir(), 'x509-'))
    const keys = await Promise.all([generateRsaKey(), generateRsaKey()])
    key = keys[1]
    const request = { subject: authoritySubject, sans: [], usages: ['certificates'] as const }
    authority = { key: keys[0], certificate: selfSign({ ...request, days: 100 }, keys[0]) }
  })
  after(() => rmSync(folder, { recursive: true }))

  const issue = (changes: Partial<SigningRequest> = {}) =>
    signCertificate(
      {
        subject,
        sans: ['sigma', '192.168.100.11'],
        usages: ['client', 'server'],
        publicKey: createPublicKey(key),
        days: 30,
        ...changes,
      },
      authority,
    )
  const file = (name: string, text: string) => {
    writeFileSync(join(folder, name), text)
    return join(folder, name)
  }
  const textOf = (pem: string) =>
    execFileSync('openssl', ['x509', '-in', file('shown.pem', pem), '-noout', '-text'], {
      encoding: 'utf8',
    })

  it('is verified by openssl, strictly', { skip: missing('openssl') }, () => {
    const ca = file('ca.pem', authority.certificate)
    const leaf = file('leaf.pem', issue())
    const verify = (purpose: string) =>
      execFileSync(
        'openssl',
        ['verify', '-x509_strict', '-purpose', purpose, '-CAfile', ca, leaf],
        { encoding: 'utf8' },
      )
    assert.match(verify('sslclient'), /leaf.pem: OK/)
    assert.match(verify('sslserver'), /leaf.pem: OK/)
  })

  it('is valid for its usages only', { skip: missing('openssl') }, () => {
    const ca = file('ca.pem', authority.certificate)
    const leaf = file('client.pem', issue({ usages: ['client'] }))
    const args = ['verify', '-purpose', 'sslserver', '-CAfile', ca, leaf]
    assert.throws(() => execFileSync('openssl', args, { stdio: 'pipe' }), /unsuitable|purpose/i)
  })

  it('contains what was requested, as openssl shows it', { skip: missing('openssl') }, () => {
    const text = textOf(issue())
    assert.match(text, /Version: 3/)
    assert.match(
      text,
      /Subject: C = US, ST = Oregon, L = Portland, OU = Tests, O = system:nodes, CN = system:node:sigma/,
    )
    assert.match(text, /Issuer: .*O = Kubernetes, CN = Kubernetes/)
    assert.match(text, /Signature Algorithm: sha256WithRSAEncryption/)
    assert.match(text, /Basic Constraints: critical\s+CA:FALSE/)
    assert.match(text, /X509v3 Key Usage: critical\s+Digital Signature, Key Encipherment\n/)
    assert.match(text, /TLS Web Client Authentication, TLS Web Server Authentication\n/)
    assert.match(text, /DNS:sigma, IP Address:192.168.100.11\n/)
  })

  it('of an authority may sign certificates, and nothing else', {
    skip: missing('openssl'),
  }, () => {
    const text = textOf(authority.certificate)
    assert.match(text, /Basic Constraints: critical\s+CA:TRUE/)
    assert.match(text, /X509v3 Key Usage: critical\s+Certificate Sign, CRL Sign\n/)
    assert.doesNotMatch(text, /Extended Key Usage/)
  })

  it('identifies its own key and that of the authority', { skip: missing('openssl') }, () => {
    const keyId = (text: string, which: string) =>
      text.match(new RegExp(`X509v3 ${which} Key Identifier: *\\n\\s+(?:keyid:)?([0-9A-F:]+)`))?.[1]
    const [ca, leaf] = [textOf(authority.certificate), textOf(issue())]
    assert.equal(keyId(leaf, 'Authority'), keyId(ca, 'Subject'))
    assert.equal(keyId(leaf, 'Subject')?.length, 59)
    assert.notEqual(keyId(leaf, 'Subject'), keyId(ca, 'Subject'))
  })

  it('has no extended usage and no names if it only signs tokens', () => {
    const certificate = new X509Certificate(issue({ usages: ['tokens'], sans: [] }))
    assert.equal(certificate.keyUsage, undefined)
    assert.equal(certificate.subjectAltName, undefined)
  })

  it('has a random serial of 128 bits, never negative', () => {
    const serials = Array.from({ length: 30 }, () => new X509Certificate(issue()).serialNumber)
    assert.equal(new Set(serials).size, serials.length)
    // A first digit above 7 would be a negative number, a 0 could be shortened.
    for (const serial of serials) assert.match(serial, /^[4-7][0-9A-F]{31}$/)
  })

  it('is valid from five minutes ago for the requested days', () => {
    const { validFrom, validTo } = new X509Certificate(issue())
    assert.ok(Math.abs(Date.now() - 5 * minute - Date.parse(validFrom)) < minute)
    assert.ok(Math.abs(Date.now() + 30 * day - Date.parse(validTo)) < minute)
  })

  it('does not expire after its authority', () => {
    const { validTo } = new X509Certificate(issue({ days: 1000 }))
    assert.equal(validTo, new X509Certificate(authority.certificate).validTo)
  })
})

describe('an RSA key', () => {
  it('has a modulus of 2048 bits, the usual public exponent, and signs', async () => {
    const key = await generateRsaKey()
    assert.deepEqual(key.asymmetricKeyDetails, { modulusLength: 2048, publicExponent: 65537n })
    const message = Buffer.from('a certificate')
    const signature = sign('sha256', message, key)
    assert.ok(verify('sha256', message, createPublicKey(key), signature))
    assert.ok(!verify('sha256', Buffer.from('another'), createPublicKey(key), signature))
  })

  it('passes all checks of openssl, a hundred times, and is never the same', {
    skip: missing('openssl', 'xargs'),
  }, async () => {
    const folder = mkdtempSync(join(tmpdir(), 'rsa-'))
    try {
      const keys = await Promise.all(Array.from({ length: 100 }, () => generateRsaKey()))
      const pems = keys.map((key) => String(key.export({ type: 'pkcs8', format: 'pem' })))
      assert.equal(new Set(pems).size, 100)
      for (const [index, pem] of pems.entries()) writeFileSync(join(folder, `${index}.pem`), pem)
      const command = 'ls | xargs -n 1 -P 2 openssl pkey -check -noout -in'
      const output = execFileSync('sh', ['-c', command], { cwd: folder, encoding: 'utf8' })
      assert.equal(output.match(/Key is valid/g)?.length, 100)
    } finally {
      rmSync(folder, { recursive: true })
    }
  })
})
