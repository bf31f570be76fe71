// A worker as the API server sees it.

import type { Cluster, Node } from '../cluster.mts'
import { probeApiServer } from '../machine/probes.mts'
import { waitFor } from '../wait.mts'
import { askApiServer } from './api-server.mts'

/** Whether the node is Ready now; false also if the API server cannot tell. */
export async function isReady(cluster: Cluster, node: Node): Promise<boolean> {
  const { nodes } = await probeApiServer(cluster)
  return nodes?.get(node.name)?.ready ?? false
}

/** Waits until a kubelet has registered the node. @param options.timeout seconds */
export async function waitForNode(
  cluster: Cluster,
  { name }: Node,
  options: { timeout: number; detail?: (text: string) => void; signal?: AbortSignal },
): Promise<void> {
  const { signal, ...wait } = options
  await waitFor({ failure: `${name} has not registered`, ...wait }, async () => {
    const { nodes, reason } = await probeApiServer(cluster, { signal })
    if (!nodes) return `the API server does not tell: ${reason}`
    return nodes.has(name) ? undefined : `the API server knows no node ${name}`
  })
}

/**
 * Waits until the node is Ready and its kubelet has renewed its lease since we began. For 40 s the
 * API server takes a node for Ready that it has not heard from.
 *
 * @param options.timeout seconds
 */
export async function waitForReady(
  cluster: Cluster,
  node: Node,
  options: { timeout: number; detail?: (text: string) => void; signal?: AbortSignal },
): Promise<void> {
  const { signal, ...wait } = options
  const before = await leaseTime(cluster, node)
  await waitFor({ failure: `${node.name} is not Ready`, ...wait }, async () => {
    signal?.throwIfAborted()
    const { nodes, reason } = await probeApiServer(cluster, { signal })
    if (!nodes) return `the API server does not tell: ${reason}`
    const found = nodes.get(node.name)
    if (!found) return `${node.name} has not registered with the API server`
    if (!found.ready) return found.reason
    const renewed = (await leaseTime(cluster, node)) !== before
    return renewed ? undefined : 'the kubelet has not been heard from yet'
  })
}

/** When the kubelet renewed its lease last, as it does every ten seconds. */
async function leaseTime(cluster: Cluster, { name }: Node): Promise<string | undefined> {
  const path = `/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/${name}`
  const answer = await askApiServer(cluster, path).catch(() => undefined)
  if (answer?.status !== 200) return undefined
  return (JSON.parse(answer.body) as { spec: { renewTime?: string } }).spec.renewTime
}
