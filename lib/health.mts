// What runs and what does not: the services of a machine in one ssh call, the API server and its
// nodes by kubectl, and waits for them.
import { $, ProcessOutput } from 'zx/core'
import type { Cluster, Node } from './cluster.mts'
import { lastLines, StepError } from './errors.mts'
import { type ApiNode, notReady, useCluster } from './kubectl.mts'
import { knownProblem, wrongEncryptionKey } from './problems.mts'
import { connect, noAnswer, type Probe, remote, runProbes } from './ssh.mts'
import { waitFor } from './wait.mts'

/** A systemd service of the cluster, and the URL of its health endpoint on the machine. */
export interface Service {
  unit: string
  health?: string
}

const controlPlaneServices: readonly Service[] = [
  // etcd's listener for health and metrics, which requires no client certificate.
  { unit: 'etcd', health: 'http://127.0.0.1:2381/health' },
  // Its health is asked for from outside, the way its clients reach it: probeApiServer.
  { unit: 'kube-apiserver' },
  { unit: 'kube-controller-manager', health: 'https://127.0.0.1:10257/healthz' },
  { unit: 'kube-scheduler', health: 'https://127.0.0.1:10259/readyz' },
]
const workerServices: readonly Service[] = [
  { unit: 'containerd' },
  { unit: 'kubelet', health: 'http://127.0.0.1:10248/healthz' },
]
const kubeProxy: Service = { unit: 'kube-proxy', health: 'http://127.0.0.1:10256/healthz' }

/** The cluster's services on a machine, in the order in which they start. */
export function servicesOf(cluster: Cluster, node: Node): readonly Service[] {
  if (node.role === 'control-plane') return controlPlaneServices
  const cilium = cluster.settings.KUBE_PROXY_MODE === 'cilium'
  return cilium ? workerServices : [...workerServices, kubeProxy]
}

export interface ServiceState {
  unit: string
  healthy: boolean
  /** Why it is not healthy: "etcd is activating (auto-restart, exit-code)"; empty if it is. */
  reason: string
  /** How often systemd has restarted it. */
  restarts: number
}

/** The states of the cluster's services on a machine, by one systemctl and one curl. */
export function serviceProbe(cluster: Cluster, node: Node): Probe<ServiceState[]> {
  const services = servicesOf(cluster, node)
  const units = services.map(({ unit }) => `${unit}.service`).join(' ')
  const urls = services.flatMap(({ health }) => health ?? []).join(' ')
  return {
    // Early in the boot sshd answers, but systemd does not yet.
    // -k: the programs issue these certificates themselves, and the connection is loopback.
    command: `
      systemctl show --property=LoadState,ActiveState,SubState,Result,ExecMainStatus,NRestarts ${units} || true
      echo '== health'
      curl -sk -m 3 -w '\\n== %{http_code} %{url} %{errormsg}\\n' ${urls} || true`,
    read(output) {
      const [shown = '', printed = ''] = output.split('== health\n')
      const blocks = shown.trim().split(/\n\n+/)
      const errors = endpointErrors(printed)
      return services.map(({ unit, health }, index) => {
        const lines = (blocks[index] ?? '').split('\n')
        const properties = Object.fromEntries(lines.map((line) => line.split(/=(.*)/s)))
        const error = health ? (errors.get(health) ?? 'no answer') : ''
        const reason = unitReason(unit, properties) || (error && `${unit} is not healthy: ${error}`)
        return { unit, healthy: reason === '', reason, restarts: Number(properties.NRestarts ?? 0) }
      })
    },
  }
}

/** Why systemd does not report a unit as active; empty if it does. */
function unitReason(unit: string, properties: Record<string, string | undefined>): string {
  const { LoadState, ActiveState, SubState, Result, ExecMainStatus } = properties
  if (ActiveState === 'active') return ''
  if (!ActiveState) return 'systemd does not answer yet'
  if (LoadState === 'not-found') return `there is no unit ${unit}`
  // The exit status that systemd sets when it cannot execute a program: systemd.exec(5).
  if (ExecMainStatus === '203') return `the program of ${unit} is missing on the machine`
  return `${unit} is ${ActiveState} (${SubState}${Result === 'success' ? '' : `, ${Result}`})`
}

