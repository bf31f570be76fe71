#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// What nodes and pods use: metrics-server asks each kubelet and answers as a part of the API. All
// three connections are verified with the cluster's CA: API server to it, it to the kubelets, and
// it to the API server.
import { existsSync, readFileSync } from 'node:fs'
import { loadCluster } from '../lib/cluster.mts'
import { StepError } from '../lib/errors.mts'
import { interruption } from '../lib/interrupt.mts'
import { addOnFlags, printOrDelete, readyWorkers } from '../lib/kubernetes/add-on.mts'
import { Kubectl } from '../lib/kubernetes/kubectl.mts'
import { script } from '../lib/script.mts'
import { step } from '../lib/steps.mts'
import { waitFor } from '../lib/wait.mts'

const { flags } = script({
  does: 'Deploys metrics-server, and waits until kubectl top has numbers of every worker and of pods.',
  reads: [
    'cluster.env',
    'configs/admin.kubeconfig',
    'tls/ca.pem',
    'tls/metrics-server.pem',
    'tls/metrics-server-key.pem',
  ],
  writes: [],
  flags: addOnFlags,
  examples: ['./bin/deploy-metrics-server.mts', './bin/deploy-metrics-server.mts --print | less'],
})
const { timeout = 300 } = flags
const cluster = loadCluster()
const { METRICS_SERVER_VERSION } = cluster.settings

const manifest = `\
apiVersion: v1
kind: ServiceAccount
metadata:
  name: metrics-server
  namespace: kube-system
---
# What it measures, and whom it asks for it.
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: system:metrics-server
rules:
  - apiGroups: ['']
    resources: [nodes/metrics]
    verbs: [get]
  - apiGroups: ['']
    resources: [pods, nodes]
    verbs: [get, list, watch]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata:
  name: system:metrics-server
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: ClusterRole
  name: system:metrics-server
subjects:
  - kind: ServiceAccount
    name: metrics-server
    namespace: kube-system
---
# It has the API server tell whether who asks may have an answer.
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata:
  name: metrics-server:system:auth-delegator
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: ClusterRole
  name: system:auth-delegator
subjects:
  - kind: ServiceAccount
    name: metrics-server
    namespace: kube-system
---
# Where it reads how the API server proves itself: the CA and name of front-proxy-client.
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  name: metrics-server-auth-reader
  namespace: kube-system
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: Role
  name: extension-apiserver-authentication-reader
subjects:
  - kind: ServiceAccount
    name: metrics-server
    namespace: kube-system
---
# Who may view, edit or administer a namespace may see its numbers.
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: system:aggregated-metrics-reader
  labels:
    rbac.authorization.k8s.io/aggregate-to-view: 'true'
    rbac.authorization.k8s.io/aggregate-to-edit: 'true'
    rbac.authorization.k8s.io/aggregate-to-admin: 'true'
rules:
  - apiGroups: [metrics.k8s.io]
    resources: [pods, nodes]
    verbs: [get, list, watch]
---
apiVersion: apps/v1
kind: Deployment
metadata:
  name: metrics-server
  namespace: kube-system
  labels:
    k8s-app: metrics-server
spec:
  selector:
    matchLabels:
      k8s-app: metrics-server
  strategy:
    rollingUpdate:
      maxUnavailable: 0
  template:
    metadata:
      labels:
        k8s-app: metrics-server
    spec:
      serviceAccountName: metrics-server
      priorityClassName: system-cluster-critical
      securityContext:
        runAsNonRoot: true
        runAsUser: 1000
        runAsGroup: 1000
        # The key in the Secret is for this group.
        fsGroup: 1000
        seccompProfile:
          type: RuntimeDefault
      containers:
        - name: metrics-server
          image: registry.k8s.io/metrics-server/metrics-server:v${METRICS_SERVER_VERSION}
          imagePullPolicy: IfNotPresent
          args:
            - --secure-port=10250
            - --tls-cert-file=/etc/metrics-server/tls/tls.crt
            - --tls-private-key-file=/etc/metrics-server/tls/tls.key
            - --tls-min-version=VersionTLS13
            # Kubelets have their lan address in their certificates, which are of the same CA.
            - --kubelet-certificate-authority=/var/run/secrets/kubernetes.io/serviceaccount/ca.crt
            - --kubelet-preferred-address-types=InternalIP
            - --kubelet-use-node-status-port
            - --metric-resolution=15s
          ports:
            - {name: https, containerPort: 10250, protocol: TCP}
          resources:
            requests: {cpu: 100m, memory: 200Mi}
          livenessProbe:
            httpGet: {path: /livez, port: https, scheme: HTTPS}
          readinessProbe:
            httpGet: {path: /readyz, port: https, scheme: HTTPS}
            initialDelaySeconds: 20
          securityContext:
            allowPrivilegeEscalation: false
            readOnlyRootFilesystem: true
            capabilities:
              drop: [ALL]
          volumeMounts:
            - {name: tls, mountPath: /etc/metrics-server/tls, readOnly: true}
      volumes:
        - name: tls
          secret:
            secretName: metrics-server-tls
            # 0440
            defaultMode: 288
---
apiVersion: v1
kind: Service
metadata:
  name: metrics-server
  namespace: kube-system
  labels:
    k8s-app: metrics-server
spec:
  selector:
    k8s-app: metrics-server
  ports:
    - {name: https, port: 443, targetPort: https, protocol: TCP, appProtocol: https}
---
# From now on the API server asks that service for everything below /apis/metrics.k8s.io/v1beta1.
apiVersion: apiregistration.k8s.io/v1
kind: APIService
metadata:
  name: v1beta1.metrics.k8s.io
spec:
  group: metrics.k8s.io
  version: v1beta1
  service:
    name: metrics-server
    namespace: kube-system
  caBundle: ${read('ca.pem').toString('base64')}
  groupPriorityMinimum: 100
  versionPriority: 100
`

