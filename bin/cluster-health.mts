#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// How the cluster is doing, as a live view: nodes, pods, their usage, and the last events.
import { setTimeout as sleep } from 'node:timers/promises'
import { $ } from 'zx/core'
import { loadCluster } from '../lib/cluster.mts'
import { formatTable } from '../lib/format.mts'
import { apiError, probeApiServer } from '../lib/health.mts'
import { interrupted, interruption } from '../lib/interrupt.mts'
import { useCluster } from '../lib/kubectl.mts'
import type { Pod } from '../lib/pods.mts'
import { script } from '../lib/script.mts'
import { isLive, redrawer } from '../lib/steps.mts'
import { machineState } from '../lib/vm.mts'

const { flags } = script({
  does: `Shows nodes, pods, their use of processor and memory (with metrics-server) and the last events,
again and again: q quits, p pauses and resumes. Without a terminal it shows them once. It changes
nothing and ends with status 0 whatever it finds ("healthy" in --json has the result).`,
  reads: ['cluster.env', 'configs/admin.kubeconfig', 'run/'],
  writes: [],
  flags: {
    once: { help: 'show them once' },
    json: { help: 'show them once, all of it as JSON' },
    interval: { value: 'SECONDS', number: true, help: 'between two updates (2)' },
    events: { value: 'COUNT', number: true, help: 'how many events to show (10)' },
    timeout: { value: 'SECONDS', number: true, help: 'how long to wait for each answer (8)' },
  },
  examples: ['./bin/cluster-health.mts', './bin/cluster-health.mts --json | jq .problems'],
})
const { interval = 2, events: eventCount = 10, timeout = 8 } = flags
const cluster = loadCluster()

if (flags.json) {
  console.log(JSON.stringify(await measure(), null, 2))
} else if (flags.once || !process.stdin.isTTY || !isLive()) {
  console.log(view(await measure()))
} else {
  await watch()
}

/** The result of --json. */
export type Health = Awaited<ReturnType<typeof measure>>

async function measure(signal?: AbortSignal) {
  const answers = await askAll(signal)
  const problems = problemsOf(answers)
  return { healthy: problems.length === 0, problems, namespaces: namespacesOf(answers), ...answers }
}

type Answers = Awaited<ReturnType<typeof askAll>>

/** Asks for everything at once; what does not answer holds up nothing else. */
async function askAll(signal?: AbortSignal) {
  const limits = { timeout, signal }
  const $$ = $({ timeout: timeout * 1000, signal })
  /** What was found, or why nothing was. */
  const find = async <T extends object>(args: string[], read: (text: string) => T) => {
    try {
      await useCluster(cluster)
      return { known: true as const, ...read((await $$`kubectl ${args}`).stdout) }
    } catch (error) {
      return { known: false as const, reason: apiError(error, limits) }
    }
  }
  const everywhere = ['--all-namespaces', '--output=json']
  const [machines, { nodes, ...api }, version, pods, usage, events] = await Promise.all([
    Promise.all(
      cluster.nodes.map(async (node) => {
        return { name: node.name, state: (await machineState(cluster, node)).state }
      }),
    ),
    probeApiServer(cluster, limits),
    find(['get', '--raw', '/version'], (text): { gitVersion: string } => JSON.parse(text)),
    find(['get', 'pods', ...everywhere], (text) => {
      const { items }: { items: Pod[] } = JSON.parse(text)
      return { list: items.map(podState) }
    }),
    find(['top', 'nodes', '--no-headers'], (text) => {
      return { list: text.trim().split('\n').flatMap(usageIn) }
    }),
    find(['get', 'events', ...everywhere], (text) => {
      const { items }: { items: Event[] } = JSON.parse(text)
      return { list: items.map(eventState).sort((one, other) => other.at - one.at) }
    }),
  ])
  const list = [...(nodes ?? [])].map(([name, state]) => {
    const all = pods.known ? pods.list.filter(({ node }) => node === name) : []
    const own = all.filter(({ phase }) => phase !== 'Succeeded')
    return {
      ...{ name, ...state },
      pods: { ready: own.filter(({ ready }) => ready).length, all: own.length },
      usage: usage.known ? usage.list.find((one) => one.name === name) : undefined,
    }
  })
  return {
    ...{ taken: new Date().toISOString(), machines, pods, events },
    api: { ...api, version: version.known ? version.gitVersion : '' },
    nodes: nodes ? { known: true as const, list } : { known: false as const, reason: api.reason },
    metrics: usage.known ? { known: true as const } : usage,
  }
}

