#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// The journals of the cluster's services, or the serial consoles.
import { createInterface } from 'node:readline'
import { $, type ProcessPromise } from 'zx/core'
import { chooseNodes, loadCluster, type Node } from '../lib/cluster.mts'
import { quote } from '../lib/format.mts'
import { servicesOf } from '../lib/health.mts'
import { refuseIf, script } from '../lib/script.mts'

const { flags, args } = script({
  does: `Shows the last lines of the journals of the cluster's services, of all machines unless some
are named; with --console the output of a machine's serial console, which needs no ssh.`,
  reads: ['cluster.env', 'tls/', 'images/NODE-console.log'],
  writes: [],
  flags: {
    follow: { help: 'keep printing new lines, until Ctrl-C' },
    unit: { value: 'UNIT', help: 'the journal of this systemd unit' },
    all: { help: 'the whole journal, not only that of the services' },
    console: { help: 'the serial console, from its log' },
    lines: { value: 'COUNT', number: true, help: 'how many lines of each machine (50)' },
  },
  args: '[NODE...]',
  examples: ['./bin/logs.mts --unit kubelet sigma gamma', './bin/logs.mts --console alpha'],
})
refuseIf(flags.console && (flags.unit || flags.all), '--console excludes --unit and --all')
refuseIf(flags.unit && flags.all, '--unit or --all, not both')
const { lines = 50 } = flags
const cluster = loadCluster()
const nodes = chooseNodes(cluster, args)
const width = Math.max(...nodes.map(({ name }) => name.length))
// Lines are printed as they arrive; zx would keep all of them in memory.
const dropped = Object.assign([] as string[], { push: () => 0 })
const $$ = $({ nothrow: true, store: { stdout: dropped, stderr: dropped, stdall: dropped } })
const statuses = await Promise.all(
  nodes.map((node) => print(node, flags.console ? consoleOf(node) : journalOf(node))),
)
process.exitCode = Math.max(...statuses)

function journalOf(node: Node): ProcessPromise {
  const units = flags.all ? [] : flags.unit ? [flags.unit] : servicesOf(cluster, node)
  // Quoted for the shell on the machine.
  const options = units.map((unit) => `--unit=${quote(unit)}`)
  if (flags.follow) options.push('--follow')
  return $$`ssh -F tls/ssh_config ${node.name} journalctl --no-pager --lines=${lines} ${options}`
}

function consoleOf({ name }: Node): ProcessPromise {
  // -F: each boot begins a new file.
  return $$`tail -n ${lines} ${flags.follow ? ['-F'] : []} images/${name}-console.log`
}

/** Prints a command's lines, each after the machine's name if there are several. @returns its status */
async function print({ name }: Node, command: ProcessPromise): Promise<number> {
  const prefix = nodes.length > 1 ? `${name.padEnd(width)} | ` : ''
  const copy = async (input: NodeJS.ReadableStream, to: NodeJS.WritableStream) => {
    for await (const line of createInterface({ input })) to.write(`${prefix}${line}\n`)
  }
  await Promise.all([copy(command.stdout, process.stdout), copy(command.stderr, process.stderr)])
  const { exitCode } = await command
  if (exitCode !== 255) return exitCode ?? 1
  console.error(`${prefix}does not answer ssh; --console shows its serial console`)
  return 1
}
