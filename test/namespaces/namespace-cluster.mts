// A cluster whose machines are sets of Linux namespaces: raised, kept, and taken away. Everything in
// a machine is what the rehearsal's virtual machines have, from the same layers and the same
// evaluation of the staged configuration; only kernel and hardware are this computer's.
import { spawn } from 'node:child_process'
import { createHash } from 'node:crypto'
import { existsSync, openSync } from 'node:fs'
import { mkdir, readFile, rm, symlink, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { stringify } from 'yaml'
import { $ } from 'zx'
import { type Cluster, loadCluster } from '../../lib/cluster.mts'
import { lastLines, StepError } from '../../lib/errors.mts'
import { stopLanSwitch } from '../../lib/lan.mts'
import { filesOf } from '../../lib/qemu.mts'
import { step } from '../../lib/steps.mts'
import { waitFor } from '../../lib/wait.mts'
import { type Checkout, makeCheckout, projectRoot, run } from '../checkout.mts'
import { installerFiles, makeIso } from '../installer-iso.mts'
import { goPrograms, kubernetesPrograms } from '../kubernetes/programs.mts'
import { debianLayer } from '../rehearsal/debian-layer.mts'
import { imageArchives, imageStore } from '../rehearsal/images.mts'
import { kubernetesLayer } from '../rehearsal/kubernetes-layer.mts'
import { ownLayer } from '../rehearsal/own-layer.mts'
import { missing } from '../tools.mts'
import { type CiliumParts, ciliumParts } from './cilium-image.mts'
import { differences } from './differences.mts'

const here = import.meta.dirname
const python = '/usr/bin/python3'

/** The clusters of this checkout, each in a folder of its own. */
export const clusterFolder = join(projectRoot, 'namespaces')
export const keptFolder = join(clusterFolder, 'kept')

/** Why there can be no such cluster here; false if there can. */
export function cannotRun(): string | false {
  if (process.platform !== 'linux') return 'machines made of namespaces need Linux'
  if (process.getuid?.() !== 0) return 'only root can make namespaces, networks and cgroups'
  if (!existsSync(python)) return `${python} is missing`
  return missing(
    'mmdebstrap',
    'sqfstar',
    'unshare',
    'ip',
    'iptables',
    'nix-instantiate',
    'qemu-system-x86_64',
    'qemu-img',
    'xorriso',
    'bsdtar',
    'setcap',
  )
}

/** What machines are made of, all from the cache once it is there. */
interface Parts {
  /** Name to squashfs. */
  layers: Record<string, string>
  /** Folder that is containerd's root on a new worker. */
  imageStore: string
  cilium: CiliumParts
  /** Folders of kubectl and helm for the PATH. */
  path: string[]
}

export async function makeParts(): Promise<Parts> {
  const { settings } = loadCluster({ env: {} })
  const found = [await kubernetesPrograms(), await goPrograms('etcd'), await goPrograms('helm')]
  const [kubernetes = '', etcd = '', helm = ''] = found.map(({ folder, reason }) => {
    if (folder) return folder
    throw new StepError(reason ?? '')
  })
  const debian = await debianLayer()
  const own = await ownLayer(debian, settings.NIXOS_VERSION)
  const cilium = await ciliumParts()
  const { archives, missing: absent } = await imageArchives(settings, debian.busybox)
  if (absent.length > 0) throw new StepError(`images are missing: ${absent.join('; ')}`)
  return {
    layers: {
      debian: debian.image,
      'stand-in': own.image,
      kubernetes: await kubernetesLayer([kubernetes, etcd]),
    },
    imageStore: await imageStore(debian, [...archives, cilium.archive]),
    cilium,
    path: [kubernetes, helm],
  }
}

export interface NamespaceCluster {
  cluster: Cluster
  /** Of its checkout, with `bin/` and the file of values for `install-cilium --values`. */
  root: string
  /** Where kubectl and helm of the right versions are, and the QEMU that switches machines on. */
  path: string[]
}

const scripts = [
  'generate-certs',
  'generate-encryption-config',
  'generate-kubeconfigs',
  'generate-nocloud-iso',
]

/**
 * Raises a cluster; one that is in the folder is taken away first.
 *
 * @param folder of all its files
 * @param settings variables of cluster.env to change
 * @param keep whether it outlives this process
 */
export async function raise({
  folder,
  settings = {},
  keep = false,
}: {
  folder: string
  settings?: Record<string, string | number>
  keep?: boolean
}): Promise<NamespaceCluster> {
  const reason = cannotRun()
  if (reason) throw new StepError(reason)
  const parts = await makeParts()
  await step('take a former cluster away', () => takeAway(folder))
  await mkdir(folder, { recursive: true })
  const checkout = await makeCheckout({
    folder: join(folder, 'checkout'),
    settings: {
      CILIUM_CHART: parts.cilium.chart,
      NIXOS_ISO_URL: join(folder, 'installer.iso'),
      // Its own QEMU emulates nothing, and needs no firmware.
      QEMU_ACCEL: 'tcg',
      QEMU_FIRMWARE_CODE: join(folder, 'firmware'),
      QEMU_FIRMWARE_VARS: join(folder, 'firmware'),
      KUBE_LOG_LEVEL: 1,
      ...settings,
    },
  })
  const { root } = checkout
  await step('certificates, kubeconfigs, staged configuration', async (detail) => {
    for (const name of scripts) {
      detail(name)
      await runOrFail(checkout, name)
    }
  })
  const cluster = loadCluster({ root, env: {} })
  await writeFile(join(root, 'differences.yaml'), ciliumValues())
  const path = [...parts.path, join(folder, 'bin')]
  await step('machines', async () => {
    await layOut(folder, cluster, parts)
    await startSupervisor(folder, parts, keep)
    await runOrFail(checkout, 'provision', { PATH: [...path, process.env.PATH].join(':') })
  })
  return { cluster, root, path }
}

async function runOrFail(checkout: Checkout, name: string, env = {}): Promise<void> {
  const { exitCode, stderr } = await run(checkout, `bin/${name}.mts`, [], { env })
  if (exitCode !== 0) throw new StepError(`${name} failed`, { output: lastLines(stderr) })
}

/** The cluster that `npm run cluster` has raised. */
export async function keptCluster(): Promise<NamespaceCluster> {
  const root = join(keptFolder, 'checkout')
  if (!existsSync(join(keptFolder, 'ready'))) {
    throw new StepError('there is no cluster', { hint: 'npm run cluster' })
  }
  const parts = await makeParts()
  const path = [...parts.path, join(keptFolder, 'bin')]
  return { cluster: loadCluster({ root, env: {} }), root, path }
}

/** Ends a cluster, also one whose supervisor was killed, and removes its files. */
export async function takeAway(folder: string): Promise<void> {
  const file = join(folder, 'supervisor.pid')
  const pid = Number(await readFile(file, 'utf8').catch(() => ''))
  const line = pid ? await readFile(`/proc/${pid}/cmdline`, 'utf8').catch(() => '') : ''
  if (line.includes(join(folder, 'cluster.json'))) {
    process.kill(pid, 'SIGTERM')
    await waitFor(
      { failure: 'the former cluster does not end', timeout: 60, every: 50 },
      async () => (existsSync(`/proc/${pid}`) ? 'it is still running' : undefined),
    )
  }
  await stopLanSwitch({ path: (...parts) => join(folder, 'checkout', ...parts) })
  // What a killed supervisor could not remove: the kernel has removed all the rest.
  if (existsSync(folder))
    await $({ quiet: true })`${python} -IB ${supervisor} --clear ${idOf(folder)}`
  await rm(folder, { recursive: true, force: true })
}

const supervisor = join(here, 'supervisor.py')

/** Part of the names of what is one for the whole computer: no two folders have the same. */
export function idOf(folder: string): string {
  return createHash('sha256').update(folder).digest('hex').slice(0, 8)
}

/** The files of the machines before their first start, and what switches them on. */
async function layOut(folder: string, cluster: Cluster, parts: Parts): Promise<void> {
  const outside = '[Network]\nDHCP=no\nAddress=10.0.2.15/24\nGateway=10.0.2.2\nDNS=10.0.2.3\n'
  const files: Record<string, string> = {
    // The signature by which the scripts know firmware.
    firmware: '_FVH',
    'blank/nix/machine/install.py': await readFile(join(here, 'install.py'), 'utf8'),
    'blank/nix/machine/differences.json': JSON.stringify(differences()),
    // nixos-install expects a kernel on its CD.
    'blank/nix/machine/cd/boot/nix/store/0-linux/bzImage': 'none',
    'blank/nix/machine/cd/boot/nix/store/0-initrd-linux/initrd': 'none',
    'blank/nix/machine/systemd/network/10-outside.network.d/50-machine.conf': outside,
    // Its messages are this computer's.
    'blank/nix/machine/systemd/journald.conf.d/50-machine.conf':
      '[Journal]\nReadKMsg=no\nAudit=no\n',
  }
  for (const [name, text] of Object.entries(files)) {
    await mkdir(join(folder, name, '..'), { recursive: true })
    await writeFile(join(folder, name), text)
  }
  await symlink(parts.imageStore, join(folder, 'images'))
  await mkdir(join(folder, 'bin'))
  for (const architecture of ['x86_64', 'aarch64']) {
    await symlink(join(here, 'qemu.py'), join(folder, 'bin', `qemu-system-${architecture}`))
  }
  await makeIso(join(folder, 'installer.iso'), installerFiles)
  await mkdir(cluster.path('images'), { recursive: true })
  for (const node of cluster.nodes) {
    const staged = cluster.path('cloud-init', node.name, 'nixos')
    await $({ quiet: true })`sh ${join(here, 'lay-out.sh')} ${folder} ${node.name} ${staged}`
    // By its disk the scripts know that a machine is installed.
    await writeFile(filesOf(cluster, node).disk, '')
  }
}

async function startSupervisor(folder: string, { layers }: Parts, keep: boolean): Promise<void> {
  const spec = { id: idOf(folder), layers }
  await writeFile(join(folder, 'cluster.json'), JSON.stringify(spec, null, 2))
  const log = openSync(join(folder, 'supervisor.log'), 'a')
  const child = spawn(
    python,
    ['-IB', supervisor, join(folder, 'cluster.json'), ...(keep ? [] : ['--with-parent'])],
    { detached: true, stdio: [keep ? 'ignore' : 'pipe', log, log] },
  )
  child.unref()
  await writeFile(join(folder, 'supervisor.pid'), String(child.pid))
  const failure = 'the machines have no supervisor'
  await waitFor(
    { failure, timeout: 120, every: 50, log: join(folder, 'supervisor.log') },
    async () => {
      if (existsSync(join(folder, 'ready'))) return undefined
      if (child.exitCode === null) return 'it has not started yet'
      const output = lastLines(await readFile(join(folder, 'supervisor.log'), 'utf8'))
      throw new StepError(failure, { output })
    },
  )
}

/** Helm values for `install-cilium --values`, each with its reason. */
export function ciliumValues(): string {
  return differences()
    .flatMap(({ what, why, cilium }) =>
      cilium ? [`# ${what}:\n# ${why}\n${stringify(cilium)}`] : [],
    )
    .join('\n')
}
