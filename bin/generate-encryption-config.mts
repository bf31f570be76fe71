#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// The key that kube-apiserver encrypts secrets with before they go to etcd.
import { randomBytes } from 'node:crypto'
import { chmod } from 'node:fs/promises'
import { parse } from 'yaml'
import { loadCluster } from '../lib/cluster.mts'
import { StepError } from '../lib/errors.mts'
import { readIfThere, writeFileAtomic } from '../lib/files.mts'
import { withLock } from '../lib/lock.mts'
import { script } from '../lib/script.mts'
import { step } from '../lib/steps.mts'

const { flags } = script({
  does:
    "Makes the API server's encryption configuration with a new random key. One that is there\n" +
    'stays: without its key the secrets in etcd cannot be read any more.',
  reads: ['cluster.env'],
  writes: ['configs/encryption-config.yaml'],
  flags: { force: { help: 'replace the key; secrets of a running cluster are lost' } },
  examples: ['./bin/generate-encryption-config.mts'],
})

const cluster = loadCluster()
const name = 'configs/encryption-config.yaml'
const file = cluster.path(name)

await withLock(cluster.path('run', 'encryption-config.lock'), `making ${name}`, async () => {
  const present = flags.force ? undefined : await readIfThere(file)
  if (present !== undefined) {
    if (!hasKey(present)) {
      throw new StepError(`${name} holds no encryption configuration with a key of 32 bytes`, {
        hint: 'put it back from a copy; --force replaces it, and secrets of a cluster are lost',
      })
    }
    await step(`${name} is there and stays`, () => chmod(file, 0o600))
    return
  }
  await step(name, () => writeFileAtomic(file, configuration(randomBytes(32)), 0o600))
})

/**
 * The first provider encrypts: XSalsa20 and Poly1305. All of them decrypt: identity reads what
 * was written before there was a key.
 */
function configuration(key: Buffer): string {
  return `apiVersion: apiserver.config.k8s.io/v1
kind: EncryptionConfiguration
resources:
  - resources:
      - secrets
    providers:
      - secretbox:
          keys:
            - name: key1
              secret: ${key.toString('base64')}
      - identity: {}
`
}

/** Whether a key of the right length stands in it, for one of the providers that have keys. */
function hasKey(text: string): boolean {
  try {
    const { kind, resources } = parse(text)
    const [first] = resources[0].providers
    const [key] = (first.secretbox ?? first.aescbc).keys
    return kind === 'EncryptionConfiguration' && Buffer.from(key.secret, 'base64').length === 32
  } catch {
    return false
  }
}
