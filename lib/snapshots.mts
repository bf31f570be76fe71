// Snapshots in the machines' images. With the disk's own, QEMU can keep the machine's memory there:
// its jobs snapshot-save and snapshot-load.
import { $ } from 'zx/core'

/** The name of the snapshot that make suspend takes and make up continues from. */
export const suspended = 'suspended'

/** What a snapshot with memory is of, by the node names in QEMU's arguments. */
export const liveParts = { vmstate: 'disk0', devices: ['disk0', 'efivars'] }

/** A snapshot in an image, identified by all three. `time`: seconds since 1970. */
export type OnDisk = { name: string; id: string; time: number }

/** The size of an image on this computer and its snapshots. -U: its machine may run. */
export async function inspect(image: string): Promise<{ bytes: number; snapshots: OnDisk[] }> {
  const info = JSON.parse((await $`qemu-img info -U --output=json ${image}`).stdout)
  const snapshots: OnDisk[] = []
  for (const { name, id, 'date-sec': seconds, 'date-nsec': nano } of info.snapshots ?? []) {
    snapshots.push({ name, id, time: seconds + nano / 1e9 })
  }
  return { bytes: info['actual-size'] ?? 0, snapshots }
}

/** What a machine's memory depends on, out of QEMU's version and its arguments (in one line). */
export function hardware(version: string, args: string): string {
  return `QEMU ${version} ${args.match(/-machine .+? -m \d+/)?.[0] ?? ''}`
}
