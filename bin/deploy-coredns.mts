#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// Names for services: CoreDNS answers at the address in every pod's /etc/resolv.conf.
import { lookup } from 'node:dns/promises'
import { loadCluster } from '../lib/cluster.mts'
import { StepError } from '../lib/errors.mts'
import { interruption } from '../lib/interrupt.mts'
import * as kubectl from '../lib/kubectl.mts'
import { startWebPods, type WebPod, waitForRollout, withScratchNamespace } from '../lib/pods.mts'
import { script } from '../lib/script.mts'
import { step } from '../lib/steps.mts'

const { flags } = script({
  does: 'Deploys CoreDNS at K8S_CLUSTER_DNS and looks names up from a pod on every worker.',
  reads: ['cluster.env', 'configs/admin.kubeconfig'],
  writes: ['the cluster: CoreDNS in kube-system'],
  flags: kubectl.addOnFlags,
  examples: ['./bin/deploy-coredns.mts', './bin/deploy-coredns.mts --print | less'],
})
const { timeout = 300, 'force-conflicts': forceConflicts } = flags
const cluster = loadCluster()
const { COREDNS_VERSION, K8S_CLUSTER_DNS, K8S_CLUSTER_DOMAIN, SMOKE_IMAGE } = cluster.settings
const outsideName = 'registry.k8s.io'

const manifest = `\
apiVersion: v1
kind: ServiceAccount
metadata: {name: coredns, namespace: kube-system}
---
# It only reads Services and EndpointSlices.
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: 'system:coredns'}
rules:
  - {apiGroups: [''], resources: [services, namespaces], verbs: [list, watch]}
  - {apiGroups: [discovery.k8s.io], resources: [endpointslices], verbs: [list, watch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: 'system:coredns'}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: 'system:coredns'}
subjects: [{kind: ServiceAccount, name: coredns, namespace: kube-system}]
---
apiVersion: v1
kind: ConfigMap
metadata: {name: coredns, namespace: kube-system}
data:
  # Port 1053 needs no privilege; the service maps 53 to it.
  Corefile: |
    .:1053 {
        errors
        health :8080 {
            lameduck 5s
        }
        ready :8181
        kubernetes ${K8S_CLUSTER_DOMAIN} in-addr.arpa ip6.arpa {
            fallthrough in-addr.arpa ip6.arpa
            ttl 30
        }
        prometheus :9153
        forward . /etc/resolv.conf
        cache 30
        loop
        reload
        loadbalance
    }
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: coredns, namespace: kube-system, labels: {k8s-app: kube-dns}}
spec:
  replicas: 2
  selector: {matchLabels: {k8s-app: kube-dns}}
  strategy: {rollingUpdate: {maxUnavailable: 1}}
  template:
    metadata: {labels: {k8s-app: kube-dns}}
    spec:
      serviceAccountName: coredns
      priorityClassName: system-cluster-critical
      # The machine's resolver, not CoreDNS itself.
      dnsPolicy: Default
      # On different workers, if there are two.
      topologySpreadConstraints:
        - maxSkew: 1
          topologyKey: kubernetes.io/hostname
          whenUnsatisfiable: ScheduleAnyway
          labelSelector: {matchLabels: {k8s-app: kube-dns}}
          matchLabelKeys: [pod-template-hash]
      securityContext:
        runAsNonRoot: true
        runAsUser: 65532
        runAsGroup: 65532
        seccompProfile: {type: RuntimeDefault}
      containers:
        - name: coredns
          image: registry.k8s.io/coredns/coredns:v${COREDNS_VERSION}
          imagePullPolicy: IfNotPresent
          args: [-conf, /etc/coredns/Corefile]
          ports:
            - {name: dns, containerPort: 1053, protocol: UDP}
            - {name: dns-tcp, containerPort: 1053, protocol: TCP}
            - {name: metrics, containerPort: 9153, protocol: TCP}
          resources: {requests: {cpu: 100m, memory: 70Mi}, limits: {memory: 170Mi}}
          # Ten minutes, for an emulated processor; the other probes begin afterwards.
          startupProbe:
            httpGet: {path: /health, port: 8080}
            periodSeconds: 2
            timeoutSeconds: 5
            failureThreshold: 300
          livenessProbe: {httpGet: {path: /health, port: 8080}, timeoutSeconds: 5}
          readinessProbe: {httpGet: {path: /ready, port: 8181}, periodSeconds: 2, timeoutSeconds: 5}
          securityContext:
            allowPrivilegeEscalation: false
            readOnlyRootFilesystem: true
            # The image's program has this file capability: without it, the kernel refuses to run it.
            capabilities: {drop: [ALL], add: [NET_BIND_SERVICE]}
          volumeMounts: [{name: config, mountPath: /etc/coredns, readOnly: true}]
      volumes: [{name: config, configMap: {name: coredns}}]
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {name: coredns, namespace: kube-system}
spec: {minAvailable: 1, selector: {matchLabels: {k8s-app: kube-dns}}}
---
apiVersion: v1
kind: Service
metadata:
  name: kube-dns
  namespace: kube-system
  labels: {k8s-app: kube-dns, kubernetes.io/name: CoreDNS}
spec:
  clusterIP: ${K8S_CLUSTER_DNS}
  selector: {k8s-app: kube-dns}
  ports:
    - {name: dns, port: 53, targetPort: dns, protocol: UDP}
    - {name: dns-tcp, port: 53, targetPort: dns-tcp, protocol: TCP}
    - {name: metrics, port: 9153, targetPort: metrics, protocol: TCP}
`

