import assert from 'node:assert/strict'
import { generateKeyPairSync } from 'node:crypto'
import { chmod, readdir, readFile, stat, writeFile } from 'node:fs/promises'
import { after, before, describe, it } from 'node:test'
import { type Cluster, loadCluster } from '../../../lib/cluster.mts'
import { authorityOf } from '../../../lib/pki/certificates.mts'
import {
  isExposed,
  protectKey,
  readPair,
  removeCertificate,
  writePair,
} from '../../../lib/pki/pki.mts'
import { generateRsaKey } from '../../../lib/pki/rsa-key.mts'
import { type Credential, selfSign } from '../../../lib/pki/x509.mts'
import { type Checkout, makeCheckout } from '../../checkout.mts'

describe('a certificate and its key in tls/', () => {
  let checkout: Checkout
  let cluster: Cluster
  let credential: Credential
  before(async () => {
    checkout = await makeCheckout()
    cluster = loadCluster({ root: checkout.root, env: {} })
    const key = await generateRsaKey()
    credential = { key, certificate: selfSign({ ...authorityOf(cluster), days: 99 }, key) }
  })
  after(() => checkout.remove())

  it('are read as they were written', async () => {
    await writePair(cluster, 'some', credential)
    const pair = await readPair(cluster, 'some')
    assert.equal(pair.pem, credential.certificate)
    assert.ok(pair.key?.equals(credential.key))
    assert.equal(pair.keyPem, await readFile(checkout.path('tls/some-key.pem'), 'utf8'))
    assert.ok(pair.certificate?.checkPrivateKey(credential.key))
    assert.deepEqual(pair.unreadable, [])
  })

  it('are a PEM certificate for everyone and a PKCS #8 key for its owner alone', async () => {
    await writePair(cluster, 'modes', credential)
    assert.equal((await stat(checkout.path('tls/modes-key.pem'))).mode & 0o777, 0o600)
    assert.equal((await stat(checkout.path('tls/modes.pem'))).mode & 0o777, 0o644)
    const key = await readFile(checkout.path('tls/modes-key.pem'), 'utf8')
    assert.match(key, /^-----BEGIN PRIVATE KEY-----\n[^\r]+\n-----END PRIVATE KEY-----\n$/)
    const pem = await readFile(checkout.path('tls/modes.pem'), 'utf8')
    assert.match(pem, /^-----BEGIN CERTIFICATE-----\n[^\r]+\n-----END CERTIFICATE-----\n$/)
  })

  it('leave nothing else behind', async () => {
    await writePair(cluster, 'alone', credential)
    const names = (await readdir(checkout.path('tls'))).filter((name) => name.includes('alone'))
    assert.deepEqual(names.sort(), ['alone-key.pem', 'alone.pem'])
  })

  it('may be missing', async () => {
    assert.deepEqual(await readPair(cluster, 'nobody'), { name: 'nobody', unreadable: [] })
  })

  it('are told if they hold something else', async () => {
    await writeFile(checkout.path('tls/odd.pem'), 'not a certificate')
    await writeFile(checkout.path('tls/odd-key.pem'), credential.certificate)
    assert.deepEqual((await readPair(cluster, 'odd')).unreadable, [
      'tls/odd.pem holds no certificate',
      'tls/odd-key.pem holds no RSA key',
    ])
  })

  it('are told if the key is not of RSA', async () => {
    const { privateKey } = generateKeyPairSync('ed25519')
    const pem = privateKey.export({ type: 'pkcs8', format: 'pem' })
    await writeFile(checkout.path('tls/edwards-key.pem'), pem)
    const { unreadable } = await readPair(cluster, 'edwards')
    assert.deepEqual(unreadable, ['tls/edwards-key.pem holds no RSA key'])
  })

  it('show a key that others can read, and can be protected', async () => {
    await writePair(cluster, 'open', credential)
    assert.equal(isExposed(await readPair(cluster, 'open')), false)
    await chmod(checkout.path('tls/open-key.pem'), 0o640)
    assert.equal(isExposed(await readPair(cluster, 'open')), true)
    await protectKey(cluster, 'open')
    assert.equal(isExposed(await readPair(cluster, 'open')), false)
  })

  it('can be parted: the certificate goes, the key stays', async () => {
    await writePair(cluster, 'parted', credential)
    await removeCertificate(cluster, 'parted')
    const pair = await readPair(cluster, 'parted')
    assert.equal(pair.certificate, undefined)
    assert.ok(pair.key)
  })
})
