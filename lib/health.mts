// The health of a machine's services (one ssh call), of the API server and of its nodes; waits for it.
import { $, ProcessOutput } from 'zx/core'
import type { Cluster, Node } from './cluster.mts'
import { knownProblem, lastLines, StepError, wrongEncryptionKey } from './errors.mts'
import { type ApiNode, notReady, useCluster } from './kubectl.mts'
import { connect, type Limits, NoAnswer, type Probe, remote, runProbes } from './ssh.mts'
import { type WaitLimits, waitFor } from './wait.mts'

/** Health endpoints on the machines. kube-apiserver is asked from outside, as its clients reach it. */
const endpoints: Readonly<Record<string, string>> = {
  etcd: 'http://127.0.0.1:2381/health', // its listener that requires no client certificate
  'kube-controller-manager': 'https://127.0.0.1:10257/healthz',
  'kube-scheduler': 'https://127.0.0.1:10259/readyz',
  kubelet: 'http://127.0.0.1:10248/healthz',
  'kube-proxy': 'http://127.0.0.1:10256/healthz',
}

/** The systemd units of the cluster on a machine, in the order in which they start. */
export function servicesOf({ settings }: Cluster, { role }: Node): string[] {
  if (role === 'control-plane') {
    return ['etcd', 'kube-apiserver', 'kube-controller-manager', 'kube-scheduler']
  }
  const proxy = settings.KUBE_PROXY_MODE === 'cilium' ? [] : ['kube-proxy']
  return ['containerd', 'kubelet', ...proxy]
}

