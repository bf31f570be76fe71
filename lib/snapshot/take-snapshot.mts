// Taking a snapshot of the whole cluster, and removing one. Either it is there as a whole in the
// end, or nothing of it.
import { existsSync } from 'node:fs'
import { mkdir, readdir, rename, rm } from 'node:fs/promises'
import { join } from 'node:path'
import type { Cluster } from '../cluster.mts'
import { StepError } from '../errors.mts'
import { writeFileAtomic } from '../files.mts'
import { formatBytes } from '../format.mts'
import { freeBytes, hasDisk } from '../qemu/disk.mts'
import { type Disk, openDisks } from './disk-snapshots.mts'
import { firmwareFiles, keepFiles, settingsFiles } from './kept-files.mts'
import {
  checkSnapshotName,
  recordFile,
  type Snapshot,
  type SnapshotMachine,
  snapshotFolder,
} from './snapshots.mts'

/** Bytes for each machine: what it changes from now on is written beside what the snapshot keeps. */
const growth = 2 ** 30

/** In an unfinished snapshot's folder: what has its name on a disk from now on is ours to remove. */
const touching = 'touching-disks'

/**
 * Takes a snapshot. The caller holds the locks of the cluster and of all machines. If it fails
 * nothing is left of it, and every machine that ran goes on.
 *
 * @param options.automatic it is a restore's own
 * @param options.beforePause what can be done to make the pause short
 * @param options.signal is heeded until the pause
 * @throws StepError if the name is taken, a disk is missing, room is short, or QEMU refuses
 */
export async function takeSnapshot(
  cluster: Cluster,
  name: string,
  options: {
    automatic?: boolean
    beforePause?: () => Promise<unknown>
    signal?: AbortSignal
  } = {},
): Promise<Snapshot> {
  const { automatic = false, beforePause, signal } = options
  await assertNameFree(cluster, name)
  await assertRoomToGrow(cluster)
  const disks = await openDisks(cluster, cluster.nodes)
  const partial = cluster.path('snapshots', `.${name}.partial`)
  try {
    await removeUnfinished(cluster, disks)
    await assertNotOnDisks(disks, name)
    await mkdir(partial, { recursive: true, mode: 0o700 })
    const files = await keepFiles(cluster, await settingsFiles(cluster), partial)
    await beforePause?.()
    signal?.throwIfAborted()

    await writeFileAtomic(join(partial, touching), '', 0o600)
    const firmware = await firmwareFiles(cluster)
    const pause = await atOneMoment(disks, name, async () => {
      files.push(...(await keepFiles(cluster, firmware, partial)))
    })
    const record: Snapshot = {
      name,
      taken: new Date().toISOString(),
      automatic,
      nixos: cluster.settings.NIXOS_VERSION,
      pause,
      machines: await Promise.all(disks.map((disk) => describe(disk, name))),
      files,
    }
    await writeFileAtomic(join(partial, recordFile), JSON.stringify(record, null, 2), 0o600)
    await rm(join(partial, touching))
    await rename(partial, snapshotFolder(cluster, name))
    return record
  } catch (error) {
    // What cannot be removed now is found by the next one.
    await removeUnfinished(cluster, disks).catch(() => {})
    throw error
  } finally {
    for (const disk of disks) disk.close()
  }
}

/** Removes a snapshot from the disks that have it, then its folder. The caller holds the locks. */
export async function deleteSnapshot(cluster: Cluster, { name }: Snapshot): Promise<void> {
  const nodes = cluster.nodes.filter((node) => hasDisk(cluster, node))
  const disks = await openDisks(cluster, nodes)
  try {
    await removeFromDisks(disks, name)
  } finally {
    for (const disk of disks) disk.close()
  }
  await rm(snapshotFolder(cluster, name), { recursive: true })
}

/**
 * Makes a snapshot on every disk while all machines that run stand still, and lets them go on
 * whatever happens.
 *
 * @param whilePaused does what else has to be of that moment
 * @returns seconds from the first machine's stop to the last one's start
 * @throws StepError if a disk refuses, or a machine does not go on
 */
