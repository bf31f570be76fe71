// A namespace for a check's own objects: whatever happens in it, nothing of it stays.
import type { Cluster } from '../cluster.mts'
import { Kubectl } from './kubectl.mts'

/** The service account in it for pods. The one called default comes a moment later. */
export const scratchAccount = 'probe'

/**
 * Makes a namespace in which Pod Security lets only restricted pods run, and takes it away with
 * all that is in it, however the work ends.
 *
 * @param options.timeout seconds for a namespace that an earlier run left to go away
 * @throws what `work` throws
 */
export async function withScratchNamespace<T>(
  cluster: Cluster,
  kubectl: Kubectl,
  options: { name: string; timeout: number },
  work: () => Promise<T>,
): Promise<T> {
  try {
    await makeScratchNamespace(kubectl, options)
    return await work()
  } finally {
    await removeScratchNamespace(cluster, options.name)
  }
}

/** The first half. Who calls it has the namespace removed, too. */
export async function makeScratchNamespace(
  kubectl: Kubectl,
  { name, timeout }: { name: string; timeout: number },
): Promise<void> {
  await kubectl.run([...remove(name), `--timeout=${timeout}s`], { timeout: timeout + 30 })
  const labels = { 'pod-security.kubernetes.io/enforce': 'restricted' }
  const objects = [
    { apiVersion: 'v1', kind: 'Namespace', metadata: { name, labels } },
    {
      apiVersion: 'v1',
      kind: 'ServiceAccount',
      metadata: { name: scratchAccount, namespace: name },
    },
  ]
  await kubectl.apply(objects.map((object) => JSON.stringify(object)).join('\n---\n'), {
    manager: name,
    forceConflicts: true,
  })
}

/** The second half; does not wait until all of it is gone. */
export async function removeScratchNamespace(cluster: Cluster, name: string): Promise<void> {
  // Without the signal of the work: after Ctrl-C there is this left to do.
  await new Kubectl(cluster).execute([...remove(name), '--wait=false'])
}

function remove(name: string): string[] {
  return ['delete', 'namespace', name, '--ignore-not-found']
}