/** Whether a pod is ready, and the reason if it is not. */
function podState({ metadata, spec, status }: Pod) {
  const { phase, conditions = [], containerStatuses = [] } = status
  const condition = (type: string) => conditions.find((candidate) => candidate.type === type)
  const waiting = containerStatuses.find(({ state }) => state?.waiting)?.state?.waiting?.reason
  const ready = phase === 'Succeeded' || condition('Ready')?.status === 'True'
  const reason = waiting ?? status.reason ?? condition('PodScheduled')?.message ?? 'not ready'
  return {
    ...{ namespace: metadata.namespace ?? '', name: metadata.name, node: spec.nodeName ?? '' },
    ...{ phase, ready, reason: ready ? '' : reason },
    restarts: containerStatuses.reduce((sum, { restartCount }) => sum + restartCount, 0),
  }
}

/** What a node uses, from a line of `kubectl top nodes`: "sigma 250m 12% 1024Mi 25%". */
function usageIn(line: string) {
  const [name, cpu = '', cpuPercent = '', memory = '', memoryPercent = ''] = line.split(/\s+/)
  return cpu === '<unknown>' ? [] : [{ name, cpu, cpuPercent, memory, memoryPercent }]
}

/** An event as `kubectl get events --output=json` prints it. */
interface Event {
  type?: string
  reason?: string
  message?: string
  metadata: { creationTimestamp: string }
  count?: number
  firstTimestamp?: string | null
  lastTimestamp?: string | null
  eventTime?: string | null
  series?: { count: number; lastObservedTime: string }
  involvedObject: { kind?: string; namespace?: string; name?: string }
}

function eventState(event: Event) {
  const { type = '', reason = '', message = '', series, metadata } = event
  const { lastTimestamp, eventTime, firstTimestamp } = event
  const { kind = '', namespace, name = '' } = event.involvedObject
  // Which of them is set depends on the reporter and its version of the API.
  const seen = series?.lastObservedTime ?? lastTimestamp ?? eventTime ?? firstTimestamp
  return {
    ...{ type, reason, message: message.trim() },
    object: `${kind.toLowerCase()} ${namespace ? `${namespace}/` : ''}${name}`,
    /** Milliseconds of the epoch, when it was seen last. */
    at: Date.parse(seen ?? metadata.creationTimestamp),
    count: series?.count ?? event.count ?? 1,
  }
}

/** What is wrong, a line each. */
function problemsOf({ machines, api, nodes, pods }: Answers): string[] {
  const stopped = machines.filter(({ state }) => state !== 'running')
  const problems = stopped.map(({ name, state }) => `machine ${name} is ${state}`)
  if (!api.ready) problems.push(`API server: ${api.reason}`)
  for (const { name } of nodes.known ? cluster.workers : []) {
    const node = nodes.known && nodes.list.find((candidate) => candidate.name === name)
    if (!node) problems.push(`node ${name} has not registered`)
    else if (!node.ready) problems.push(`node ${name} is not Ready: ${node.reason}`)
  }
  for (const { namespace, name, ready, reason } of pods.known ? pods.list : []) {
    if (!ready) problems.push(`pod ${namespace}/${name}: ${reason}`)
  }
  return problems
}

/** How many pods of each namespace are ready, and how often their containers were restarted. */
function namespacesOf({ pods }: Answers) {
  const list = pods.known ? pods.list : []
  return [...new Set(list.map(({ namespace }) => namespace))].sort().map((namespace) => {
    const own = list.filter((pod) => pod.namespace === namespace)
    const restarts = own.reduce((sum, pod) => sum + pod.restarts, 0)
    return { namespace, ready: own.filter(({ ready }) => ready).length, all: own.length, restarts }
  })
}

