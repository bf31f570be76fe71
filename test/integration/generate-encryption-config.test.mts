import assert from 'node:assert/strict'
import { chmod, readFile, stat, writeFile } from 'node:fs/promises'
import { afterEach, beforeEach, describe, it } from 'node:test'
import { parse } from 'yaml'
import { type Checkout, makeCheckout, run } from '../checkout.mts'

const script = 'bin/generate-encryption-config.mts'

describe('generate-encryption-config', () => {
  let checkout: Checkout
  let file: string
  beforeEach(async () => {
    checkout = await makeCheckout()
    file = checkout.path('configs/encryption-config.yaml')
  })
  afterEach(() => checkout.remove())

  const make = async (...args: string[]) => {
    const outcome = await run(checkout, script, args)
    assert.equal(outcome.exitCode, 0, outcome.stderr)
    return outcome
  }
  const text = () => readFile(file, 'utf8')
  const secretIn = (config: string): string =>
    parse(config).resources[0].providers[0].secretbox.keys[0].secret

  it('encrypts secrets, and reads what is not encrypted yet', async () => {
    await make()
    const config = parse(await text())
    const secret = secretIn(await text())
    assert.deepEqual(config, {
      apiVersion: 'apiserver.config.k8s.io/v1',
      kind: 'EncryptionConfiguration',
      resources: [
        {
          resources: ['secrets'],
          providers: [{ secretbox: { keys: [{ name: 'key1', secret }] } }, { identity: {} }],
        },
      ],
    })
    assert.equal(Buffer.from(secret, 'base64').length, 32)
  })

  it("is for its owner's eyes alone, and its key is not shown", async () => {
    const { stdout, stderr } = await make('--verbose')
    assert.equal((await stat(file)).mode & 0o777, 0o600)
    assert.ok(!(stdout + stderr).includes(secretIn(await text())))
  })

  it('stays as it is, but closed to others', async () => {
    await make()
    const before = await text()
    await chmod(file, 0o644)
    await make()
    assert.equal(await text(), before)
    assert.equal((await stat(file)).mode & 0o777, 0o600)
  })

  it('gets a new key by --force only', async () => {
    await make()
    const before = secretIn(await text())
    await make('--force')
    assert.notEqual(secretIn(await text()), before)
  })

  it('may encrypt by aescbc', async () => {
    await make()
    const other = (await text()).replace('secretbox', 'aescbc')
    await writeFile(file, other)
    await make()
    assert.equal(await text(), other)
  })

  const spoilt: [string, (config: string) => string][] = [
    ['empty', () => ''],
    ['no YAML', () => 'a: b: c'],
    ['cut off', (config) => config.slice(0, 120)],
    ['of another kind', (config) => config.replace('EncryptionConfiguration', 'EncryptionConfig')],
    ['with too short a key', (config) => config.replace(/secret: .*/, 'secret: c2hvcnQ=')],
  ]
  for (const [what, spoil] of spoilt) {
    it(`is not touched if it is ${what}, as its key may be needed`, async () => {
      await make()
      const other = spoil(await text())
      await writeFile(file, other)
      const { exitCode, stderr } = await run(checkout, script)
      assert.equal(exitCode, 1)
      assert.match(stderr, /no encryption configuration with a key of 32 bytes[\s\S]*--force/)
      assert.equal(await text(), other)
    })
  }

  it('refuses arguments that it does not know', async () => {
    assert.equal((await run(checkout, script, ['now'])).exitCode, 2)
  })
})
