// Snapshots in the machines' images: of disks, and of memory by QEMU's jobs snapshot-save and -load.
import { readdir } from 'node:fs/promises'
import { cpus } from 'node:os'
import { $ } from 'zx/core'
import type { Cluster, Node } from './cluster.mts'
import { StepError } from './errors.mts'
import { readIfThere } from './files.mts'

/** The snapshot that make suspend takes and make up continues from: no name that others can have. */
export const suspended = '_suspended'

/** In snapshots/ while a restore replaces disks, which may be of different moments. */
export const restoring = '.restoring'

/** What a snapshot with memory is of, by the node names in QEMU's arguments. */
export const liveParts = { vmstate: 'disk0', devices: ['disk0', 'efivars'] }

/** live: with the machines' memory. */
export type Kind = 'live' | 'disks'

/** The record of a snapshot: snapshots/NAME/snapshot.json. */
export interface Snapshot {
  name: string
  taken: string // ISO 8601
  automatic: boolean // by a restore, of what it was about to overwrite
  kind?: Kind // older ones are of disks
  nixos: string
  pause: number // seconds for which the running machines were paused
  /** `bytes`: what the disk took on this computer. */
  machines: (Pick<Node, 'name' | 'role'> & { running: boolean; bytes: number; disk: OnDisk })[]
  hardware: Record<string, string> // live: what the memory of each machine depends on
  /** Paths in the project, and in snapshots/NAME/; the mode is that of the original. */
  files: { path: string; mode: number; sha256: string }[]
}

/** A snapshot in an image, identified by all three. `time`: seconds since 1970. */
export type OnDisk = { name: string; id: string; time: number }

/** All snapshots, oldest first. */
export async function readSnapshots(cluster: Cluster): Promise<Snapshot[]> {
  const names = await readdir(cluster.path('snapshots')).catch(() => [])
  const snapshots: Snapshot[] = []
  for (const name of names.filter((each) => !each.startsWith('.'))) {
    const text = await readIfThere(cluster.path('snapshots', name, 'snapshot.json'))
    try {
      if (text !== undefined) snapshots.push({ ...JSON.parse(text), name })
    } catch (cause) {
      const hint = `remove it: mv snapshots/${name} snapshots/.${name}.partial && ./bin/snapshot.mts --delete ${name}`
      throw new StepError(`snapshots/${name}/snapshot.json cannot be read`, { hint, cause })
    }
  }
  return snapshots.sort((one, other) => Date.parse(one.taken) - Date.parse(other.taken))
}

/** An image: its size to the machine and on this computer, its snapshots. -U: its machine may run. */
export async function inspect(image: string) {
  const info = JSON.parse((await $`qemu-img info -U --output=json ${image}`).stdout)
  const snapshots: OnDisk[] = []
  for (const { name, id, 'date-sec': seconds, 'date-nsec': nano } of info.snapshots ?? []) {
    snapshots.push({ name, id, time: seconds + nano / 1e9 })
  }
  return { size: info['virtual-size'], bytes: info['actual-size'] ?? 0, snapshots }
}

/** What a machine's memory depends on, out of QEMU's version and its arguments (in one line). */
export function hardware(version: string, args: string): string {
  const host = args.includes(' -cpu host') ? ` on ${cpus()[0]?.model}` : ''
  return `QEMU ${version} ${args.match(/-machine .+? -m \d+/)?.[0] ?? ''}${host}`
}
