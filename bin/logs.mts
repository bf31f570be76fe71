#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// What the machines say: the journals of the cluster's services, or the serial consoles.
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { constants } from 'node:os'
import { createInterface } from 'node:readline'
import { chooseNodes, loadCluster, type Node } from '../lib/cluster.mts'
import { StepError } from '../lib/errors.mts'
import { interruption } from '../lib/interrupt.mts'
import { servicesOf } from '../lib/machine/probes.mts'
import { quoteForShell, sshArguments, sshFolder } from '../lib/machine/ssh.mts'
import { filesOf } from '../lib/qemu/machine-files.mts'
import { script } from '../lib/script.mts'

const { flags, args } = script({
  does: `Shows the last lines of the journals of the cluster's services, of all machines unless some
are named; with --console what a machine's serial console said, which needs no ssh.`,
  reads: ['cluster.env', 'tls/', 'images/NODE-console.log'],
  writes: [],
  flags: {
    follow: { help: 'go on showing what comes, until Ctrl-C' },
    unit: { value: 'UNIT', help: 'the journal of this systemd unit' },
    all: { help: 'the whole journal, not only that of the services' },
    console: { help: 'the serial console, from its log' },
    lines: { value: 'COUNT', number: true, help: 'how many lines of each machine (default: 50)' },
  },
  args: '[NODE...]',
  examples: [
    './bin/logs.mts --follow',
    './bin/logs.mts --unit kubelet sigma gamma',
    './bin/logs.mts --console alpha',
  ],
})

const cluster = loadCluster()
const nodes = chooseNodes(cluster, args)
const lines = flags.lines ?? 50
if (flags.console && (flags.unit || flags.all)) {
  throw new StepError('--console has no units in it', { exitCode: 2 })
}
if (flags.unit && flags.all) throw new StepError('--unit or --all, not both', { exitCode: 2 })

const width = Math.max(...nodes.map(({ name }) => name.length))
const signal = interruption()
const statuses = await Promise.all(nodes.map(show))
signal.throwIfAborted()
process.exitCode = Math.max(...statuses)

/** Prints a machine's lines, each behind its name if there are several. @returns exit status */
async function show(node: Node): Promise<number> {
  const [file = '', ...rest] = flags.console ? tailOf(node) : journalOf(node)
  const cwd = flags.console ? cluster.root : await sshFolder(cluster)
  const child = spawn(file, rest, { cwd, stdio: ['ignore', 'pipe', 'pipe'] })
  signal.addEventListener('abort', () => child.kill())
  const prefix = nodes.length > 1 ? `${node.name.padEnd(width)} | ` : ''
  const copies = [
    [child.stdout, process.stdout],
    [child.stderr, process.stderr],
  ] as const
  const ended = once(child, 'exit') as Promise<[number | null, NodeJS.Signals | null]>
  await Promise.all(
    copies.map(async ([from, to]) => {
      for await (const line of createInterface({ input: from })) to.write(`${prefix}${line}\n`)
    }),
  )
  const [status, killedBy] = await ended
  if (status === 255) {
    console.error(`${prefix}does not answer ssh; --console shows its serial console`)
    return 1
  }
  return status ?? 128 + (killedBy ? constants.signals[killedBy] : 0)
}

function journalOf(node: Node): string[] {
  const named = servicesOf(cluster, node).map(({ unit }) => unit)
  const units = flags.all ? [] : flags.unit ? [flags.unit] : named
  const journalctl = [
    ...['journalctl', '--no-pager', `--lines=${lines}`],
    ...units.map((unit) => `--unit=${quoteForShell(unit)}`),
    ...(flags.follow ? ['--follow'] : []),
  ]
  return ['ssh', '-n', ...sshArguments(node), journalctl.join(' ')]
}

function tailOf(node: Node): string[] {
  // -F: the log starts anew at each boot.
  const follow = flags.follow ? ['-F'] : []
  return ['tail', '-n', `${lines}`, ...follow, filesOf(cluster, node).consoleLog]
}
