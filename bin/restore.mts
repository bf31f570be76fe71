#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// Back to a snapshot: the machines stop, become what they were, and start again.
import { loadCluster, type Node } from '../lib/cluster.mts'
import { StepError } from '../lib/errors.mts'
import { formatDuration } from '../lib/format.mts'
import { interruption, takingTime } from '../lib/interrupt.mts'
import { componentsOf, watchReadiness } from '../lib/kubernetes/readiness.mts'
import { withClusterLock, withMachineLocks } from '../lib/lock.mts'
import { Machine } from '../lib/machine/machine.mts'
import { detectHost, type Host } from '../lib/qemu/host.mts'
import { stopMachine } from '../lib/qemu/stop-machine.mts'
import { isRunning, startMachine } from '../lib/qemu/vm.mts'
import { script } from '../lib/script.mts'
import { setClocks, syncGuests } from '../lib/snapshot/guests.mts'
import { assertRestorable, overwriteWith } from '../lib/snapshot/restore-snapshot.mts'
import { findSnapshot, type Snapshot } from '../lib/snapshot/snapshots.mts'
import { inParallel, step } from '../lib/steps.mts'

const { flags, args } = script({
  does: `Makes the cluster what it was when a snapshot was taken, the newest unless one is named: disks,
UEFI variables, certificates, kubeconfigs, encryption key and cluster.env. What is there now is
kept as a snapshot of its own. Ends when the cluster answers. Refuses before it touches anything.`,
  reads: ['cluster.env', 'snapshots/NAME/', 'images/'],
  writes: ['images/', 'tls/', 'configs/', 'cluster.env', 'snapshots/', 'run/'],
  flags: {
    'start-only': { help: 'end when the machines have been started' },
    timeout: { value: 'SECONDS', number: true, help: 'for the cluster to answer (WAIT_TIMEOUT)' },
  },
  args: '[NAME]',
  examples: ['./bin/restore.mts', './bin/restore.mts before-lab-3'],
})

const began = performance.now()
const signal = interruption()
const before = loadCluster()
const cluster = await withClusterLock(before, 'restoring a snapshot', async () => {
  // 1. Whatever would keep us from it is found before anything is touched.
  const snapshot = await findSnapshot(before, args[0])
  await step(`check the snapshot ${snapshot.name}`, () => assertRestorable(before, snapshot))
  const host = await detectHost(before)

  // 2. The machines stop, and what they are is kept as a snapshot.
  // 3. Disks, keys and settings become what they were. If that fails, who ran goes on.
  const running = await runningNodes()
  await syncGuests(before, signal)
  signal.throwIfAborted()
  const aside = await takingTime(() =>
    stopAll()
      .then(() => overwrite(snapshot))
      .catch(async (error) => {
        await goOn(running, host)
        throw error
      }),
  )
  console.log(`what was there before is kept: make restore NAME=${aside.name}`)

  // 4. The machines start, as cluster.env now has them.
  const restored = loadCluster({ root: before.root })
  await inParallel(names(), async (name, row) => {
    row.step('power on')
    await startMachine(restored, restored.node(name), host)
  })
  return restored
})

// 5. The cluster answers.
if (!flags['start-only']) {
  await inParallel(names(), async (name, row) => {
    row.step('waiting for ssh')
    const machine = new Machine(cluster, cluster.node(name), signal)
    await machine.waitForSsh({ detail: (text) => row.detail(text) })
  })
  await setClocks(cluster, signal)
  await step('wait until the cluster answers', waitUntilReady)
}
console.log(`restored in ${formatDuration(performance.now() - began)}`)

async function runningNodes() {
  const states = await Promise.all(before.nodes.map((node) => isRunning(before, node)))
  return before.nodes.filter((_, index) => states[index])
}

async function stopAll(): Promise<void> {
  await inParallel(names(), async (name, row) => {
    row.step('stop')
    await stopMachine(before, before.node(name), { atOnce: true })
  })
}

/** After a failure: machines that ran before and do not any more. */
async function goOn(nodes: readonly Node[], host: Host): Promise<void> {
  for (const node of nodes) {
    if (!(await isRunning(before, node))) await startMachine(before, node, host).catch(() => {})
  }
}

function overwrite(snapshot: Snapshot): Promise<Snapshot> {
  return withMachineLocks(before, before.nodes, 'restoring a snapshot', () =>
    step('put back disks, keys and settings', () => overwriteWith(before, snapshot)),
  )
}

async function waitUntilReady(detail: (text: string) => void): Promise<void> {
  const timeout = flags.timeout ?? cluster.settings.WAIT_TIMEOUT
  const deadline = AbortSignal.timeout(timeout * 1000)
  let missing: string[] = []
  await watchReadiness(cluster, componentsOf(cluster), {
    changed: (rows) => {
      missing = rows.flatMap((row) => (row.active ? [] : [`${row.name}: ${row.reason}`]))
      detail(missing.map((line) => line.split(':')[0]).join(', '))
    },
    signal: AbortSignal.any([signal, deadline]),
  }).catch((error) => {
    if (!deadline.aborted) throw error
    throw new StepError(`the machines are restored, but the cluster does not answer yet`, {
      output: missing.join('\n'),
      hint: `${timeout} s were not enough: make wait goes on waiting`,
    })
  })
}

function names(): string[] {
  return before.nodes.map(({ name }) => name)
}