export async function atOneMoment(
  disks: readonly Disk[],
  name: string,
  whilePaused: () => Promise<void>,
): Promise<number> {
  const running = disks.filter((disk) => disk.running)
  // What does not run does not change: it need not be done within the pause.
  for (const disk of disks) if (!disk.running) await disk.create(name)
  await Promise.all(running.map((disk) => disk.flush()))

  const began = performance.now()
  let outcome: PromiseSettledResult<void>[]
  try {
    await Promise.all(running.map((disk) => disk.pause()))
    outcome = await Promise.allSettled([...running.map((disk) => disk.create(name)), whilePaused()])
  } finally {
    await resume(running)
  }
  const seconds = (performance.now() - began) / 1000
  const failure = outcome.find(({ status }) => status === 'rejected')
  if (failure?.status === 'rejected') throw failure.reason
  return seconds
}

async function resume(disks: readonly Extract<Disk, { running: true }>[]): Promise<void> {
  const resumed = await Promise.allSettled(disks.map((disk) => disk.resume()))
  const stuck = disks.filter((_, index) => resumed[index]?.status === 'rejected')
  if (stuck.length === 0) return
  const names = stuck.map(({ node }) => node.name).join(', ')
  throw new StepError(`${names} may stand still: QEMU was told to go on and did not answer`, {
    hint: 'make up lets a machine go on',
  })
}

async function assertNameFree(cluster: Cluster, name: string): Promise<void> {
  checkSnapshotName(name)
  // Whatever case it is written in: not every file system tells them apart.
  const there = await readdir(cluster.path('snapshots')).catch(() => [])
  const taken = there.find((other) => other.toLowerCase() === name.toLowerCase())
  if (!taken) return
  throw new StepError(`there is a snapshot "${taken}" already`, {
    hint: `take another name, or remove it: ./bin/snapshot.mts --delete ${taken}`,
  })
}

/** @throws StepError if the disks could hardly grow any more */
export async function assertRoomToGrow(cluster: Cluster, free = freeBytes): Promise<void> {
  const needed = cluster.nodes.length * growth
  const available = await free(cluster.path('images'))
  if (available >= needed) return
  throw new StepError(
    `not enough disk space: ${formatBytes(needed)} are needed, ${formatBytes(available)} are free`,
    {
      hint: `after a snapshot, what the machines change is written beside it; make room where ${cluster.path('images')} is, or remove a snapshot: ./bin/snapshot.mts --list`,
    },
  )
}

async function assertNotOnDisks(disks: readonly Disk[], name: string): Promise<void> {
  for (const disk of disks) {
    const { snapshots } = await disk.content()
    if (!snapshots.some((snapshot) => snapshot.name === name)) continue
    throw new StepError(`the disk of ${disk.node.name} has a snapshot "${name}" of its own`, {
      hint: `it was not made by this script: take another name`,
    })
  }
}

/** Snapshots that were interrupted by force, or by this computer's end, and the failed one. */
async function removeUnfinished(cluster: Cluster, disks: readonly Disk[]): Promise<void> {
  const there = await readdir(cluster.path('snapshots')).catch(() => [])
  for (const folder of there) {
    const [, name] = folder.match(/^\.(.+)\.partial$/) ?? []
    if (!name) continue
    const path = cluster.path('snapshots', folder)
    if (existsSync(join(path, touching))) await removeFromDisks(disks, name)
    await rm(path, { recursive: true })
  }
}

async function removeFromDisks(disks: readonly Disk[], name: string): Promise<void> {
  for (const disk of disks) {
    const { snapshots } = await disk.content()
    if (snapshots.some((snapshot) => snapshot.name === name)) await disk.delete(name)
  }
}

async function describe(disk: Disk, name: string): Promise<SnapshotMachine> {
  const { bytes, snapshots } = await disk.content()
  const found = snapshots.find((snapshot) => snapshot.name === name)
  if (!found) throw new StepError(`the disk of ${disk.node.name} does not list the new snapshot`)
  return {
    name: disk.node.name,
    role: disk.node.role,
    running: disk.running,
    bytes,
    disk: found,
  }
}
