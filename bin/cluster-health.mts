#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// How the cluster is doing, as a live view: nodes, pods, their usage, and the last events.
import { setTimeout as sleep } from 'node:timers/promises'
import { $ } from 'zx/core'
import { loadCluster } from '../lib/cluster.mts'
import { formatTable } from '../lib/format.mts'
import { apiError, probeApiServer } from '../lib/health.mts'
import { interruption } from '../lib/interrupt.mts'
import { useCluster } from '../lib/kubectl.mts'
import { script } from '../lib/script.mts'
import { isLive } from '../lib/steps.mts'
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
  examples: ['./bin/cluster-health.mts', './bin/cluster-health.mts --json | jq .troubles'],
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

/** What was found, or why nothing was. */
type Found<T> = ({ known: true } & T) | { known: false; reason: string }

/** The result of --json. */
export type Health = Awaited<ReturnType<typeof measure>>

async function measure(signal?: AbortSignal) {
  const answers = await askAll(signal)
  const troubles = troublesOf(answers)
  return { healthy: troubles.length === 0, troubles, namespaces: namespacesOf(answers), ...answers }
}

type Answers = Awaited<ReturnType<typeof askAll>>

/** Asks for everything at once; what does not answer holds up nothing else. */
async function askAll(signal?: AbortSignal) {
  const limits = { timeout, signal }
  const kubectl = $({ timeout: timeout * 1000, ...(signal ? { signal } : {}) })
  const find = async <T extends object>(work: () => Promise<T>): Promise<Found<T>> => {
    try {
      await useCluster(cluster)
      return { known: true, ...(await work()) }
    } catch (error) {
      return { known: false, reason: apiError(error, limits) }
    }
  }
  const [machines, { nodes, ...api }, version, pods, usage, events] = await Promise.all([
    Promise.all(
      cluster.nodes.map(async (node) => {
        const found = await machineState(cluster, node)
        const installing = found.state === 'running' && found.mode === 'install'
        return { name: node.name, state: installing ? ('installing' as const) : found.state }
      }),
    ),
    probeApiServer(cluster, limits),
    find(async () => {
      const { stdout } = await kubectl`kubectl get --raw /version`
      return JSON.parse(stdout) as { gitVersion: string }
    }),
    find(async () => {
      const { stdout } = await kubectl`kubectl get pods --all-namespaces --output=json`
      return { list: (JSON.parse(stdout) as { items: Pod[] }).items.map(podState) }
    }),
    find(async () => {
      const { stdout } = await kubectl`kubectl top nodes --no-headers`
      return { list: stdout.trim().split('\n').flatMap(usageIn) }
    }),
    find(async () => {
      const { stdout } = await kubectl`kubectl get events --all-namespaces --output=json`
      const list = (JSON.parse(stdout) as { items: Event[] }).items.map(eventState)
      return { list: list.sort((one, other) => other.at - one.at) }
    }),
  ])
  const list = [...(nodes ?? [])].map(([name, state]) => {
    const own = pods.known
      ? pods.list.filter(({ node, phase }) => node === name && phase !== 'Succeeded')
      : []
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

/** A pod as `kubectl get pods --output=json` prints it, as far as it is read here. */
interface Pod {
  metadata: { namespace: string; name: string }
  spec: { nodeName?: string }
  status: {
    phase: string
    reason?: string
    conditions?: { type: string; status: string; message?: string }[]
    containerStatuses?: { restartCount: number; state?: { waiting?: { reason?: string } } }[]
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
    ...{ namespace: metadata.namespace, name: metadata.name, node: spec.nodeName ?? '' },
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
  metadata: { creationTimestamp: string }
  type?: string
  reason?: string
  message?: string
  count?: number
  firstTimestamp?: string | null
  lastTimestamp?: string | null
  eventTime?: string | null
  series?: { count: number; lastObservedTime: string }
  involvedObject: { kind?: string; namespace?: string; name?: string }
}

function eventState(event: Event) {
  const { type = '', reason = '', message = '', involvedObject, series } = event
  const { kind = '', namespace, name = '' } = involvedObject
  // Which of them is set depends on the reporter and its version of the API.
  const time =
    series?.lastObservedTime ??
    event.lastTimestamp ??
    event.eventTime ??
    event.firstTimestamp ??
    event.metadata.creationTimestamp
  return {
    ...{ type, reason, message: message.trim() },
    object: `${kind.toLowerCase()} ${namespace ? `${namespace}/` : ''}${name}`,
    /** Milliseconds of the epoch, when it was seen last. */
    at: Date.parse(time),
    count: series?.count ?? event.count ?? 1,
  }
}

/** What is wrong, a line each. */
function troublesOf({ machines, api, nodes, pods }: Answers): string[] {
  const stopped = machines.filter(({ state }) => state !== 'running')
  const troubles = stopped.map(({ name, state }) => `machine ${name} is ${state}`)
  if (!api.ready) troubles.push(`API server: ${api.reason}`)
  for (const { name } of nodes.known ? cluster.workers : []) {
    const node = nodes.known && nodes.list.find((candidate) => candidate.name === name)
    if (!node) troubles.push(`node ${name} has not registered`)
    else if (!node.ready) troubles.push(`node ${name} is not Ready: ${node.reason}`)
  }
  const waiting = pods.known ? pods.list.filter(({ ready }) => !ready) : []
  const reasons = waiting.map(
    ({ namespace, name, reason }) => `pod ${namespace}/${name}: ${reason}`,
  )
  return [...troubles, ...reasons]
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

/** All of it as text: tables of nodes, namespaces and events, with the troubles before the events. */
function view({
  machines,
  api,
  nodes,
  pods,
  namespaces,
  troubles,
  metrics,
  events,
  taken,
}: Health) {
  const machineOf = (name: string) =>
    machines.find((machine) => machine.name === name)?.state ?? '?'
  const control = cluster.controlPlane.name
  const nodeRows = (nodes.known ? nodes.list : []).map(({ name, pods, usage, ...node }) => [
    ...[
      name,
      machineOf(name),
      `${node.ready ? 'Ready' : 'NotReady'}${node.cordoned ? ', cordoned' : ''}`,
    ],
    `${pods.ready}/${pods.all}`,
    ...(usage
      ? [`${usage.cpu} (${usage.cpuPercent})`, `${usage.memory} (${usage.memoryPercent})`]
      : ['?', '?']),
  ])
  const controlRow = [
    control,
    machineOf(control),
    `API server ${api.ready ? 'ready' : 'not ready'}`,
  ]
  const podRows = namespaces.map(({ namespace, ready, all, restarts }) => {
    return [namespace, `${ready}/${all}`, `${restarts}`]
  })
  const last = events.known ? events.list.slice(0, eventCount) : []
  const eventRows = last.map(({ at, type, object, reason, count, message }) => [
    `${Math.max(0, Math.round((Date.parse(taken) - at) / 1000))}s`,
    ...[type, object, `${reason}${count > 1 ? ` (${count}x)` : ''}`],
    message.replaceAll('\n', ' '),
  ])
  const table = (header: string, rows: string[][]) => formatTable(header.split(', '), rows)
  return [
    nodes.known
      ? table('NODE, MACHINE, STATE, PODS, CPU, MEMORY', [controlRow, ...nodeRows])
      : `nodes: ${nodes.reason}`,
    ...(nodes.known && !metrics.known ? [`usage: ${metrics.reason} (make metrics)`] : []),
    '',
    pods.known ? table('NAMESPACE, PODS READY, RESTARTS', podRows) : `pods: ${pods.reason}`,
    '',
    troubles.map((trouble) => `✗ ${trouble}`).join('\n') || '✓ everything is healthy',
    '',
    events.known
      ? table('AGO, TYPE, OBJECT, REASON, MESSAGE', eventRows)
      : `events: ${events.reason}`,
  ].join('\n')
}

/** Measures and draws until a key or a signal ends it. */
async function watch(): Promise<void> {
  const quit = new AbortController()
  const signal = AbortSignal.any([interruption(), quit.signal])
  let paused = false
  let health: Health | undefined
  let drawn = 0
  const draw = () => {
    const { columns = 80, rows = 24 } = process.stderr
    const time = health ? new Date(health.taken).toLocaleTimeString('en-GB') : 'asking …'
    const state = paused ? 'paused, p resumes' : `every ${interval} s, p pauses`
    const head = `${cluster.settings.CLUSTER_NAME}  ${time}  (${state}, q quits)`
    const lines = [head, '', ...(health ? view(health).split('\n') : [])].slice(0, rows - 1)
    const up = drawn > 0 ? `\x1b[${drawn}A` : ''
    const text = lines.map((line) => `\x1b[2K${line.slice(0, columns - 1)}\n`).join('')
    process.stderr.write(`${up}${text}\x1b[J`)
    drawn = lines.length
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
    // Of its own end, or after Ctrl-C.
    if (!quit.signal.aborted) throw error
  } finally {
    release()
  }
}

/**
 * Calls back for each key, without Enter and without echo. However the process ends, the terminal is
 * restored. Ctrl-C and Ctrl-Z mean what they always do.
 *
 * @returns ends it
 */
function readKeys(pressed: (key: string) => void): () => void {
  // Hide and show the cursor: DECTCEM of the VT220.
  const begin = () => {
    process.stdin.setRawMode(true)
    process.stderr.write('\x1b[?25l')
  }
  const restore = () => {
    process.stdin.setRawMode(false)
    process.stderr.write('\x1b[?25h')
  }
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
