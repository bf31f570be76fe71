#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// How the cluster is doing, again and again: nodes, pods, what they use, what has happened last.
import { setTimeout as sleep } from 'node:timers/promises'
import { loadCluster } from '../lib/cluster.mts'
import { formatBytes, formatTable } from '../lib/format.mts'
import { interruption } from '../lib/interrupt.mts'
import {
  type Health,
  lookAtHealth,
  type NodeHealth,
  troublesOf,
} from '../lib/kubernetes/health.mts'
import { podTable } from '../lib/kubernetes/pod-report.mts'
import { LiveLines } from '../lib/live-lines.mts'
import { RawKeys } from '../lib/raw-keys.mts'
import { script } from '../lib/script.mts'

const { flags } = script({
  does: `Shows nodes, pods, their use of processor and memory (with metrics-server) and the last events,
again and again: q quits, p pauses and goes on. Without a terminal it looks once. Looking is all it
does: it ends with status 0 whatever it sees ("healthy" in --json tells).`,
  reads: ['cluster.env', 'tls/', 'run/'],
  writes: [],
  flags: {
    once: { help: 'look once' },
    json: { help: 'look once, and print all of it as JSON' },
    interval: { value: 'SECONDS', number: true, help: 'between two looks (2)' },
    events: { value: 'COUNT', number: true, help: 'how many events to show (10)' },
    timeout: { value: 'SECONDS', number: true, help: 'how long to wait for each answer (8)' },
  },
  examples: ['./bin/cluster-health.mts', './bin/cluster-health.mts --json | jq .troubles'],
})
const { interval = 2, events = 10, timeout = 8 } = flags
const cluster = loadCluster()

if (flags.json) {
  const health = await lookAtHealth(cluster, timeout)
  const troubles = troublesOf(cluster, health)
  console.log(JSON.stringify({ healthy: troubles.length === 0, troubles, ...health }, null, 2))
} else if (flags.once || !process.stdin.isTTY || !process.stderr.isTTY) {
  console.log(linesOf(await lookAtHealth(cluster, timeout)).join('\n'))
} else await watch()

/** Looks and draws until a key or a signal ends it. */
async function watch(): Promise<void> {
  const quit = new AbortController()
  const signal = AbortSignal.any([interruption(), quit.signal])
  let paused = false
  let health: Health | undefined
  const live = new LiveLines(() => [head(health, paused), '', ...(health ? linesOf(health) : [])])
  const keys = new RawKeys((key) => {
    if (key === 'q') quit.abort()
    if (key === 'p' || key === ' ') paused = !paused
  })
  try {
    while (!signal.aborted) {
      // What was asked for before a pause is not shown in it.
      const fresh = paused ? undefined : await orAborted(lookAtHealth(cluster, timeout), signal)
      if (fresh && !paused) health = fresh
      const pause = paused ? 0.1 : interval
      await sleep(pause * 1000, undefined, { signal }).catch(() => {})
    }
  } finally {
    keys.end()
    live.end()
  }
  // After Ctrl-C or SIGTERM the status is that of the signal.
  if (!quit.signal.aborted) signal.throwIfAborted()
  // An answer that is still awaited is of no more use.
  process.exit()
}

/** The result, or nothing as soon as the signal is aborted. */
function orAborted<T>(work: Promise<T>, signal: AbortSignal): Promise<T | undefined> {
  const aborted = new Promise<undefined>((resolve) => {
    signal.addEventListener('abort', () => resolve(undefined), { once: true })
  })
  return Promise.race([work, aborted])
}

function head(health: Health | undefined, paused: boolean): string {
  const time = health ? new Date(health.taken).toLocaleTimeString('en-GB') : 'asking …'
  const state = paused ? 'paused, p goes on' : `every ${interval} s, p pauses`
  return `${cluster.settings.CLUSTER_NAME}  ${time}  (${state}, q quits)`
}

function linesOf(health: Health): string[] {
  const troubles = troublesOf(cluster, health)
  return [
    ...nodeLines(health),
    '',
    ...podLines(health),
    '',
    ...(troubles.length > 0 ? troubles.map((trouble) => `✗ ${trouble}`) : ['✓ all is well']),
    '',
    ...eventLines(health),
  ]
}

function nodeLines({ nodes, machines, api, metrics }: Health): string[] {
  if (!nodes.known) return [`nodes: ${nodes.reason}`]
  const machineOf = (name: string) => machines.find((machine) => machine.name === name)?.state
  const control = cluster.controlPlane.name
  const rows = [
    [control, machineOf(control) ?? '', `API server ${api.ready ? 'ready' : 'not ready'}`],
    ...nodes.list.map((node) => [
      ...[node.name, machineOf(node.name) ?? 'unknown', stateOf(node)],
      `${node.pods.ready}/${node.pods.all}`,
      ...usageOf(node),
    ]),
  ]
  const table = formatTable(['NODE', 'MACHINE', 'STATE', 'PODS', 'CPU', 'MEMORY'], rows)
  const why = metrics.known ? [] : [`usage: ${metrics.reason} (make metrics)`]
  return [...table.split('\n'), ...why]
}

function stateOf({ ready, cordoned }: NodeHealth): string {
  return `${ready ? 'Ready' : 'NotReady'}${cordoned ? ', cordoned' : ''}`
}

/** "0.25 of 2 (13%)": in use, and what there is for pods. */
function usageOf({ usage }: NodeHealth): string[] {
  if (!usage) return ['?', '?']
  const { cpu, memory, allocatable } = usage
  const part = (used: number, all: number) =>
    all > 0 ? ` (${Math.round((used / all) * 100)}%)` : ''
  return [
    `${cpu.toFixed(2)} of ${allocatable.cpu}${part(cpu, allocatable.cpu)}`,
    `${formatBytes(memory)} of ${formatBytes(allocatable.memory)}${part(memory, allocatable.memory)}`,
  ]
}

function podLines({ pods }: Health): string[] {
  if (!pods.known) return [`pods: ${pods.reason}`]
  return podTable(pods.list).split('\n')
}

function eventLines({ events: known, taken }: Health): string[] {
  if (!known.known) return [`events: ${known.reason}`]
  const rows = known.list
    .slice(0, events)
    .map(({ at, type, object, reason, message, count }) => [
      `${Math.max(0, Math.round((Date.parse(taken) - at) / 1000))}s`,
      ...[
        type,
        object,
        `${reason}${count > 1 ? ` (${count}x)` : ''}`,
        message.replaceAll('\n', ' '),
      ],
    ])
  return formatTable(['AGO', 'TYPE', 'OBJECT', 'REASON', 'MESSAGE'], rows).split('\n')
}
