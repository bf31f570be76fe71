// The folder rehearsal/: a copy of the project with a small cluster of its own, so that a rehearsal
// changes nothing of a real one and can run at the same time.
import { writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { stringify } from 'yaml'
import type { Cluster } from '../../lib/cluster.mts'
import { makeCheckout, projectRoot } from '../checkout.mts'
import type { CiliumParts } from '../namespaces/cilium-image.mts'
import { imagesBuiltHere } from '../namespaces/differences.mts'
import { freePorts } from '../ports.mts'

export const rehearsalFolder = join(projectRoot, 'rehearsal')

/** Values for machines without KVM on two cores. */
export const smallMachines: Record<string, string | number> = {
  CONTROL_PLANE_MEM: 1280,
  CONTROL_PLANE_CPUS: 2,
  WORKER_MEM: 1024,
  WORKER_CPUS: 1,
  DISK_SIZE: 8,
  QEMU_DISK_CACHE: 'unsafe',
  INSTALL_TIMEOUT: 1800,
  BOOT_TIMEOUT: 600,
  WAIT_TIMEOUT: 1200,
  KUBE_LOG_LEVEL: 1,
  // In place of Cilium its chart for the bridge plugin.
  KUBE_PROXY_MODE: 'nftables',
  CILIUM_CHART: join(projectRoot, 'test/charts/cilium'),
}

/** The values for `install-cilium --values` in the folder, where there is a real Cilium. */
export const ciliumValues = 'images.yaml'

/**
 * Creates the folder; what was in it is deleted.
 *
 * @param cluster the real one, whose nodes the small one has
 * @param iso of the simulated installer
 * @param cilium the real one, if it is to be used
 */
export async function makeRehearsalFolder(
  cluster: Cluster,
  iso: string,
  cilium?: CiliumParts,
): Promise<void> {
  const ports = await freePorts(cluster.nodes.length)
  const sshPorts = cluster.nodes.map(({ name }, index) => {
    return [`SSH_PORT_${name.replaceAll('-', '_')}`, ports[index] ?? 0] as const
  })
  await makeCheckout({
    folder: rehearsalFolder,
    settings: {
      ...smallMachines,
      // The agent compiles with clang.
      ...(cilium && { KUBE_PROXY_MODE: 'cilium', CILIUM_CHART: cilium.chart, WORKER_MEM: 2048 }),
      NIXOS_ISO_URL: iso,
      ...Object.fromEntries(sshPorts),
    },
  })
  if (cilium) await writeFile(join(rehearsalFolder, ciliumValues), stringify(imagesBuiltHere))
}
