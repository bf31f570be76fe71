import assert from 'node:assert/strict'
import { spawnSync } from 'node:child_process'
import { createPublicKey, type KeyObject, sign, verify } from 'node:crypto'
import { before, describe, it } from 'node:test'
import { generateRsaKey } from '../../../lib/pki/rsa-key.mts'
import { missing } from '../../tools.mts'

describe('an RSA key', () => {
  let key: KeyObject
  before(async () => {
    key = await generateRsaKey()
  })

  it('has a modulus of 2048 bits and the usual public exponent', () => {
    assert.equal(key.type, 'private')
    assert.deepEqual(key.asymmetricKeyDetails, { modulusLength: 2048, publicExponent: 65537n })
  })

  it('passes all checks of openssl', { skip: missing('openssl') }, async () => {
    for (const each of [key, await generateRsaKey(), await generateRsaKey()]) {
      const input = each.export({ type: 'pkcs8', format: 'pem' })
      const check = spawnSync('openssl', ['pkey', '-check', '-noout'], { input, encoding: 'utf8' })
      assert.match(check.stdout, /Key is valid/)
      assert.equal(check.status, 0, check.stderr)
    }
  })

  it('signs what its public half verifies', () => {
    const message = Buffer.from('a certificate')
    const signature = sign('sha256', message, key)
    assert.ok(verify('sha256', message, createPublicKey(key), signature))
    assert.ok(!verify('sha256', Buffer.from('another'), createPublicKey(key), signature))
  })

  it('is another one every time', async () => {
    const other = await generateRsaKey()
    assert.ok(!createPublicKey(other).equals(createPublicKey(key)))
  })
})
