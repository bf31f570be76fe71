#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// Prepares what each machine gets as a tree of files. (No ISO is made; the name is historical.)
import { existsSync } from 'node:fs'
import { mkdir, readFile, rename, rm, writeFile } from 'node:fs/promises'
import { dirname, join, relative, resolve } from 'node:path'
import { authorityOf, certificatesOf } from '../lib/certificates.mts'
import { chooseNodes, loadCluster, type Node } from '../lib/cluster.mts'
import { StepError } from '../lib/errors.mts'
import { privateFolder, sha256 } from '../lib/files.mts'
import { withLock } from '../lib/lock.mts'
import { machineProxy } from '../lib/proxy.mts'
import { script } from '../lib/script.mts'
import { step } from '../lib/steps.mts'

const { flags, args } = script({
  does: `Stages each node's NixOS configuration with the certificates, kubeconfigs and host key that this
node needs, in folders as on the machine. The installer and reconfig copy them there.`,
  reads: ['cluster.env', 'configs/*.nix, *.kubeconfig, encryption-config.yaml', 'tls/'],
  writes: ['cloud-init/NODE/nixos/'],
  flags: { list: { help: 'show which file goes where on the machine, and stage nothing' } },
  args: '[NODE...]',
  examples: ['./bin/generate-nocloud-iso.mts', './bin/generate-nocloud-iso.mts --list sigma'],
})

const cluster = loadCluster()
const { settings } = cluster
const { caFile, ...proxy } = machineProxy(cluster)
const [certs, kubernetes] = ['./bin/generate-certs.mts', '/var/lib/kubernetes']

const nodes = chooseNodes(cluster, args)
if (flags.list) for (const node of nodes) list(node)
else await withLock(cluster.path('run', 'pki.lock'), 'staging files', stageAll, { wait: 5 })

async function stageAll(): Promise<void> {
  for (const node of nodes) await step(`stage ${node.name}`, () => stage(node))
}

interface StagedFile {
  mode: number // 0600 for secrets; users that own files exist only on the machine, which sets them
  from: string // path on this computer
  to: string // path on the machine
  madeBy: string // what creates a missing file
  digest?: string | undefined // its name in the digests of cluster.json; none for what Nix reads
}

/** What a node gets, and nothing that only another one needs. */
function filesOf(node: Node): StagedFile[] {
  const isWorker = node.role === 'worker'
  const row = (mode: number, from: string, to: string, madeBy: string, digest?: string) => {
    return { mode, from: resolve(cluster.root, from), to, madeBy, digest }
  }
  const nix = (file: string) =>
    row(0o644, `configs/${file}`, `/etc/nixos/${file}`, 'git checkout configs')
  const ca = (file: string) =>
    row(0o644, file, '/etc/nixos/proxy-ca.pem', 'correct PROXY_CA_FILE in cluster.env')
  const pki = (mode: number, file: string) =>
    row(mode, `tls/${file}`, `${kubernetes}/pki/${file}`, certs, `pki/${file}`)
  const config = (file: string, script: string, digest = file) =>
    row(0o600, `configs/${file}`, `${kubernetes}/${file}`, `./bin/${script}.mts`, digest)
  const kubeconfig = (user: string) =>
    config(`${user}.kubeconfig`, 'generate-kubeconfigs', `kubeconfigs/${user}.kubeconfig`)
  const [hostKey, onMachine] = [`tls/ssh_host_${node.name}_ed25519`, 'ssh/ssh_host_ed25519_key']
  const users = isWorker ? [node.name] : ['kube-controller-manager', 'kube-scheduler']
  if (isWorker && settings.KUBE_PROXY_MODE !== 'cilium') users.push('kube-proxy')
  return [
    ...['configuration.nix', 'nixos-base.nix', `${node.role}.nix`].map(nix),
    ...(caFile ? [ca(caFile)] : []),
    ...[authorityOf(cluster), ...certificatesOf(cluster)].flatMap(({ name, on, keyOn }) => [
      ...(on.includes(node.name) ? [pki(0o644, `${name}.pem`)] : []),
      ...(keyOn.includes(node.name) ? [pki(0o600, `${name}-key.pem`)] : []),
    ]),
    ...users.map(kubeconfig),
    ...(isWorker ? [] : [config('encryption-config.yaml', 'generate-encryption-config')]),
    row(0o600, hostKey, `/etc/${onMachine}`, certs, onMachine),
    row(0o644, `${hostKey}.pub`, `/etc/${onMachine}.pub`, certs, `${onMachine}.pub`),
  ]
}

