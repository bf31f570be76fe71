// How a Secret lies in etcd: encrypted by a provider of encryption-config.yaml, or in the clear.
import { randomBytes } from 'node:crypto'
import type { Machine } from '../machine/machine.mts'
import type { Kubectl } from './kubectl.mts'

const pki = '/var/lib/kubernetes/pki'
const etcdctl = [
  'etcdctl --endpoints=https://127.0.0.1:2379',
  `--cacert=${pki}/ca.pem --cert=${pki}/kubernetes.pem --key=${pki}/kubernetes-key.pem`,
].join(' ')

/**
 * Makes a Secret and reads from etcd what has become of it.
 *
 * @param alpha the machine that etcd runs on
 * @returns the provider that encrypted it, such as "secretbox"; undefined if it can be read
 */
export async function encryptionOfSecrets(
  kubectl: Kubectl,
  alpha: Machine,
  namespace: string,
): Promise<string | undefined> {
  const value = randomBytes(16).toString('hex')
  const metadata = { name: 'probe', namespace }
  const secret = { apiVersion: 'v1', kind: 'Secret', metadata, stringData: { value } }
  await kubectl.apply(JSON.stringify(secret), { manager: 'encryption-probe' })
  const key = `/registry/secrets/${namespace}/${metadata.name}`
  const stored = await alpha.succeed(`${etcdctl} get ${key} | tr -d '\\000'`)
  if (stored.includes(value)) return undefined
  return stored.match(/k8s:enc:(\w+):/)?.[1]
}
