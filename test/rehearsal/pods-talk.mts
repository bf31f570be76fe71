// Pods on all workers that fetch pages from each other: this needs every part of a cluster.

import type { Cluster } from '../../lib/cluster.mts'
import { kubectlJson } from '../../lib/kubectl.mts'
import { startWebPods, type WebPod, withScratchNamespace } from '../../lib/pods.mts'

/** The address of the service "web" of a namespace. */
export async function webServiceIp(namespace: string): Promise<string> {
  type Service = { spec: { clusterIP: string } }
  const found = await kubectlJson<Service>('get', 'service', 'web', `--namespace=${namespace}`)
  return found.spec.clusterIP
}

/**
 * Starts a pod on each worker, and lets each fetch a page from all pods and from their service, by
 * exec, so that the API server has to reach every kubelet.
 *
 * @param check further checks of these pods
 * @throws StepError that says what does not work
 */
export async function podsTalk(
  cluster: Cluster,
  signal: AbortSignal,
  check: (pods: readonly WebPod[]) => Promise<void> = async () => {},
): Promise<void> {
  const namespace = 'pods-talk'
  const limits = { timeout: cluster.settings.WAIT_TIMEOUT, signal }
  await withScratchNamespace(namespace, limits, async () => {
    const pods = await startWebPods(cluster, { ...limits, namespace, workers: cluster.workers })
    const pages = pods.map(({ ip }) => `http://${ip}:8080/`)
    const service = `http://${await webServiceIp(namespace)}/`
    for (const pod of pods) {
      // The service chooses a pod each time.
      const urls = [...pages, ...pods.map(() => service)].join(' ')
      // Each worker learns a moment later than the pod which pods the service has.
      const fetch = 'wget -q -T 30 -O /dev/null $url'
      const again = 'tries=$((tries + 1)); [ $tries -lt 30 ] || exit 1; sleep 1'
      await pod.run(`tries=0; for url in ${urls}; do until ${fetch}; do ${again}; done; done`)
    }
    await check(pods)
  })
}
