// One at a time, among the scripts that change the cluster as a whole: a snapshot, a restore, new
// configurations, a bootstrap, cleaning up. Each would be in the other's way.
import type { Cluster, Node } from './cluster.mts'
import { withLock } from './lock.mts'
import { filesOf } from './qemu/machine-files.mts'

/** Seconds for another script to finish starting or stopping a machine. */
const patience = 60

/**
 * Does something during which no other script changes the cluster.
 *
 * @param purpose what is being done, for whoever comes second: "another process is restoring …"
 * @throws StepError that names the other's purpose, command and pid
 */
export function withClusterLock<T>(
  cluster: Cluster,
  purpose: string,
  work: () => Promise<T>,
): Promise<T> {
  return withLock(cluster.path('run', 'bootstrap.lock'), purpose, work)
}

/** Does something during which no machine of these is started or stopped, not even by us. */
export function withMachineLocks<T>(
  cluster: Cluster,
  nodes: readonly Node[],
  purpose: string,
  work: () => Promise<T>,
): Promise<T> {
  const [first, ...rest] = nodes
  if (!first) return work()
  const others = () => withMachineLocks(cluster, rest, purpose, work)
  return withLock(filesOf(cluster, first).lock, `${purpose} (${first.name})`, others, {
    wait: patience,
  })
}