const kubectl = new Kubectl(cluster, interruption())
await printOrDelete('metrics-server', manifest, flags, async () => {
  await kubectl.delete(manifest)
  await kubectl.run([
    'delete',
    'secret',
    'metrics-server-tls',
    '--namespace=kube-system',
    '--ignore-not-found',
  ])
})

const workers = await step('pods can start', () => readyWorkers(cluster, kubectl))
await step(`metrics-server ${METRICS_SERVER_VERSION}`, async () => {
  const how = { manager: 'deploy-metrics-server', forceConflicts: flags['force-conflicts'] }
  // Not a part of the manifest, which may be shown to anybody.
  await kubectl.apply(JSON.stringify(secret()), how)
  await kubectl.apply(manifest, how)
})
await step('metrics-server is ready', (detail) =>
  kubectl.rollout('deployment/metrics-server', { namespace: 'kube-system', timeout, detail }),
)
const table = await step('numbers of every worker and of pods', measured)
console.log(`${table}\nTry: kubectl top pods --all-namespaces --sort-by=memory`)

/** The certificate by which the API server knows it; the key reaches it in no other way. */
function secret(): object {
  const data = { 'tls.crt': 'metrics-server.pem', 'tls.key': 'metrics-server-key.pem' }
  return {
    apiVersion: 'v1',
    kind: 'Secret',
    metadata: { name: 'metrics-server-tls', namespace: 'kube-system' },
    type: 'kubernetes.io/tls',
    data: Object.fromEntries(
      Object.entries(data).map(([key, file]) => [key, read(file).toString('base64')]),
    ),
  }
}

function read(file: string): Buffer {
  const path = cluster.path('tls', file)
  if (!existsSync(path)) throw new StepError(`tls/${file} is missing`, { hint: 'make certs' })
  return readFileSync(path)
}

/** Asks until there are numbers of all. @returns what is printed of the nodes */
async function measured(detail: (text: string) => void): Promise<string> {
  let table = ''
  const limits = { failure: 'kubectl top has no numbers', timeout, detail }
  const hint = 'kubectl describe apiservice v1beta1.metrics.k8s.io'
  await waitFor({ ...limits, hint, command: 'kubectl top nodes' }, async () => {
    const nodes = await kubectl.execute(['top', 'nodes'])
    const pods = await kubectl.execute(['top', 'pods', '--all-namespaces'])
    for (const { exitCode, stderr } of [nodes, pods]) {
      if (exitCode !== 0) return stderr.trim()
    }
    table = nodes.stdout.trimEnd()
    // A node without numbers has a row, too: <unknown>.
    const missing = workers.filter(({ name }) => !new RegExp(`^${name} +\\d`, 'm').test(table))
    return missing.map(({ name }) => `none of ${name}`).join('\n') || undefined
  })
  return table
}
