// The table of what each machine is given: where a file comes from, where it goes, who may read it.

import type { Cluster, Node } from '../cluster.mts'
import { authorityOf, certificatesOf } from '../pki/certificates.mts'
import { machineProxy } from './machine-proxy.mts'

export interface StagedFile {
  /** Where it comes from, absolute. */
  source: string
  /** Path in cloud-init/NODE/nixos/. */
  staged: string
  /** Path on the machine. */
  target: string
  /** 0o600 for what is secret, 0o644 for the rest. Owners are set on the machine. */
  mode: number
  /** What to do when the source is missing. */
  madeBy: string
}

// Where the staged files go on the machine: the first prefix that fits.
const targets = [
  { staged: 'pki/', target: '/var/lib/kubernetes/pki/' },
  { staged: 'kubeconfigs/', target: '/var/lib/kubernetes/' },
  { staged: 'encryption-config.yaml', target: '/var/lib/kubernetes/encryption-config.yaml' },
  { staged: 'ssh/', target: '/etc/ssh/' },
  { staged: '', target: '/etc/nixos/' },
] as const

/** Path on the machine of a staged file. */
export function targetOf(staged: string): string {
  const rule = targets.find((candidate) => staged.startsWith(candidate.staged))
  return rule ? rule.target + staged.slice(rule.staged.length) : staged
}

/** The files of a node, only what that node needs. cluster.json is made when they are staged. */
export function stagedFiles(cluster: Cluster, node: Node): StagedFile[] {
  return [
    ...modules(cluster, node),
    ...certificates(cluster, node),
    ...kubeconfigs(cluster, node),
    ...hostKey(cluster, node),
  ]
}

function modules(cluster: Cluster, node: Node): StagedFile[] {
  const names = ['configuration.nix', 'nixos-base.nix', `${node.role}.nix`]
  const { caFile } = machineProxy(cluster)
  return [
    ...names.map((name) => publicFile(cluster.path('configs', name), name, 'git checkout configs')),
    ...(caFile ? [publicFile(caFile, 'proxy-ca.pem', 'correct PROXY_CA_FILE in cluster.env')] : []),
  ]
}

function certificates(cluster: Cluster, node: Node): StagedFile[] {
  const madeBy = './bin/generate-certs.mts'
  return [authorityOf(cluster), ...certificatesOf(cluster)].flatMap(({ name, on, keyOn }) => {
    const certificate = cluster.path('tls', `${name}.pem`)
    const key = cluster.path('tls', `${name}-key.pem`)
    return [
      ...(on.includes(node.name) ? [publicFile(certificate, `pki/${name}.pem`, madeBy)] : []),
      ...(keyOn.includes(node.name) ? [secretFile(key, `pki/${name}-key.pem`, madeBy)] : []),
    ]
  })
}

function kubeconfigs(cluster: Cluster, node: Node): StagedFile[] {
  const madeBy = './bin/generate-kubeconfigs.mts'
  const kubeProxy = cluster.settings.KUBE_PROXY_MODE !== 'cilium'
  const names =
    node.role === 'control-plane'
      ? ['kube-controller-manager', 'kube-scheduler']
      : [node.name, ...(kubeProxy ? ['kube-proxy'] : [])]
  const files = names.map((name) => `${name}.kubeconfig`)
  return [
    ...files.map((file) =>
      secretFile(cluster.path('configs', file), `kubeconfigs/${file}`, madeBy),
    ),
    ...(node.role === 'control-plane' ? [encryption(cluster)] : []),
  ]
}

function encryption(cluster: Cluster): StagedFile {
  const name = 'encryption-config.yaml'
  return secretFile(cluster.path('configs', name), name, './bin/generate-encryption-config.mts')
}

function hostKey(cluster: Cluster, node: Node): StagedFile[] {
  const madeBy = './bin/generate-certs.mts'
  const key = cluster.path('tls', `ssh_host_${node.name}_ed25519`)
  return [
    secretFile(key, 'ssh/ssh_host_ed25519_key', madeBy),
    publicFile(`${key}.pub`, 'ssh/ssh_host_ed25519_key.pub', madeBy),
  ]
}

function publicFile(source: string, staged: string, madeBy: string): StagedFile {
  return { source, staged, target: targetOf(staged), mode: 0o644, madeBy }
}

function secretFile(source: string, staged: string, madeBy: string): StagedFile {
  return { source, staged, target: targetOf(staged), mode: 0o600, madeBy }
}
