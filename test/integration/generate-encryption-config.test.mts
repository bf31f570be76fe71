import assert from 'node:assert/strict'
import { chmod, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { after, before, beforeEach, describe, it } from 'node:test'
import { parse } from 'yaml'
import { type Checkout, makeCheckout, run } from '../checkout.mts'

const script = 'bin/generate-encryption-config.mts'

describe('generate-encryption-config', () => {
  let checkout: Checkout
  let file: string
  before(async () => {
    checkout = await makeCheckout()
    file = checkout.path('configs/encryption-config.yaml')
  })
  after(() => checkout.remove())
  beforeEach(() => rm(file, { force: true }))

  const make = async (...args: string[]) => {
    const outcome = await run(checkout, script, args)
    assert.equal(outcome.exitCode, 0, outcome.stderr)
    return outcome
  }
  const text = () => readFile(file, 'utf8')
  const secretIn = (config: string): string =>
    parse(config).resources[0].providers[0].secretbox.keys[0].secret

  it('encrypts Secrets, and reads what is not encrypted yet', async () => {
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

  it('is readable by its owner only, and its key is not printed', async () => {
    const { stdout, stderr } = await make('--verbose')
    assert.equal((await stat(file)).mode & 0o777, 0o600)
    assert.ok(!(stdout + stderr).includes(secretIn(await text())))
  })

  it('is kept as it is, but closed to others', async () => {
    await make()
    const before = await text()
    await chmod(file, 0o644)
    await make()
    assert.equal(await text(), before)
    assert.equal((await stat(file)).mode & 0o777, 0o600)
  })

  it('gets a new key with --force only', async () => {
    await make()
    const before = secretIn(await text())
    await make('--force')
    assert.notEqual(secretIn(await text()), before)
  })

  const key = (name: string, bytes: number) =>
    `${name}: {keys: [{name: a, secret: ${Buffer.alloc(bytes, 7).toString('base64')}}]}`
  const providers = (...lines: string[]) =>
    `apiVersion: apiserver.config.k8s.io/v1\nkind: EncryptionConfiguration\nresources:\n- resources: [secrets]\n  providers:\n${lines.map((line) => `  - ${line}\n`).join('')}`
  const kept: [string, string, RegExp | undefined][] = [
    ['secretbox', providers(key('secretbox', 32)), undefined],
    [
      'aescbc',
      providers(key('aescbc', 32), 'identity: {}'),
      /^! aescbc is open to padding oracle/m,
    ],
    ['aescbc with 16 bytes', providers(key('aescbc', 16)), /^! the key of aescbc has 16 bytes/m],
    ['aesgcm', providers(key('aesgcm', 24)), /^! a key of aesgcm has to be replaced/m],
    [
      'kms v2',
      providers('kms: {apiVersion: v2, name: k, endpoint: unix:///k.sock}'),
      /^! kms needs/m,
    ],
    [
      'identity first',
      providers('identity: {}', key('secretbox', 32)),
      /^! Secrets are not encrypted: the first provider is identity/m,
    ],
    [
      'other resources only',
      providers(key('secretbox', 32)).replace('secrets', 'configmaps'),
      /^! Secrets are not encrypted: no entry/m,
    ],
    ['all resources', providers(key('secretbox', 32)).replace('secrets', "'*.*'"), undefined],
    [
      'the former kind',
      providers(key('secretbox', 32))
        .replace('EncryptionConfiguration', 'EncryptionConfig')
        .replace('apiserver.config.k8s.io/v1', 'v1'),
      undefined,
    ],
  ]
  for (const [what, config, weakness] of kept) {
    it(`is kept with ${what}${weakness ? ', and what is weak about it is said' : ''}`, async () => {
      await writeFile(file, config, { mode: 0o600 })
      const { stderr } = await make()
      assert.equal(await text(), config)
      if (weakness) assert.match(stderr, weakness)
      else assert.doesNotMatch(stderr, /^!/m)
    })
  }

  const invalid: [string, string, RegExp][] = [
    ['is empty', '', /a part of it is missing/],
    ['is not YAML', 'a: b: c', /a part of it is missing/],
    ['is cut off', providers(key('secretbox', 32)).slice(0, 120), /./],
    [
      'is of another kind',
      providers('identity: {}').replace('Configuration', 'Config'),
      /its kind is not/,
    ],
    [
      'has too short a key',
      providers(key('secretbox', 16)),
      /a key of secretbox needs a name and 32 bytes/,
    ],
    ['has no keys', providers('aescbc: {keys: []}'), /aescbc has no keys/],
    [
      'has an unknown provider',
      providers('rot13: {}'),
      /a provider is not one of secretbox, aescbc/,
    ],
    [
      'has two providers in one',
      providers(`{${key('aescbc', 32)}, identity: {}}`),
      /a provider is not one/,
    ],
    ['has no providers', providers().replace('providers:', 'providers: []'), /providers are empty/],
    [
      'has an incomplete kms',
      providers('kms: {name: k, endpoint: /k.sock}'),
      /kms needs a name and/,
    ],
  ]
  for (const [what, config, reason] of invalid) {
    it(`is not touched if it ${what}, as its key may be needed`, async () => {
      await writeFile(file, config, { mode: 0o600 })
      const { exitCode, stderr } = await run(checkout, script)
      assert.equal(exitCode, 1)
      assert.match(stderr, /not a valid EncryptionConfiguration: [\s\S]*copy[\s\S]*--force/)
      assert.match(stderr, reason)
      assert.equal(await text(), config)
    })
  }

  it('is not used if other users can change it', async () => {
    await make()
    const before = await text()
    await chmod(file, 0o666)
    const { exitCode, stderr } = await run(checkout, script)
    assert.equal(exitCode, 1)
    assert.match(stderr, /other users can change configs\/encryption-config.yaml/)
    assert.equal(await text(), before)
  })

  it('refuses unknown arguments', async () => {
    assert.equal((await run(checkout, script, ['now'])).exitCode, 2)
  })
})
