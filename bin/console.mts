#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// The serial console of a machine, in this terminal: what one has when ssh does not answer.
import { once } from 'node:events'
import { loadCluster } from '../lib/cluster.mts'
import { StepError } from '../lib/errors.mts'
import { withLock } from '../lib/lock.mts'
import { lastConsoleLines } from '../lib/qemu/console-log.mts'
import { filesOf } from '../lib/qemu/machine-files.mts'
import { connectUnixSocket } from '../lib/qemu/unix-socket.mts'
import { machineState } from '../lib/qemu/vm.mts'
import { script } from '../lib/script.mts'

const { args } = script({
  does: `Attaches this terminal to the serial console of a running machine. Ctrl-] leaves it; the
machine runs on. What the console said before is in images/NODE-console.log.`,
  reads: ['cluster.env', 'run/NODE.console', 'images/NODE-console.log'],
  writes: [],
  args: 'NODE',
  examples: ['./bin/console.mts alpha', 'make console-alpha'],
})

const leave = 0x1d // what a terminal sends for Ctrl-]

const cluster = loadCluster()
const node = cluster.node(args[0] ?? '')
const files = filesOf(cluster, node)
const found = await machineState(cluster, node)
if (found.state === 'stopped') {
  throw new StepError(`${node.name} is not running`, {
    hint: `./bin/provision.mts ${node.name}`,
    log: files.consoleLog,
  })
}
if (found.mode === 'install') {
  throw new StepError(`${node.name} is being installed, and its console is with the installer`, {
    hint: `tail -f "${files.installLog}"`,
  })
}
if (!process.stdin.isTTY) {
  throw new StepError('a console needs a terminal to be typed into', {
    hint: `to read only: tail -f "${files.consoleLog}"`,
  })
}

// QEMU serves one client; a second would wait in silence until the first leaves.
await withLock(`${files.console}.lock`, `attached to the console of ${node.name}`, async () => {
  for (const line of await lastConsoleLines(files.consoleLog)) console.log(line)
  console.error(`── ${node.name}: Ctrl-] leaves this console ──`)

  // However this process ends, the terminal is as it was.
  process.once('exit', () => process.stdin.setRawMode(false))
  const socket = connectUnixSocket(files.console)
  await once(socket, 'connect')
  socket.on('error', () => {}) // 'close' follows
  for (const signal of ['SIGTERM', 'SIGHUP', 'SIGINT'] as const) {
    process.once(signal, () => socket.destroy())
  }
  process.stdin.setRawMode(true)
  process.stdin.on('data', (typed: Buffer) => {
    const end = typed.indexOf(leave)
    socket.write(end < 0 ? typed : typed.subarray(0, end))
    if (end >= 0) socket.destroy()
  })
  socket.pipe(process.stdout, { end: false })
  await new Promise((resolve) => socket.once('close', resolve))
  process.stdin.setRawMode(false).pause()
})

const ended = (await machineState(cluster, node)).state === 'stopped'
console.error(`\n── ${node.name}: ${ended ? 'the machine has ended' : 'left, it runs on'} ──`)
