#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// A worker less: its pods go elsewhere, then nothing of it is left but its disk.
import { readFileSync } from 'node:fs'
import { loadCluster, type Node } from '../lib/cluster.mts'
import { describeError, StepError } from '../lib/errors.mts'
import { writeFileAtomic } from '../lib/files.mts'
import { formatDuration } from '../lib/format.mts'
import { interruption } from '../lib/interrupt.mts'
import { cordon, drain, forgetNode, uncordon } from '../lib/kubernetes/drain.mts'
import { Kubectl } from '../lib/kubernetes/kubectl.mts'
import { ensureLanSwitch, lanSwitchStatus } from '../lib/lan/lan-switch.mts'
import { withClusterLock, withMachineLocks } from '../lib/lock.mts'
import { Machine } from '../lib/machine/machine.mts'
import { stopMachine } from '../lib/qemu/stop-machine.mts'
import { isRunning } from '../lib/qemu/vm.mts'
import { script } from '../lib/script.mts'
import { step } from '../lib/steps.mts'
import { claimsOn } from '../lib/workers/local-volumes.mts'
import { forget, unreachable } from '../lib/workers/other-machines.mts'
import { removeWorkerFiles } from '../lib/workers/worker-files.mts'
import { withoutWorker } from '../lib/workers/worker-settings.mts'

const { flags, args } = script({
  does: `Removes a worker: has its pods leave it, as far as disruption budgets allow, stops its machine,
deletes its node, and takes it out of the other machines' configuration and of cluster.env. Its
disk is kept beside the others. Run again after an interruption, it goes on from there.`,
  reads: ['cluster.env', 'tls/', 'run/'],
  writes: [
    ...['cluster.env', 'tls/', 'configs/NAME.kubeconfig', 'cloud-init/', 'images/', 'run/'],
    'on the other machines: /etc/nixos',
  ],
  flags: {
    force: {
      help: 'whatever budgets, pods without controller, local volumes or silent machines say; also the last worker',
    },
    purge: { help: 'delete its disk, with all that is on it' },
    timeout: { value: 'SECONDS', number: true, help: 'for its pods to be gone (300)' },
  },
  args: 'NAME',
  examples: ['./bin/remove-worker.mts delta', 'make remove-worker NAME=delta FLAGS=--purge'],
})
const [name = ''] = args
const began = performance.now()
const signal = interruption()
const before = loadCluster()
const node = before.node(name)
refuseNode(node)
const kubectl = new Kubectl(before, signal)

await withClusterLock(before, `removing the worker ${name}`, async () => {
  // 1. Whatever speaks against it is found before anything is touched.
  const cluster = loadCluster({ root: before.root, text: settingsWithout(name) })
  const others = await step('check the cluster', checkCluster)

  // 2. Its pods leave, then it stops. What does not run has none.
  if (await isRunning(before, node)) {
    if (await kubectl.exists('node', name)) await step(`drain ${name}`, emptyNode)
    await step(`stop ${name}`, stop)
  }

  // 3. The API forgets it. Not before: a kubelet that starts would register it again.
  await step(`delete node ${name}`, () => forgetNode(kubectl, name))

  // 4. The others forget its name and the way to its pods.
  const timeout = cluster.settings.WAIT_TIMEOUT
  await forget(cluster, node, others, { timeout, signal })

  // 5. Its files here, and at last its lines in cluster.env: until then this can be run again.
  const kept = await step(`files of ${name}`, removeFiles)
  await writeFileAtomic(cluster.path('cluster.env'), settingsWithout(name))
  if (await lanSwitchStatus(cluster)) await ensureLanSwitch(cluster)
  console.log(`${name} is gone (${formatDuration(performance.now() - began)})`)
  if (kept) console.log(`its disk is kept, and on it its keys: ${kept}`)
})

/** Read anew each time: its owner may have changed something meanwhile. */
function settingsWithout(worker: string): string {
  return withoutWorker(readFileSync(before.path('cluster.env'), 'utf8'), worker)
}

function refuseNode({ role }: Node): void {
  if (role === 'control-plane') {
    throw new StepError(`${name} is the control plane: without it there is no cluster`, {
      hint: 'make clobber removes the whole cluster',
      exitCode: 2,
    })
  }
  if (before.workers.length === 1 && !flags.force) {
    throw new StepError(`${name} is the last worker: without it no pod can run`, {
      hint: `add another one first, make add-worker; or --force`,
      exitCode: 2,
    })
  }
  if (process.env.WORKER_NODES !== undefined) {
    throw new StepError('WORKER_NODES is set in the environment, and wins over cluster.env', {
      hint: 'unset WORKER_NODES',
      exitCode: 2,
    })
  }
}

/** @returns the machines that are to forget it */
async function checkCluster(): Promise<Node[]> {
  await kubectl.run(['get', '--raw', '/readyz'])
  const reasons: string[] = []
  const claims = await claimsOn(kubectl, name)
  if (claims.length > 0)
    reasons.push(`volumes on ${name} hold what is nowhere else: ${claims.join(', ')}`)
  const others = before.nodes.filter((each) => each !== node)
  const silent = await unreachable(before, others, signal)
  for (const reason of silent.values()) reasons.push(`${reason}, and cannot be told`)
  if (reasons.length > 0 && !flags.force) {
    throw new StepError(`${name} cannot be removed, and nothing was done`, {
      output: reasons.join('\n'),
      hint: `--force removes it all the same${silent.size > 0 ? '; make up starts machines' : ''}`,
    })
  }
  for (const reason of reasons) console.error(`! ${reason}`)
  if (silent.size > 0) console.error('! when they run again: make reconfig')
  return others.filter((other) => !silent.has(other.name))
}

async function emptyNode(): Promise<void> {
  const tookPods = await cordon(kubectl, name)
  const { timeout = 300, force } = flags
  try {
    await drain(kubectl, name, { timeout, force })
  } catch (error) {
    if (force && !signal.aborted) {
      // They end with their machine.
      console.error(`! ${describeError(error)}`)
      return
    }
    // Without the signal: after Ctrl-C there is this left to do.
    if (tookPods) await uncordon(new Kubectl(before), name).catch(() => {})
    throw error
  }
}

async function stop(detail: (text: string) => void): Promise<void> {
  const machine = new Machine(before, node, signal)
  const powerOff = () => machine.succeed('systemctl poweroff', { timeout: 20 })
  const { ended } = await stopMachine(before, node, { powerOff, report: detail, signal })
  detail(ended)
}

function removeFiles(): Promise<string | undefined> {
  return withMachineLocks(before, [node], 'removing', async () => {
    if (await isRunning(before, node)) throw new StepError(`${name} was started meanwhile`)
    return removeWorkerFiles(before, node, { purge: flags.purge })
  })
}
