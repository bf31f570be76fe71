// A machine's files laid out on this computer in cloud-init/NODE/nixos/, and packed for the way.
import { createHash } from 'node:crypto'
import { chmod, mkdir, readdir, readFile, rename, rm, stat, writeFile } from 'node:fs/promises'
import { dirname, join, relative } from 'node:path'
import { promisify } from 'node:util'
import { gzip } from 'node:zlib'
import type { Cluster, Node } from '../cluster.mts'
import { StepError } from '../errors.mts'
import { machineProxy } from './machine-proxy.mts'
import { type StagedFile, stagedFiles, targetOf } from './staged-files.mts'
import { type TarEntry, tar } from './tar.mts'

/** Where a node's files are staged. */
export function stagingFolder(cluster: Cluster, node: Node): string {
  return cluster.path('cloud-init', node.name, 'nixos')
}

/**
 * The values of cluster.env that the modules in configs/ read, for one node: cluster.json.
 *
 * @param sshKeys public keys that may log in as root
 * @param digests staged path to hash of the content. By it a changed certificate changes the
 *   configuration, so the machine knows which services to restart.
 */
export function clusterJson(
  cluster: Cluster,
  node: Node,
  sshKeys: readonly string[],
  digests: Readonly<Record<string, string>>,
) {
  const { settings } = cluster
  const { http, https, no, caFile } = machineProxy(cluster)
  const { name, ip, mac, lanMac, podCidr = null } = node
  return {
    name: settings.CLUSTER_NAME,
    role: node.role,
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
    proxy: { http, https, no, ca: Boolean(caFile) },
    sshKeys,
    digests,
  }
}

/**
 * Lays out a node's files in cloud-init/NODE/nixos/. They are written beside it and take its
 * place at the end: an interruption leaves what was there.
 *
 * @returns their staged paths
 * @throws StepError that names the files that are missing and what makes them
 */
export async function stage(cluster: Cluster, node: Node): Promise<string[]> {
  const table = stagedFiles(cluster, node)
  const login = {
    source: cluster.path('tls', 'ssh_ed25519.pub'),
    madeBy: './bin/generate-certs.mts',
  }
  const contents = await readAll(cluster, node, [login, ...table])
  const contentOf = (source: string) => contents.get(source) ?? Buffer.alloc(0)
  const digests = Object.fromEntries(
    table
      .filter(({ target }) => !target.startsWith('/etc/nixos/'))
      .map(({ staged, source }) => [staged, digestOf(contentOf(source))]),
  )
  const sshKey = contentOf(login.source).toString().trim()
  const values = JSON.stringify(clusterJson(cluster, node, [sshKey], digests), null, 2)
  const files = [
    ...table.map(({ staged, mode, source }) => ({ staged, mode, data: contentOf(source) })),
    { staged: 'cluster.json', mode: 0o644, data: Buffer.from(`${values}\n`) },
  ]

  const folder = stagingFolder(cluster, node)
  const fresh = `${folder}.new`
  await rm(fresh, { recursive: true, force: true })
  await mkdir(fresh, { recursive: true, mode: 0o700 })
  try {
    for (const { staged, mode, data } of files) {
      const path = join(fresh, staged)
      await mkdir(dirname(path), { recursive: true })
      await writeFile(path, data, { mode })
      // The umask may have taken bits away.
      await chmod(path, mode)
    }
    await takePlace(fresh, folder)
  } finally {
    await rm(fresh, { recursive: true, force: true })
  }
  return files.map(({ staged }) => staged)
}

// Folders of ours, which a machine may not have yet.
const folders = ['etc/nixos/', 'var/lib/kubernetes/', 'var/lib/kubernetes/pki/']

/**
 * A node's staged files as they lie on the machine: a gzipped tar archive to unpack at its root,
 * or at /mnt during installation. Everything in it is root's.
 *
 * @throws StepError if the node is not staged
 */
export async function stagedArchive(cluster: Cluster, node: Node): Promise<Buffer> {
  const folder = stagingFolder(cluster, node)
  const entries = await readdir(folder, { recursive: true, withFileTypes: true }).catch((cause) => {
    throw new StepError(`${node.name} has no staged configuration`, {
      hint: `./bin/generate-nocloud-iso.mts ${node.name}`,
      cause,
    })
  })
  const files: TarEntry[] = await Promise.all(
    entries
      .filter((entry) => entry.isFile())
      .map(async (entry) => {
        const path = join(entry.parentPath ?? entry.path, entry.name)
        const [{ mode }, data] = await Promise.all([stat(path), readFile(path)])
        return { path: targetOf(relative(folder, path)).slice(1), mode: mode & 0o777, data }
      }),
  )
  files.sort((one, other) => (one.path < other.path ? -1 : 1))
  const made: TarEntry[] = folders.map((path) => ({ path, mode: 0o755 }))
  return promisify(gzip)(tar([...made, ...files], Date.now() / 1000))
}

/** Enough of SHA-256 to tell two contents apart, and too little to learn from. */
function digestOf(data: Uint8Array): string {
  return createHash('sha256').update(data).digest('hex').slice(0, 16)
}

/** The contents by source; if any is missing, an error that names all that are. */
async function readAll(
  cluster: Cluster,
  node: Node,
  files: readonly Pick<StagedFile, 'source' | 'madeBy'>[],
): Promise<Map<string, Buffer>> {
  const contents = new Map<string, Buffer>()
  const missing: (typeof files)[number][] = []
  for (const file of files) {
    const content = await readFile(file.source).catch(() => undefined)
    if (content) contents.set(file.source, content)
    else missing.push(file)
  }
  if (missing.length === 0) return contents
  const count = missing.length === 1 ? 'a file is' : `${missing.length} files are`
  throw new StepError(`${node.name} cannot be staged: ${count} missing`, {
    output: missing.map(({ source }) => relative(cluster.root, source)).join('\n'),
    hint: [...new Set(missing.map(({ madeBy }) => madeBy))].join('\n'),
  })
}

/** Puts a folder in another's place. A folder cannot be renamed over one that is not empty. */
async function takePlace(fresh: string, folder: string): Promise<void> {
  const former = `${folder}.former`
  await rm(former, { recursive: true, force: true })
  await rename(folder, former).catch(ignoreMissing)
  await rename(fresh, folder)
  await rm(former, { recursive: true, force: true })
}

function ignoreMissing(error: NodeJS.ErrnoException): void {
  if (error.code !== 'ENOENT') throw error
}
