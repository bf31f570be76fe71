// The folder rehearsal/: a copy of the project with a small cluster of its own, so that a rehearsal
// changes nothing of a real one and can run beside it.
import { cp, mkdir, readFile, rm, symlink, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import type { Cluster } from '../../lib/cluster.mts'
import { freePorts, projectRoot } from '../checkout.mts'

export const rehearsalFolder = join(projectRoot, 'rehearsal')

/** What a clone holds and the scripts need. */
const copied = ['bin', 'lib', 'configs', 'cluster.env', 'package.json', 'Makefile']
const generated = /\.kubeconfig$|encryption-config\.yaml$/

/** Values that fit machines without KVM on two cores. */
const small: Record<string, string | number> = {
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
  // The stand-in has no Cilium.
  KUBE_PROXY_MODE: 'nftables',
}

/**
 * Makes the folder anew.
 *
 * @param cluster the real one, whose nodes the small one has
 * @param iso the stand-in
 */
export async function makeRehearsalFolder(cluster: Cluster, iso: string): Promise<void> {
  await rm(rehearsalFolder, { recursive: true, force: true })
  await mkdir(rehearsalFolder)
  for (const name of copied) {
    await cp(join(projectRoot, name), join(rehearsalFolder, name), {
      recursive: true,
      filter: (path) => !generated.test(path),
    })
  }
  await symlink(join(projectRoot, 'node_modules'), join(rehearsalFolder, 'node_modules'))

  const [api = 0, ...ssh] = await freePorts(cluster.nodes.length + 1)
  await setValues(join(rehearsalFolder, 'cluster.env'), {
    ...small,
    NIXOS_ISO_URL: iso,
    API_PORT: api,
    // Below the ports that the system hands out, and not those of a real cluster.
    LAN_SWITCH_PORT: cluster.settings.LAN_SWITCH_PORT - 1000 * (1 + Math.floor(Math.random() * 8)),
    ...Object.fromEntries(
      cluster.nodes.map(({ name }, index) => [
        `SSH_PORT_${name.replaceAll('-', '_')}`,
        ssh[index] ?? 0,
      ]),
    ),
  })
}

async function setValues(file: string, values: Record<string, string | number>): Promise<void> {
  let text = await readFile(file, 'utf8')
  for (const [name, value] of Object.entries(values)) {
    const line = `${name}='${value}'`
    const pattern = new RegExp(`^${name}=.*$`, 'm')
    text = pattern.test(text) ? text.replace(pattern, () => line) : `${text}${line}\n`
  }
  await writeFile(file, text)
}