/** The states of the cluster's services on a machine, by one systemctl and one curl. */
export function serviceProbe(cluster: Cluster, node: Node) {
  const services = servicesOf(cluster, node)
  return {
    // Early in the boot sshd answers, but systemd does not yet.
    // -k: the programs issue these certificates themselves, and the connection is loopback.
    command: `
      systemctl show --property=LoadState,ActiveState,SubState,Result,ExecMainStatus,NRestarts \\
        ${services.map((unit) => `${unit}.service`).join(' ')} || true
      echo '== health'
      curl -sk -m 3 -w '\\n== %{http_code} %{url} %{errormsg}\\n' \\
        ${services.flatMap((unit) => endpoints[unit] ?? []).join(' ')} || true`,
    read(output: string) {
      const [shown = '', printed = ''] = output.split('== health\n')
      const blocks = shown.trim().split(/\n\n+/)
      return services.map((unit, index) => {
        const lines = (blocks[index] ?? '').split('\n')
        const properties = Object.fromEntries(lines.map((line) => line.split(/=(.*)/s)))
        // "etcd is activating (auto-restart, exit-code)"; empty if it is healthy.
        const reason = unitReason(unit, properties) || endpointReason(unit, printed)
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

/** Why a unit's endpoint is not healthy, from the output of curl; empty if it is, or has none. */
function endpointReason(unit: string, printed: string): string {
  if (!endpoints[unit]) return ''
  const answers = [...printed.matchAll(/([\s\S]*?)\n== (\d{3}) (\S+) ?(.*)\n/g)]
  const [, body = '', status = '', , message = 'no answer'] =
    answers.find(([, , , url]) => url === endpoints[unit]) ?? []
  if (status === '200') return ''
  const response = `HTTP ${status} ${body.replaceAll('\n', ' ').trim()}`.slice(0, 200)
  // The duration differs each time, and would make every line a new one.
  const error = message.replace(/ after \d+ ms/, '')
  return `${unit} is not healthy: ${/[1-9]/.test(status) ? response : error}`
}

/** How many seconds a machine's clock is ahead of this computer's; negative: behind. */
export const clockProbe: Probe<number> = {
  command: 'date +%s',
  read: (output) => Number(output) - Math.round(Date.now() / 1000),
}

/** "the clock of alpha is 730 days ahead of this computer's"; empty up to five minutes. */
export function clockProblem(name: string, ahead: number): string {
  const off = Math.abs(ahead)
  if (off <= 300) return ''
  const days = off / 86_400
  const time = days < 2 ? `${Math.round(off / 60)} minutes` : `${Math.round(days)} days`
  return `the clock of ${name} is ${time} ${ahead > 0 ? 'ahead of' : 'behind'} this computer's`
}

/**
 * Whether the API server is ready, and its nodes by name (undefined if they could not be listed).
 * No answer is a state, not an error.
 * @param limits.timeout for each answer; 10 s by default
 */
export async function probeApiServer(cluster: Cluster, limits: Limits = {}) {
  let ready = false
  try {
    await get(cluster, '/readyz?verbose', limits)
    ready = true
    const list = await get(cluster, '/api/v1/nodes', limits)
    const { items }: { items: ApiNode[] } = JSON.parse(list)
    return { ready, reason: '', nodes: new Map(items.map(nodeState)) }
  } catch (error) {
    const reason = apiError(error, limits)
    if (ready) return { ready, reason: `nodes cannot be listed: ${reason}` }
    // "[-]etcd failed: reason withheld"
    const checks = [...reason.matchAll(/\[-\](\S+) failed/g)].map(([, name]) => name)
    // For informer-sync it reads all Secrets. A limit is answered by etcd itself.
    const secrets = checks.includes('informer-sync')
      ? await get(cluster, '/api/v1/secrets?limit=100', limits).catch((e) => apiError(e, limits))
      : ''
    const why = secrets === wrongEncryptionKey ? secrets : checks.join(', ')
    return { ready, reason: why ? `not ready: ${why}` : reason }
  }
}

/** The API server's answer to a GET by the admin. */
async function get(cluster: Cluster, path: string, limits: Limits): Promise<string> {
  await useCluster(cluster)
  const { timeout = 10, signal } = limits
  return (await $({ timeout: timeout * 1000, signal })`kubectl get --raw ${path}`).stdout
}

/** Why kubectl got no answer from the API server. @throws the signal's reason; any other error */
export function apiError(error: unknown, { timeout = 10, signal }: Limits = {}): string {
  signal?.throwIfAborted()
  if (error instanceof StepError) return error.message
  if (!(error instanceof ProcessOutput)) throw error
  // zx ended it.
  if (error.exitCode === null) return `the API server did not answer within ${timeout} s`
  const known = knownProblem('kubectl', error.stderr)
  return known?.reason ?? lastLines(error.stderr, 1).replace(/^error: /, '')
}

function nodeState(node: ApiNode) {
  const { addresses = [], nodeInfo } = node.status
  const reason = notReady(node) ?? ''
  const state = {
    ready: reason === '',
    reason,
    /** Takes no new pods. */
    cordoned: node.spec?.unschedulable ?? false,
    address: addresses.find(({ type }) => type === 'InternalIP')?.address ?? '',
    kubelet: nodeInfo.kubeletVersion,
    runtime: nodeInfo.containerRuntimeVersion,
  }
  return [node.metadata.name, state] as const
}

/**
 * Waits until the cluster's services on a machine are healthy, and on the control plane until the
 * API server is ready.
 * @param options.check returns what else is missing, or throws to end the wait
 * @throws StepError with the end of the journal as soon as a service was restarted five times: some
 *   fail a few times while what they need starts
 */
export async function waitForServices(
  cluster: Cluster,
  node: Node,
  options: WaitLimits & { check?: () => Promise<string | undefined> },
): Promise<void> {
  const { check, ...wait } = options
  const probes = { services: serviceProbe(cluster, node) }
  const before = new Map<string, number>()
  await waitFor({ failure: `${node.name} is not healthy`, ...wait }, async () => {
    const found = await connect(cluster, node, { signal: wait.signal })
      .then(() => runProbes(node, probes, 20, wait.signal))
      .catch((error) => {
        // It may be restarting its network.
        if (error instanceof NoAnswer) return error.message
        throw error
      })
    if (typeof found === 'string') return found
    const { services } = found
    for (const { unit, healthy, restarts } of services) {
      const first = before.get(unit) ?? restarts
      before.set(unit, first)
      if (healthy || restarts - first < 5) continue
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

/**
 * Waits until the node is Ready and its kubelet has renewed its lease: for 50 s the API server reports
 * a node as Ready that it does not hear from.
 * @param since the kubelet's start, "2026-11-30T03:20:34.074041Z"; by default, the first renewal read
 */
export async function waitForReady(cluster: Cluster, node: Node, wait: WaitLimits, since?: string) {
  const { name } = node
  const { signal } = wait
  const path = `/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/${name}`
  // Empty if there is no lease yet; undefined without an answer.
  const renewed = (): Promise<string | undefined> =>
    get(cluster, path, { signal }).then(
      (lease) => JSON.parse(lease).spec?.renewTime ?? '',
      (error) => (/NotFound/.test(String(error.stderr)) ? '' : undefined),
    )
  let before = since ?? (await renewed())
  await waitFor({ failure: `${name} is not Ready`, ...wait }, async () => {
    const { nodes, reason } = await probeApiServer(cluster, { signal })
    if (!nodes) return `the API server does not list its nodes: ${reason}`
    const found = nodes.get(name)
    if (!found) return `${name} has not registered with the API server`
    if (!found.ready) return found.reason
    const now = await renewed()
    if (before !== undefined && now !== undefined && now > before) return undefined
    before ??= now
    return 'the kubelet has not renewed its lease yet'
  })
}
