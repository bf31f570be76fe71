#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// The key with which kube-apiserver encrypts Secrets before it writes them to etcd.
import assert, { AssertionError } from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { chmod } from 'node:fs/promises'
import { parse, stringify } from 'yaml'
import { loadCluster } from '../lib/cluster.mts'
import { StepError } from '../lib/errors.mts'
import { readIfThere, writeFileAtomic } from '../lib/files.mts'
import { withLock } from '../lib/lock.mts'
import { script } from '../lib/script.mts'
import { step } from '../lib/steps.mts'
import { assertUnchanged } from '../lib/tls.mts'

const { flags } = script({
  does: `Generates the API server's encryption configuration with a new random key. An existing one of
any provider is kept: without its key, the Secrets in etcd cannot be read any more.`,
  reads: ['cluster.env'],
  writes: ['configs/encryption-config.yaml'],
  flags: { force: { help: 'replace the key; Secrets of a running cluster are lost' } },
  examples: ['./bin/generate-encryption-config.mts'],
})

const cluster = loadCluster()
const file = 'configs/encryption-config.yaml'

// Of each provider: the key lengths that kube-apiserver accepts, and what is weak about it.
const known: Readonly<Record<string, { keySizes?: readonly number[]; weakness?: string }>> = {
  secretbox: { keySizes: [32] },
  aescbc: { keySizes: [16, 24, 32], weakness: 'aescbc is open to padding oracle attacks' },
  aesgcm: {
    keySizes: [16, 24, 32],
    weakness: 'a key of aesgcm has to be replaced after 200,000 writes, which nothing here does',
  },
  kms: { weakness: 'kms needs a plugin on the control plane, which nothing here installs' },
  identity: { weakness: 'Secrets are not encrypted: the first provider is identity' },
}

await withLock(cluster.path('run', 'encryption-config.lock'), `generating ${file}`, async () => {
  const present = flags.force ? undefined : await readIfThere(cluster.path(file))
  if (present === undefined) return generate()
  await assertUnchanged(cluster, [file])
  const weaknesses = inspect(present)
  await step(`${file} is kept`, () => chmod(cluster.path(file), 0o600))
  for (const weakness of weaknesses) console.error(`! ${weakness}`)
})

/** The first provider encrypts (XSalsa20 and Poly1305); identity reads what is not encrypted yet. */
async function generate(): Promise<void> {
  const secret = randomBytes(32).toString('base64')
  const providers = [{ secretbox: { keys: [{ name: 'key1', secret }] } }, { identity: {} }]
  const configuration = {
    apiVersion: 'apiserver.config.k8s.io/v1',
    kind: 'EncryptionConfiguration',
    resources: [{ resources: ['secrets'], providers }],
  }
  await step(file, () => writeFileAtomic(cluster.path(file), stringify(configuration), 0o600))
}

type Configuration = { apiVersion: string; kind: string; resources: Rule[] }
type Rule = { resources: string[]; providers: Record<string, Provider | null>[] }
type Provider = { keys?: { name: string; secret: string }[]; name?: string; endpoint?: string }

/** What is weak about a configuration. @throws StepError if kube-apiserver would reject it */
function inspect(text: string): string[] {
  try {
    const { apiVersion, kind, resources: rules }: Configuration = parse(text)
    // kube-apiserver accepts the second as well, which its documentation once had by mistake.
    const kinds = ['apiserver.config.k8s.io/v1 EncryptionConfiguration', 'v1 EncryptionConfig']
    assert(kinds.includes(`${apiVersion} ${kind}`), `its kind is not ${kinds[0]}`)
    assert(rules.length > 0, 'resources is empty')
    for (const { resources, providers } of rules) {
      assert(resources.length > 0 && providers.length > 0, 'resources or providers are empty')
      providers.forEach(assertProvider)
    }
    const isForSecrets = (name: string) => ['secrets', '*.', '*.*'].includes(name)
    const rule = rules.find(({ resources }) => resources.some(isForSecrets))
    const [[name, provider] = ['', null]] = Object.entries(rule?.providers[0] ?? {})
    const size = Buffer.from(provider?.keys?.[0]?.secret ?? '', 'base64').length
    return [
      rule ? '' : 'Secrets are not encrypted: no entry of resources contains them',
      known[name]?.weakness ?? '',
      size > 0 && size < 32 ? `the key of ${name} has ${size} bytes, 32 are possible` : '',
    ].filter(Boolean)
  } catch (error) {
    // The YAML parser's own messages would show lines of the file.
    const reason = error instanceof AssertionError ? error.message : 'a part of it is missing'
    throw new StepError(`${file} is not a valid EncryptionConfiguration: ${reason}`, {
      hint: `correct it, or restore it from a copy. --force replaces it: Secrets that a cluster has
encrypted with it are lost then`,
    })
  }
}

function assertProvider(provider: Record<string, Provider | null>): void {
  const [[name, value] = ['', null], ...more] = Object.entries(provider)
  const names = Object.keys(known).join(', ')
  assert(known[name] && value && more.length === 0, `a provider is not one of ${names}`)
  const isReachable = value.name && value.endpoint?.startsWith('unix:')
  assert(name !== 'kms' || isReachable, 'kms needs a name and an endpoint (unix://…)')
  const { keySizes } = known[name]
  assert(!keySizes || value.keys?.length, `${name} has no keys`)
  for (const { name: keyName, secret } of (keySizes && value.keys) ?? []) {
    const size = /^[A-Za-z0-9+/]+={0,2}$/.test(secret) ? Buffer.from(secret, 'base64').length : 0
    const wanted = `a key of ${name} needs a name and ${keySizes?.join(', ')} bytes as base64`
    assert(keyName && keySizes?.includes(size), wanted)
  }
}
