#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// Prepares what each machine gets as a tree of files. (No ISO is made; the name is the original's.)
import { createHash } from 'node:crypto'
import { existsSync } from 'node:fs'
import { mkdir, readFile, rename, rm, writeFile } from 'node:fs/promises'
import { dirname, join, relative, resolve } from 'node:path'
import { authorityOf, certificatesOf } from '../lib/certificates.mts'
import { chooseNodes, loadCluster, type Node } from '../lib/cluster.mts'
import { StepError } from '../lib/errors.mts'
import { privateFolder } from '../lib/files.mts'
import { machineProxy } from '../lib/proxy.mts'
import { script } from '../lib/script.mts'
import { step } from '../lib/steps.mts'

const { flags, args } = script({
  does: `Stages each node's NixOS configuration with the certificates, kubeconfigs and host key that this
node needs, in folders as on the machine. The installer and reconfig copy them there.`,
  reads: [
    'cluster.env',
    'configs/*.nix',
    'configs/*.kubeconfig',
    'configs/encryption-config.yaml',
    'tls/',
  ],
  writes: ['cloud-init/NODE/nixos/'],
  flags: { list: { help: 'show which file goes where on the machine, and stage nothing' } },
  args: '[NODE...]',
  examples: ['./bin/generate-nocloud-iso.mts', './bin/generate-nocloud-iso.mts --list sigma'],
})

const cluster = loadCluster()
const { settings } = cluster
const proxy = machineProxy(cluster)

for (const node of chooseNodes(cluster, args)) {
  if (flags.list) list(node)
  else await step(`stage ${node.name}`, () => stage(node))
}

interface StagedFile {
  /** 0600 for secrets. Users that own files exist only on the machine, which sets the owners. */
  mode: number
  /** Path on this computer. */
  from: string
  /** Path on the machine. */
  to: string
  /** What creates a missing file. */
  madeBy: string
  /** Its name in the digests of cluster.json; none for what Nix itself reads. */
  digest?: string
}

/** What a node gets, and nothing that only another one needs. */
function filesOf(node: Node): StagedFile[] {
  const row = (mode: number, from: string, to: string, madeBy: string, digest?: string) => {
    return { mode, from: resolve(cluster.root, from), to, madeBy, ...(digest ? { digest } : {}) }
  }
  const [certs, kubernetes] = ['./bin/generate-certs.mts', '/var/lib/kubernetes']
  const pki = (mode: number, file: string) =>
    row(mode, `tls/${file}`, `${kubernetes}/pki/${file}`, certs, `pki/${file}`)
  const kubeconfig = (user: string) => {
    const file = `${user}.kubeconfig`
    const madeBy = './bin/generate-kubeconfigs.mts'
    return row(0o600, `configs/${file}`, `${kubernetes}/${file}`, madeBy, `kubeconfigs/${file}`)
  }
  const encryption = 'encryption-config.yaml'
  const makesKey = './bin/generate-encryption-config.mts'
  const [hostKey, onMachine] = [`tls/ssh_host_${node.name}_ed25519`, 'ssh/ssh_host_ed25519_key']

  return [
    ...['configuration.nix', 'nixos-base.nix', `${node.role}.nix`].map((name) =>
      row(0o644, `configs/${name}`, `/etc/nixos/${name}`, 'git checkout configs'),
    ),
    ...(proxy.caFile
      ? [
          row(
            0o644,
            proxy.caFile,
            '/etc/nixos/proxy-ca.pem',
            'correct PROXY_CA_FILE in cluster.env',
          ),
        ]
      : []),
    ...[authorityOf(cluster), ...certificatesOf(cluster)].flatMap(({ name, on, keyOn }) => [
      ...(on.includes(node.name) ? [pki(0o644, `${name}.pem`)] : []),
      ...(keyOn.includes(node.name) ? [pki(0o600, `${name}-key.pem`)] : []),
    ]),
    ...(node.role === 'worker'
      ? [kubeconfig(node.name)]
      : [
          kubeconfig('kube-controller-manager'),
          kubeconfig('kube-scheduler'),
          row(0o600, `configs/${encryption}`, `${kubernetes}/${encryption}`, makesKey, encryption),
        ]),
    ...(node.role === 'worker' && settings.KUBE_PROXY_MODE !== 'cilium'
      ? [kubeconfig('kube-proxy')]
      : []),
    row(0o600, hostKey, `/etc/${onMachine}`, certs, onMachine),
    row(0o644, `${hostKey}.pub`, `/etc/${onMachine}.pub`, certs, `${onMachine}.pub`),
  ]
}