/**
 * cluster.json: the values of cluster.env that the modules in configs/ read.
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
    nodes: cluster.nodes.map(({ name, role, ip, podCidr = null }) => ({ name, role, ip, podCidr })),
    lanPrefixLength: Number(settings.LAN_CIDR.split('/')[1]),
    apiPort: settings.API_PORT,
    serviceCidr: settings.K8S_SERVICE_CIDR,
    podCidr: settings.K8S_POD_CIDR,
    clusterDns: settings.K8S_CLUSTER_DNS,
    clusterDomain: settings.K8S_CLUSTER_DOMAIN,
    kubeProxyMode: settings.KUBE_PROXY_MODE,
    logLevel: settings.KUBE_LOG_LEVEL,
    proxy: { ...proxy, ca: Boolean(caFile) },
    sshKeys: [sshKey],
    digests,
  }
  return `${JSON.stringify(values, null, 2)}\n`
}

/** Writes a node's files to a new folder, which then replaces the old one as a whole. */
async function stage(node: Node): Promise<void> {
  const files = filesOf(node)
  const login = { from: cluster.path('tls', 'ssh_ed25519.pub'), madeBy: certs }
  const [sshKey, ...contents] = await readAll(node, [login, ...files])
  const digests = files.flatMap(({ digest }, index) => {
    // A part of it shows that a file has changed, and nothing about what is in it.
    return digest ? [[digest, sha256(contents[index] ?? '').slice(0, 16)] as const] : []
  })
  const json = clusterJson(node, String(sshKey).trim(), Object.fromEntries(digests))

  const current = cluster.path('cloud-init', node.name, 'nixos')
  const [fresh, former] = [`${current}.new`, `${current}.former`]
  await privateFolder(dirname(current))
  await rm(fresh, { recursive: true, force: true })
  // The machine gets these modes, also those of the folders: / and /etc are among them.
  process.umask(0o022)
  const write = async (to: string, mode: number, data: string | Buffer) => {
    await mkdir(dirname(join(fresh, to)), { recursive: true })
    await writeFile(join(fresh, to), data, { mode })
  }
  for (const [index, { to, mode }] of files.entries()) await write(to, mode, contents[index] ?? '')
  await write('/etc/nixos/cluster.json', 0o644, json)

  // A folder cannot be renamed over one that is not empty.
  await rm(former, { recursive: true, force: true })
  if (existsSync(current)) await rename(current, former)
  await rename(fresh, current)
  await rm(former, { recursive: true, force: true })
}

/** Their contents. @throws StepError that names every missing file and what creates it */
async function readAll(node: Node, files: readonly Pick<StagedFile, 'from' | 'madeBy'>[]) {
  const contents = await Promise.all(
    files.map(({ from }) =>
      readFile(from).catch((error: NodeJS.ErrnoException) => {
        if (error.code !== 'ENOENT') throw error
      }),
    ),
  )
  const missing = files.filter((_, index) => !contents[index])
  if (missing.length === 0) return contents
  const count = missing.length === 1 ? 'a file is' : `${missing.length} files are`
  throw new StepError(`${node.name} cannot be staged: ${count} missing`, {
    output: missing.map(({ from }) => relative(cluster.root, from)).join('\n'),
    hint: [...new Set(missing.map(({ madeBy }) => madeBy))].join('\n'),
  })
}

function list(node: Node): void {
  console.log(`${node.name}:`)
  for (const { from, to, mode } of filesOf(node)) {
    console.log(`  ${mode.toString(8)}  ${to}  from ${relative(cluster.root, from)}`)
  }
  console.log('  644  /etc/nixos/cluster.json  from cluster.env')
}
