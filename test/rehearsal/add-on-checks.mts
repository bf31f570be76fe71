// The add-ons as their users see them: names in pods of every worker, metrics of every worker.
// deploy-local-storage itself checks that claims keep their data, smoke that a service has a name.
import { $ } from 'zx'
import type { Cluster } from '../../lib/cluster.mts'
import { StepError } from '../../lib/errors.mts'
import { kubectlJson } from '../../lib/kubectl.mts'
import { type Pod, startWebPods, type WebPod, withScratchNamespace } from '../../lib/pods.mts'
import { CheckList } from './check-list.mts'
import type { Rehearsal } from './rehearsal.mts'

/** Lookups through the service, of all workers' pods together; none of them may fail. */
const lookups = 200
/** From each pod to each replica, without the service. */
const lookupsOfReplica = 10

/** An add-on's script, and what it deploys. */
const addOns = [
  { script: 'deploy-coredns', workload: ['deployment/coredns', 'kube-system'] },
  {
    script: 'deploy-local-storage',
    workload: ['deployment/local-path-provisioner', 'local-path-storage'],
  },
  { script: 'deploy-metrics-server', workload: ['deployment/metrics-server', 'kube-system'] },
] as const

/**
 * Deploys the add-ons that are missing, and checks them.
 *
 * @throws StepError with the checks that failed, after all were done
 */
export async function addOnChecks(rehearsal: Rehearsal): Promise<void> {
  const { cluster, signal } = rehearsal
  const { workers, settings } = cluster
  const timeout = settings.WAIT_TIMEOUT
  for (const { script: name, workload } of addOns) {
    const [what, namespace] = workload
    const { exitCode } = await $({ nothrow: true })`kubectl get ${what} --namespace=${namespace}`
    if (exitCode === 0) continue
    await rehearsal.script(name, '--timeout', `${timeout}`)
  }

  const list = new CheckList(signal)
  const namespace = 'add-on-checks'
  await withScratchNamespace(namespace, { timeout, signal }, async () => {
    const pods = await startWebPods(cluster, { namespace, workers, timeout, signal })
    const name = `kubernetes.default.svc.${settings.K8S_CLUSTER_DOMAIN}.`
    await list.check(`${lookups} of ${lookups} lookups succeed`, () =>
      lookUp(pods, { name, server: settings.K8S_CLUSTER_DNS, times: lookups / pods.length }),
    )
    await list.check('CoreDNS has a replica on each of two workers', async () => {
      const at = (await replicas()).map(({ spec }) => spec.nodeName)
      if (new Set(at).size !== 2) throw new StepError(`its replicas are on ${at.join(' and ')}`)
      return at.join(' and ')
    })
    await list.check('every worker gets answers from every replica', async () => {
      for (const { status } of await replicas()) {
        const how = { server: `${status.podIP}:1053`, times: lookupsOfReplica }
        await lookUp(pods, { name, ...how })
      }
      return undefined
    })
  })
  await list.check('kubectl top has every worker', () => metricsOfEveryWorker(cluster))
  list.assertPassed()
}

/** @returns the rows of `kubectl top` @throws StepError if it has none of a worker */
export async function metricsOfEveryWorker({ workers }: Cluster): Promise<string> {
  const table = (await $`kubectl top nodes --no-headers`).stdout
  const found = table.trim().split('\n')
  for (const { name } of workers) {
    const row = found.find((line) => new RegExp(`^${name}\\s+\\d+m\\s.*\\d+Mi\\s`).test(line))
    if (!row) throw new StepError(`no metrics of ${name}`, { output: table })
  }
  return found.join('; ').replaceAll(/ +/g, ' ')
}

async function replicas(): Promise<Pod[]> {
  const args = ['pods', '--namespace=kube-system', '--selector=k8s-app=kube-dns']
  const { items } = await kubectlJson<{ items: Pod[] }>('get', ...args)
  return items.filter(({ metadata }) => !metadata.deletionTimestamp)
}

/**
 * Looks a name up from each of the pods, all at the same time.
 *
 * @param how.server its address, with a port if it is not 53
 * @param how.times of each pod
 * @throws StepError with the last failure of a pod
 */
export async function lookUp(
  pods: readonly WebPod[],
  { name, server, times }: { name: string; server: string; times: number },
): Promise<string> {
  const loop = `
    found=0
    for time in $(seq ${times}); do
      if answer=$(nslookup -type=a ${name} ${server} 2>&1); then found=$((found + 1))
      else failure=$answer
      fi
    done
    echo "$found
    $failure"`
  const results = await Promise.all(
    pods.map(async (pod) => {
      const said = await pod.run(loop)
      return { worker: pod.node.name, found: Number.parseInt(said, 10), said }
    }),
  )
  for (const { worker, found, said } of results) {
    if (found === times) continue
    throw new StepError(`${worker}: ${found} of ${times} lookups at ${server} succeed`, {
      output: said.trim(),
    })
  }
  return results.map(({ worker, found }) => `${worker} ${found}`).join(', ')
}
