// Making the cluster what it was at a snapshot: what would keep it from that is found before
// anything is touched, and what is overwritten is kept.
import { rm } from 'node:fs/promises'
import { type Cluster, loadCluster } from '../cluster.mts'
import { describeError, StepError } from '../errors.mts'
import { readIfThere, writeFileAtomic } from '../files.mts'
import { timestamp } from '../format.mts'
import { type Disk, type IdleDisk, openDisk, openDisks } from './disk-snapshots.mts'
import { damagedFiles, putBackFiles } from './kept-files.mts'
import { listSnapshots, type Snapshot, snapshotFolder } from './snapshots.mts'
import { assertRoomToGrow, deleteSnapshot, takeSnapshot } from './take-snapshot.mts'

/**
 * Makes sure that a snapshot can be restored: the same machines, all their disks there with the
 * very snapshot on each, its files as they were kept, room on this computer.
 *
 * @throws StepError with every reason why not
 */
export async function assertRestorable(cluster: Cluster, snapshot: Snapshot): Promise<void> {
  const problems = [...missingMachines(cluster, snapshot)]
  for (const machine of snapshot.machines) {
    const node = cluster.nodes.find(({ name }) => name === machine.name)
    if (!node) continue
    const problem = await openDisk(cluster, node).then(
      (disk) => diskProblem(disk, machine.disk).finally(() => disk.close()),
      (error) => describeError(error).split('\n')[0],
    )
    if (problem) problems.push(problem)
  }
  const damaged = await damagedFiles(snapshotFolder(cluster, snapshot.name), snapshot.files)
  for (const path of damaged) {
    problems.push(`snapshots/${snapshot.name}/${path} is missing or was changed`)
  }
  await assertRoomToGrow(cluster).catch((error) => problems.push(error.message))
  if (problems.length === 0) return
  const later = cluster.workers.filter(
    ({ name }) => !snapshot.machines.some((machine) => machine.name === name),
  )
  const removals = later.map(({ name }) => `make remove-worker NAME=${name}`).join(', ')
  throw new StepError(`the snapshot "${snapshot.name}" cannot be restored; nothing was touched`, {
    output: problems.join('\n'),
    hint: removals
      ? `a worker that came later has to go first: ${removals}`
      : './bin/snapshot.mts --list shows the others',
  })
}

/**
 * Overwrites disks, UEFI variables, keys and settings with those of the snapshot, after taking a
 * snapshot of what is there now. The machines are stopped, and the caller holds their locks and
 * the cluster's.
 *
 * @returns the snapshot of what was overwritten
 * @throws StepError; all is then as it was before, unless it says otherwise
 */
export async function overwriteWith(cluster: Cluster, snapshot: Snapshot): Promise<Snapshot> {
  const aside = await takeSnapshot(cluster, `before-restore-${timestamp()}`, { automatic: true })
  // After a restore that was killed half-way, what it kept aside is the last whole state there was.
  const marker = cluster.path('snapshots', '.restoring')
  const interrupted = (await readIfThere(marker))?.trim()
  if (!interrupted) await writeFileAtomic(marker, `${aside.name}\n`)
  try {
    await become(cluster, snapshot)
  } catch (error) {
    await become(cluster, aside).catch((second) => {
      throw new StepError('some disks are restored, others are not', {
        output: `${describeError(error)}\n${describeError(second)}`,
        hint: `what was there before is the snapshot "${aside.name}": make restore NAME=${aside.name}`,
      })
    })
    if (!interrupted) await rm(marker, { force: true })
    throw error
  }
  await rm(marker, { force: true })
  // The cluster of now: its settings may be others.
  const keep = [aside.name, snapshot.name, ...(interrupted ? [interrupted] : [])]
  await forgetOldAsides(loadCluster({ root: cluster.root }), keep).catch((error) => {
    console.error(`! what earlier restores kept aside is still there: ${describeError(error)}`)
  })
  return aside
}

async function become(cluster: Cluster, { name, files }: Snapshot): Promise<void> {
  const disks = await openDisks(cluster, cluster.nodes)
  const idle = disks.filter((disk): disk is IdleDisk => !disk.running)
  if (idle.length < disks.length) throw new StepError('a machine runs; its disk is not touched')
  for (const disk of idle) await disk.apply(name)
  await putBackFiles(cluster, files, snapshotFolder(cluster, name))
}

/** Of what restores have kept aside the last is enough: each keeps the disks from shrinking. */
async function forgetOldAsides(cluster: Cluster, keep: readonly string[]): Promise<void> {
  for (const snapshot of await listSnapshots(cluster)) {
    if (snapshot.automatic && !keep.includes(snapshot.name)) await deleteSnapshot(cluster, snapshot)
  }
}

function missingMachines(cluster: Cluster, { machines }: Snapshot): string[] {
  const then = machines.map(({ name, role }) => `${name} (${role})`)
  const now = cluster.nodes.map(({ name, role }) => `${name} (${role})`)
  return [
    ...now.filter((name) => !then.includes(name)).map((name) => `it does not have ${name}`),
    ...then.filter((name) => !now.includes(name)).map((name) => `it is also of ${name}`),
  ]
}

async function diskProblem(
  disk: Disk,
  wanted: Snapshot['machines'][number]['disk'],
): Promise<string | undefined> {
  const { snapshots } = await disk.content()
  const found = snapshots.find(({ name }) => name === wanted.name)
  if (!found) return `the disk of ${disk.node.name} does not have it`
  // As when the disk was made anew, and a snapshot of the same name taken by hand.
  const same = found.id === wanted.id && found.time === wanted.time
  return same ? undefined : `the disk of ${disk.node.name} has another snapshot of that name`
}
