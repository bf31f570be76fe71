#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// Storage for claims: each is a folder on a worker's disk, which outlives pods but never moves.
import { $ } from 'zx/core'
import { loadCluster } from '../lib/cluster.mts'
import { StepError } from '../lib/errors.mts'
import { interruption } from '../lib/interrupt.mts'
import * as kubectl from '../lib/kubectl.mts'
import { scratchAccount, waitForPods, waitForRollout, withScratchNamespace } from '../lib/pods.mts'
import { script } from '../lib/script.mts'
import { step } from '../lib/steps.mts'
import { waitFor } from '../lib/wait.mts'

const { flags } = script({
  does: `Deploys local-path-provisioner with the default StorageClass local-path and one for each worker,
and checks that claims of all of them are bound and keep their data when their pods are replaced.`,
  reads: ['cluster.env', 'configs/admin.kubeconfig'],
  writes: ['the cluster: its provisioner in local-path-storage, StorageClasses'],
  flags: kubectl.addOnFlags,
  examples: ['./bin/deploy-local-storage.mts', './bin/deploy-local-storage.mts --print | less'],
})
const { timeout = 300, 'force-conflicts': forceConflicts } = flags
const cluster = loadCluster()
const { LOCAL_PATH_VERSION, SMOKE_IMAGE } = cluster.settings
const provisioner = 'rancher.io/local-path'
const workerLabel = 'local-path/worker'