/**
 * cluster.json: the values of cluster.env that the modules in configs/ read.
 *
 * @param sshKey the public key that may log in as root
 * @param digests a changed certificate changes its digest and by that the configuration, so the
 *   machine knows which services to restart
 */
function clusterJson(node: Node, sshKey: string, digests: Record<string, string>): string {
  const { name, role, ip, mac, lanMac, podCidr = null } = node
  const values = {
    name: settings.CLUSTER_NAME,
    role,
    node: { name, ip, mac, lanMac, podCidr },
    nodes: cluster.nodes.map((each) => {
      return { name: each.name, role: each.role, ip: each.ip, podCidr: each.podCidr ?? null }
    }),
    lanPrefixLength: Number(settings.LAN_CIDR.split('/')[1]),
    apiPort: settings.API_PORT,
    serviceCidr: settings.K8S_SERVICE_CIDR,
    podCidr: settings.K8S_POD_CIDR,
    clusterDns: settings.K8S_CLUSTER_DNS,
    clusterDomain: settings.K8S_CLUSTER_DOMAIN,
    kubeProxyMode: settings.KUBE_PROXY_MODE,
    logLevel: settings.KUBE_LOG_LEVEL,
    proxy: { http: proxy.http, https: proxy.https, no: proxy.no, ca: Boolean(proxy.caFile) },
    sshKeys: [sshKey],
    digests,
  }
  return `${JSON.stringify(values, null, 2)}\n`
}

/** Writes a node's files to a new folder, which then replaces the old one as a whole. */
async function stage(node: Node): Promise<void> {
  const files = filesOf(node)
  const login = { from: cluster.path('tls', 'ssh_ed25519.pub'), madeBy: './bin/generate-certs.mts' }
  const contents = await readAll(node, [login, ...files])
  const sshKey = String(contents.get(login.from)).trim()
  const digests = files.flatMap(({ from, digest }) =>
    digest ? [[digest, digestOf(contents.get(from) ?? '')] as const] : [],
  )
  const json = clusterJson(node, sshKey, Object.fromEntries(digests))

  const current = cluster.path('cloud-init', node.name, 'nixos')
  const [fresh, former] = [`${current}.new`, `${current}.former`]
  await privateFolder(dirname(current))
  await rm(fresh, { recursive: true, force: true })
  // The machine gets these modes, also those of the folders: / and /etc are among them.
  process.umask(0o022)
  for (const { from, to, mode } of files) await write(to, contents.get(from) ?? '', mode)
  await write('/etc/nixos/cluster.json', json, 0o644)

  // A folder cannot be renamed over one that is not empty.
  await rm(former, { recursive: true, force: true })
  if (existsSync(current)) await rename(current, former)
  await rename(fresh, current)
  await rm(former, { recursive: true, force: true })

  async function write(to: string, data: string | Buffer, mode: number): Promise<void> {
    await mkdir(dirname(join(fresh, to)), { recursive: true })
    await writeFile(join(fresh, to), data, { mode })
  }
}

/** The contents by path. @throws StepError that names every missing file and what creates it */
async function readAll(
  node: Node,
  files: readonly Pick<StagedFile, 'from' | 'madeBy'>[],
): Promise<Map<string, Buffer>> {
  const contents = new Map<string, Buffer>()
  const missing: (typeof files)[number][] = []
  for (const file of files) {
    const data = await readFile(file.from).catch((error: NodeJS.ErrnoException) => {
      if (error.code !== 'ENOENT') throw error
    })
    if (data) contents.set(file.from, data)
    else missing.push(file)
  }
  if (missing.length === 0) return contents
  const count = missing.length === 1 ? 'a file is' : `${missing.length} files are`
  throw new StepError(`${node.name} cannot be staged: ${count} missing`, {
    output: missing.map(({ from }) => relative(cluster.root, from)).join('\n'),
    hint: [...new Set(missing.map(({ madeBy }) => madeBy))].join('\n'),
  })
}

/** A part of SHA-256: it shows that a file has changed, and nothing about what is in it. */
function digestOf(data: string | Buffer): string {
  return createHash('sha256').update(data).digest('hex').slice(0, 16)
}

function list(node: Node): void {
  console.log(`${node.name}:`)
  for (const { from, to, mode } of filesOf(node)) {
    console.log(`  ${mode.toString(8)}  ${to}  from ${relative(cluster.root, from)}`)
  }
  console.log('  644  /etc/nixos/cluster.json  from cluster.env')
}
