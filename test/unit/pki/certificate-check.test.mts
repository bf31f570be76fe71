import assert from 'node:assert/strict'
import { createPublicKey, type KeyObject, X509Certificate } from 'node:crypto'
import { before, describe, it } from 'node:test'
import { loadCluster } from '../../../lib/cluster.mts'
import {
  describeCertificate,
  problemsOf,
  usableAuthority,
} from '../../../lib/pki/certificate-check.mts'
import {
  authorityOf,
  type CertificateEntry,
  certificatesOf,
} from '../../../lib/pki/certificates.mts'
import type { Pair } from '../../../lib/pki/pki.mts'
import { generateRsaKey } from '../../../lib/pki/rsa-key.mts'
import { selfSign, signCertificate } from '../../../lib/pki/x509.mts'

const cluster = loadCluster({ env: {} })
const authorityEntry = authorityOf(cluster)
const sigma = certificatesOf(cluster).find(({ name }) => name === 'sigma') as CertificateEntry
const renewDays = 30

let key: KeyObject
let otherKey: KeyObject
let authority: Pair
before(async () => {
  ;[key, otherKey] = await Promise.all([generateRsaKey(), generateRsaKey()])
  authority = authorityPair(key)
})

function pairOf(name: string, pem: string, itsKey: KeyObject): Pair {
  const certificate = new X509Certificate(pem)
  return { name, certificate, pem, key: itsKey, keyMode: 0o600, unreadable: [] }
}

function authorityPair(itsKey: KeyObject, days = 3650): Pair {
  return pairOf('ca', selfSign({ ...authorityEntry, days }, itsKey), itsKey)
}

/** A pair for sigma, but for the changes as it should be. */
function issued(changes: Partial<CertificateEntry> = {}, days = 365): Pair {
  const request = { ...sigma, ...changes, publicKey: createPublicKey(key), days }
  const pem = signCertificate(request, { certificate: authority.pem ?? '', key })
  return pairOf('sigma', pem, key)
}

function judge(pair: Pair, entry = sigma, by = authority): string {
  return problemsOf(pair, entry, { authority: by.certificate, renewDays }).join('; ')
}

describe('a certificate that is there', () => {
  it('stays if it is as the table has it', () => {
    assert.equal(judge(issued()), '')
  })

  it('stays if its names and its subject stand in another order', () => {
    const { CN, ...rest } = sigma.subject
    const pair = issued({ sans: sigma.sans.toReversed(), subject: { CN, ...rest } })
    assert.equal(judge(pair), '')
  })

  const mistakes: [string, () => string, RegExp][] = [
    ['is not there', () => judge({ name: 'sigma', unreadable: [] }), /^missing$/],
    ['has no key', () => judge({ ...issued(), key: undefined }), /^tls\/sigma-key.pem is missing$/],
    [
      'is a key alone',
      () => judge({ name: 'sigma', unreadable: [], key }),
      /^tls\/sigma.pem is missing$/,
    ],
    [
      'cannot be read',
      () => judge({ name: 'sigma', unreadable: ['tls/sigma.pem holds no certificate'], key }),
      /^tls\/sigma.pem holds no certificate$/,
    ],
    [
      'lies beside the key of another',
      () => judge({ ...issued(), key: otherKey }),
      /^the key does not match$/,
    ],
    [
      'is signed by another authority of the same name',
      () => judge(issued(), sigma, authorityPair(otherKey)),
      /^tls\/ca.pem has not signed it$/,
    ],
    [
      'has nobody to have signed it',
      () => judge(issued(), sigma, { name: 'ca', unreadable: [] }),
      /^tls\/ca.pem has not signed it$/,
    ],
    [
      'is of someone else',
      () => judge(issued({ subject: { ...sigma.subject, CN: 'system:node:gamma' } })),
      /^subject changed \(\+CN=system:node:sigma -CN=system:node:gamma\)$/,
    ],
    [
      'lacks a name and has one too many',
      () => judge(issued({ sans: ['sigma', '127.0.0.1', '192.168.100.77'] })),
      /^SANs changed \(\+192.168.100.11 -192.168.100.77\)$/,
    ],
    ['has no names', () => judge(issued({ sans: [] })), /^SANs changed/],
    [
      'serves for too little',
      () => judge(issued({ usages: ['client'] })),
      /^usages changed \(\+1.3.6.1.5.5.7.3.1\)$/,
    ],
    ['ends in 29 days', () => judge(issued({}, 29.5)), /^it ends in 29 days$/],
    ['has ended', () => judge(issued({}, -1)), /^it ended /],
    [
      'is an authority of its own',
      () => judge(issued({ usages: ['client', 'server', 'certificates'] })),
      /^it is an authority$/,
    ],
  ]
  for (const [what, found, wanted] of mistakes) {
    it(`does not stay if it ${what}`, () => assert.match(found(), wanted))
  }

  it('stays with a day more than the limit', () => {
    assert.equal(judge(issued({}, renewDays + 1)), '')
  })

  it('tells subject, names, usages and end', () => {
    const { certificate } = issued()
    assert.ok(certificate)
    const { subject, sans, usages, daysLeft } = describeCertificate(certificate)
    assert.deepEqual(subject.at(-1), 'CN=system:node:sigma')
    assert.deepEqual(sans, ['sigma', '192.168.100.11', '127.0.0.1'])
    assert.deepEqual(usages, ['client', 'server'])
    assert.equal(daysLeft, 364)
  })
})

describe('an authority that is there', () => {
  const use = (pair: Pair) => usableAuthority(pair, authorityEntry, renewDays)

  it('signs on', () => {
    assert.deepEqual(use(authority), { certificate: authority.pem, key })
  })

  it('is made if there is none, or only its key', () => {
    assert.equal(use({ name: 'ca', unreadable: [] }), undefined)
    assert.equal(use({ name: 'ca', unreadable: [], key }), undefined)
  })

  const mistakes: [string, () => Pair, RegExp][] = [
    ['its key is missing', () => ({ ...authority, key: undefined }), /tls\/ca-key.pem is missing/],
    ['its key is another', () => ({ ...authority, key: otherKey }), /the key does not match/],
    ['it ends soon', () => authorityPair(key, 20), /it ends in (19|20) days/],
    ['it is none', () => ({ ...issued(), name: 'ca' }), /it is no authority/],
    [
      'its key cannot be read',
      () => ({ name: 'ca', unreadable: ['tls/ca-key.pem holds no RSA key'] }),
      /tls\/ca-key.pem holds no RSA key/,
    ],
  ]
  for (const [what, pair, reason] of mistakes) {
    it(`is refused if ${what}`, () => {
      assert.throws(
        () => use(pair()),
        (error: Error) => error.name === 'StepError' && reason.test(error.message),
      )
    })
  }
})