const manifest = `\
# Its helper pods run as root and mount a folder of the machine; Pod Security admits them only here.
apiVersion: v1
kind: Namespace
metadata: {name: local-path-storage, labels: {pod-security.kubernetes.io/enforce: privileged}}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: local-path-provisioner, namespace: local-path-storage}
---
# It creates a volume for each claim.
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: local-path-provisioner}
rules:
  - {apiGroups: [''], resources: [nodes], verbs: [get]}
  - {apiGroups: [''], resources: [persistentvolumeclaims], verbs: [get, list, watch]}
  - apiGroups: ['']
    resources: [persistentvolumes]
    verbs: [get, list, watch, create, patch, delete]
  - {apiGroups: [storage.k8s.io], resources: [storageclasses], verbs: [get, list, watch]}
  - {apiGroups: [''], resources: [events], verbs: [create, patch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: local-path-provisioner}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: local-path-provisioner}
subjects: [{kind: ServiceAccount, name: local-path-provisioner, namespace: local-path-storage}]
---
# A helper pod on the claim's worker creates the folder, and another removes it.
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: local-path-provisioner, namespace: local-path-storage}
rules:
  - {apiGroups: [''], resources: [pods], verbs: [get, list, create, delete]}
  - {apiGroups: [''], resources: [pods/log], verbs: [get]}
  - {apiGroups: [''], resources: [configmaps], verbs: [list]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: local-path-provisioner, namespace: local-path-storage}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: local-path-provisioner}
subjects: [{kind: ServiceAccount, name: local-path-provisioner, namespace: local-path-storage}]
---
apiVersion: v1
kind: ConfigMap
metadata: {name: local-path-config, namespace: local-path-storage}
data:
  config.json: |
    {
      "nodePathMap": [
        { "node": "DEFAULT_PATH_FOR_NON_LISTED_NODES", "paths": ["/var/lib/local-path"] }
      ]
    }
  # For any user, as a pod's user is not known when the folder is created.
  setup: |
    #!/bin/sh
    set -eu
    mkdir -m 0777 -p "$VOL_DIR"
  teardown: |
    #!/bin/sh
    set -eu
    rm -rf "$VOL_DIR"
  # Root, since only root may write to /var/lib, and files in a volume have any owner.
  helperPod.yaml: |
    apiVersion: v1
    kind: Pod
    metadata: {name: helper-pod}
    spec:
      priorityClassName: system-node-critical
      automountServiceAccountToken: false
      tolerations:
        - {key: node.kubernetes.io/disk-pressure, operator: Exists, effect: NoSchedule}
      containers:
        - name: helper-pod
          image: ${SMOKE_IMAGE}
          imagePullPolicy: IfNotPresent
          securityContext:
            {runAsUser: 0, allowPrivilegeEscalation: false, readOnlyRootFilesystem: true}
---
apiVersion: apps/v1
kind: Deployment
metadata:
  name: local-path-provisioner
  namespace: local-path-storage
  labels: {app: local-path-provisioner}
spec:
  selector: {matchLabels: {app: local-path-provisioner}}
  # Two at the same time would both handle a claim.
  strategy: {type: Recreate}
  template:
    metadata: {labels: {app: local-path-provisioner}}
    spec:
      serviceAccountName: local-path-provisioner
      securityContext:
        runAsNonRoot: true
        runAsUser: 65532
        runAsGroup: 65532
        seccompProfile: {type: RuntimeDefault}
      containers:
        - name: local-path-provisioner
          image: docker.io/rancher/local-path-provisioner:v${LOCAL_PATH_VERSION}
          imagePullPolicy: IfNotPresent
          command:
            - local-path-provisioner
            - start
            - --provisioner-name=${provisioner}
            - --service-account-name=local-path-provisioner
            - --config=/etc/config/config.json
            - --helper-pod-file=/etc/config/helperPod.yaml
          env:
            - name: POD_NAMESPACE
              valueFrom: {fieldRef: {apiVersion: v1, fieldPath: metadata.namespace}}
            # It reads the helper pod again when it changes.
            - {name: CONFIG_MOUNT_PATH, value: /etc/config/}
          ports: [{name: health, containerPort: 8080, protocol: TCP}]
          resources: {requests: {cpu: 10m, memory: 32Mi}}
          # Ten minutes, for an emulated processor; the other probes begin afterwards.
          startupProbe:
            httpGet: {path: /health, port: health}
            periodSeconds: 2
            timeoutSeconds: 5
            failureThreshold: 300
          livenessProbe: {httpGet: {path: /health, port: health}, timeoutSeconds: 5}
          readinessProbe:
            httpGet: {path: /ready, port: health}
            # It sends the API server five requests for each answer.
            timeoutSeconds: 10
          securityContext:
            allowPrivilegeEscalation: false
            readOnlyRootFilesystem: true
            capabilities: {drop: [ALL]}
          volumeMounts: [{name: config, mountPath: /etc/config, readOnly: true}]
      volumes: [{name: config, configMap: {name: local-path-config}}]
---
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata:
  name: local-path
  annotations:
    storageclass.kubernetes.io/is-default-class: 'true'
    # A local volume's folder must exist; a missing one of a hostPath volume would be created, empty.
    defaultVolumeType: local
provisioner: ${provisioner}
# The scheduler chooses the worker first, by all that the pod needs; then the volume is created.
volumeBindingMode: WaitForFirstConsumer
reclaimPolicy: Delete
${cluster.workers.map(({ name }) => classOf(name)).join('')}`

/** For pods that must run on a certain worker, with their data. */
function classOf(worker: string): string {
  return `\
---
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata:
  name: local-path-${worker}
  labels: {${workerLabel}: ${worker}}
  annotations: {defaultVolumeType: local}
provisioner: ${provisioner}
volumeBindingMode: WaitForFirstConsumer
reclaimPolicy: Delete
allowedTopologies:
  - matchLabelExpressions: [{key: kubernetes.io/hostname, values: [${worker}]}]
`
}

