// A machine's disk and UEFI variables, as files. A disk has its own name only when a system is
// installed on it: until then it is NODE.qcow2.partial, which nothing takes for a machine.
import { constants, existsSync } from 'node:fs'
import { chmod, copyFile, mkdir, open, rename, rm, stat, statfs } from 'node:fs/promises'
import { basename, dirname, join } from 'node:path'
import { $ } from 'zx/core'
import type { Cluster, Node } from '../cluster.mts'
import { StepError } from '../errors.mts'
import type { FlashImage } from './firmware.mts'
import type { Host } from './host.mts'
import { filesOf } from './machine-files.mts'

const gigabyte = 2 ** 30

/** What an installed machine with its container images comes to, in GB. */
const filled = 6

/** Whether the machine has a disk with a system on it. */
export function hasDisk(cluster: Cluster, node: Node): boolean {
  return existsSync(filesOf(cluster, node).disk)
}

/**
 * Makes the empty disk that the installer is to work on, in the place of a former attempt's.
 *
 * @param options.replace the machine may have a disk, which stays until the new one is finished
 * @throws StepError if the machine has a disk already, or this computer has no room for one
 */
export async function createDisk(
  cluster: Cluster,
  node: Node,
  options: { replace?: boolean } = {},
): Promise<void> {
  const { disk, partialDisk } = filesOf(cluster, node)
  if (existsSync(disk) && !options.replace) {
    throw new StepError(`${node.name} has a disk already: images/${basename(disk)}`, {
      hint: `to install it anew, remove that file; to start it: ./bin/provision.mts ${node.name}`,
    })
  }
  await assertDiskSpace(cluster, [node])
  await mkdir(dirname(disk), { recursive: true })
  await rm(partialDisk, { force: true })
  const size = `${cluster.settings.DISK_SIZE}G`
  await $({ quiet: true })`qemu-img create -q -f qcow2 ${partialDisk} ${size}`
}

/** Gives the disk its own name: a system is installed on it, down to the last block. */
export async function finishDisk(cluster: Cluster, node: Node): Promise<void> {
  const { disk, partialDisk } = filesOf(cluster, node)
  const file = await open(partialDisk, 'r+')
  await file.sync()
  await file.close()
  await rename(partialDisk, disk)
}

/** Removes what an installation that failed has left. */
export async function discardDisk(cluster: Cluster, node: Node): Promise<void> {
  const { disk, partialDisk, efiVars } = filesOf(cluster, node)
  await rm(partialDisk, { force: true })
  if (!existsSync(disk)) await rm(efiVars, { force: true })
}

/**
 * Makes sure that there is room for new disks. They grow as they fill; what counts is what an
 * installed machine takes, not the size that it sees.
 *
 * @param free bytes that are free in a folder
 */
export async function assertDiskSpace(
  cluster: Cluster,
  nodes: readonly Node[],
  free: (folder: string) => Promise<number> = freeBytes,
): Promise<void> {
  const folder = cluster.path('images')
  const needed = nodes.length * Math.min(cluster.settings.DISK_SIZE, filled)
  const available = (await free(folder)) / gigabyte
  if (available >= needed) return
  const names = nodes.map(({ name }) => name).join(', ')
  throw new StepError(
    `not enough disk space: ${names} ${nodes.length > 1 ? 'need' : 'needs'} ${needed} GB, ${available.toFixed(1)} GB are free`,
    { hint: `make room on the file system of ${folder}` },
  )
}

/** Bytes that are free where a folder is, or is to be. */
export async function freeBytes(folder: string): Promise<number> {
  const { bavail, bsize } = await statfs(existsSync(folder) ? folder : dirname(folder))
  return bavail * bsize
}

/**
 * Makes the machine's UEFI variables from the firmware's template. Present ones are kept, unless
 * they are of another size: the firmware was exchanged for one that could not use them. (They hold
 * nothing the machine needs: it boots from the path for removable media.)
 *
 * @param options.fresh never keep: for an installation
 */
export async function prepareEfiVars(
  cluster: Cluster,
  node: Node,
  host: Host,
  options: { fresh?: boolean } = {},
): Promise<void> {
  const { efiVars } = filesOf(cluster, node)
  if (!options.fresh && (await fits(efiVars, host.firmware.vars))) return
  await mkdir(dirname(efiVars), { recursive: true })
  if (!options.fresh && existsSync(efiVars)) await rename(efiVars, `${efiVars}.old`)
  const beside = join(dirname(efiVars), `.${basename(efiVars)}.tmp-${process.pid}`)
  try {
    await copyFile(host.firmware.vars.path, beside, constants.COPYFILE_FICLONE)
    // The template is read-only in some packages.
    await chmod(beside, 0o600)
    await rename(beside, efiVars)
  } finally {
    await rm(beside, { force: true })
  }
}

async function fits(path: string, template: FlashImage): Promise<boolean> {
  const found = await stat(path).catch(() => undefined)
  if (!found) return false
  // A qcow2 file grows; its size says nothing.
  return template.format === 'qcow2' || found.size === (await stat(template.path)).size
}
