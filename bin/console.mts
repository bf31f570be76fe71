#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// The serial console of a machine in this terminal: to watch it when ssh does not answer.
import { once } from 'node:events'
import { loadCluster } from '../lib/cluster.mts'
import { lastConsoleLines } from '../lib/console-log.mts'
import { StepError } from '../lib/errors.mts'
import { withLock } from '../lib/lock.mts'
import { connectUnixSocket } from '../lib/qmp.mts'
import { script } from '../lib/script.mts'
import { filesOf, machineState } from '../lib/vm.mts'
import { becomes } from '../lib/wait.mts'

const { args } = script({
  does: `Attaches this terminal to the serial console of a running machine, to watch it: there is no login,
as no user has a password. Ctrl-] leaves it. Earlier output is in images/NODE-console.log.`,
  reads: ['cluster.env', 'run/NODE.console', 'images/NODE-console.log'],
  writes: [],
  args: 'NODE',
  examples: ['./bin/console.mts alpha', 'make console-alpha'],
})

const ctrlBracket = 0x1d // what a terminal sends for Ctrl-]

const cluster = loadCluster()
const node = cluster.node(args[0] ?? '')
const files = filesOf(cluster, node)
const found = await machineState(cluster, node)
if (found.state === 'stopped') {
  const hint = `./bin/provision.mts ${node.name}`
  throw new StepError(`${node.name} is not running`, { hint, log: files.consoleLog })
}
if (found.state === 'installing') {
  const reason = `${node.name} is being installed, and its console belongs to the installer`
  throw new StepError(reason, { hint: `tail -f "${files.installLog}"` })
}
if (!process.stdin.isTTY) {
  const hint = `to read only: tail -f "${files.consoleLog}"`
  throw new StepError('the console needs a terminal to type in', { hint })
}

let left = false
// QEMU serves one client; a second would wait silently until the first leaves.
await withLock(`${files.console}.lock`, `attached to the console of ${node.name}`, async () => {
  for (const line of await lastConsoleLines(files.consoleLog)) console.log(line)
  console.error(`── ${node.name}: Ctrl-] leaves this console ──`)

  // Without this script: socat STDIO,raw,echo=0,escape=0x1d UNIX-CONNECT:run/NODE.console
  const socket = connectUnixSocket(files.console)
  await once(socket, 'connect')
  socket.on('error', () => {}) // 'close' follows
  const leave = () => {
    left = true
    socket.destroy()
  }
  for (const signal of ['SIGTERM', 'SIGHUP', 'SIGINT'] as const) {
    process.removeAllListeners(signal).once(signal, leave)
  }
  process.stdout.once('error', leave) // Nobody reads it any more (`| head`).
  // However this process ends, the terminal gets its mode back.
  process.once('exit', () => process.stdin.setRawMode(false))
  process.stdin.setRawMode(true)
  process.stdin.on('data', (typed: Buffer) => {
    const end = typed.indexOf(ctrlBracket)
    socket.write(end < 0 ? typed : typed.subarray(0, end))
    if (end >= 0) leave()
  })
  socket.pipe(process.stdout, { end: false })
  await new Promise((resolve) => socket.once('close', resolve))
  process.stdin.setRawMode(false).pause()
})

// A machine that ends closes its console a moment before its QEMU is gone.
const isStopped = async () => (await machineState(cluster, node)).state === 'stopped'
const ended = await (left ? isStopped() : becomes(isStopped, 10))
console.error(`\n── ${node.name}: ${ended ? 'the machine has ended' : 'it keeps running'} ──`)
