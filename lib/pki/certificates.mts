// The table of certificates: who gets one, under which name, and what for. What is generated,
// checked and explained is read from here.

import { outsideGateway } from '../cidr.mts'
import type { Cluster, Node } from '../cluster.mts'
import { StepError } from '../errors.mts'

/** A subject's parts by their short names (RFC 4514), in the order they are written. */
export type Subject = Readonly<{
  C: string
  ST: string
  L: string
  O?: string
  OU: string
  CN: string
}>

/** What a certificate's key may do: log in, prove a server's name, sign tokens or certificates. */
export type Usage = 'client' | 'server' | 'tokens' | 'certificates'

/** How a usage stands in a certificate (RFC 5280, 4.2.1.3 and 4.2.1.12). */
export const usages: Readonly<
  Record<Usage, { bits: readonly string[]; extended?: { name: string; oid: string } }>
> = {
  client: {
    bits: ['digitalSignature'],
    extended: { name: 'clientAuth', oid: '1.3.6.1.5.5.7.3.2' },
  },
  server: {
    bits: ['digitalSignature', 'keyEncipherment'],
    extended: { name: 'serverAuth', oid: '1.3.6.1.5.5.7.3.1' },
  },
  tokens: { bits: ['digitalSignature'] },
  certificates: { bits: ['keyCertSign', 'cRLSign'] },
}

/** One row: a certificate `tls/NAME.pem` and its key `tls/NAME-key.pem`. */
export interface CertificateEntry {
  name: string
  subject: Subject
  usages: readonly Usage[]
  /** Subject alternative names: DNS names and IPv4 addresses. */
  sans: readonly string[]
  usedBy: string
  why: string
  /** Names of the nodes that need the certificate, and those that need its key, as files. */
  on: readonly string[]
  keyOn: readonly string[]
  /** A renewed certificate gets a new key, unless what the old one signed has to stay valid. */
  keepsKey: boolean
}

/** The certificate authority, which signs all others. */
export function authorityOf(cluster: Cluster): CertificateEntry {
  return {
    name: 'ca',
    subject: subject({ CN: 'Kubernetes', O: 'Kubernetes', OU: 'CA' }),
    usages: ['certificates'],
    sans: [],
    usedBy: 'everyone, to check the others',
    why: 'whom it has signed is trusted: the API server takes CN as user name, O as group',
    on: cluster.nodes.map(({ name }) => name),
    // kube-controller-manager signs CSRs of the cluster's own API with it.
    keyOn: [cluster.controlPlane.name],
    keepsKey: true,
  }
}

/**
 * Every certificate that the authority signs.
 *
 * @throws StepError if a node has the name of one that is there anyway
 */
export function certificatesOf(cluster: Cluster): CertificateEntry[] {
  const entries = [
    entry('admin', { CN: 'admin', O: 'system:masters' }, ['client'], {
      usedBy: 'you, by kubectl',
      why: 'the group system:masters may do everything, whatever RBAC says',
    }),
    ...cluster.workers.map(kubelet),
    ...['kube-controller-manager', 'kube-scheduler'].map((name) =>
      entry(name, { CN: `system:${name}`, O: `system:${name}` }, ['client'], {
        usedBy: name,
        why: 'Kubernetes comes with a role for this user',
      }),
    ),
    entry('kube-proxy', { CN: 'system:kube-proxy', O: 'system:node-proxier' }, ['client'], {
      usedBy: 'kube-proxy on the workers, where it runs',
      why: 'Kubernetes comes with a role for this user',
    }),
    apiServer(cluster),
    entry('service-account', { CN: 'service-accounts' }, ['tokens'], {
      usedBy: 'kube-controller-manager and kube-apiserver',
      why: 'its key signs the tokens of pods; a new key would make all of them invalid',
      on: [cluster.controlPlane.name],
      keepsKey: true,
    }),
    entry('front-proxy-client', { CN: 'front-proxy-client' }, ['client'], {
      usedBy: 'kube-apiserver, to aggregated APIs such as metrics-server',
      why: 'they believe only this name when it says on whose behalf it asks',
      on: [cluster.controlPlane.name],
    }),
    metricsServer(cluster),
  ]
  refuseDuplicates([authorityOf(cluster), ...entries])
  return entries
}

/** A kubelet logs in to the API server, and serves logs and exec to it. */
function kubelet(node: Node): CertificateEntry {
  const identity = { CN: `system:node:${node.name}`, O: 'system:nodes' }
  return entry(node.name, identity, ['client', 'server'], {
    sans: [node.name, node.ip, '127.0.0.1'],
    usedBy: `kubelet on ${node.name}`,
    why: 'the node authorizer knows by this name which pods and secrets are its own',
    on: [node.name],
  })
}

function apiServer(cluster: Cluster): CertificateEntry {
  const { K8S_API_SERVICE_IP, K8S_CLUSTER_DOMAIN } = cluster.settings
  const service = 'kubernetes.default.svc'
  return entry('kubernetes', { CN: 'kubernetes', O: 'Kubernetes' }, ['client', 'server'], {
    sans: [
      K8S_API_SERVICE_IP,
      cluster.controlPlane.ip,
      outsideGateway,
      '127.0.0.1',
      'kubernetes',
      'kubernetes.default',
      service,
      `${service}.${K8S_CLUSTER_DOMAIN}`,
      cluster.controlPlane.name,
    ],
    usedBy: 'kube-apiserver (serving, to etcd, to kubelets) and etcd (serving, peers)',
    why: 'every name and address by which the API server is reached has to stand in it',
    on: [cluster.controlPlane.name],
  })
}

function metricsServer(cluster: Cluster): CertificateEntry {
  const service = 'metrics-server.kube-system.svc'
  return entry('metrics-server', { CN: 'metrics-server' }, ['server'], {
    sans: [service, `${service}.${cluster.settings.K8S_CLUSTER_DOMAIN}`],
    usedBy: 'metrics-server, as a Secret in the cluster (make metrics)',
    why: 'the API server asks it by its service name, and believes only who proves that name',
  })
}

function entry(
  name: string,
  identity: Pick<Subject, 'CN' | 'O'>,
  use: readonly Usage[],
  rest: Pick<CertificateEntry, 'usedBy' | 'why'> &
    Partial<Pick<CertificateEntry, 'sans' | 'on' | 'keepsKey'>>,
): CertificateEntry {
  // Without `on` no machine needs the files: they stand in a kubeconfig, or in a Secret.
  const { sans = [], on = [], keepsKey = false } = rest
  return { ...rest, name, subject: subject(identity), usages: use, sans, on, keyOn: on, keepsKey }
}

function subject({ CN, O, OU }: Pick<Subject, 'CN' | 'O'> & { OU?: string }): Subject {
  const place = { C: 'US', ST: 'Oregon', L: 'Portland' }
  return { ...place, ...(O ? { O } : {}), OU: OU ?? 'Kubernetes The Hardest Way', CN }
}

function refuseDuplicates(entries: readonly CertificateEntry[]): void {
  const names = entries.map(({ name }) => name)
  const twice = names.find((name, index) => names.indexOf(name) !== index)
  if (!twice) return
  throw new StepError(`a node cannot be named "${twice}"`, {
    hint: `tls/${twice}.pem is another certificate: choose another name in cluster.env`,
  })
}
