// Whether this computer has enough left for the machines that do not run yet.
import { freemem } from 'node:os'
import { $ } from 'zx/core'
import type { Cluster } from '../cluster.mts'
import { formatBytes } from '../format.mts'
import { lanSwitchStatus } from '../lan/lan-switch.mts'
import { assertDiskSpace, freeBytes, hasDisk } from '../qemu/disk.mts'
import { assertFree, isPortFree } from '../qemu/ports.mts'
import { assertPortsFree, isRunning } from '../qemu/vm.mts'
import { type Finding, problem } from './finding.mts'

/** Too little memory is a warning: the machines take it only as they need it. */
export async function checkMemory(
  cluster: Cluster,
  free: () => Promise<number> = freeMemory,
): Promise<Finding> {
  const name = 'free memory'
  let needed = 0
  for (const node of cluster.nodes) {
    if (!(await isRunning(cluster, node))) needed += node.memory * 2 ** 20
  }
  const available = await free()
  const [found, wanted] = [formatBytes(available), formatBytes(needed)]
  if (available >= needed) return { name, found, wanted, state: 'ok' }
  const advice = `the machines may come to take ${wanted}: end other programs, or lower CONTROL_PLANE_MEM and WORKER_MEM in cluster.env`
  return { name, found, wanted, state: 'warning', advice }
}

/** Room for the disks that are not there yet. @param free bytes that are free in a folder */
export async function checkDisk(
  cluster: Cluster,
  free: (folder: string) => Promise<number> = freeBytes,
): Promise<Finding> {
  const name = 'free disk'
  const nodes = cluster.nodes.filter((node) => !hasDisk(cluster, node))
  const wanted = `for ${nodes.length} new ${nodes.length === 1 ? 'machine' : 'machines'}`
  let found = ''
  try {
    await assertDiskSpace(cluster, nodes, async (folder) => {
      const bytes = await free(folder)
      found = formatBytes(bytes)
      return bytes
    })
    return { name, found, wanted, state: 'ok' }
  } catch (error) {
    return problem(name, found, wanted, error)
  }
}

/** The ports of the machines and of their switch. Those of machines that run are no problem. */
export async function checkPorts(cluster: Cluster): Promise<Finding> {
  const [name, wanted] = ['ports', 'free']
  try {
    await assertPortsFree(cluster, cluster.nodes)
    const port = cluster.settings.LAN_SWITCH_PORT
    if (!(await isPortFree('udp', port)) && !(await lanSwitchStatus(cluster))) {
      await assertFree([{ transport: 'udp', port, variable: 'LAN_SWITCH_PORT' }])
    }
    return { name, found: 'free', wanted, state: 'ok' }
  } catch (error) {
    return problem(name, 'taken', wanted, error)
  }
}

/** Bytes that programs could have without swapping. */
async function freeMemory(): Promise<number> {
  if (process.platform !== 'darwin') return freemem()
  // There freemem() counts pages without any content, and macOS fills them with caches.
  const { stdout } = await $({ quiet: true, nothrow: true })`vm_stat`
  const pageSize = Number(stdout.match(/page size of (\d+) bytes/)?.[1] ?? 0)
  const kinds = ['free', 'inactive', 'speculative', 'purgeable']
  const pages = kinds.map((kind) =>
    Number(stdout.match(new RegExp(`^Pages ${kind}:\\s+(\\d+)`, 'm'))?.[1] ?? 0),
  )
  const sum = pages.reduce((total, count) => total + count, 0)
  return Math.max(freemem(), sum * pageSize)
}
