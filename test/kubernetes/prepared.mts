// A control plane of a throwaway checkout: certificates made and configuration staged by the
// project's own scripts, files placed as on the machine, units evaluated. Ready to start.
import { execFile } from 'node:child_process'
import { access, constants, cp, mkdir } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { promisify } from 'node:util'
import { type Cluster, loadCluster } from '../../lib/cluster.mts'
import { type Checkout, makeCheckout, run } from '../checkout.mts'
import { evaluate } from '../nixos/evaluate.mts'
import { ControlPlane } from './control-plane.mts'
import { goPrograms, kubernetesPrograms, type Programs } from './programs.mts'

const scripts = [
  'bin/generate-certs.mts',
  'bin/generate-encryption-config.mts',
  'bin/generate-kubeconfigs.mts',
  'bin/generate-nocloud-iso.mts',
]

export interface Tools {
  kubernetes: string
  etcd: string
}

/**
 * Folders of the programs that a control plane needs.
 *
 * @returns the reason to skip where something is missing
 */
export async function findTools(): Promise<Tools | string> {
  const missing = await missingTool('nix-instantiate', 'setpriv', 'tar')
  if (missing) return missing
  const kubernetes = await kubernetesPrograms()
  if (!kubernetes.folder) return kubernetes.reason ?? ''
  const etcd = await findEtcd()
  return etcd.folder ? { kubernetes: kubernetes.folder, etcd: etcd.folder } : (etcd.reason ?? '')
}

/** Why to skip: the first of these programs that is not on the PATH; undefined if all are. */
export async function missingTool(...programs: string[]): Promise<string | undefined> {
  for (const program of programs) {
    if (!(await onPath(program))) return `${program} is not on the PATH`
  }
  return undefined
}

/** A checkout with certificates, kubeconfigs, encryption key and staged machines. */
export async function makeStagedCheckout(
  settings: Record<string, string | number> = {},
): Promise<{ checkout: Checkout; cluster: Cluster }> {
  const checkout = await makeCheckout({ settings, keys: true })
  for (const script of scripts) {
    const { exitCode, stderr } = await run(checkout, script)
    if (exitCode === 0) continue
    await checkout.remove()
    throw new Error(`${script}: ${stderr}`)
  }
  return { checkout, cluster: loadCluster({ root: checkout.root, env: {} }) }
}

/** A control plane, not started yet, in `machine/` of a checkout of its own. */
export async function prepareControlPlane(
  tools: Tools,
): Promise<{ checkout: Checkout; cluster: Cluster; controlPlane: ControlPlane }> {
  const { checkout, cluster } = await makeStagedCheckout()
  try {
    const root = checkout.path('machine')
    await mkdir(root)
    const staged = checkout.path('cloud-init', cluster.controlPlane.name, 'nixos')
    await cp(staged, root, { recursive: true })
    const machine = await evaluate(join(root, 'etc/nixos/configuration.nix'))
    const controlPlane = await ControlPlane.prepare(cluster, machine, { root, ...tools })
    return { checkout, cluster, controlPlane }
  } catch (error) {
    await checkout.remove()
    throw error
  }
}

/** etcd of the version that NixOS has; else the distribution's, unless it is older than 3.5. */
async function findEtcd(): Promise<Programs> {
  const built = await goPrograms('etcd')
  const [etcd, etcdctl] = await Promise.all(['etcd', 'etcdctl'].map(onPath))
  if (built.folder || !etcd || !etcdctl || dirname(etcd) !== dirname(etcdctl)) return built
  const { stdout } = await promisify(execFile)(etcd, ['--version'])
  const version = stdout.match(/Version: (3\.\d+)\./)?.[1] ?? ''
  if (version >= '3.5') return { folder: dirname(etcd) }
  return { reason: `${etcd} is ${version}, which Kubernetes no longer works with; ${built.reason}` }
}

async function onPath(program: string): Promise<string | undefined> {
  for (const folder of (process.env.PATH ?? '').split(':')) {
    const path = join(folder, program)
    if (
      await access(path, constants.X_OK).then(
        () => true,
        () => false,
      )
    )
      return path
  }
  return undefined
}
