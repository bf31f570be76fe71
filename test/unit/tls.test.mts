import assert from 'node:assert/strict'
import { createPublicKey, generateKeyPairSync, type KeyObject, X509Certificate } from 'node:crypto'
import { chmod, chown, mkdir, writeFile } from 'node:fs/promises'
import { after, before, describe, it } from 'node:test'
import { authorityOf, type CertificateEntry, certificatesOf } from '../../lib/certificates.mts'
import { type Cluster, loadCluster } from '../../lib/cluster.mts'
import { accessOf, assertUnchanged, type Pair, problemsOf, readPair } from '../../lib/tls.mts'
import { generateRsaKey, selfSign, signCertificate } from '../../lib/x509.mts'
import { type Checkout, makeCheckout } from '../checkout.mts'

const table = loadCluster({ env: {} })
const authorityEntry = authorityOf(table)
const sigma = certificatesOf(table).find(({ name }) => name === 'sigma') as CertificateEntry
const renewDays = 30

let key: KeyObject
let otherKey: KeyObject
let authority: Pair
before(async () => {
  ;[key, otherKey] = await Promise.all([generateRsaKey(), generateRsaKey()])
  authority = authorityPair(key)
})

function pairOf(name: string, pem: string, itsKey: KeyObject): Pair {
  return { name, certificate: new X509Certificate(pem), key: itsKey, problems: [] }
}

function authorityPair(itsKey: KeyObject, days = 3650): Pair {
  return pairOf('ca', selfSign({ ...authorityEntry, days }, itsKey), itsKey)
}

/** A pair for sigma, as it should be except for the changes. */
function issued(changes: Partial<CertificateEntry> = {}, days = 365): Pair {
  const request = { ...sigma, ...changes, publicKey: createPublicKey(key), days }
  const pem = signCertificate(request, { certificate: String(authority.certificate), key })
  return pairOf('sigma', pem, key)
}

function judge(pair: Pair, entry = sigma, by = authority): string {
  return problemsOf(pair, entry, { authority: by.certificate, renewDays }).join('; ')
}

describe('an existing certificate', () => {
  it('is kept if it matches the table', () => {
    assert.equal(judge(issued()), '')
  })

  it('is kept if its names and its subject are in another order', () => {
    const { CN, ...rest } = sigma.subject
    const pair = issued({ sans: sigma.sans.toReversed(), subject: { CN, ...rest } })
    assert.equal(judge(pair), '')
  })

  it('is kept with a day more than the limit', () => {
    assert.equal(judge(issued({}, renewDays + 1)), '')
  })

  const nothing: Pair = { name: 'sigma', certificate: undefined, key: undefined, problems: [] }
  const mistakes: [string, () => string, RegExp][] = [
    ['is missing', () => judge(nothing), /^missing$/],
    ['has no key', () => judge({ ...issued(), key: undefined }), /^tls\/sigma-key.pem is missing$/],
    ['is only a key', () => judge({ ...nothing, key }), /^tls\/sigma.pem is missing$/],
    [
      'cannot be parsed',
      () => judge({ ...nothing, problems: ['tls/sigma.pem does not contain x'], key }),
      /^tls\/sigma.pem does not contain x$/,
    ],
    [
      'has the key of another',
      () => judge({ ...issued(), key: otherKey }),
      /^the key does not match$/,
    ],
    [
      'is signed by another authority of the same name',
      () => judge(issued(), sigma, authorityPair(otherKey)),
      /^tls\/ca.pem has not signed it$/,
    ],
    ['has no authority', () => judge(issued(), sigma, nothing), /^tls\/ca.pem has not signed it$/],
    [
      'has the subject of another node',
      () => judge(issued({ subject: { ...sigma.subject, CN: 'system:node:gamma' } })),
      /^subject changed \(\+CN=system:node:sigma -CN=system:node:gamma\)$/,
    ],
    [
      'lacks a name and has an extra one',
      () => judge(issued({ sans: ['sigma', '127.0.0.1', '192.168.100.77'] })),
      /^SANs changed \(\+192.168.100.11 -192.168.100.77\)$/,
    ],
    ['has no names', () => judge(issued({ sans: [] })), /^SANs changed/],
    [
      'lacks a usage',
      () => judge(issued({ usages: ['client'] })),
      /^usages changed \(\+1.3.6.1.5.5.7.3.1\)$/,
    ],
    ['expires in 29 days', () => judge(issued({}, 29.5)), /^it expires in 29 days$/],
    ['has expired', () => judge(issued({}, -1)), /^it expired on /],
    [
      'has a date that X.509 cannot express',
      () => {
        const forever = authorityPair(key, 9_999_999)
        return judge(forever, authorityEntry, forever)
      },
      /^its dates are invalid$/,
    ],
    [
      'is a CA certificate',
      () => judge(issued({ usages: ['client', 'server', 'certificates'] })),
      /^it is a CA certificate$/,
    ],
  ]
  for (const [what, found, wanted] of mistakes) {
    it(`is not kept if it ${what}`, () => assert.match(found(), wanted))
  }
})

describe('the files of tls/', () => {
  let checkout: Checkout
  let cluster: Cluster
  before(async () => {
    checkout = await makeCheckout()
    cluster = loadCluster({ root: checkout.root, env: {} })
    await mkdir(checkout.path('tls'))
  })
  after(() => checkout.remove())

  it('may be missing', async () => {
    const { certificate, key, problems } = await readPair(cluster, 'nobody')
    assert.deepEqual([certificate, key, problems], [undefined, undefined, []])
  })

  it('are named if they contain something else', async () => {
    const { privateKey } = generateKeyPairSync('ed25519')
    await writeFile(checkout.path('tls/odd.pem'), 'not a certificate')
    for (const text of [
      String(authority.certificate),
      privateKey.export({ type: 'pkcs8', format: 'pem' }),
    ]) {
      await writeFile(checkout.path('tls/odd-key.pem'), text)
      assert.deepEqual((await readPair(cluster, 'odd')).problems, [
        'tls/odd.pem does not contain a certificate',
        'tls/odd-key.pem does not contain an RSA key',
      ])
    }
  })

  it('are open to others by their mode or by their owner', async () => {
    const file = checkout.path('tls/some-key.pem')
    assert.equal(await accessOf(cluster, 'tls/some-key.pem'), 'missing')
    await writeFile(file, key.export({ type: 'pkcs8', format: 'pem' }), { mode: 0o600 })
    for (const [mode, access] of [
      [0o600, 'private'],
      [0o640, 'readable'],
      [0o644, 'readable'],
      [0o660, 'writable'],
      [0o602, 'writable'],
    ] as const) {
      await chmod(file, mode)
      assert.equal(await accessOf(cluster, 'tls/some-key.pem'), access)
      const { problems } = await readPair(cluster, 'some')
      assert.equal(problems.length > 0, access === 'writable')
    }
    // A file of another user is theirs to change, whatever its mode.
    if (process.getuid?.() === 0) {
      await chmod(file, 0o600)
      await chown(file, 12345, 12345)
      assert.equal(await accessOf(cluster, 'tls/some-key.pem'), 'writable')
    }
    await assert.rejects(
      assertUnchanged(cluster, ['tls/some-key.pem', 'tls/missing.pem']),
      /other users can change tls\/some-key.pem,/,
    )
  })
})
