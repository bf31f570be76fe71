#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
import { loadCluster } from '../lib/cluster.mts'
import { StepError } from '../lib/errors.mts'
// The whole cluster at one moment, to come back to: all disks, and the keys that go with them.
import { formatBytes, formatTable, timestamp } from '../lib/format.mts'
import { interruption } from '../lib/interrupt.mts'
import { withClusterLock, withMachineLocks } from '../lib/lock.mts'
import { script } from '../lib/script.mts'
import { setClocks, syncGuests } from '../lib/snapshot/guests.mts'
import {
  checkSnapshotName,
  findSnapshot,
  listSnapshots,
  type Snapshot,
} from '../lib/snapshot/snapshots.mts'
import { deleteSnapshot, takeSnapshot } from '../lib/snapshot/take-snapshot.mts'
import { step } from '../lib/steps.mts'

const { flags, args } = script({
  does: `Takes a snapshot of all machines, running or not, under a name or the time of day. Those that run
stand still for a moment, so that all disks are of one moment; UEFI variables, certificates,
kubeconfigs, the encryption key and cluster.env are kept with them. make restore comes back to it.`,
  reads: ['cluster.env', 'run/', 'images/', 'tls/', 'configs/'],
  writes: ['images/NODE.qcow2', 'snapshots/NAME/'],
  flags: {
    list: { help: 'show the snapshots there are' },
    delete: { value: 'NAME', help: 'remove this snapshot; the machines may run' },
    json: { help: 'print the snapshot, or with --list all, as JSON' },
  },
  args: '[NAME]',
  examples: [
    './bin/snapshot.mts before-lab-3',
    './bin/snapshot.mts --list',
    './bin/snapshot.mts --delete before-lab-3',
  ],
})
if ([flags.list, flags.delete, args[0]].filter(Boolean).length > 1) {
  throw new StepError('NAME, --list or --delete NAME: one of them', { exitCode: 2 })
}

const cluster = loadCluster()
if (flags.list) await list()
else if (flags.delete) await remove(flags.delete)
else await take(args[0] ?? timestamp())

async function take(name: string): Promise<void> {
  checkSnapshotName(name)
  const signal = interruption()
  const purpose = `taking the snapshot ${name}`
  const snapshot = await withClusterLock(cluster, purpose, () =>
    withMachineLocks(cluster, cluster.nodes, purpose, () =>
      step(`snapshot ${name}`, (detail) =>
        takeSnapshot(cluster, name, {
          beforePause: () => {
            detail('the machines write out what they hold')
            return syncGuests(cluster, signal)
          },
          signal,
        }),
      ),
    ),
  )
  const running = snapshot.machines.filter((machine) => machine.running)
  if (running.length > 0) await setClocks(cluster, signal)

  if (flags.json) return console.log(JSON.stringify(snapshot, null, 2))
  console.log(holds(snapshot))
  if (running.length > 0) {
    const names = running.map((machine) => machine.name).join(', ')
    console.log(`${names} stood still for ${Math.round(snapshot.pause * 1000)} ms`)
  }
  console.log(`come back to it: make restore NAME=${name}`)
}

async function list(): Promise<void> {
  const snapshots = await listSnapshots(cluster)
  if (flags.json) return console.log(JSON.stringify(snapshots, null, 2))
  if (snapshots.length === 0) return console.log('There is no snapshot yet: make snapshot')
  const rows = snapshots.map((snapshot) => [
    snapshot.name,
    new Date(snapshot.taken).toLocaleString('sv'),
    formatBytes(snapshot.machines.reduce((total, { bytes }) => total + bytes, 0)),
    holds(snapshot),
  ])
  console.log(formatTable(['NAME', 'TAKEN', 'DISKS THEN', 'HOLDS'], rows))
}

async function remove(name: string): Promise<void> {
  const purpose = `removing the snapshot ${name}`
  await withClusterLock(cluster, purpose, async () => {
    const snapshot = await findSnapshot(cluster, name)
    await withMachineLocks(cluster, cluster.nodes, purpose, () =>
      step(`remove ${name}`, () => deleteSnapshot(cluster, snapshot)),
    )
  })
  if (flags.json) console.log(JSON.stringify({ removed: name }))
}

function holds({ machines, nixos, files, automatic }: Snapshot): string {
  const names = machines.map(({ name, running }) => `${name}${running ? '' : ' (was off)'}`)
  const why = automatic ? '; what a restore overwrote' : ''
  return `${names.join(', ')}; NixOS ${nixos}; ${files.length} files${why}`
}
