// How a running cluster is doing: nodes, pods, what they use, and what has happened last. Asked of
// the API server alone, so that it can be asked every few seconds.
import type { Cluster } from '../cluster.mts'
import { type NodeState, probeApiServer } from '../machine/probes.mts'
import { machineState } from '../qemu/vm.mts'
import { ask, type Learned } from './cluster-report.mts'
import { type PodList, type PodReport, podReport } from './pod-report.mts'
import { parseQuantity } from './quantity.mts'

/** What is in use, and how much there is for pods. Cores and bytes. */
export interface Usage {
  cpu: number
  memory: number
  allocatable: { cpu: number; memory: number }
}

export interface NodeHealth extends NodeState {
  name: string
  /** Takes no new pods. */
  cordoned: boolean
  pods: { ready: number; all: number }
  /** Unknown without metrics-server, and until it has measured. */
  usage?: Usage
}

export interface ClusterEvent {
  type: string
  reason: string
  message: string
  /** "pod default/web-1". */
  object: string
  /** Milliseconds of the epoch, when it was seen last. */
  at: number
  count: number
}

export interface Health {
  /** ISO 8601. */
  taken: string
  machines: { name: string; state: 'running' | 'installing' | 'stopped' }[]
  api: { ready: boolean; reason: string }
  nodes: Learned<{ list: NodeHealth[] }>
  pods: Learned<{ list: PodReport[] }>
  /** Whether the metrics API answers, or why not. */
  metrics: Learned<object>
  /** Newest first. */
  events: Learned<{ list: ClusterEvent[] }>
}

interface NodeItems {
  items: {
    metadata: { name: string }
    spec: { unschedulable?: boolean }
    status: { allocatable?: { cpu?: string; memory?: string } }
  }[]
}

interface MetricsItems {
  items: { metadata: { name: string }; usage: { cpu: string; memory: string } }[]
}

interface EventItems {
  items: {
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
  }[]
}

/** Asks for all of it at once; what does not answer is said. @param timeout seconds for each */
export async function lookAtHealth(cluster: Cluster, timeout: number): Promise<Health> {
  const [machines, { nodes: states, ready, reason }, items, pods, metrics, events] =
    await Promise.all([
      Promise.all(
        cluster.nodes.map(async (node) => {
          const found = await machineState(cluster, node)
          const installing = found.state === 'running' && found.mode === 'install'
          return { name: node.name, state: installing ? ('installing' as const) : found.state }
        }),
      ),
      probeApiServer(cluster, { timeout }),
      ask<NodeItems>(cluster, '/api/v1/nodes', timeout),
      ask<PodList>(cluster, '/api/v1/pods', timeout),
      ask<MetricsItems>(cluster, '/apis/metrics.k8s.io/v1beta1/nodes', timeout),
      ask<EventItems>(cluster, '/api/v1/events', timeout),
    ])
  const list = pods.known ? pods.items.map(podReport) : []
  const measured = metrics.known ? metrics.items : []
  return {
    taken: new Date().toISOString(),
    machines,
    api: { ready, reason },
    nodes: items.known
      ? { known: true, list: items.items.map((item) => nodeHealth(item, states, list, measured)) }
      : items,
    pods: pods.known ? { known: true, list } : pods,
    metrics: metrics.known ? { known: true } : metrics,
    events: events.known
      ? { known: true, list: events.items.map(eventOf).sort((one, other) => other.at - one.at) }
      : events,
  }
}

/** What is not as it should be, a line each. */
export function troublesOf(cluster: Cluster, health: Health): string[] {
  const { machines, api, nodes, pods } = health
  const registered = new Map(nodes.known ? nodes.list.map((node) => [node.name, node]) : [])
  return [
    ...machines
      .filter(({ state }) => state !== 'running')
      .map(({ name, state }) => `machine ${name} is ${state}`),
    ...(api.ready ? [] : [`API server: ${api.reason}`]),
    ...cluster.workers.flatMap(({ name }) => {
      const node = registered.get(name)
      if (!nodes.known || node?.ready) return []
      return [`node ${name} ${node ? `is not Ready: ${node.reason}` : 'has not registered'}`]
    }),
    ...(pods.known ? pods.list : [])
      .filter(({ ready }) => !ready)
      .map(({ namespace, name, reason }) => `pod ${namespace}/${name}: ${reason}`),
  ]
}

function nodeHealth(
  { metadata, spec, status }: NodeItems['items'][number],
  states: Map<string, NodeState> | undefined,
  pods: readonly PodReport[],
  metrics: MetricsItems['items'],
): NodeHealth {
  const { name } = metadata
  const unknown = { ready: false, reason: 'not known', address: '', kubelet: '', runtime: '' }
  const own = pods.filter(({ node, phase }) => node === name && phase !== 'Succeeded')
  const used = metrics.find((item) => item.metadata.name === name)?.usage
  const number = (text = '') => parseQuantity(text) ?? 0
  const { cpu, memory } = status.allocatable ?? {}
  const allocatable = { cpu: number(cpu), memory: number(memory) }
  return {
    name,
    ...(states?.get(name) ?? unknown),
    cordoned: spec.unschedulable === true,
    pods: { ready: own.filter(({ ready }) => ready).length, all: own.length },
    ...(used ? { usage: { cpu: number(used.cpu), memory: number(used.memory), allocatable } } : {}),
  }
}

function eventOf(item: EventItems['items'][number]): ClusterEvent {
  const { type = '', reason = '', message = '', involvedObject, series } = item
  const { kind = '', namespace, name = '' } = involvedObject
  // Which of them is set depends on who reports, and by which version of the API.
  const time =
    series?.lastObservedTime ??
    item.lastTimestamp ??
    item.eventTime ??
    item.firstTimestamp ??
    item.metadata.creationTimestamp
  return {
    ...{ type, reason, message: message.trim() },
    object: `${kind.toLowerCase()} ${namespace ? `${namespace}/` : ''}${name}`,
    at: Date.parse(time),
    count: series?.count ?? item.count ?? 1,
  }
}
