#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// The first workload: a web server on every worker behind one service, used by pods and from outside.
import { $ } from 'zx/core'
import { loadCluster, type Node } from '../lib/cluster.mts'
import { interruption } from '../lib/interrupt.mts'
import * as kubectl from '../lib/kubectl.mts'
import { execInPod, waitForPods, waitForRollout } from '../lib/pods.mts'
import { script } from '../lib/script.mts'
import { connect, remote } from '../lib/ssh.mts'
import { step } from '../lib/steps.mts'

const { flags } = script({
  does: `Deploys nginx with a NodePort service, waits for it, and requests its page: from pod to pod,
through the service (by its name too, after make dns), and from the control plane through the
NodePort of every worker. Can be run again; what it deployed stays until --cleanup.`,
  reads: ['cluster.env', 'configs/admin.kubeconfig', 'tls/'],
  writes: ['the cluster: what it deploys'],
  flags: {
    cleanup: { help: 'delete what it deployed' },
    timeout: { value: 'SECONDS', number: true, help: 'how long to wait for the pods (300)' },
  },
  examples: ['./bin/smoke.mts', './bin/smoke.mts --cleanup'],
})
const { timeout = 300 } = flags
const namespace = 'smoke'
// A service chooses a pod at random: after so many requests each pod has got some.
const tries = 8
const cluster = loadCluster()
const signal = interruption()
// As many replicas as there are workers, one on each.
const manifest = (workers: readonly Node[]) => `\
apiVersion: v1
kind: Namespace
metadata: {name: ${namespace}, labels: {pod-security.kubernetes.io/enforce: restricted}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: nginx, namespace: ${namespace}}
spec:
  replicas: ${workers.length}
  selector: {matchLabels: {app: nginx}}
  template:
    metadata: {labels: {app: nginx}}
    spec:
      automountServiceAccountToken: false
      terminationGracePeriodSeconds: 5
      topologySpreadConstraints:
        - maxSkew: 1
          topologyKey: kubernetes.io/hostname
          whenUnsatisfiable: DoNotSchedule
          labelSelector: {matchLabels: {app: nginx}}
          matchLabelKeys: [pod-template-hash]
      securityContext: {runAsNonRoot: true, runAsUser: 101, seccompProfile: {type: RuntimeDefault}}
      containers:
        - name: nginx
          image: ${cluster.settings.SMOKE_IMAGE}
          imagePullPolicy: IfNotPresent
          ports: [{name: http, containerPort: 8080}]
          readinessProbe: {httpGet: {path: /, port: http}, periodSeconds: 2, timeoutSeconds: 5}
          resources: {requests: {cpu: 50m, memory: 16Mi}, limits: {memory: 64Mi}}
          securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
---
apiVersion: v1
kind: Service
metadata: {name: nginx, namespace: ${namespace}}
spec:
  type: NodePort
  selector: {app: nginx}
  ports: [{name: http, port: 80, targetPort: http}]
`

await kubectl.useCluster(cluster)
if (flags.cleanup) {
  await step('delete nginx', () => {
    const $$ = $({ timeout: (timeout + 30) * 1000, signal })
    return $$`kubectl delete namespace ${namespace} --ignore-not-found --timeout=${timeout}s`
  })
  process.exit(0)
}

const workers = await step('pods can start', () => kubectl.readyWorkers(cluster))
await step(`nginx on ${workers.map(({ name }) => name).join(' and ')}`, () =>
  kubectl.apply(manifest(workers), { manager: 'smoke', signal }),
)
const pods = await step('nginx is ready', async (detail) => {
  const limits = { namespace, timeout, detail, signal }
  await waitForRollout('deployment/nginx', limits)
  // Those of an earlier run may not have ended yet.
  const all = await waitForPods('Ready', limits)
  return all.filter(({ metadata }) => !metadata.deletionTimestamp)
})
const address = 'jsonpath={.spec.clusterIP} {.spec.ports[0].nodePort}'
const service = await $`kubectl get service nginx --namespace=${namespace} --output=${address}`
const [serviceIp, nodePort] = service.stdout.split(' ')

await step('every pod reaches every pod', async () => {
  for (const from of pods) {
    for (const to of pods) await fetchInPod(from.metadata.name, `${to.status.podIP}:8080`)
  }
})
await step(`every pod reaches the service at ${serviceIp}`, async () => {
  for (const { metadata } of pods) await fetchInPod(metadata.name, `${serviceIp}:80`, tries)
})
if ((await $`kubectl get deployment coredns --namespace=kube-system --ignore-not-found`).stdout) {
  const name = `nginx.${namespace}.svc.${cluster.settings.K8S_CLUSTER_DOMAIN}`
  await step('every pod reaches the service by its name', async () => {
    for (const { metadata } of pods) await fetchInPod(metadata.name, `${name}:80`, tries)
  })
}
await step(`NodePort ${nodePort} of every worker answers`, async () => {
  await connect(cluster, cluster.controlPlane, { signal })
  for (const { ip } of workers) {
    const fetch = `curl -fsS -m 10 -o /dev/null http://${ip}:${nodePort}/`
    const command = `for i in $(seq ${tries}); do ${fetch}; done`
    await remote(cluster.controlPlane, command, { timeout: 90, signal })
  }
})

const rows = pods.map((pod) => `  ${pod.metadata.name}  ${pod.status.podIP}  ${pod.spec.nodeName}`)
console.log(`nginx answers everywhere, from ${pods.length} pods:\n${rows.join('\n')}`)
kubectl.suggest(`kubectl port-forward --namespace=${namespace} service/nginx 8080:80`)

/** Requests a page from inside a pod. */
async function fetchInPod(pod: string, address: string, times = 1): Promise<void> {
  const fetch = `for i in $(seq ${times}); do wget -q -T 10 -O /dev/null http://${address}/; done`
  await execInPod(pod, fetch, { namespace, signal }, `${pod} gets no page from ${address}`)
}