/** Errors of health endpoints by URL, from curl's output; empty for a healthy one. */
function endpointErrors(printed: string): Map<string, string> {
  const answers = printed.matchAll(/([\s\S]*?)\n== (\d{3}) (\S+) ?(.*)\n/g)
  return new Map(
    [...answers].map(([, body = '', status = '', url = '', message = '']) => {
      if (status === '200') return [url, '']
      const response = `HTTP ${status} ${body.replaceAll('\n', ' ').trim()}`
      // The duration differs each time, and would make every line a new one.
      return [url, status === '000' ? message.replace(/ after \d+ ms/, '') : response.slice(0, 200)]
    }),
  )
}

/** What serviceProbe finds. @param timeout seconds @throws NoAnswer */
export async function probeServices(cluster: Cluster, node: Node, timeout = 20) {
  await connect(cluster, node, { timeout })
  return (await runProbes(node, { services: serviceProbe(cluster, node) }, timeout)).services
}

/** How many seconds a machine's clock is ahead of this computer's; negative: behind. */
export const clockProbe: Probe<number> = {
  command: 'date +%s',
  read: (output) => Number(output) - Math.round(Date.now() / 1000),
}

/** "the clock of alpha is 730 days ahead of this computer's"; empty up to five minutes. */
export function clockTrouble(name: string, ahead: number): string {
  const off = Math.abs(ahead)
  if (off <= 300) return ''
  const days = off / 86_400
  const time = days < 2 ? `${Math.round(off / 60)} minutes` : `${Math.round(days)} days`
  return `the clock of ${name} is ${time} ${ahead > 0 ? 'ahead of' : 'behind'} this computer's`
}

