#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// Another NixOS, and the Kubernetes in it, on running machines: one after another, so that the pods
// of each find room on the others.
import { $ } from 'zx/core'
import { loadCluster, type Node } from '../lib/cluster.mts'
import { describeError, StepError } from '../lib/errors.mts'
import { interruption, takingTime } from '../lib/interrupt.mts'
import { cordon, drain, uncordon } from '../lib/kubernetes/drain.mts'
import { Kubectl } from '../lib/kubernetes/kubectl.mts'
import { withClusterLock } from '../lib/lock.mts'
import { Machine } from '../lib/machine/machine.mts'
import { probeApiServer } from '../lib/machine/probes.mts'
import { isRunning } from '../lib/qemu/vm.mts'
import { script } from '../lib/script.mts'
import { stage } from '../lib/staging/staging.mts'
import { inParallel, type Row } from '../lib/steps.mts'
import {
  finishUpgrade,
  prepareUpgrade,
  type Release,
  undoPreparation,
} from '../lib/upgrade/upgrade.mts'
import { assertSkew } from '../lib/upgrade/version-skew.mts'

const { flags, args } = script({
  does: `Brings NIXOS_VERSION of cluster.env, and the Kubernetes in it, to a node, or to all: the control
plane first, then one worker after another. Each builds the new system beside the old one; if
Kubernetes' rules for versions allow it, the pods leave, the system is switched to, the machine
starts anew if the kernel is another one, and pods may come back when the node is Ready. Stops at
the first node that is not well, which stays cordoned. Take a snapshot before: make snapshot.`,
  reads: ['cluster.env', 'configs/', 'tls/'],
  writes: ['configs/*.kubeconfig', 'cloud-init/NODE/nixos/', 'on the machines: their system'],
  flags: {
    force: { help: 'remove pods whatever disruption budgets say, also those without a controller' },
    timeout: {
      value: 'SECONDS',
      number: true,
      help: 'for pods to leave, and services (WAIT_TIMEOUT)',
    },
  },
  args: 'NODE|all',
  examples: [
    'NIXOS_VERSION=26.11 ./bin/rolling-upgrade.mts all',
    './bin/rolling-upgrade.mts sigma',
  ],
})
const [name = ''] = args

const cluster = loadCluster()
const nodes = name === 'all' ? cluster.nodes : [cluster.node(name)]
const signal = interruption()
const kubectl = new Kubectl(cluster, signal)
const timeout = flags.timeout ?? cluster.settings.WAIT_TIMEOUT
await withClusterLock(cluster, 'upgrading machines', upgradeAll)

async function upgradeAll(): Promise<void> {
  // 1. Who is to change has to run, and the API server to answer, before anyone does change.
  await versionsNow()
  for (const node of nodes) {
    if (await isRunning(cluster, node)) continue
    throw new StepError(`${node.name} is not running, so no machine was upgraded`, {
      hint: `make boot-${node.name}`,
    })
  }
  await $({ stdio: 'inherit' })`${cluster.path('bin', 'generate-kubeconfigs.mts')}`
  for (const node of nodes) await stage(cluster, node)

  // 2. One after another.
  for (const [index, node] of nodes.entries()) {
    const [told] = await inParallel([node.name], (_, row) => upgrade(node, row)).catch((error) => {
      const rest = nodes.slice(index + 1).map((other) => other.name)
      if (!(error instanceof StepError) || rest.length === 0) throw error
      const untouched = `${rest.join(', ')} ${rest.length > 1 ? 'were' : 'was'} not touched`
      throw new StepError(`${error.message}; ${untouched}`, error.explanation)
    })
    console.log(`${node.name}: ${told}`)
  }
}

/** @returns what has become of it, in words */
async function upgrade(node: Node, row: Row): Promise<string> {
  // Without the signal: an ssh call that has begun is not cut off.
  const machine = new Machine(cluster, node)
  const options = { timeout, row, signal }

  // 1. The new system, built beside the one that runs; and whether it may run here.
  const releases = await prepareUpgrade(machine, options)
  const { now, built } = releases
  let cordoned = false
  try {
    const { role } = node
    const change = { name: node.name, role, from: now.kubernetes, to: built.kubernetes }
    assertSkew({ ...change, ...(await versionsNow()) })

    // 2. The pods leave, as far as disruption budgets allow.
    if (node.role === 'worker') {
      row.step('draining')
      cordoned = await cordon(kubectl, node.name)
      await drain(kubectl, node.name, { timeout, force: flags.force })
    }
  } catch (error) {
    row.step('undoing')
    throw await takingTime(async () => {
      const reason = await undoPreparation(machine, error)
      if (cordoned)
        await letPodsBack(node).catch((second) => console.error(`! ${describeError(second)}`))
      return reason
    })
  }

  // 3. The switch, and a new start if the kernel wants it.
  await finishUpgrade(machine, releases, options).catch((error) => {
    throw leftBehind(node, error)
  })

  // 4. Pods may come back.
  if (node.role === 'worker') await letPodsBack(node)
  return describe(now, built)
}

/** Without the signal: after Ctrl-C there is this left to do. */
async function letPodsBack({ name }: Node): Promise<void> {
  await uncordon(new Kubectl(cluster), name).catch((error) => {
    throw new StepError(`${name} is well, but stays cordoned`, {
      output: describeError(error),
      hint: `KUBECONFIG=configs/admin.kubeconfig kubectl uncordon ${name}`,
      cause: error,
    })
  })
}

/** What the API server and the kubelets are now. */
async function versionsNow(): Promise<{ apiServer: string; kubelets: Map<string, string> }> {
  const { nodes: found, reason } = await probeApiServer(cluster, { signal })
  if (!found) throw new StepError(`the API server does not answer: ${reason}`, { hint: 'make up' })
  const { gitVersion } = JSON.parse(await kubectl.run(['get', '--raw', '/version']))
  const kubelets = [...found].map(([name, { kubelet }]) => [name, kubelet] as const)
  return { apiServer: gitVersion, kubelets: new Map(kubelets) }
}

function leftBehind(node: Node, error: unknown): StepError {
  const state = node.role === 'worker' ? ' and stays cordoned' : ''
  return new StepError(`${node.name} has not come back from its upgrade${state}`, {
    ...(error instanceof StepError ? { exitCode: error.explanation.exitCode ?? 1 } : {}),
    output: describeError(error),
    hint: `make ssh-${node.name}: nixos-rebuild switch --rollback goes back; make upgrade NAME=${node.name} tries again`,
    cause: error,
  })
}

function describe(now: Release, built: Release): string {
  const from = `NixOS ${now.nixos}, Kubernetes ${now.kubernetes}`
  const kernel = now.kernel === built.kernel ? '' : ', with another kernel'
  return `${from} → NixOS ${built.nixos}, Kubernetes ${built.kubernetes}${kernel}`
}
