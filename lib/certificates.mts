// The table of certificates: subject, names and uses of each. generate-certs issues from it and
// --check compares with it; generate-nocloud-iso reads there which node gets which.
import type { Cluster } from './cluster.mts'
import { outsideGateway } from './settings.mts'

/** A subject's parts by their short names (RFC 4514), in the order in which they are written. */
export type Subject = Readonly<Record<'C' | 'ST' | 'L' | 'OU' | 'CN', string> & { O?: string }>

/** What a key may do: authenticate a client or a server, sign tokens, sign certificates. */
export type Usage = 'client' | 'server' | 'tokens' | 'certificates'

/** Key usage bits, and the OID of the extended key usage (RFC 5280, 4.2.1.3 and 4.2.1.12). */
export const usages: Readonly<Record<Usage, { bits: readonly string[]; extended?: string }>> = {
  client: { bits: ['digitalSignature'], extended: '1.3.6.1.5.5.7.3.2' },
  server: { bits: ['digitalSignature', 'keyEncipherment'], extended: '1.3.6.1.5.5.7.3.1' },
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
export function authorityOf({ nodes, controlPlane }: Cluster): CertificateEntry {
  return entry('ca', ['certificates'], {
    ...{ CN: 'Kubernetes', O: 'Kubernetes', OU: 'CA', keepsKey: true },
    usedBy: 'everything that verifies a certificate',
    on: nodes.map(({ name }) => name),
    // kube-controller-manager signs the API's CertificateSigningRequests with it.
    keyOn: [controlPlane.name],
  })
}

/** Every certificate that the authority signs. The API server takes CN as user and O as group. */
export function certificatesOf({ settings, controlPlane, workers }: Cluster): CertificateEntry[] {
  const [kubernetes, metrics] = ['kubernetes.default.svc', 'metrics-server.kube-system.svc']
  const domain = settings.K8S_CLUSTER_DOMAIN
  const onControlPlane = { on: [controlPlane.name], keyOn: [controlPlane.name] }
  return [
    // The group system:masters may do everything, whatever RBAC says.
    entry('admin', ['client'], { CN: 'admin', O: 'system:masters', usedBy: 'you, by kubectl' }),
    // By this user name the node authorizer knows which pods and secrets belong to the node. The
    // API server dials the kubelet's LAN address for logs and exec.
    ...workers.map(({ name, ip }) =>
      entry(name, ['client', 'server'], {
        ...{ CN: `system:node:${name}`, O: 'system:nodes', usedBy: `kubelet on ${name}` },
        ...{ sans: [name, ip, '127.0.0.1'], on: [name], keyOn: [name] },
      }),
    ),
    // Kubernetes has built-in roles for the next three users.
    ...['kube-controller-manager', 'kube-scheduler'].map((name) =>
      entry(name, ['client'], { CN: `system:${name}`, O: `system:${name}`, usedBy: name }),
    ),
    entry('kube-proxy', ['client'], {
      ...{ CN: 'system:kube-proxy', O: 'system:node-proxier' },
      usedBy: 'kube-proxy on the workers, where it runs',
    }),
    // Every name and address by which the API server is reached.
    entry('kubernetes', ['client', 'server'], {
      ...{ CN: 'kubernetes', O: 'Kubernetes', ...onControlPlane },
      usedBy: 'kube-apiserver (serving, to etcd, to kubelets) and etcd (serving, peers)',
      sans: [
        ...[settings.K8S_API_SERVICE_IP, controlPlane.ip, outsideGateway, '127.0.0.1'],
        ...['kubernetes', 'kubernetes.default', kubernetes, `${kubernetes}.${domain}`],
        controlPlane.name,
      ],
    }),
    // Its key signs the pods' tokens; a new key would invalidate them all.
    entry('service-account', ['tokens'], {
      ...{ CN: 'service-accounts', ...onControlPlane, keepsKey: true },
      usedBy: 'kube-controller-manager and kube-apiserver',
    }),
    // Aggregated APIs trust only this name to say on whose behalf it asks.
    entry('front-proxy-client', ['client'], {
      ...{ CN: 'front-proxy-client', ...onControlPlane },
      usedBy: 'kube-apiserver, to aggregated APIs such as metrics-server',
    }),
    // The API server verifies it by the name of the service.
    entry('metrics-server', ['server'], {
      ...{ CN: 'metrics-server', sans: [metrics, `${metrics}.${domain}`] },
      usedBy: 'metrics-server, as a Secret in the cluster (make metrics)',
    }),
  ]
}

type Row = Partial<CertificateEntry> & Pick<CertificateEntry, 'usedBy'>

/** Without `on` no node needs it as files: it is embedded in a kubeconfig, or in a Secret. */
function entry(
  name: string,
  usages: readonly Usage[],
  { CN, O, OU = 'Kubernetes The Hardest Way', ...row }: Row & Partial<Subject> & { CN: string },
): CertificateEntry {
  const subject = { C: 'US', ST: 'Oregon', L: 'Portland', ...(O ? { O } : {}), OU, CN }
  return { name, subject, usages, sans: [], on: [], keyOn: [], keepsKey: false, ...row }
}
