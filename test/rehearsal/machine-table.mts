// The machines of a rehearsal, in a table at its end.
import { stat } from 'node:fs/promises'
import type { Node } from '../../lib/cluster.mts'
import { formatDuration, formatTable } from '../../lib/format.mts'
import { filesOf } from '../../lib/qemu.mts'
import { waitForSystem } from '../../lib/ssh.mts'
import type { Rehearsal } from './rehearsal.mts'

const header = ['machine', 'state', 'failed units', 'installed in', 'ssh after', 'memory used']

/** A row for each machine: its state, times, and the memory that its programs use. */
export async function machineTable(rehearsal: Rehearsal): Promise<string> {
  return formatTable(
    header,
    await Promise.all(rehearsal.nodes.map((node) => rowOf(rehearsal, node))),
  )
}

async function rowOf(rehearsal: Rehearsal, node: Node): Promise<string[]> {
  const { cluster, signal } = rehearsal
  const { state, failedUnits } = await waitForSystem(cluster, node, { signal })
  const { birthtimeMs, mtimeMs } = await stat(filesOf(cluster, node).installLog)
  const memory = await rehearsal.on(node, "free -m | awk '/^Mem/ { print $3 }'")
  // The machine has its time from this computer.
  const shown = await rehearsal.on(
    node,
    'systemctl show --timestamp=unix --property=ActiveEnterTimestamp --value sshd',
  )
  const ssh = Number(shown.trim().slice(1)) * 1000 - (await rehearsal.poweredOn(node))
  return [
    node.name,
    state,
    failedUnits.join('\n') || '-',
    formatDuration(mtimeMs - birthtimeMs),
    formatDuration(ssh),
    `${memory.trim()} MB`,
  ]
}