const signal = interruption()
await kubectl.printOrDelete(cluster, 'local storage', manifest, flags, async () => {
  // Without the provisioner, nothing would ever remove the volumes of claims.
  const left = await volumes()
  if (left.length > 0) {
    throw new StepError('there are volumes that nothing could remove any more', {
      output: left.join('\n'),
      hint: 'delete the claims first:\nkubectl get persistentvolumeclaims --all-namespaces',
    })
  }
  await $`kubectl delete storageclasses --selector=${workerLabel} --ignore-not-found`
})
const workers = await step('pods can start', () => kubectl.readyWorkers(cluster))
await step(`local-path-provisioner ${LOCAL_PATH_VERSION}`, async () => {
  await kubectl.apply(manifest, { manager: 'deploy-local-storage', forceConflicts, signal })
  // Classes of workers that cluster.env no longer has.
  const names = cluster.workers.map(({ name }) => name).join(',')
  const others = `${workerLabel},${workerLabel} notin (${names})`
  await $`kubectl delete storageclasses --selector=${others} --ignore-not-found`
})
await step('local-path-provisioner is ready', (detail) => {
  const limits = { namespace: 'local-path-storage', timeout, detail, signal }
  return waitForRollout('deployment/local-path-provisioner', limits)
})
await step('claims keep their data when their pods are replaced', async (detail) => {
  const limits = { namespace: 'storage-probe', timeout, detail, signal }
  const claims = ['default', ...workers.map(({ name }) => name)]
  const podsThat = (verb: string) => claims.map((claim) => probe(claim, verb)).join('')
  const apply = (text: string) => kubectl.apply(text, { manager: 'storage-probe', signal })
  await withScratchNamespace(limits.namespace, limits, async () => {
    await apply(claims.map(claimOf).join('') + podsThat('write'))
    for (const { metadata, spec } of await waitForPods('Succeeded', limits)) {
      const claim = metadata.name.replace('write-', '')
      if (claim === 'default' || claim === spec.nodeName) continue
      throw new StepError(`a claim of class local-path-${claim} was bound on ${spec.nodeName}`)
    }
    await $({ timeout: '210s' })`kubectl delete pods --all --namespace=${limits.namespace}`
    await apply(podsThat('read'))
    await waitForPods('Succeeded', limits)
  })
  detail('removing the volumes')
  await waitFor({ failure: 'volumes of deleted claims still exist', ...limits }, async () => {
    const left = await volumes()
    return left.filter((volume) => volume.includes(' storage-probe/')).join('\n') || undefined
  })
})
kubectl.suggest('kubectl get storageclasses') // A claim that names none gets local-path.

/** A claim of a worker's class, or of the default one. */
function claimOf(claim: string): string {
  return `\
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: ${claim}, namespace: storage-probe}
spec:
  accessModes: [ReadWriteOnce]
  ${claim === 'default' ? '' : `storageClassName: local-path-${claim}`}
  resources: {requests: {storage: 1Mi}}
---
`
}

/** A pod that writes a word into the claim's volume, or checks that it is there. */
function probe(claim: string, verb: string): string {
  const command = verb === 'write' ? `echo ${claim} >/data/word` : `grep -x ${claim} /data/word`
  return `\
apiVersion: v1
kind: Pod
metadata: {name: ${verb}-${claim}, namespace: storage-probe}
spec:
  restartPolicy: Never
  serviceAccountName: ${scratchAccount}
  automountServiceAccountToken: false
  securityContext: {runAsNonRoot: true, runAsUser: 65534, seccompProfile: {type: RuntimeDefault}}
  containers:
    - name: probe
      image: ${SMOKE_IMAGE}
      imagePullPolicy: IfNotPresent
      command: [sh, -c, '${command}']
      securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
      volumeMounts: [{name: data, mountPath: /data}]
  volumes: [{name: data, persistentVolumeClaim: {claimName: ${claim}}}]
---
`
}

/** The volumes that the provisioner has created: "pvc-… of claim NAMESPACE/NAME". */
async function volumes(): Promise<string[]> {
  const ours = `?(@.metadata.annotations.pv\\.kubernetes\\.io/provisioned-by=="${provisioner}")`
  const line = '{.metadata.name} of claim {.spec.claimRef.namespace}/{.spec.claimRef.name}{"\\n"}'
  const query = `jsonpath={range .items[${ours}]}${line}{end}`
  const { stdout } = await $({ timeout: '60s' })`kubectl get persistentvolumes --output=${query}`
  return stdout.split('\n').filter(Boolean)
}
