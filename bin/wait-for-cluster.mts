#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// The dashboard of a cluster that starts: a row for each component, until all are active.
import { setTimeout as sleep } from 'node:timers/promises'
import { chooseNodes, loadCluster, type Node } from '../lib/cluster.mts'
import { lastConsoleLines } from '../lib/console-log.mts'
import { formatDuration } from '../lib/format.mts'
import { clockProbe, clockProblem, probeApiServer, serviceProbe } from '../lib/health.mts'
import { interruption } from '../lib/interrupt.mts'
import { script } from '../lib/script.mts'
import { assertStarting, connect, NoAnswer, runProbes } from '../lib/ssh.mts'
import { isLive, redrawer } from '../lib/steps.mts'
import { filesOf } from '../lib/vm.mts'
import { waitFor } from '../lib/wait.mts'

const { flags, args } = script({
  does: `Waits until the API server, etcd, scheduler, controller-manager and every worker are active,
and shows each of them: its state, for how long, and what is still missing. Asks their health
endpoints and systemd. With names, waits for those machines alone. Gives up at once when a
machine does not run or its boot has failed.`,
  reads: ['cluster.env', 'tls/', 'configs/admin.kubeconfig', 'run/', 'images/NODE-console.log'],
  writes: [],
  flags: {
    timeout: { value: 'SECONDS', number: true, help: 'give up after this time (WAIT_TIMEOUT)' },
    ready: { help: 'wait until the workers are Ready for pods, as they are after make network' },
    json: { help: 'print the rows at the end, as JSON' },
  },
  args: '[NODE...]',
  examples: ['./bin/wait-for-cluster.mts alpha', './bin/wait-for-cluster.mts --ready'],
})

const cluster = loadCluster()
const nodes = chooseNodes(cluster, args)
const { controlPlane } = cluster
const timeout = flags.timeout ?? cluster.settings.WAIT_TIMEOUT
const started = Date.now()
const hint = 'make logs shows the journals of the services, make status the whole cluster'

/** What was measured last. Without an entry: nothing yet. */
let api: Awaited<ReturnType<typeof probeApiServer>> | undefined
const machines = new Map<Node, Awaited<ReturnType<typeof askMachine>>>()
const notAskedYet = 'not asked yet'

const service = (unit: string) => () => serviceMissing(controlPlane, unit)
const rows = [
  row('API server', controlPlane, apiServerMissing),
  row('etcd', controlPlane, service('etcd')),
  row('controller-manager', controlPlane, service('kube-controller-manager')),
  row('scheduler', controlPlane, service('kube-scheduler')),
  ...cluster.workers.map((node) => row(node.name, node, () => workerMissing(node))),
].filter(({ node }) => nodes.includes(node))
const width = Math.max(...rows.map(({ name }) => name.length))
const redraw = redrawer()

// The API server and each machine are asked in loops of their own, so that none holds up the others.
const ended = new AbortController()
const signal = AbortSignal.any([interruption(), ended.signal])
let hopeless: unknown
const loops = [
  repeat(async () => {
    api = await probeApiServer(cluster, { signal })
  }),
  ...nodes.map((node) => repeat(async () => machines.set(node, await askMachine(node)))),
]
try {
  await waitFor({ failure: 'not all are active', timeout, signal, every: 200, hint }, async () => {
    if (hopeless) throw hopeless
    update()
    return rows.every(({ active }) => active) ? undefined : missing()
  })
} finally {
  ended.abort()
  if (flags.json) printJson()
  await Promise.all(loops)
}
console.error(`✓ all are active (${formatDuration(Date.now() - started)})`)

async function repeat(measure: () => Promise<unknown>): Promise<void> {
  while (!signal.aborted) {
    await measure().catch((error) => {
      hopeless ??= error
    })
    await sleep(1000, undefined, { signal }).catch(() => {})
  }
}

/** @throws StepError if the machine will not answer, however long one waits */
async function askMachine(node: Node) {
  try {
    await connect(cluster, node, { signal })
    const probes = { services: serviceProbe(cluster, node), clock: clockProbe }
    return await runProbes(node, probes, 20, signal)
  } catch (error) {
    if (!(error instanceof NoAnswer)) throw error
    await assertStarting(cluster, node, `${node.name} will not start`, `make boot-${node.name}`)
    return { silent: error.message }
  }
}

function row(name: string, node: Node, missing: () => string) {
  return { name, node, missing, active: false, since: started, reason: notAskedYet, shown: '' }
}

function serviceMissing(node: Node, unit: string): string {
  const machine = machines.get(node)
  if (!machine) return notAskedYet
  if ('silent' in machine) return machine.silent
  return machine.services.find((service) => service.unit === unit)?.reason ?? `no unit ${unit}`
}

function apiServerMissing(): string {
  if (api?.ready) return ''
  // A unit that does not run is a better reason than a port on which nothing listens.
  return serviceMissing(controlPlane, 'kube-apiserver') || api?.reason || notAskedYet
}

/** A worker needs the pod network to be Ready; without --ready it is enough that it registered. */
function workerMissing(node: Node): string {
  const kubelet = serviceMissing(node, 'kubelet')
  if (kubelet) return kubelet
  if (!api?.nodes) return 'kubelet runs; the API server does not answer yet'
  const registered = api.nodes.get(node.name)
  if (!registered) return 'kubelet runs, but has not registered with the API server'
  return flags.ready && !registered.ready ? `not Ready: ${registered.reason}` : ''
}

/** Sets the rows to what was measured last, and shows them. */
function update(): void {
  for (const row of rows) {
    const machine = machines.get(row.node)
    const reason = row.missing()
    // Certificates are refused because of a wrong clock, and much else fails because of that.
    const clock = machine && 'clock' in machine ? clockProblem(row.node.name, machine.clock) : ''
    row.reason = [reason, reason && clock].filter(Boolean).join('; ')
    if (row.active !== (reason === '')) row.since = Date.now()
    row.active = reason === ''
  }
  if (isLive()) return void redraw(rows.map((row) => textOf(row, row.since)))
  // Without a terminal: a line for each row whose state or reason has changed.
  for (const row of rows) {
    const shown = row.active ? 'active' : row.reason
    if (shown === notAskedYet || shown === row.shown) continue
    row.shown = shown
    console.error(textOf(row, started))
  }
}

function textOf({ name, active, reason }: (typeof rows)[number], since: number): string {
  const time = formatDuration(Date.now() - since).padStart(7)
  return `${active ? '✓' : '•'} ${name.padEnd(width)}  ${active ? 'active ' : 'waiting'} ${time}  ${reason}`
}

/** What is missing and why, and the last console lines of machines that do not answer. */
async function missing(): Promise<string> {
  const waiting = rows.filter(({ active }) => !active)
  const lines = waiting.map(({ name, reason }) => `${name}: ${reason}`)
  for (const node of new Set(waiting.map((row) => row.node))) {
    const machine = machines.get(node)
    if (!machine || !('silent' in machine)) continue
    const console = await lastConsoleLines(filesOf(cluster, node).consoleLog, 8)
    lines.push(`the console of ${node.name}:`, ...console.map((line) => `  ${line}`))
  }
  return lines.join('\n')
}

function printJson(): void {
  const seconds = (since: number) => Math.round((Date.now() - since) / 1000)
  const components = rows.map(({ name, node, active, since, reason }) => {
    const state = active ? 'active' : 'waiting'
    return { name, machine: node.name, state, seconds: seconds(since), reason }
  })
  const ready = rows.every(({ active }) => active)
  console.log(JSON.stringify({ ready, seconds: seconds(started), components }, null, 2))
}