const signal = interruption()
await kubectl.printOrDelete(cluster, 'CoreDNS', manifest, flags)
const workers = await step('pods can start', () => kubectl.readyWorkers(cluster))
await step(`CoreDNS ${COREDNS_VERSION} at ${K8S_CLUSTER_DNS}`, () =>
  kubectl.apply(manifest, { manager: 'deploy-coredns', forceConflicts, signal }),
)
await step('CoreDNS is ready', (detail) =>
  waitForRollout('deployment/coredns', { namespace: 'kube-system', timeout, detail, signal }),
)
await step('lookups from every worker', async (detail) => {
  // Where this computer has no internet, a pod need not have it either.
  const outside = (await lookup(outsideName).catch(() => undefined)) !== undefined
  const limits = { namespace: 'network-probe', timeout, detail, signal }
  await withScratchNamespace(limits.namespace, limits, async () => {
    for (const pod of await startWebPods(cluster, { workers, ...limits })) {
      detail(pod.node.name)
      await expectLookup(pod, `kubernetes.default.svc.${K8S_CLUSTER_DOMAIN}`, 10)
      await expectLookup(pod, `no-such-service.default.svc.${K8S_CLUSTER_DOMAIN}`, 0)
      if (outside) await expectLookup(pod, outsideName, 10)
    }
  })
  detail(outside ? '' : `${outsideName} was not tried: this computer cannot resolve it`)
})
kubectl.suggest(
  `kubectl run dns -it --rm --restart=Never --image=${SMOKE_IMAGE} -- nslookup kubernetes.default.svc.${K8S_CLUSTER_DOMAIN}`,
)

/** Looks a name up often enough to ask every replica; 0 times: the answer must be NXDOMAIN. */
async function expectLookup(pod: WebPod, name: string, times: number): Promise<void> {
  const command = `nslookup ${name}. ${K8S_CLUSTER_DNS}`
  const output = await pod.run(
    `for i in $(seq ${times || 1}); do out=$(${command} 2>&1) && echo found || echo "failed: $out"; done`,
  )
  const found = output.match(/^found$/gm)?.length ?? 0
  if (times ? found === times : /NXDOMAIN|can't resolve/.test(output)) return
  const reason = times
    ? `finds ${name} in ${found} of ${times} lookups`
    : `gets no answer that ${name} does not exist`
  throw new StepError(`a pod on ${pod.node.name} ${reason}`, {
    output: output.replaceAll('found\n', '').trim(),
    command,
    hint: 'kubectl logs --namespace=kube-system deployment/coredns',
  })
}
