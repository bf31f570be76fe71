#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// What nodes and pods use: metrics-server collects it from each kubelet and serves it as a part of
// the API. TLS on all its connections is verified with the cluster's CA.
import { existsSync, readFileSync } from 'node:fs'
import { $ } from 'zx/core'
import { loadCluster } from '../lib/cluster.mts'
import { StepError } from '../lib/errors.mts'
import { interruption } from '../lib/interrupt.mts'
import * as kubectl from '../lib/kubectl.mts'
import { waitForRollout } from '../lib/pods.mts'
import { script } from '../lib/script.mts'
import { step } from '../lib/steps.mts'
import { waitFor } from '../lib/wait.mts'

const { flags } = script({
  does: 'Deploys metrics-server, and waits until kubectl top shows every worker and pods.',
  reads: ['cluster.env', 'configs/admin.kubeconfig', 'tls/ca.pem', 'tls/metrics-server{,-key}.pem'],
  writes: ['the cluster: metrics-server in kube-system'],
  flags: kubectl.addOnFlags,
  examples: ['./bin/deploy-metrics-server.mts', './bin/deploy-metrics-server.mts --print | less'],
})
const { timeout = 300, 'force-conflicts': forceConflicts } = flags
const cluster = loadCluster()
const { METRICS_SERVER_VERSION } = cluster.settings

const manifest = `\
apiVersion: v1
kind: ServiceAccount
metadata: {name: metrics-server, namespace: kube-system}
---
# May scrape kubelets, and list nodes and pods.
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: 'system:metrics-server'}
rules:
  - {apiGroups: [''], resources: [nodes/metrics], verbs: [get]}
  - {apiGroups: [''], resources: [pods, nodes], verbs: [get, list, watch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: 'system:metrics-server'}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: 'system:metrics-server'}
subjects: [{kind: ServiceAccount, name: metrics-server, namespace: kube-system}]
---
# It lets the API server authenticate and authorize its clients.
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: 'metrics-server:system:auth-delegator'}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: 'system:auth-delegator'}
subjects: [{kind: ServiceAccount, name: metrics-server, namespace: kube-system}]
---
# How it verifies the API server: the CA and name of front-proxy-client.
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: metrics-server-auth-reader, namespace: kube-system}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: Role
  name: extension-apiserver-authentication-reader
subjects: [{kind: ServiceAccount, name: metrics-server, namespace: kube-system}]
---
# Those who may view, edit or administer a namespace may see its metrics.
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: system:aggregated-metrics-reader
  labels:
    rbac.authorization.k8s.io/aggregate-to-view: 'true'
    rbac.authorization.k8s.io/aggregate-to-edit: 'true'
    rbac.authorization.k8s.io/aggregate-to-admin: 'true'
rules:
  - {apiGroups: [metrics.k8s.io], resources: [pods, nodes], verbs: [get, list, watch]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: metrics-server, namespace: kube-system, labels: {k8s-app: metrics-server}}
spec:
  selector: {matchLabels: {k8s-app: metrics-server}}
  strategy: {rollingUpdate: {maxUnavailable: 0}}
  template:
    metadata: {labels: {k8s-app: metrics-server}}
    spec:
      serviceAccountName: metrics-server
      priorityClassName: system-cluster-critical
      securityContext:
        runAsNonRoot: true
        runAsUser: 1000
        runAsGroup: 1000
        # This group may read the key in the Secret.
        fsGroup: 1000
        seccompProfile: {type: RuntimeDefault}
      containers:
        - name: metrics-server
          image: registry.k8s.io/metrics-server/metrics-server:v${METRICS_SERVER_VERSION}
          imagePullPolicy: IfNotPresent
          args:
            - --secure-port=10250
            - --tls-cert-file=/etc/metrics-server/tls/tls.crt
            - --tls-private-key-file=/etc/metrics-server/tls/tls.key
            - --tls-min-version=VersionTLS13
            # Kubelets have their LAN address in their certificates, issued by the same CA.
            - --kubelet-certificate-authority=/var/run/secrets/kubernetes.io/serviceaccount/ca.crt
            - --kubelet-preferred-address-types=InternalIP
            - --kubelet-use-node-status-port
            - --metric-resolution=15s
          ports: [{name: https, containerPort: 10250, protocol: TCP}]
          resources: {requests: {cpu: 100m, memory: 200Mi}}
          # Ten minutes, for an emulated processor; the other probes begin afterwards.
          startupProbe:
            httpGet: {path: /livez, port: https, scheme: HTTPS}
            periodSeconds: 2
            timeoutSeconds: 5
            failureThreshold: 300
          livenessProbe: {httpGet: {path: /livez, port: https, scheme: HTTPS}, timeoutSeconds: 5}
          readinessProbe:
            httpGet: {path: /readyz, port: https, scheme: HTTPS}
            # There are metrics after the second scrape, 15 s after the first.
            initialDelaySeconds: 15
            periodSeconds: 2
            timeoutSeconds: 5
          securityContext:
            allowPrivilegeEscalation: false
            readOnlyRootFilesystem: true
            capabilities: {drop: [ALL]}
          volumeMounts: [{name: tls, mountPath: /etc/metrics-server/tls, readOnly: true}]
      volumes:
        - name: tls
          # 288 is 0440. This script makes the Secret from tls/, so --print does not have it.
          secret: {secretName: metrics-server-tls, defaultMode: 288}
---
apiVersion: v1
kind: Service
metadata: {name: metrics-server, namespace: kube-system, labels: {k8s-app: metrics-server}}
spec:
  selector: {k8s-app: metrics-server}
  ports: [{name: https, port: 443, targetPort: https, protocol: TCP, appProtocol: https}]
---
# The API server forwards /apis/metrics.k8s.io/v1beta1 to that service.
apiVersion: apiregistration.k8s.io/v1
kind: APIService
metadata: {name: v1beta1.metrics.k8s.io}
spec:
  group: metrics.k8s.io
  version: v1beta1
  service: {name: metrics-server, namespace: kube-system}
  caBundle: ${readFileSync(cluster.path(tls('ca.pem')), 'base64')}
  groupPriorityMinimum: 100
  versionPriority: 100
`

