// A namespace for a check's own objects: whatever happens in it, nothing of it stays.
import type { Cluster } from '../cluster.mts'
import { Kubectl } from './kubectl.mts'

/** The service account in it for pods. The one called default comes a moment later. */
export const scratchAccount = 'probe'

/**
 * Makes a namespace in which Pod Security lets only restricted pods run, and takes it away with
 * all that is in it, however the work ends.
 *
 * @param timeout seconds for a namespace that an earlier run left to go away
 * @throws what `work` throws
 */
export async function withScratchNamespace<T>(
  cluster: Cluster,
  kubectl: Kubectl,
  { name, timeout }: { name: string; timeout: number },
  work: () => Promise<T>,
): Promise<T> {
  const remove = ['delete', 'namespace', name, '--ignore-not-found']
  await kubectl.run(remove, { timeout })
  const labels = { 'pod-security.kubernetes.io/enforce': 'restricted' }
  const objects = [
    { apiVersion: 'v1', kind: 'Namespace', metadata: { name, labels } },
    {
      apiVersion: 'v1',
      kind: 'ServiceAccount',
      metadata: { name: scratchAccount, namespace: name },
    },
  ]
  try {
    await kubectl.apply(objects.map((object) => JSON.stringify(object)).join('\n---\n'), {
      manager: name,
      forceConflicts: true,
    })
    return await work()
  } finally {
    // Without the signal: after Ctrl-C there is this left to do.
    await new Kubectl(cluster).execute([...remove, '--wait=false'])
  }
}
