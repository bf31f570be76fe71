#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// The dashboard of a cluster that is coming up: a row for each component until all are active.
import { chooseNodes, loadCluster } from '../lib/cluster.mts'
import { StepError } from '../lib/errors.mts'
import { formatDuration } from '../lib/format.mts'
import { interruption } from '../lib/interrupt.mts'
import {
  componentsOf,
  notAskedYet,
  type Row,
  watchReadiness,
} from '../lib/kubernetes/readiness.mts'
import { LiveLines } from '../lib/live-lines.mts'
import { lastConsoleLines } from '../lib/qemu/console-log.mts'
import { filesOf } from '../lib/qemu/machine-files.mts'
import { script } from '../lib/script.mts'

const { flags, args } = script({
  does: `Waits until the API server, etcd, scheduler, controller-manager and every worker are active,
and shows each of them: its state, for how long, and what is still missing. Asks their health
endpoints and systemd. With names, waits for those machines alone. Gives up at once when a
machine does not run or its boot has failed.`,
  reads: ['cluster.env', 'tls/', 'run/', 'images/NODE-console.log'],
  writes: [],
  flags: {
    timeout: { value: 'SECONDS', number: true, help: 'give up after this time (WAIT_TIMEOUT)' },
    ready: {
      help: 'wait until the workers are Ready for pods too, as they are after make network',
    },
    json: { help: 'print the rows at the end, as JSON' },
  },
  args: '[NODE...]',
  examples: [
    './bin/wait-for-cluster.mts',
    './bin/wait-for-cluster.mts alpha',
    './bin/wait-for-cluster.mts --ready --timeout 300',
  ],
})

const cluster = loadCluster()
const chosen = chooseNodes(cluster, args)
const components = componentsOf(cluster, flags.ready).filter(({ node }) => chosen.includes(node))
const width = Math.max(...components.map(({ name }) => name.length))
const timeout = flags.timeout ?? cluster.settings.WAIT_TIMEOUT
const started = Date.now()
const deadline = AbortSignal.timeout(timeout * 1000)
let rows: Row[] = []

const live = process.stderr.isTTY ? new LiveLines(() => rows.map(rowText)) : undefined
const told = new Map<string, string>()
try {
  rows = await watchReadiness(cluster, components, {
    changed: (now) => {
      rows = now
      if (!live) tellChanges()
    },
    signal: AbortSignal.any([interruption(), deadline]),
  })
  if (!live) tellChanges()
} catch (error) {
  throw deadline.aborted ? await gaveUp() : error
} finally {
  live?.end()
  if (flags.json) printJson()
}
console.error(`✓ all are active (${formatDuration(Date.now() - started)})`)

/** Without a terminal: a line for each row whose state or reason is another than before. */
function tellChanges(): void {
  for (const row of rows) {
    const state = row.active ? 'active' : row.reason
    if (state === notAskedYet || told.get(row.name) === state) continue
    told.set(row.name, state)
    console.error(rowText(row))
  }
}

function rowText({ name, active, since, reason }: Row): string {
  const time = formatDuration(Date.now() - (live ? since : started)).padStart(7)
  return `${active ? '✓' : '•'} ${name.padEnd(width)}  ${active ? 'active ' : 'waiting'} ${time}  ${reason}`
}

/** Who was not there in time and why, and what a machine that cannot be reached said last. */
async function gaveUp(): Promise<StepError> {
  const missing = rows.filter(({ active }) => !active)
  const lines = missing.map(({ name, reason }) => `${name}: ${reason}`)
  for (const node of new Set(missing.map((row) => row.node))) {
    const unreachable = missing.some((row) => row.node === node && row.unreachable)
    if (!unreachable) continue
    const console = await lastConsoleLines(filesOf(cluster, node).consoleLog, 8)
    lines.push(`the console of ${node.name}:`, ...console.map((line) => `  ${line}`))
  }
  const names = missing.map(({ name }) => name).join(', ')
  return new StepError(`not active after ${timeout} s: ${names}`, {
    output: lines.join('\n'),
    hint: 'make logs shows the journals of the services, make status all of the cluster',
  })
}

function printJson(): void {
  const found = rows.map(({ name, node, active, since, reason }) => ({
    name,
    machine: node.name,
    state: active ? 'active' : 'waiting',
    seconds: Math.round((Date.now() - since) / 1000),
    reason,
  }))
  const ready = rows.length > 0 && rows.every(({ active }) => active)
  const seconds = Math.round((Date.now() - started) / 1000)
  console.log(JSON.stringify({ ready, seconds, components: found }, null, 2))
}