const signal = interruption()
const namespace = 'kube-system'
await kubectl.printOrDelete(
  cluster,
  'metrics-server',
  manifest,
  flags,
  () => $`kubectl delete secret metrics-server-tls --namespace=${namespace} --ignore-not-found`,
)
const workers = await step('pods can start', () => kubectl.readyWorkers(cluster))
await step(`metrics-server ${METRICS_SERVER_VERSION}`, async () => {
  const how = { manager: 'deploy-metrics-server', forceConflicts, signal }
  // The API server verifies it by this certificate. Not in the manifest: --print shows no keys.
  const files = [`--cert=${tls('metrics-server.pem')}`, `--key=${tls('metrics-server-key.pem')}`]
  const secret = ['metrics-server-tls', `--namespace=${namespace}`, ...files]
  const { stdout } = await $`kubectl create secret tls ${secret} --dry-run=client --output=yaml`
  await kubectl.apply(stdout, how)
  await kubectl.apply(manifest, how)
})
await step('metrics-server is ready', (detail) =>
  waitForRollout('deployment/metrics-server', { namespace, timeout, detail, signal }),
)
const table = await step('metrics of every worker and of pods', async (detail) => {
  let nodes = ''
  const limits = { failure: 'kubectl top has no metrics', timeout, detail, signal }
  const hint = 'kubectl describe apiservice v1beta1.metrics.k8s.io'
  await waitFor({ ...limits, hint, command: 'kubectl top nodes' }, async () => {
    const $$ = $({ nothrow: true, timeout: '60s' })
    const top = await $$`kubectl top pods --all-namespaces >/dev/null && kubectl top nodes`
    if (top.exitCode !== 0) return top.stderr.trim()
    nodes = top.stdout.trimEnd()
    // A node without metrics has a row, too: <unknown>.
    const missing = workers.filter(({ name }) => !new RegExp(`^${name} +\\d`, 'm').test(nodes))
    return missing.map(({ name }) => `no metrics for ${name}`).join('\n') || undefined
  })
  return nodes
})
console.log(table)
kubectl.suggest('kubectl top pods --all-namespaces --sort-by=memory')

/** The path of a file of tls/. */
function tls(file: string): string {
  if (existsSync(cluster.path('tls', file))) return `tls/${file}`
  throw new StepError(`tls/${file} is missing`, { hint: 'make certs' })
}
