#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// Shuts machines down: the workers first, then the control plane, then the LAN switch.
import { $ } from 'zx/core'
import { chooseNodes, loadCluster, type Node } from '../lib/cluster.mts'
import { StepError } from '../lib/errors.mts'
import { formatDuration } from '../lib/format.mts'
import { interruption } from '../lib/interrupt.mts'
import { stopLanSwitch } from '../lib/lan.mts'
import { withLock } from '../lib/lock.mts'
import { isGone } from '../lib/processes.mts'
import { Qmp } from '../lib/qmp.mts'
import { script } from '../lib/script.mts'
import { connect } from '../lib/ssh.mts'
import { inParallel, type Row } from '../lib/steps.mts'
import { answers, filesOf, isRunning, machineState } from '../lib/vm.mts'
import { becomes } from '../lib/wait.mts'

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
const { STOP_TIMEOUT } = cluster.settings
const signal = interruption()
const chosen = chooseNodes(cluster, args)

// The control plane last: kubelets and pods that are being stopped still use it.
const endings = new Map<string, string>()
const failures: unknown[] = []
for (const role of ['worker', 'control-plane']) {
  const names = chosen.filter((node) => node.role === role).map(({ name }) => name)
  for (const name of names) endings.set(name, 'was not stopped')
  await inParallel(names, async (name, row) => {
    const node = cluster.node(name)
    if (!(await isRunning(cluster, node))) return endings.set(name, 'was not running')
    const { lock } = filesOf(cluster, node)
    const waiting = { wait: Math.min(10, STOP_TIMEOUT), signal }
    const stop = () => shutDown(node, row)
    return endings.set(name, await withLock(lock, `stopping ${name}`, stop, waiting))
  }).catch((error) => {
    signal.throwIfAborted()
    failures.push(error)
  })
}

const up = await Promise.all(cluster.nodes.map((node) => isRunning(cluster, node)))
if (!up.includes(true)) await stopLanSwitch(cluster)

const width = Math.max(...chosen.map(({ name }) => name.length))
for (const [name, ending] of endings) console.log(`${name.padEnd(width)}  ${ending}`)
if (failures.length > 0) throw failures[0]

/** Escalates until its QEMU has ended: ssh, power button, quit, SIGKILL. @returns what ended it */
async function shutDown(node: Node, row: Row): Promise<string> {
  const found = await machineState(cluster, node)
  if (found.state === 'stopped') return 'was not running'
  const { pid, state } = found
  const files = filesOf(cluster, node)
  const began = performance.now()
  const how = (text: string) => `${text} (${formatDuration(performance.now() - began)})`

  /** Asks for the end, and waits for it unless asking fails. */
  const ended = async (seconds: number, ask: () => Promise<unknown>): Promise<boolean> => {
    // Checked each time: the pid must still be that of this machine's QEMU.
    const now = await machineState(cluster, node)
    let time = seconds
    if (now.state !== 'stopped' && now.pid === pid) {
      await ask().catch(() => {
        time = 0
      })
    }
    signal.throwIfAborted()
    return becomes(() => isGone(pid), time, signal)
  }
  const qmp = async (command: string) => {
    const connection = await Qmp.connect(files.qmp, { timeout: 5 })
    // A QEMU that quits may close the connection before it answers.
    await connection.execute(command).catch(() => {})
    connection.close()
  }

  // A machine that is being installed has nothing to save, so its system is not asked.
  const gently = state === 'running' && !flags.now
  if (gently) {
    row.step('asked to power off')
    const time = Math.min(15, STOP_TIMEOUT / 2)
    const overSsh = async () => {
      await connect(cluster, node, { timeout: 10, signal })
      await $({ signal, timeout: '20s' })`ssh -F tls/ssh_config ${node.name} systemctl poweroff`
    }
    if (await ended(time, overSsh)) return how('powered off')

    row.step('power button pressed')
    // A machine that is paused would not notice it; one whose QEMU is silent may be on its way down.
    const press = async () => {
      if (await answers(files.qmp).catch(() => false)) await qmp('system_powerdown').catch(() => {})
    }
    // Again and again: early in its boot a machine does not notice it either.
    for (let left = STOP_TIMEOUT - time; left > 0; left -= 15) {
      if (await ended(Math.min(15, left), press)) return how('powered off')
    }
  }
  row.step('switched off')
  const late = gently ? 'did not power off in time and was ' : ''
  // SIGTERM tells provision that it was ended on purpose, and not to try again.
  const quit = async () => (state === 'installing' ? process.kill(pid, 'SIGTERM') : qmp('quit'))
  if (await ended(10, quit)) return how(`${late}switched off`)

  row.step('QEMU does not quit: killed')
  const kill = async () => process.kill(pid, 'SIGKILL')
  if (await ended(10, kill)) return how('did not answer and was killed')
  const reason = `${node.name} cannot be stopped: its QEMU does not end`
  throw new StepError(reason, { command: `kill -9 ${pid}`, log: files.qemuLog })
}
