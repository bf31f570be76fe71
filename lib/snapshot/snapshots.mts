// Snapshots of the whole cluster: the disks of all machines at one moment, and in snapshots/NAME/
// the keys and settings of that moment with a record of it all.
import { readdir } from 'node:fs/promises'
import type { Cluster, Node } from '../cluster.mts'
import { StepError } from '../errors.mts'
import { readIfThere } from '../files.mts'
import type { DiskSnapshot } from './disk-snapshots.mts'
import type { KeptFile } from './kept-files.mts'

/** The record, snapshots/NAME/snapshot.json. */
export interface Snapshot {
  name: string
  /** ISO 8601. */
  taken: string
  /** By a restore, of what it was about to overwrite. */
  automatic: boolean
  nixos: string
  /** Seconds for which the machines that ran stood still. */
  pause: number
  machines: SnapshotMachine[]
  files: KeptFile[]
}

export interface SnapshotMachine {
  name: string
  role: Node['role']
  running: boolean
  /** What its disk's image took on this computer then. */
  bytes: number
  /** As the image lists it. */
  disk: DiskSnapshot
}

// A qcow2 image takes a snapshot's number where its name is asked for, so a name is never digits
// only. A leading dot is for what is not finished.
const namePattern = /^(?!\d+$)[A-Za-z0-9][A-Za-z0-9._-]{0,62}$/

/** @throws StepError if this cannot be a snapshot's name */
export function checkSnapshotName(name: string): void {
  if (namePattern.test(name)) return
  throw new StepError(`a snapshot cannot be named "${name}"`, {
    hint: 'at most 63 letters, digits, dots, dashes and underscores; a letter or digit first; not digits only',
    exitCode: 2,
  })
}

export function snapshotFolder(cluster: Cluster, name: string): string {
  return cluster.path('snapshots', name)
}

/** Path of a snapshot's record in its folder. */
export const recordFile = 'snapshot.json'

/**
 * All snapshots, oldest first.
 *
 * @throws StepError if a record cannot be read
 */
export async function listSnapshots(cluster: Cluster): Promise<Snapshot[]> {
  const names = await readdir(cluster.path('snapshots')).catch(() => [])
  const found: Snapshot[] = []
  for (const name of names.filter((candidate) => namePattern.test(candidate))) {
    const text = await readIfThere(cluster.path('snapshots', name, recordFile))
    if (text !== undefined) found.push({ ...parse(text, name), name })
  }
  return found.sort((one, other) => Date.parse(one.taken) - Date.parse(other.taken))
}

function parse(text: string, name: string): Snapshot {
  try {
    return JSON.parse(text) as Snapshot
  } catch (cause) {
    throw new StepError(`snapshots/${name}/${recordFile} cannot be read`, {
      hint: `without it the snapshot is of no use: remove snapshots/${name}`,
      cause,
    })
  }
}

/**
 * The snapshot of a name.
 *
 * @param name none: the newest that a person has asked for
 * @throws StepError that names the snapshots there are
 */
export async function findSnapshot(cluster: Cluster, name?: string): Promise<Snapshot> {
  if (name !== undefined) checkSnapshotName(name)
  const all = await listSnapshots(cluster)
  const found = all.filter((snapshot) =>
    name === undefined ? !snapshot.automatic : snapshot.name === name,
  )
  const newest = found.at(-1)
  if (newest) return newest
  const names = all.map((snapshot) => snapshot.name).join(', ')
  throw new StepError(name ? `there is no snapshot "${name}"` : 'there is no snapshot yet', {
    hint: names ? `there are ${names}` : 'make snapshot takes one',
    exitCode: 2,
  })
}
