// The table of certificates: subject, names and uses of each. generate-certs issues them by it,
// --check compares with it, and generate-nocloud-iso copies the files to the nodes by it.

import type { Cluster } from './cluster.mts'
import { outsideGateway } from './settings.mts'

/** A subject's parts by their short names (RFC 4514), in the order in which they are written. */
export type Subject = Readonly<Record<'C' | 'ST' | 'L' | 'OU' | 'CN', string> & { O?: string }>

/** What a key may do: authenticate a client or a server, sign tokens, sign certificates. */
export type Usage = 'client' | 'server' | 'tokens' | 'certificates'

/** Key usage bits and extended key usage of each (RFC 5280, 4.2.1.3 and 4.2.1.12). */
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

/** One row: the certificate `tls/NAME.pem` and its key `tls/NAME-key.pem`. */
export interface CertificateEntry {
  name: string
  subject: Subject
  usages: readonly Usage[]
  /** Subject alternative names: DNS names and IPv4 addresses. */
  sans: readonly string[]
  usedBy: string
  /** Names of the nodes that need the certificate, and those that need its key, as files. */
  on: readonly string[]
  keyOn: readonly string[]
  /** A renewed certificate keeps its key, because what the key has signed has to stay valid. */
  keepsKey: boolean
}

/** The files of a row, relative to the project's root. */
export function pairFiles(name: string): { certificate: string; key: string } {
  return { certificate: `tls/${name}.pem`, key: `tls/${name}-key.pem` }
}

/** The certificate authority, which signs all the others. */
export function authorityOf(cluster: Cluster): CertificateEntry {
  return {
    ...entry('ca', { CN: 'Kubernetes', O: 'Kubernetes', OU: 'CA' }, ['certificates']),
    usedBy: 'everything that verifies a certificate',
    on: cluster.nodes.map(({ name }) => name),
    // kube-controller-manager signs the API's CertificateSigningRequests with it.
    keyOn: [cluster.controlPlane.name],
    keepsKey: true,
  }
}

/** Every certificate that the authority signs. The API server takes CN as user and O as group. */
export function certificatesOf(cluster: Cluster): CertificateEntry[] {
  const { K8S_API_SERVICE_IP, K8S_CLUSTER_DOMAIN } = cluster.settings
  const onControlPlane = { on: [cluster.controlPlane.name], keyOn: [cluster.controlPlane.name] }
  const metrics = 'metrics-server.kube-system.svc'
  return [
    // The group system:masters may do everything, whatever RBAC says.
    {
      ...entry('admin', { CN: 'admin', O: 'system:masters' }, ['client']),
      usedBy: 'you, by kubectl',
    },
    // By this user name the node authorizer knows which pods and secrets belong to the node. The
    // API server dials the kubelet's LAN address for logs and exec.
    ...cluster.workers.map(({ name, ip }) => ({
      ...entry(name, { CN: `system:node:${name}`, O: 'system:nodes' }, ['client', 'server']),
      sans: [name, ip, '127.0.0.1'],
      usedBy: `kubelet on ${name}`,
      on: [name],
      keyOn: [name],
    })),
    // Kubernetes has built-in roles for the next three users.
    ...['kube-controller-manager', 'kube-scheduler'].map((name) => ({
      ...entry(name, { CN: `system:${name}`, O: `system:${name}` }, ['client']),
      usedBy: name,
    })),
    {
      ...entry('kube-proxy', { CN: 'system:kube-proxy', O: 'system:node-proxier' }, ['client']),
      usedBy: 'kube-proxy on the workers, where it runs',
    },
    // Every name and address by which the API server is reached.
    {
      ...entry('kubernetes', { CN: 'kubernetes', O: 'Kubernetes' }, ['client', 'server']),
      sans: [
        K8S_API_SERVICE_IP,
        cluster.controlPlane.ip,
        outsideGateway,
        '127.0.0.1',
        'kubernetes',
        'kubernetes.default',
        'kubernetes.default.svc',
        `kubernetes.default.svc.${K8S_CLUSTER_DOMAIN}`,
        cluster.controlPlane.name,
      ],
      usedBy: 'kube-apiserver (serving, to etcd, to kubelets) and etcd (serving, peers)',
      ...onControlPlane,
    },
    // Its key signs the pods' tokens; a new key would invalidate them all.
    {
      ...entry('service-account', { CN: 'service-accounts' }, ['tokens']),
      usedBy: 'kube-controller-manager and kube-apiserver',
      ...onControlPlane,
      keepsKey: true,
    },
    // Aggregated APIs trust only this name to say on whose behalf it asks.
    {
      ...entry('front-proxy-client', { CN: 'front-proxy-client' }, ['client']),
      usedBy: 'kube-apiserver, to aggregated APIs such as metrics-server',
      ...onControlPlane,
    },
    // The API server verifies it by the name of the service.
    {
      ...entry('metrics-server', { CN: 'metrics-server' }, ['server']),
      sans: [metrics, `${metrics}.${K8S_CLUSTER_DOMAIN}`],
      usedBy: 'metrics-server, as a Secret in the cluster (make metrics)',
    },
  ]
}

/** A row that no node needs as files: it is embedded in a kubeconfig, or in a Secret. */
function entry(
  name: string,
  { OU = 'Kubernetes The Hardest Way', CN, O }: Pick<Subject, 'CN' | 'O'> & { OU?: string },
  use: readonly Usage[],
): Omit<CertificateEntry, 'usedBy'> {
  const subject = { C: 'US', ST: 'Oregon', L: 'Portland', ...(O ? { O } : {}), OU, CN }
  return { name, subject, usages: use, sans: [], on: [], keyOn: [], keepsKey: false }
}
