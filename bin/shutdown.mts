#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// Machines down: the workers first, then the control plane, then the network between them.
import { chooseNodes, loadCluster, type Node } from '../lib/cluster.mts'
import { formatDuration } from '../lib/format.mts'
import { interruption } from '../lib/interrupt.mts'
import { stopLanSwitch } from '../lib/lan/lan-switch.mts'
import { Machine } from '../lib/machine/machine.mts'
import { type Ending, type Stopped, stopMachine } from '../lib/qemu/stop-machine.mts'
import { isRunning } from '../lib/qemu/vm.mts'
import { script } from '../lib/script.mts'
import { inParallel } from '../lib/steps.mts'

const { args } = script({
  does: `Shuts machines down, all of them unless some are named: asks over ssh, else presses the
power button; who is still up after STOP_TIMEOUT seconds is switched off. Disks stay.`,
  reads: ['cluster.env', 'run/'],
  writes: ['run/'],
  args: '[NODE...]',
  examples: ['./bin/shutdown.mts', './bin/shutdown.mts sigma gamma'],
})

const endings: Record<Ending, string> = {
  'not running': 'was not running',
  'powered off': 'powered off',
  quit: 'did not power off in time and was switched off',
  killed: 'did not answer and was killed',
}

const cluster = loadCluster()
const chosen = chooseNodes(cluster, args)
const signal = interruption()

// The control plane last: until then workers can still tell it that their pods have ended. One that
// cannot be stopped keeps no other up.
const workers = chosen.filter(({ role }) => role === 'worker')
const controlPlane = chosen.filter(({ role }) => role === 'control-plane')
const stopped = new Map<Node, Stopped>()
const failures: unknown[] = []
for (const nodes of [workers, controlPlane]) {
  await shutDown(nodes).catch((error) => {
    signal.throwIfAborted()
    failures.push(error)
  })
}

const up = await Promise.all(cluster.nodes.map((node) => isRunning(cluster, node)))
if (!up.includes(true)) await stopLanSwitch(cluster)

const width = Math.max(...chosen.map(({ name }) => name.length))
for (const node of [...workers, ...controlPlane]) {
  console.log(`${node.name.padEnd(width)}  ${told(stopped.get(node))}`)
}
if (failures.length > 0) throw failures[0]

function told(how: Stopped | undefined): string {
  if (!how) return 'was not stopped'
  const time = how.ended === 'not running' ? '' : ` (${formatDuration(how.seconds * 1000)})`
  return `${endings[how.ended]}${time}`
}

async function shutDown(nodes: Node[]): Promise<void> {
  await inParallel(
    nodes.map(({ name }) => name),
    async (name, row) => {
      const node = cluster.node(name)
      row.step('shutting down')
      const machine = new Machine(cluster, node, signal)
      const powerOff = () => machine.succeed('systemctl poweroff', { timeout: 20 })
      const report = (text: string) => row.step(text)
      stopped.set(node, await stopMachine(cluster, node, { powerOff, report, signal }))
    },
  )
}