/** A node as the API server reports it. */
export interface NodeState {
  ready: boolean
  reason: string
  /** Takes no new pods. */
  cordoned: boolean
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

interface Limits {
  /** Seconds; 10 by default. */
  timeout?: number
  signal?: AbortSignal | undefined
}

/** Whether the API server is ready, and its nodes. No answer is a state, not an error. */
export async function probeApiServer(cluster: Cluster, limits: Limits = {}): Promise<ApiState> {
  let ready = false
  try {
    await get(cluster, '/readyz?verbose', limits)
    ready = true
    const { items } = JSON.parse(await get(cluster, '/api/v1/nodes', limits))
    return { ready, reason: '', nodes: new Map(items.map(nodeState)) }
  } catch (error) {
    const reason = apiError(error, limits)
    if (ready) return { ready, reason: `nodes cannot be listed: ${reason}` }
    return { ready, reason: await whyNotReady(cluster, reason, limits) }
  }
}

/** The API server's answer to a GET by the admin. */
async function get(cluster: Cluster, path: string, limits: Limits): Promise<string> {
  await useCluster(cluster)
  const { timeout = 10, signal } = limits
  const run = $({ timeout: timeout * 1000, ...(signal ? { signal } : {}) })
  return (await run`kubectl get --raw ${path}`).stdout
}

/**
 * Why a kubectl command got no answer from the API server.
 *
 * @throws the signal's reason; anything that is not an error of kubectl or of a step
 */
export function apiError(error: unknown, { timeout = 10, signal }: Limits = {}): string {
  signal?.throwIfAborted()
  if (error instanceof StepError) return error.message
  if (!(error instanceof ProcessOutput)) throw error
  // zx ended it.
  if (error.exitCode === null) return `the API server did not answer within ${timeout} s`
  return (
    knownProblem('kubectl', error.stderr)?.reason ??
    lastLines(error.stderr, 1).replace(/^error: /, '')
  )
}

/** Names the checks that failed, as in "[-]etcd failed: reason withheld". */
async function whyNotReady(cluster: Cluster, reason: string, limits: Limits): Promise<string> {
  const checks = [...reason.matchAll(/\[-\](\S+) failed/g)].map(([, name]) => name)
  if (checks.length === 0) return reason
  // It reads all Secrets when it starts, and is not ready before. A limit is answered by etcd itself.
  const secrets = checks.includes('informer-sync')
    ? await get(cluster, '/api/v1/secrets?limit=100', limits).catch((error) =>
        apiError(error, limits),
      )
    : ''
  return `not ready: ${secrets === wrongEncryptionKey ? secrets : checks.join(', ')}`
}

interface ListedNode extends ApiNode {
  spec: ApiNode['spec'] & { unschedulable?: boolean }
  status: ApiNode['status'] & {
    addresses?: { type: string; address: string }[]
    nodeInfo: { kubeletVersion: string; containerRuntimeVersion: string }
  }
}

function nodeState(node: ListedNode): [string, NodeState] {
  const { addresses = [], nodeInfo } = node.status
  const reason = notReady(node) ?? ''
  const state = {
    ready: reason === '',
    reason,
    cordoned: node.spec?.unschedulable ?? false,
    address: addresses.find(({ type }) => type === 'InternalIP')?.address ?? '',
    kubelet: nodeInfo.kubeletVersion,
    runtime: nodeInfo.containerRuntimeVersion,
  }
  return [node.metadata.name, state]
}

/** Whether a node is Ready now; false also if the API server does not answer. */
export async function isReady(cluster: Cluster, node: Node): Promise<boolean> {
  return (await probeApiServer(cluster)).nodes?.get(node.name)?.ready ?? false
}

type Wait = Pick<Parameters<typeof waitFor>[0], 'timeout' | 'detail' | 'signal'>

/**
 * Waits until the cluster's services on a machine are healthy, and on the control plane until the
 * API server is ready.
 *
 * @param options.check returns what else is missing, or throws to end the wait
 * @throws StepError with the end of the journal as soon as a service was restarted five times: some
 *   fail a few times while what they need starts
 */
export async function waitForServices(
  cluster: Cluster,
  node: Node,
  options: Wait & { check?: () => Promise<string | undefined> },
): Promise<void> {
  const { check, ...wait } = options
  let first: ServiceState[] | undefined
  await waitFor({ failure: `${node.name} is not healthy`, ...wait }, async () => {
    const services = await probeServices(cluster, node).catch((error: Error) => {
      // It may be restarting its network.
      if (noAnswer(error)) return error.message
      throw error
    })
    if (typeof services === 'string') return services
    first ??= services
    for (const [index, { unit, healthy, restarts }] of services.entries()) {
      if (healthy || restarts - (first[index]?.restarts ?? 0) < 5) continue
      const journal = `journalctl --unit=${unit} --lines=15 --no-pager --output=cat`
      throw new StepError(`${unit} on ${node.name} keeps crashing`, {
        output: (await remote(node, journal)).trim(),
        command: `./bin/logs.mts --unit ${unit} ${node.name}`,
      })
    }
    let missing = services.find(({ healthy }) => !healthy)?.reason
    if (!missing && node.role === 'control-plane') {
      const { ready, reason } = await probeApiServer(cluster, { signal: wait.signal })
      if (!ready) missing = `the API server is not ready: ${reason}`
    }
    // Also while something is missing, since it may throw; and last, with all else healthy.
    const unmet = await check?.()
    return missing ?? unmet
  })
}

/** Waits until a kubelet has registered the node. */
export async function waitForNode(cluster: Cluster, node: Node, wait: Wait): Promise<void> {
  await waitFor({ failure: `${node.name} has not registered`, ...wait }, async () => {
    const found = await registered(cluster, node, wait)
    return typeof found === 'string' ? found : undefined
  })
}

/**
 * Waits until the node is Ready and its kubelet has renewed its lease since the wait began: for 40 s
 * the API server reports a node as Ready that it does not hear from.
 */
export async function waitForReady(cluster: Cluster, node: Node, wait: Wait): Promise<void> {
  const { signal } = wait
  const path = `/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/${node.name}`
  const leaseTime = async (): Promise<string | undefined> =>
    JSON.parse(await get(cluster, path, { signal }).catch(() => '{}')).spec?.renewTime
  const before = await leaseTime()
  await waitFor({ failure: `${node.name} is not Ready`, ...wait }, async () => {
    const found = await registered(cluster, node, wait)
    if (typeof found === 'string') return found
    if (!found.ready) return found.reason
    const renewed = (await leaseTime()) !== before
    return renewed ? undefined : 'the kubelet has not renewed its lease yet'
  })
}

/** The node's state, or why there is none. */
async function registered(cluster: Cluster, node: Node, wait: Wait): Promise<NodeState | string> {
  const { nodes, reason } = await probeApiServer(cluster, { signal: wait.signal })
  if (!nodes) return `the API server does not list its nodes: ${reason}`
  return nodes.get(node.name) ?? `${node.name} has not registered with the API server`
}
