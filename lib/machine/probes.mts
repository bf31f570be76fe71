// Measuring what runs: systemd units and health endpoints of a machine in one ssh call, and the
// API server over its forwarded port. Only what was measured is told, never what should be.

import type { Cluster, Node } from '../cluster.mts'
import { StepError } from '../errors.mts'
import { type ApiAnswer, askApiServer, wrongEncryptionKey } from '../kubernetes/api-server.mts'
import type { Machine } from './machine.mts'
import { type Probe, runProbes } from './probe.mts'

/** A service that is part of the cluster. */
export interface Service {
  unit: string
  /** Health endpoint on the machine itself; none: what systemd says has to do. */
  health?: string
}

const controlPlaneServices: readonly Service[] = [
  // The listener for health and metrics, which asks for no certificate.
  { unit: 'etcd', health: 'http://127.0.0.1:2381/health' },
  // Its health is asked for from outside, as everybody who uses it does.
  { unit: 'kube-apiserver' },
  { unit: 'kube-controller-manager', health: 'https://127.0.0.1:10257/healthz' },
  { unit: 'kube-scheduler', health: 'https://127.0.0.1:10259/readyz' },
]
const workerServices: readonly Service[] = [
  { unit: 'containerd' },
  { unit: 'kubelet', health: 'http://127.0.0.1:10248/healthz' },
]
const kubeProxy: Service = { unit: 'kube-proxy', health: 'http://127.0.0.1:10256/healthz' }

/** The cluster's services on a machine, in the order in which they come up. */
export function servicesOf(cluster: Cluster, node: Node): readonly Service[] {
  if (node.role === 'control-plane') return controlPlaneServices
  const cilium = cluster.settings.KUBE_PROXY_MODE === 'cilium'
  return cilium ? workerServices : [...workerServices, kubeProxy]
}

/** One service as it was found. */
export interface ServiceState {
  unit: string
  healthy: boolean
  /** Why it is not: "activating (auto-restart), exit-code", "health: 503". */
  reason: string
  /** Times that systemd has started it again. */
  restarts: number
}

/** A node as the API server has it. */
export interface NodeState {
  ready: boolean
  reason: string
  address: string
  kubelet: string
  runtime: string
}

export interface ApiState {
  ready: boolean
  reason: string
  /** Registered nodes by name; undefined if they could not be listed. */
  nodes?: Map<string, NodeState>
}

/** The states of all the cluster's services on a machine, with one systemctl and one curl. */
export function serviceProbe(cluster: Cluster, node: Node): Probe<ServiceState[]> {
  const wanted = servicesOf(cluster, node)
  const units = wanted.map(({ unit }) => `${unit}.service`).join(' ')
  const urls = wanted.flatMap(({ health }) => health ?? []).join(' ')
  return {
    // Early in its boot a machine lets us in, but systemd does not answer yet.
    // -k: these certificates are made by the programs for themselves, and loopback is the machine.
    command: `
      systemctl show --property=LoadState,ActiveState,SubState,Result,ExecMainStatus,NRestarts ${units} || true
      echo '== health'
      curl -sk -m 3 -w '\\n== %{http_code} %{url} %{errormsg}\\n' ${urls} || true`,
    read(output) {
      const [shown = '', health = ''] = output.split('== health\n')
      const blocks = shown.trim().split(/\n\n+/)
      const answers = healthAnswers(health)
      return wanted.map(({ unit, health: url }, index) => {
        const properties = propertiesOf(blocks[index] ?? '')
        const trouble = url ? (answers.get(url) ?? 'no answer') : ''
        const reason =
          unitReason(unit, properties) || (trouble && `${unit} is not healthy: ${trouble}`)
        return { unit, healthy: reason === '', reason, restarts: Number(properties.NRestarts ?? 0) }
      })
    },
  }
}

/** The states of all the cluster's services on a machine. @throws NoAnswer */
export async function probeServices(machine: Machine, timeout = 20): Promise<ServiceState[]> {
  const services = serviceProbe(machine.cluster, machine.node)
  return (await runProbes(machine, { services }, timeout)).services
}

