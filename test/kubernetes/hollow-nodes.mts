// Workers without machines: nodes that are Ready, and whose pods count as running as soon as the
// scheduler has given them one. The rest (API server, controllers, scheduler) is real.
import { readFile } from 'node:fs/promises'
import { Agent, request } from 'node:https'
import { text } from 'node:stream/consumers'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Cluster, Node } from '../../lib/cluster.mts'
import type { ApiObject } from '../../lib/kubectl.mts'

interface HollowPod extends ApiObject {
  metadata: ApiObject['metadata'] & { uid: string }
  spec: { nodeName?: string; restartPolicy?: string; containers: { name: string; image: string }[] }
  status: { phase?: string }
}

/** What becomes of a pod: it runs, it ends, or its container waits for a reason. */
export type Fate = 'Running' | 'Succeeded' | 'Failed' | { reason: string; message: string }

/** Pods that are to end do so at once, the others run. */
export function defaultFate({ spec }: HollowPod): Fate {
  return spec.restartPolicy === 'Never' ? 'Succeeded' : 'Running'
}

export class HollowNodes {
  private readonly cluster: Cluster
  private readonly agent: Agent
  private stopped = false
  private readonly loops: Promise<void>[] = []
  private lastAddress = 1
  private readonly statuses = new Map<string, object>()
  /** What became of each pod, by its path. */
  private readonly decided = new Map<string, string>()
  /** Decides about each pod when it has come to a node. */
  fate: (pod: HollowPod) => Fate = defaultFate

  private constructor(cluster: Cluster, agent: Agent) {
    this.cluster = cluster
    this.agent = agent
  }

  /** Registers workers of cluster.env, not Ready yet, as kubelets without a network do. */
  static async register(cluster: Cluster, names?: readonly string[]): Promise<HollowNodes> {
    const [ca, cert, key] = await Promise.all(
      ['ca', 'admin', 'admin-key'].map((name) => readFile(cluster.path('tls', `${name}.pem`))),
    )
    const nodes = new HollowNodes(cluster, new Agent({ keepAlive: true, ca, cert, key }))
    for (const node of cluster.workers) {
      if (names && !names.includes(node.name)) continue
      await nodes.add(node)
    }
    return nodes
  }

  /** Makes all registered nodes Ready, and keeps them so. A second call changes nothing. */
  async start(): Promise<void> {
    if (this.loops.length > 0) return
    await this.beat()
    this.loops.push(
      this.repeat(5000, () => this.beat()),
      this.repeat(100, () => this.runPods()),
    )
  }

  /** Reports another status of a node from now on. @param status some of its fields */
  async setStatus(name: string, status: object): Promise<void> {
    this.statuses.set(name, status)
    await this.beat()
  }

  /** All nodes report the addresses of cluster.env, where no kubelet listens. */
  async useLanAddresses(): Promise<void> {
    for (const { name, ip } of this.cluster.workers) {
      await this.setStatus(name, { addresses: [{ type: 'InternalIP', address: ip }] })
    }
  }

  async stop(): Promise<void> {
    this.stopped = true
    await Promise.allSettled(this.loops)
    this.agent.destroy()
  }

  /** One request to the API server. @throws Error unless it succeeds */
  async api<T>(method: string, path: string, body?: object): Promise<T> {
    const type = method === 'PATCH' ? 'strategic-merge-patch+json' : 'json'
    const port = this.cluster.settings.API_PORT
    return new Promise((resolve, reject) => {
      const sent = request(
        {
          ...{ host: '127.0.0.1', port, path, method, agent: this.agent },
          headers: { 'content-type': `application/${type}` },
        },
        async (response) => {
          const answer = await text(response)
          if ((response.statusCode ?? 500) < 300) return resolve(JSON.parse(answer) as T)
          reject(new Error(`${method} ${path}: ${response.statusCode} ${answer}`))
        },
      )
      sent.on('error', reject)
      sent.end(body && JSON.stringify(body))
    })
  }

  private add({ name }: Node): Promise<ApiObject> {
    const labels = { 'kubernetes.io/hostname': name, 'kubernetes.io/os': 'linux' }
    const node = { apiVersion: 'v1', kind: 'Node', metadata: { name, labels } }
    return this.api('POST', '/api/v1/nodes', node)
  }

  /** What a kubelet reports regularly, so that its node does not count as lost. */
  private async beat(): Promise<void> {
    const { items } = await this.api<{ items: ApiObject[] }>('GET', '/api/v1/nodes')
    for (const { metadata } of items) {
      const now = new Date().toISOString()
      const capacity = { cpu: '4', memory: '8Gi', pods: '110' }
      const ready = { type: 'Ready', status: 'True', reason: 'KubeletReady', message: 'hollow' }
      const status = {
        capacity,
        allocatable: capacity,
        // A request for logs finds no listener, and none of another network.
        addresses: [{ type: 'InternalIP', address: '127.0.0.1' }],
        daemonEndpoints: { kubeletEndpoint: { Port: 1 } },
        conditions: [{ ...ready, lastHeartbeatTime: now }],
        ...this.statuses.get(metadata.name),
      }
      await this.api('PATCH', `/api/v1/nodes/${metadata.name}/status`, { status })
    }
  }

  private async runPods(): Promise<void> {
    const { items } = await this.api<{ items: HollowPod[] }>('GET', '/api/v1/pods')
    for (const pod of items) {
      const { namespace, name, uid, deletionTimestamp } = pod.metadata
      const path = `/api/v1/namespaces/${namespace}/pods/${name}`
      if (deletionTimestamp) {
        await this.api('DELETE', `${path}?gracePeriodSeconds=0`)
      } else if (pod.spec.nodeName && (pod.status.phase ?? 'Pending') === 'Pending') {
        const fate = this.fate(pod)
        const last = JSON.stringify([uid, fate])
        if (this.decided.get(path) === last) continue
        await this.api('PATCH', `${path}/status`, { status: this.statusOf(pod, fate) })
        this.decided.set(path, last)
      }
    }
  }

  private statusOf(pod: HollowPod, fate: Fate): object {
    const ready = fate === 'Running'
    this.lastAddress += 1
    // A node that a test has added is not in the cluster of the start.
    const node = this.cluster.nodes.find(({ name }) => name === pod.spec.nodeName)
    const range = node?.podCidr ?? '10.200.3.0/24'
    const podIP = `${range.replace(/0\/.*/, '')}${this.lastAddress % 250}`
    const state =
      typeof fate === 'object'
        ? { waiting: fate }
        : fate === 'Running'
          ? { running: { startedAt: new Date().toISOString() } }
          : { terminated: { exitCode: fate === 'Succeeded' ? 0 : 1 } }
    return {
      phase: typeof fate === 'object' ? 'Pending' : fate,
      podIP,
      podIPs: [{ ip: podIP }],
      conditions: ['Ready', 'ContainersReady'].map((type) => {
        return { type, status: ready ? 'True' : 'False' }
      }),
      containerStatuses: pod.spec.containers.map(({ name, image }) => {
        return { name, image, imageID: '', ready, restartCount: 0, state }
      }),
    }
  }

  /** A failure (the API server stops, an object is gone by now) is forgotten at the next turn. */
  private async repeat(milliseconds: number, work: () => Promise<void>): Promise<void> {
    while (!this.stopped) {
      await work().catch(() => {})
      await sleep(milliseconds)
    }
  }
}
