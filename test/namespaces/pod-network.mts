// The pod network from everywhere to everywhere, as it has to be after any operation.
import { $ } from 'zx'
import { type Cluster, loadCluster } from '../../lib/cluster.mts'
import { StepError } from '../../lib/errors.mts'
import { apply, kubectlJson } from '../../lib/kubectl.mts'
import type { WebPod } from '../../lib/pods.mts'
import { becomes } from '../../lib/wait.mts'
import { lookUp, metricsOfEveryWorker } from '../rehearsal/add-on-checks.mts'
import { CheckList } from '../rehearsal/check-list.mts'
import { podsTalk } from '../rehearsal/pods-talk.mts'
import type { Rehearsal } from '../rehearsal/rehearsal.mts'

/** Lookups of all pods together; none of them may fail. */
const lookups = 200
const namespace = 'pods-talk'
/** A service chooses a pod for each connection: so many reach each of them. */
const tries = 8

/** All checks, each a line, with the workers of cluster.env as it is now. */
export async function podNetwork(rehearsal: Rehearsal): Promise<void> {
  const { signal } = rehearsal
  const cluster = loadCluster({ root: rehearsal.cluster.root })
  const list = new CheckList(signal)
  // Each pod from each, and their service.
  await podsTalk(cluster, signal, async (pods) => {
    for (const [what, check] of checks) {
      await list.check(what, () => check({ rehearsal, cluster, pods }))
    }
  })
  // Last, as it may take longest: metrics-server asks every 15 s, and may have been started a moment ago.
  await list.check('kubectl top has every worker', async () => {
    let reason: unknown
    const has = () =>
      metricsOfEveryWorker(cluster).catch((error) => {
        reason = error
        return ''
      })
    if (!(await becomes(async () => (await has()) !== '', 120, signal))) throw reason
    return undefined
  })
  list.assertPassed()
}

interface Place {
  rehearsal: Rehearsal
  cluster: Cluster
  /** One on each worker. */
  pods: readonly WebPod[]
}

const checks: readonly [what: string, check: (place: Place) => Promise<string | undefined>][] = [
  [`${lookups} of ${lookups} lookups succeed`, lookUps],
  ['the control plane reaches every pod', fromControlPlane],
  ['the NodePort of every worker answers: the control plane, the workers, this computer', nodePort],
  ['a network policy blocks, and lets through whom it allows', networkPolicy],
]

function lookUps({ cluster, pods }: Place): Promise<string> {
  const { K8S_CLUSTER_DOMAIN, K8S_CLUSTER_DNS } = cluster.settings
  return lookUp(pods, {
    name: `kubernetes.default.svc.${K8S_CLUSTER_DOMAIN}.`,
    server: K8S_CLUSTER_DNS,
    times: Math.ceil(lookups / pods.length),
  })
}

/** It is not a node, but its API server has to reach webhooks. */
async function fromControlPlane({ rehearsal, cluster, pods }: Place): Promise<undefined> {
  const fetches = pods.map(({ ip }) => `curl -fsS -m 10 -o /dev/null http://${ip}:8080/`)
  await rehearsal.on(cluster.controlPlane, fetches.join(' && '))
}

async function nodePort({ rehearsal, cluster }: Place): Promise<string> {
  const service = {
    apiVersion: 'v1',
    kind: 'Service',
    metadata: { name: 'node-port', namespace },
    spec: { type: 'NodePort', selector: { app: 'web' }, ports: [{ port: 80, targetPort: 8080 }] },
  }
  await apply([service], { manager: 'pod-network' })
  const { spec } = await kubectlJson<{ spec: { ports: { nodePort: number }[] } }>(
    ...['get', 'service', 'node-port', `--namespace=${namespace}`],
  )
  const port = spec.ports[0]?.nodePort
  const addresses = cluster.workers.map(({ ip }) => `${ip}:${port}`)
  // Each worker learns of the service a moment later.
  const fetch = `curl -fsS -m 10 --retry 5 --retry-connrefused --retry-delay 1 -o /dev/null`
  const all = addresses.map(
    (to) => `for i in $(seq ${tries}); do ${fetch} http://${to}/ || exit; done`,
  )
  for (const node of cluster.nodes) await rehearsal.on(node, all.join('\n'), 120)
  for (const to of addresses) {
    const through = $({ input: 'GET / HTTP/1.0\r\n\r\n' })
    const { stdout } = await through`ssh -F tls/ssh_config -W ${to} ${cluster.controlPlane.name}`
    if (!/^HTTP\/1\.\d 200/.test(stdout)) throw new StepError(`${to} answers: ${stdout}`)
  }
  return addresses.join(', ')
}

async function networkPolicy({ rehearsal, pods }: Place): Promise<undefined> {
  const [from, to] = pods
  if (!from || !to) throw new StepError('two pods are needed')
  const reaches = () =>
    from.run(`wget -q -T 1 -O /dev/null http://${to.ip}:8080/`).then(
      () => true,
      () => false,
    )
  const expect = async (wanted: boolean, reason: string) => {
    const right = async () => (await reaches()) === wanted
    if (!(await becomes(right, 60, rehearsal.signal))) throw new StepError(reason)
  }
  const policy = (name: string, ingress: object[]) => {
    return {
      ...{ apiVersion: 'networking.k8s.io/v1', kind: 'NetworkPolicy' },
      metadata: { name, namespace },
      spec: { podSelector: {}, policyTypes: ['Ingress'], ingress },
    }
  }
  await expect(true, 'blocked although there is no policy')
  await apply([policy('closed', [])], { manager: 'pod-network' })
  await expect(false, 'the policy blocks nothing')
  const web = { podSelector: { matchLabels: { app: 'web' } } }
  await apply([policy('from-web', [{ from: [web] }])], { manager: 'pod-network' })
  await expect(true, 'blocked although a policy allows it')
  return undefined
}