/** Whether the API server is ready, and the nodes it knows. Never throws: no answer is a state. */
export async function probeApiServer(
  cluster: Cluster,
  options: { timeout?: number; signal?: AbortSignal | undefined } = {},
): Promise<ApiState> {
  try {
    const readiness = await askApiServer(cluster, '/readyz?verbose', options)
    if (readiness.status !== 200) {
      return { ready: false, reason: await whyNotReady(cluster, readiness, options) }
    }
    const { status, body } = await askApiServer(cluster, '/api/v1/nodes', options)
    if (status !== 200) return { ready: true, reason: `listing nodes: HTTP ${status}` }
    return { ready: true, reason: '', nodes: nodesOf(JSON.parse(body)) }
  } catch (error) {
    options.signal?.throwIfAborted()
    if (!(error instanceof StepError)) throw error
    return { ready: false, reason: error.message }
  }
}

async function whyNotReady(
  cluster: Cluster,
  readiness: ApiAnswer,
  options: Parameters<typeof askApiServer>[2],
): Promise<string> {
  const reason = failingChecks(readiness)
  // It reads all Secrets when it starts, and is not ready before it can.
  if (!reason.includes('informer-sync')) return reason
  const { body } = await askApiServer(cluster, '/api/v1/secrets', options)
  return body.includes('unable to transform key') ? `not ready: ${wrongEncryptionKey}` : reason
}

/** Of "[-]etcd failed: reason withheld" and its like, the names of what is not ready. */
function failingChecks({ status, body }: ApiAnswer): string {
  if (status === 401) return 'it does not accept the admin certificate (HTTP 401)'
  const failing = [...body.matchAll(/^\[-\](\S+)/gm)].map(([, name]) => name)
  return failing.length > 0 ? `not ready: ${failing.join(', ')}` : `HTTP ${status}`
}

interface NodeList {
  items: {
    metadata: { name: string }
    status: {
      conditions?: { type: string; status: string; reason: string; message: string }[]
      addresses?: { type: string; address: string }[]
      nodeInfo: { kubeletVersion: string; containerRuntimeVersion: string }
    }
  }[]
}

function nodesOf(list: NodeList): Map<string, NodeState> {
  return new Map(
    list.items.map(({ metadata, status }) => {
      const condition = status.conditions?.find(({ type }) => type === 'Ready')
      return [
        metadata.name,
        {
          ready: condition?.status === 'True',
          reason: condition?.status === 'True' ? '' : (condition?.message ?? 'no condition yet'),
          address: status.addresses?.find(({ type }) => type === 'InternalIP')?.address ?? '',
          kubelet: status.nodeInfo.kubeletVersion,
          runtime: status.nodeInfo.containerRuntimeVersion,
        },
      ]
    }),
  )
}

/** Why systemd does not call a unit active; empty if it does. */
function unitReason(unit: string, properties: Record<string, string>): string {
  const { LoadState, ActiveState, SubState, Result, ExecMainStatus } = properties
  if (ActiveState === 'active') return ''
  if (!ActiveState) return 'systemd does not answer yet'
  if (LoadState === 'not-found') return `there is no unit ${unit}`
  // systemd's own status when it cannot run a program: systemd.exec(5).
  if (ExecMainStatus === '203') return `the program of ${unit} is missing on the machine`
  return `${unit} is ${ActiveState} (${SubState}${Result === 'success' ? '' : `, ${Result}`})`
}

/** Why health endpoints are not content, by address, from what curl printed; empty if one is. */
function healthAnswers(printed: string): Map<string, string> {
  const answers = printed.matchAll(/([\s\S]*?)\n== (\d{3}) (\S+) ?(.*)\n/g)
  return new Map(
    [...answers].map(([, body = '', status = '', url = '', error = '']) => {
      if (status === '200') return [url, '']
      // How long it took is another number each time, and says nothing.
      const silence = error.replace(/ after \d+ ms/, '')
      const said =
        status === '000' ? silence : `HTTP ${status} ${body.replaceAll('\n', ' ').trim()}`
      return [url, said.slice(0, 200)]
    }),
  )
}

function propertiesOf(block: string): Record<string, string> {
  return Object.fromEntries(block.split('\n').map((line) => line.split(/=(.*)/s).slice(0, 2)))
}
