// Pods on all workers that get pages of each other: with that, whatever a cluster is made of works.
import type { Cluster } from '../../lib/cluster.mts'
import type { Kubectl } from '../../lib/kubernetes/kubectl.mts'
import { withScratchNamespace } from '../../lib/kubernetes/scratch-namespace.mts'
import { startWebPods, type WebPod, webService } from '../../lib/kubernetes/web-pods.mts'

const namespace = 'pods-talk'

/**
 * Has the scheduler give each worker a pod, and each pod get a page of all pods and of their
 * service, by exec, so that the API server has to reach every kubelet.
 *
 * @param look what else there is to see of them
 * @throws StepError that says what does not work
 */
export async function podsTalk(
  cluster: Cluster,
  kubectl: Kubectl,
  look: (pods: readonly WebPod[]) => Promise<void> = async () => {},
): Promise<void> {
  const { workers } = cluster
  const timeout = cluster.settings.WAIT_TIMEOUT
  await withScratchNamespace(cluster, kubectl, { name: namespace, timeout }, async () => {
    const pods = await startWebPods(cluster, kubectl, { namespace, workers, timeout })
    const pages = pods.map(({ ip }) => `http://${ip}:8080/`)
    const service = `http://${await webService(kubectl, namespace)}/`
    for (const pod of pods) {
      await pod.succeed(`for page in ${pages.join(' ')}; do wget -q -T 30 -O /dev/null $page; done`)
      // It chooses a pod each time.
      const often = pods.map(() => service).join(' ')
      await pod.succeed(`for page in ${often}; do wget -q -T 30 -O /dev/null $page; done`)
    }
    await look(pods)
  })
}