/** All of it as text: tables of nodes, namespaces and events, with the problems before the events. */
function view(health: Health): string {
  const { machines, api, nodes, pods, metrics, events } = health
  const machineOf = (name: string) => machines.find((one) => one.name === name)?.state ?? '?'
  const control = cluster.controlPlane.name
  const controlState = `API server ${api.ready ? 'ready' : 'not ready'}`
  const nodeRows = (nodes.known ? nodes.list : []).map(({ name, usage, ...node }) => {
    const state = `${node.ready ? 'Ready' : 'NotReady'}${node.cordoned ? ', cordoned' : ''}`
    const cpu = usage ? `${usage.cpu} (${usage.cpuPercent})` : '?'
    const memory = usage ? `${usage.memory} (${usage.memoryPercent})` : '?'
    return [name, machineOf(name), state, `${node.pods.ready}/${node.pods.all}`, cpu, memory]
  })
  const podRows = health.namespaces.map(({ namespace, ready, all, restarts }) => {
    return [namespace, `${ready}/${all}`, `${restarts}`]
  })
  const last = events.known ? events.list.slice(0, eventCount) : []
  const eventRows = last.map(({ at, type, object, reason, count, message }) => {
    const ago = Math.max(0, Math.round((Date.parse(health.taken) - at) / 1000))
    const times = count > 1 ? ` (${count}x)` : ''
    return [`${ago}s`, type, object, `${reason}${times}`, message.replaceAll('\n', ' ')]
  })
  const table = (header: string, rows: string[][]) => formatTable(header.split(', '), rows)
  const nodeHeader = 'NODE, MACHINE, STATE, PODS, CPU, MEMORY'
  return [
    nodes.known
      ? table(nodeHeader, [[control, machineOf(control), controlState], ...nodeRows])
      : `nodes: ${nodes.reason}`,
    ...(nodes.known && !metrics.known ? [`usage: ${metrics.reason} (make metrics)`] : []),
    '',
    pods.known ? table('NAMESPACE, PODS READY, RESTARTS', podRows) : `pods: ${pods.reason}`,
    '',
    health.problems.map((problem) => `✗ ${problem}`).join('\n') || '✓ everything is healthy',
    '',
    events.known
      ? table('AGO, TYPE, OBJECT, REASON, MESSAGE', eventRows)
      : `events: ${events.reason}`,
  ].join('\n')
}

/** Measures and draws until a key or a signal ends it. */
async function watch(): Promise<void> {
  const quit = new AbortController()
  const signal = AbortSignal.any([interruption(false), quit.signal])
  let paused = false
  let health: Health | undefined
  const redraw = redrawer()
  const draw = () => {
    const time = health ? new Date(health.taken).toLocaleTimeString('en-GB') : 'asking …'
    const state = paused ? 'paused, p resumes' : `every ${interval} s, p pauses`
    const head = `${cluster.settings.CLUSTER_NAME}  ${time}  (${state}, q quits)`
    redraw([head, '', ...(health ? view(health).split('\n') : [])])
  }
  const release = readKeys((key) => {
    if (key === 'q') quit.abort()
    if (key === 'p' || key === ' ') paused = !paused
    draw()
  })
  process.stderr.on('resize', draw)
  draw()
  try {
    while (!signal.aborted) {
      const fresh = paused ? undefined : await measure(signal)
      // An answer that arrives during a pause is not shown in it.
      if (fresh && !paused) health = fresh
      draw()
      await sleep((paused ? 0.1 : interval) * 1000, undefined, { signal })
    }
  } catch (error) {
    if (!quit.signal.aborted) throw interrupted() ?? error
  } finally {
    release()
  }
}

/**
 * Calls back for each key, without Enter and without echo. However the process ends, the terminal is
 * restored. Ctrl-C and Ctrl-Z mean what they always do. @returns ends it
 */
function readKeys(pressed: (key: string) => void): () => void {
  // Hide and show the cursor: DECTCEM of the VT220.
  const setRaw = (on: boolean) => {
    process.stdin.setRawMode(on)
    process.stderr.write(on ? '\x1b[?25l' : '\x1b[?25h')
  }
  const [begin, restore] = [() => setRaw(true), () => setRaw(false)]
  const onData = (typed: Buffer) => {
    const key = typed.toString()
    // In raw mode the terminal does not send these signals.
    if (key.includes('\x03')) process.kill(process.pid, 'SIGINT')
    else if (key.includes('\x1a')) {
      restore()
      process.kill(0, 'SIGTSTP')
    } else pressed(key)
  }
  process.once('exit', restore)
  process.on('SIGCONT', begin)
  begin()
  process.stdin.on('data', onData)
  return () => {
    process.off('exit', restore).off('SIGCONT', begin)
    process.stdin.off('data', onData).pause()
    restore()
  }
}
