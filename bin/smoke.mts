#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// The first thing one runs on a cluster: a web server on every worker, one service before them,
// asked from inside and from outside.
import { loadCluster, type Node } from '../lib/cluster.mts'
import { StepError } from '../lib/errors.mts'
import { interruption } from '../lib/interrupt.mts'
import { readyWorkers } from '../lib/kubernetes/add-on.mts'
import { Kubectl } from '../lib/kubernetes/kubectl.mts'
import { waitForPods } from '../lib/kubernetes/rollout.mts'
import { Machine } from '../lib/machine/machine.mts'
import { script } from '../lib/script.mts'
import { step } from '../lib/steps.mts'

const { flags } = script({
  does: `Deploys nginx with a NodePort service, waits for it, and asks for its page: from pod to pod,
through the service (by its name too, after make dns), and from the control plane through the
NodePort of every worker. Can be run again; what it deployed stays to be looked at, until
--cleanup.`,
  reads: ['cluster.env', 'configs/admin.kubeconfig', 'tls/'],
  writes: [],
  flags: {
    cleanup: { help: 'take it away' },
    timeout: { value: 'SECONDS', number: true, help: 'how long to wait for the pods (300)' },
  },
  examples: ['./bin/smoke.mts', './bin/smoke.mts --cleanup'],
})
const { timeout = 300 } = flags
const namespace = 'smoke'
// A service asks one pod or the other; after so many times it has asked each of them.
const tries = 8
const cluster = loadCluster()
const signal = interruption()
const kubectl = new Kubectl(cluster, signal)

// As many replicas as there are workers, one on each.
const manifest = (workers: readonly Node[]) => `\
apiVersion: v1
kind: Namespace
metadata:
  name: ${namespace}
  labels:
    pod-security.kubernetes.io/enforce: restricted
---
apiVersion: apps/v1
kind: Deployment
metadata:
  name: nginx
  namespace: ${namespace}
spec:
  replicas: ${workers.length}
  selector:
    matchLabels: {app: nginx}
  template:
    metadata:
      labels: {app: nginx}
    spec:
      automountServiceAccountToken: false
      terminationGracePeriodSeconds: 5
      topologySpreadConstraints:
        - maxSkew: 1
          topologyKey: kubernetes.io/hostname
          whenUnsatisfiable: DoNotSchedule
          labelSelector:
            matchLabels: {app: nginx}
          matchLabelKeys: [pod-template-hash]
      securityContext:
        runAsNonRoot: true
        runAsUser: 101
        seccompProfile: {type: RuntimeDefault}
      containers:
        - name: nginx
          image: ${cluster.settings.SMOKE_IMAGE}
          imagePullPolicy: IfNotPresent
          ports:
            - {name: http, containerPort: 8080}
          readinessProbe:
            httpGet: {path: /, port: http}
            periodSeconds: 2
            timeoutSeconds: 5
          resources:
            requests: {cpu: 50m, memory: 16Mi}
            limits: {memory: 64Mi}
          securityContext:
            allowPrivilegeEscalation: false
            capabilities: {drop: [ALL]}
---
apiVersion: v1
kind: Service
metadata:
  name: nginx
  namespace: ${namespace}
spec:
  type: NodePort
  selector: {app: nginx}
  ports:
    - {name: http, port: 80, targetPort: http}
`

if (flags.cleanup) {
  await step('taking nginx away', () =>
    kubectl.run(['delete', 'namespace', namespace, '--ignore-not-found', `--timeout=${timeout}s`], {
      timeout: timeout + 30,
    }),
  )
  process.exit(0)
}

const workers = await step('pods can start', () => readyWorkers(cluster, kubectl))
await step(`nginx on ${workers.map(({ name }) => name).join(' and ')}`, () =>
  kubectl.apply(manifest(workers), { manager: 'smoke' }),
)
const pods = await step('nginx is ready', async (detail) => {
  await kubectl.rollout('deployment/nginx', { namespace, timeout, detail })
  // Those of an earlier run may still be on their way out.
  const all = await waitForPods(kubectl, 'Ready', { namespace, timeout, detail })
  return all.filter(({ metadata }) => !metadata.deletionTimestamp)
})
interface Service {
  spec: { clusterIP: string; ports: { nodePort: number }[] }
}
const { spec } = await kubectl.get<Service>('service/nginx', `--namespace=${namespace}`)
const nodePort = spec.ports[0]?.nodePort ?? 0

await step('every pod is reached from every pod', async () => {
  for (const from of pods) {
    for (const to of pods) await fetchInPod(from.metadata.name, `${to.status.podIP}:8080`)
  }
})
await step(`every pod reaches the service at ${spec.clusterIP}`, async () => {
  for (const { metadata } of pods) await fetchInPod(metadata.name, `${spec.clusterIP}:80`, tries)
})
if (await kubectl.exists('deployment/coredns', '--namespace=kube-system')) {
  const name = `nginx.${namespace}.svc.${cluster.settings.K8S_CLUSTER_DOMAIN}`
  await step('every pod reaches the service by its name', async () => {
    for (const { metadata } of pods) await fetchInPod(metadata.name, `${name}:80`, tries)
  })
}
await step(`NodePort ${nodePort} of every worker answers`, async () => {
  const machine = new Machine(cluster, cluster.controlPlane, signal)
  for (const { ip } of workers) {
    const url = `http://${ip}:${nodePort}/`
    await machine.succeed(
      `for i in $(seq ${tries}); do curl --fail --silent --show-error --max-time 10 ${url} >/dev/null; done`,
      { timeout: 90 },
    )
  }
})

const rows = pods.map((pod) => `  ${pod.metadata.name}  ${pod.status.podIP}  ${pod.spec.nodeName}`)
console.log(`nginx answers everywhere, from ${pods.length} pods:\n${rows.join('\n')}`)
console.log(
  `Look at it: kubectl port-forward --namespace=${namespace} service/nginx 8080:80, then http://127.0.0.1:8080`,
)

/** Asks for a page from inside a pod. */
async function fetchInPod(pod: string, address: string, times = 1): Promise<void> {
  const fetch = `for i in $(seq ${times}); do wget -q -T 10 -O /dev/null http://${address}/; done`
  const command = ['sh', '-ec', fetch]
  const { exitCode, stdout, stderr } = await kubectl.exec(pod, command, { namespace, timeout: 90 })
  if (exitCode === 0) return
  throw new StepError(`${pod} does not get a page from ${address}`, {
    output: `${stdout}${stderr}`.trim(),
    command: `kubectl exec --namespace=${namespace} ${pod} -- wget -O- http://${address}/`,
  })
}
