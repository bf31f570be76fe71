#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// Shuts machines down: the workers first, then the control plane, then the LAN switch.
import { $ } from 'zx/core'
import { chooseNodes, loadCluster, type Node } from '../lib/cluster.mts'
import { formatDuration } from '../lib/format.mts'
import { interruption } from '../lib/interrupt.mts'
import { stopLanSwitch } from '../lib/lan.mts'
import { script } from '../lib/script.mts'
import { connect } from '../lib/ssh.mts'
import { inParallel, type Row } from '../lib/steps.mts'
import { isRunning } from '../lib/vm.mts'
import { powerButton, type Stopped, stopMachine, unplug } from '../lib/vm-stop.mts'

const { flags, args } = script({
  does: `Shuts machines down, all of them unless some are named: by ssh, else by the power button. A
machine that is still up after STOP_TIMEOUT seconds is switched off. Disks stay.`,
  reads: ['cluster.env', 'tls/ssh_config', 'run/'],
  writes: ['run/'],
  flags: { now: { help: 'switch them off at once, as if the plug were pulled' } },
  args: '[NODE...]',
  examples: ['./bin/shutdown.mts', './bin/shutdown.mts sigma gamma'],
})

const cluster = loadCluster()
const chosen = chooseNodes(cluster, args)
const signal = interruption()

// The control plane last: until then workers can still report to it that their pods have ended. A
// machine that cannot be stopped does not keep the others from it.
const workers = chosen.filter(({ role }) => role === 'worker')
const controlPlane = chosen.filter(({ role }) => role === 'control-plane')
const stopped = new Map<string, Stopped>()
const failures: unknown[] = []
for (const nodes of [workers, controlPlane]) {
  const names = nodes.map(({ name }) => name)
  await inParallel(names, async (name, row) => {
    stopped.set(name, await shutDown(cluster.node(name), row))
  }).catch((error) => {
    signal.throwIfAborted()
    failures.push(error)
  })
}

const up = await Promise.all(cluster.nodes.map((node) => isRunning(cluster, node)))
if (!up.includes(true)) await stopLanSwitch(cluster)

const width = Math.max(...chosen.map(({ name }) => name.length))
for (const { name } of [...workers, ...controlPlane]) {
  console.log(`${name.padEnd(width)}  ${describe(stopped.get(name))}`)
}
if (failures.length > 0) throw failures[0]

/** Tries one after the other until QEMU has ended. The last two are QMP's "quit" and kill -9. */
function shutDown(node: Node, row: Row): Promise<Stopped> {
  const { STOP_TIMEOUT } = cluster.settings
  const sshTime = Math.min(15, STOP_TIMEOUT / 2)
  const overSsh = async () => {
    await connect(cluster, node, { timeout: 10, signal })
    await $({ signal, timeout: '20s' })`ssh -F tls/ssh_config ${node.name} systemctl poweroff`
  }
  const attempts = [
    { text: 'asked to power off', ended: 'powered off', ask: overSsh, seconds: sshTime } as const,
    powerButton(cluster, node, STOP_TIMEOUT - sshTime), // QMP's "system_powerdown"
    ...unplug(cluster, node),
  ]
  const report = (text: string) => row.step(text)
  return stopMachine(cluster, node, { attempts, atOnce: flags.now, report, signal })
}

function describe(how: Stopped | undefined): string {
  if (!how) return 'was not stopped'
  const endings = {
    'not running': 'was not running',
    'powered off': 'powered off',
    quit: flags.now ? 'switched off' : 'did not power off in time and was switched off',
    killed: 'did not answer and was killed',
  }
  const time = how.ended === 'not running' ? '' : ` (${formatDuration(how.seconds * 1000)})`
  return `${endings[how.ended]}${time}`
}
