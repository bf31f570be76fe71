// What the systems on the machines are asked for around a snapshot. Those that do not answer (one
// that is booting, or has no system) do without.
import type { Cluster, Node } from '../cluster.mts'
import { StepError } from '../errors.mts'
import { Machine } from '../machine/machine.mts'
import { isRunning } from '../qemu/vm.mts'

/** Seconds: where QEMU emulates the processor, a first ssh call takes five. */
const patience = 20

/** Has the machines write out what their kernels hold, so that a snapshot has it on the disk. */
export async function syncGuests(cluster: Cluster, signal?: AbortSignal): Promise<void> {
  await askAll(cluster, () => 'sync', signal)
}

/**
 * Sets clocks that are off. A machine that stood still is behind by that time; one whose disk was
 * put back has its time from QEMU, but also a record of the past that its services may believe.
 */
export async function setClocks(cluster: Cluster, signal?: AbortSignal): Promise<void> {
  // Two seconds: what ssh takes under emulation is no error of the clock.
  const command = () => {
    const now = Date.now()
    return `off=$(($(date +%s%3N) - ${now}))
      [ "\${off#-}" -lt 2000 ] || date --utc --set=@${now / 1000} >/dev/null`
  }
  await askAll(cluster, command, signal)
}

async function askAll(cluster: Cluster, command: () => string, signal?: AbortSignal) {
  const ask = async (node: Node) => {
    if (!(await isRunning(cluster, node))) return
    const machine = new Machine(cluster, node, signal)
    await machine.succeed(command(), { timeout: patience }).catch((error) => {
      signal?.throwIfAborted()
      if (!(error instanceof StepError)) throw error
    })
  }
  await Promise.all(cluster.nodes.map(ask))
}
