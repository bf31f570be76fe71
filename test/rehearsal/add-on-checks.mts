// What the add-ons are there for, looked at from where it is used: names from pods of every worker,
// numbers of every worker. That claims keep their data is shown by deploy-local-storage itself each
// time it runs, and that a service is found by its name by smoke.
import { CheckList } from '../../lib/check-list.mts'
import { StepError } from '../../lib/errors.mts'
import { Kubectl } from '../../lib/kubernetes/kubectl.mts'
import { type ProbePod, withProbePods } from '../../lib/kubernetes/probe-pods.mts'
import type { Pod } from '../../lib/kubernetes/rollout.mts'
import type { Rehearsal } from './rehearsal.mts'

/** Lookups through the service, of all workers' pods together; none of them may fail. */
const lookups = 200
/** From each pod to each replica, past the service. */
const lookupsOfReplica = 10

/** An add-on's script, and what is there when it has run. */
const addOns = [
  { script: 'deploy-coredns', workload: ['deployment/coredns', 'kube-system'] },
  {
    script: 'deploy-local-storage',
    workload: ['deployment/local-path-provisioner', 'local-path-storage'],
  },
  { script: 'deploy-metrics-server', workload: ['deployment/metrics-server', 'kube-system'] },
] as const

/**
 * Deploys the add-ons that are not there yet, and puts them to the test.
 *
 * @throws StepError with the checks that failed, after all were done
 */
export async function addOnChecks(rehearsal: Rehearsal): Promise<void> {
  const { cluster, signal } = rehearsal
  const { workers, settings } = cluster
  const kubectl = new Kubectl(cluster, signal)
  const timeout = settings.WAIT_TIMEOUT
  for (const { script: name, workload } of addOns) {
    const [what, namespace] = workload
    if (await kubectl.exists(what, `--namespace=${namespace}`)) continue
    await rehearsal.script(name, '--timeout', `${timeout}`)
  }

  const list = new CheckList(signal)
  await withProbePods(cluster, kubectl, { workers, timeout }, async (pods) => {
    const name = `kubernetes.default.svc.${settings.K8S_CLUSTER_DOMAIN}.`
    await list.check(`${lookups} of ${lookups} lookups succeed`, {}, () =>
      lookUp(pods, { name, server: settings.K8S_CLUSTER_DNS, times: lookups / pods.length }),
    )
    await list.check('CoreDNS has a replica on each of two workers', {}, async () => {
      const at = (await replicas(kubectl)).map(({ spec }) => spec.nodeName)
      if (new Set(at).size !== 2) throw new StepError(`its replicas are on ${at.join(' and ')}`)
      return at.join(' and ')
    })
    await list.check('every worker gets answers of every replica', {}, async () => {
      for (const { status } of await replicas(kubectl)) {
        const how = { server: `${status.podIP}:1053`, times: lookupsOfReplica }
        await lookUp(pods, { name, ...how })
      }
      return undefined
    })
  })
  await list.check('kubectl top knows every worker', {}, async () => {
    const table = await kubectl.run(['top', 'nodes', '--no-headers'])
    const found = table.trim().split('\n')
    for (const { name } of workers) {
      const row = found.find((line) => new RegExp(`^${name}\\s+\\d+m\\s.*\\d+Mi\\s`).test(line))
      if (!row) throw new StepError(`no numbers of ${name}`, { output: table })
    }
    return found.join('; ').replaceAll(/ +/g, ' ')
  })
  console.error(`\nadd-ons: ${list.summary()}`)
  list.assertPassed()
}

async function replicas(kubectl: Kubectl): Promise<Pod[]> {
  const args = ['pods', '--namespace=kube-system', '--selector=k8s-app=kube-dns']
  const { items } = await kubectl.get<{ items: Pod[] }>(...args)
  return items.filter(({ metadata }) => !metadata.deletionTimestamp)
}

/**
 * Looks a name up from each of the pods, all at the same time.
 *
 * @param how.server its address, with a port if it is not 53
 * @param how.times of each pod
 * @throws StepError with the last failure of a pod
 */
async function lookUp(
  pods: readonly ProbePod[],
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
      const { stdout, stderr } = await pod.exec(['sh', '-c', loop], 300)
      return { worker: pod.node.name, found: Number.parseInt(stdout, 10), said: stdout + stderr }
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
