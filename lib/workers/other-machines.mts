// The machines that a worker joins or leaves: each has a route to its pods and its name in
// /etc/hosts, now and after a restart.
import type { Cluster, Node } from '../cluster.mts'
import { describeError } from '../errors.mts'
import { Machine } from '../machine/machine.mts'
import { isRunning } from '../qemu/vm.mts'
import { compare, formatChanges } from '../reconfigure/configuration-changes.mts'
import { reconfigure } from '../reconfigure/reconfigure.mts'
import { stage } from '../staging/staging.mts'
import { inParallel, step } from '../steps.mts'

/** Seconds for networkd to change a route. */
const routeTimeout = 60

/** Those of the machines that do not answer, each with the reason in words. */
export async function unreachable(
  cluster: Cluster,
  nodes: readonly Node[],
  signal: AbortSignal,
): Promise<Map<string, string>> {
  const reasons = await Promise.all(
    nodes.map(async (node) => {
      try {
        if (!(await isRunning(cluster, node))) return `${node.name} is not running`
        await new Machine(cluster, node, signal).execute('true', { timeout: 30 })
        return undefined
      } catch (error) {
        signal.throwIfAborted()
        return describeError(error)
      }
    }),
  )
  const pairs = nodes.map(({ name }, index) => [name, reasons[index]] as const)
  return new Map(pairs.flatMap(([name, reason]) => (reason ? [[name, reason] as const] : [])))
}

/**
 * Tells machines of a worker that joins: its name and the way to its pods.
 *
 * @param cluster with the worker
 * @param options.timeout seconds for services to be well again
 * @throws StepError that says what a machine is left with
 */
export async function introduce(
  cluster: Cluster,
  worker: Node,
  others: readonly Node[],
  options: { timeout: number; signal: AbortSignal },
): Promise<void> {
  await configure(cluster, others, options)
  const { podCidr, ip } = worker
  // networkd has read its new configuration, but makes the route when it comes to it.
  const command = `[ -n "$(ip route show exact ${podCidr} via ${ip})" ]`
  await eachHas(cluster, others, `a route to ${podCidr}`, command, options.signal)
}

/** Has machines forget a worker that has left. @param cluster without the worker */
export async function forget(
  cluster: Cluster,
  worker: Node,
  others: readonly Node[],
  options: { timeout: number; signal: AbortSignal },
): Promise<void> {
  await configure(cluster, others, options)
  const { podCidr } = worker
  // Cilium makes routes beside networkd's; both lead nowhere now.
  const remove = `while ip route delete ${podCidr} 2>/dev/null; do true; done`
  const command = `${remove}; [ -z "$(ip route show exact ${podCidr})" ]`
  await eachHas(cluster, others, `no route to ${podCidr}`, command, options.signal)
}

async function eachHas(
  cluster: Cluster,
  nodes: readonly Node[],
  what: string,
  command: string,
  signal: AbortSignal,
): Promise<void> {
  await inParallel(
    nodes.map(({ name }) => name),
    async (name, row) => {
      row.step(what)
      const machine = new Machine(cluster, cluster.node(name), signal)
      await machine.waitUntilSucceeds(command, { timeout: routeTimeout })
    },
  )
}

/**
 * Brings machines the configuration that follows from the nodes of the cluster, as reconfig does:
 * one after another, each shown before. A machine that has it already is left alone.
 */
async function configure(
  cluster: Cluster,
  nodes: readonly Node[],
  { timeout, signal }: { timeout: number; signal: AbortSignal },
): Promise<void> {
  for (const node of nodes) {
    await step(`stage ${node.name}`, () => stage(cluster, node))
    // Without the signal: an ssh call that has begun is not cut off.
    const machine = new Machine(cluster, node)
    const { changes, unfinished } = await compare(machine)
    signal.throwIfAborted()
    process.stdout.write(await formatChanges(changes))
    if (changes.length === 0 && !unfinished) continue
    await inParallel([node.name], (_, row) => reconfigure(machine, { timeout, row, signal }))
  }
}
