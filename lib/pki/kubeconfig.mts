// Kubeconfigs: where the API server is, whom to believe it, and as whom to log in, in one file.
import { isDeepStrictEqual } from 'node:util'
import type { Cluster } from '../cluster.mts'
import { type CertificateEntry, certificatesOf } from './certificates.mts'

/** One row of the table: the file `configs/NAME.kubeconfig`. */
export interface KubeconfigEntry {
  name: string
  /** The row of the client certificate in it; its common name is the user's name. */
  certificate: CertificateEntry
  /** URL of the API server as its user reaches it. */
  server: string
}

/** What is embedded, as PEM. */
export interface Credentials {
  authority: string
  certificate: string
  key: string
}

/** Every kubeconfig of the cluster. */
export function kubeconfigsOf(cluster: Cluster): KubeconfigEntry[] {
  const workers = cluster.workers.map(({ name }) => name)
  // The forward on this computer has the port that the API server has on the control plane.
  const local = `https://127.0.0.1:${cluster.settings.API_PORT}`
  const servers = new Map([
    ...[...workers, 'kube-proxy'].map((name) => [name, cluster.apiServer] as const),
    ...['kube-controller-manager', 'kube-scheduler', 'admin'].map((name) => [name, local] as const),
  ])
  return certificatesOf(cluster).flatMap((certificate) => {
    const server = servers.get(certificate.name)
    return server ? { name: certificate.name, certificate, server } : []
  })
}

/**
 * A kubeconfig as YAML, everything embedded (client-go's api/v1 types). Names are quoted, as YAML
 * takes some of them for numbers.
 */
export function formatKubeconfig(
  cluster: Cluster,
  { certificate, server }: KubeconfigEntry,
  credentials: Credentials,
): string {
  const name = cluster.settings.CLUSTER_NAME
  const user = certificate.subject.CN
  return `apiVersion: v1
kind: Config
clusters:
  - name: "${name}"
    cluster:
      server: ${server}
      certificate-authority-data: ${base64(credentials.authority)}
users:
  - name: "${user}"
    user:
      client-certificate-data: ${base64(credentials.certificate)}
      client-key-data: ${base64(credentials.key)}
contexts:
  - name: default
    context:
      cluster: "${name}"
      user: "${user}"
current-context: default
preferences: {}
`
}

/**
 * Whether a kubeconfig leads where a fresh one does, as the same user. What was added to it (a
 * namespace, another context) does not matter.
 *
 * @param text of the file that is there, YAML or not
 */
export async function isUpToDate(text: string, fresh: string): Promise<boolean> {
  return text === fresh || isDeepStrictEqual(await effective(text), await effective(fresh))
}

/** The parts of the context's cluster and user that we set. */
async function effective(text: string): Promise<unknown> {
  const config = await parseOrNothing(text)
  const named = (list: unknown, name: unknown) =>
    Array.isArray(list) ? list.find((item) => item?.name === name) : undefined
  const chosen = named(config?.contexts, 'default')?.context
  const cluster = named(config?.clusters, chosen?.cluster)?.cluster
  const user = named(config?.users, chosen?.user)
  return [
    cluster?.server,
    cluster?.['certificate-authority-data'],
    user?.name,
    user?.user?.['client-certificate-data'],
    user?.user?.['client-key-data'],
  ]
}

async function parseOrNothing(text: string): Promise<Record<string, unknown> | null> {
  // Only loaded where it is needed: it would make up a tenth of the time of making them all.
  const { parse } = await import('yaml')
  try {
    return parse(text)
  } catch {
    return null
  }
}

function base64(pem: string): string {
  return Buffer.from(pem).toString('base64')
}
