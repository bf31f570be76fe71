#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// A changed flag or certificate brought to running machines, one after another.
import { $ } from 'zx/core'
import { chooseNodes, loadCluster, type Node } from '../lib/cluster.mts'
import { describeError, StepError } from '../lib/errors.mts'
import { interruption } from '../lib/interrupt.mts'
import { withClusterLock } from '../lib/lock.mts'
import { Machine } from '../lib/machine/machine.mts'
import { isRunning } from '../lib/qemu/vm.mts'
import {
  type Comparison,
  compare,
  formatChanges,
} from '../lib/reconfigure/configuration-changes.mts'
import { reconfigure } from '../lib/reconfigure/reconfigure.mts'
import { script } from '../lib/script.mts'
import { stage } from '../lib/staging/staging.mts'
import { inParallel, step } from '../lib/steps.mts'

const { flags } = script({
  does: `Brings changes of cluster.env, configs/*.nix and certificates to running machines: stages the
configurations, shows what changes, pushes each as a whole and has NixOS switch to it, which
restarts the services that are concerned. The control plane first, then one worker after another,
each when the one before is well. One that is not gets its former configuration back.`,
  reads: ['cluster.env', 'configs/', 'tls/'],
  writes: ['configs/*.kubeconfig', 'cloud-init/NODE/nixos/', 'on the machines: /etc/nixos, keys'],
  flags: {
    'dry-run': { help: 'show what would change, and change nothing on the machines' },
    node: { value: 'NODES', help: 'only this node; several with commas between' },
    timeout: { value: 'SECONDS', number: true, help: 'for services to be well (WAIT_TIMEOUT)' },
  },
  examples: ['./bin/reconfig.mts --dry-run', './bin/reconfig.mts --node sigma'],
})

const cluster = loadCluster()
const chosen = chooseNodes(cluster, flags.node?.split(',') ?? [])
// The control plane first, in whatever order they were named.
const nodes = cluster.nodes.filter((node) => chosen.includes(node))
const signal = interruption()
await withClusterLock(cluster, 'pushing configurations', pushAll)

async function pushAll(): Promise<void> {
  // 1. A new certificate belongs into its kubeconfig, too.
  await $({ stdio: 'inherit' })`${cluster.path('bin', 'generate-kubeconfigs.mts')}`

  // 2. What each machine is to have.
  await step(`stage ${nodes.map(({ name }) => name).join(', ')}`, async () => {
    for (const node of nodes) await stage(cluster, node)
  })

  // 3. Whoever is to change has to answer, before anyone does.
  const comparisons = await lookAtAll()

  // 4. What changes.
  const concerned = nodes.filter((_, index) => changesIn(comparisons[index]))
  for (const [index, node] of nodes.entries()) await show(node, comparisons[index])
  if (flags['dry-run']) return

  // 5. One after another: so the others go on with the pods, and a mistake meets only one.
  for (const [index, node] of concerned.entries()) {
    const rest = concerned.slice(index + 1).map(({ name }) => name)
    await change(node).catch((error) => {
      if (!(error instanceof StepError) || rest.length === 0) throw error
      const untouched = `${rest.join(', ')} ${rest.length > 1 ? 'were' : 'was'} not touched`
      throw new StepError(`${error.message}; ${untouched}`, error.explanation)
    })
  }
}

async function lookAtAll(): Promise<Comparison[]> {
  const failures: string[] = []
  const looked = await Promise.all(
    nodes.map(async (node) => {
      try {
        if (!(await isRunning(cluster, node))) throw new StepError(`${node.name} is not running`)
        return await compare(new Machine(cluster, node, signal))
      } catch (error) {
        signal.throwIfAborted()
        failures.push(describeError(error))
        return { changes: [], unfinished: false }
      }
    }),
  )
  if (failures.length === 0) return looked
  throw new StepError('not all machines can be changed, so none was', {
    output: failures.join('\n'),
    hint: 'make up starts machines; --node NODES leaves some out',
  })
}

async function show({ name }: Node, comparison: Comparison | undefined): Promise<void> {
  const { changes = [], unfinished } = comparison ?? {}
  const files = `${changes.length} ${changes.length === 1 ? 'file changes' : 'files change'}`
  const again = unfinished
    ? ', and the last change, which did not come to its end, is made again'
    : ''
  console.log(`${name}: ${changes.length > 0 ? files : 'no file changes'}${again}`)
  process.stdout.write(await formatChanges(changes))
}

async function change({ name }: Node): Promise<void> {
  // Without the signal: an ssh call that has begun is not cut off.
  const machine = new Machine(cluster, cluster.node(name))
  const timeout = flags.timeout ?? cluster.settings.WAIT_TIMEOUT
  const [units = []] = await inParallel([name], (_, row) =>
    reconfigure(machine, { timeout, row, signal }),
  )
  console.log(
    `${name}: ${units.length > 0 ? `restarted ${units.join(', ')}` : 'no unit restarted'}`,
  )
}

function changesIn(comparison: Comparison | undefined): boolean {
  return comparison !== undefined && (comparison.changes.length > 0 || comparison.unfinished)
}
