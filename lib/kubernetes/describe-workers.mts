// What cluster.env knows of the workers, and the API has to be told.
import type { Node } from '../cluster.mts'
import { StepError } from '../errors.mts'
import { getNodes } from './add-on.mts'
import type { Kubectl } from './kubectl.mts'

/**
 * Gives nodes their POD_CIDR and their role.
 *
 * @param detail is told which it is at
 * @throws StepError if one has not registered, or has another range already
 */
export async function describeWorkers(
  kubectl: Kubectl,
  workers: readonly Node[],
  detail: (text: string) => void = () => {},
): Promise<void> {
  const nodes = new Map((await getNodes(kubectl)).map((node) => [node.metadata.name, node]))
  const missing = workers.filter(({ name }) => !nodes.has(name))
  if (missing.length > 0) {
    const names = missing.map(({ name }) => name).join(', ')
    throw new StepError(`not registered yet: ${names}`, { hint: 'make wait' })
  }
  for (const { name, podCidr } of workers) {
    detail(name)
    const other = nodes.get(name)?.spec.podCIDR
    if (other && other !== podCidr) {
      throw new StepError(`${name} has pod range ${other}, not ${podCidr}`, {
        output: `A node's range can be set once. The machines' routes follow POD_CIDR_${name.replaceAll('-', '_')}.`,
        hint: `kubectl delete node ${name}, restart its kubelet (make ssh-${name}: systemctl restart kubelet), and again; or put ${other} back into cluster.env`,
      })
    }
    const spec = { podCIDR: podCidr, podCIDRs: [podCidr] }
    // A kubelet may not give itself a role.
    const metadata = { labels: { 'node-role.kubernetes.io/worker': '' } }
    await kubectl.run(['patch', 'node', name, '--patch', JSON.stringify({ metadata, spec })])
  }
}
