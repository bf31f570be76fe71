#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// The pod network. Until it is installed, kubelets have no CNI plugin and no node is Ready; and the
// API server may not read logs from kubelets until RBAC allows it.
import { existsSync, readFileSync } from 'node:fs'
import { resolve } from 'node:path'
import { isDeepStrictEqual } from 'node:util'
import { Document, isMap, parse, Scalar } from 'yaml'
import { $ } from 'zx/core'
import { loadCluster } from '../lib/cluster.mts'
import { StepError } from '../lib/errors.mts'
import { writeFileAtomic } from '../lib/files.mts'
import { ensureHelm, usableRelease } from '../lib/helm.mts'
import { interruption } from '../lib/interrupt.mts'
import * as kubectl from '../lib/kubectl.mts'
import { withLock } from '../lib/lock.mts'
import { waitForRollout } from '../lib/pods.mts'
import { hostEnvironment } from '../lib/proxy.mts'
import { script } from '../lib/script.mts'
import { step } from '../lib/steps.mts'
import { waitFor } from '../lib/wait.mts'

const { flags } = script({
  does: `Allows the API server to call kubelets, sets each worker's POD_CIDR, and installs Cilium with
Helm (fetched into tools/ if it is not on the PATH), or upgrades it if the version or a value has
changed. Waits until its agents run and all workers are Ready.`,
  reads: ['cluster.env', 'configs/admin.kubeconfig'],
  writes: ['tools/helm-VERSION', 'run/cilium-values.yaml'],
  flags: {
    ...kubectl.addOnFlags,
    print: { help: 'write the RBAC manifest to stdout and do nothing' },
    'print-values': { help: "write Cilium's values to stdout, each with its reason" },
    values: { value: 'FILE', help: 'your own values in YAML; they are kept by later runs' },
    timeout: { value: 'SECONDS', number: true, help: 'how long to wait until it is ready (600)' },
  },
  examples: ['./bin/install-cilium.mts', './bin/install-cilium.mts --print-values'],
})
const { timeout = 600 } = flags
const cluster = loadCluster()
const { CILIUM_VERSION, CILIUM_CHART, KUBE_PROXY_MODE, K8S_POD_CIDR, API_PORT } = cluster.settings

// The API server calls kubelets as user "kubernetes", the CN of its certificate; each kubelet then
// asks it back what this user may do. A request is one of these subresources and an HTTP method (GET
// is get, POST is create): https://kubernetes.io/docs/reference/access-authn-authz/kubelet-authn-authz/
// What has no subresource of its own there, such as container logs, exec and port-forward, is proxy.
const manifest = `\
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: kubelet-api-full
rules:
  - apiGroups: ['']
    resources: [nodes/proxy]
    verbs: [get, create]
  # For kubectl get --raw /api/v1/nodes/NODE/proxy/...: these are read, and not by proxy.
  - apiGroups: ['']
    resources: [nodes/stats, nodes/log, nodes/metrics]
    verbs: [get]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata:
  name: kubelet-api-full
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: ClusterRole
  name: kubelet-api-full
subjects:
  - apiGroup: rbac.authorization.k8s.io
    kind: User
    name: kubernetes
`

// Names as in https://docs.cilium.io/en/stable/helm-reference/, values, and why they are set.
const values: [name: string, value: unknown, why: string][] = [
  [
    'cluster.name',
    // At most 32 characters, unlike a name in Kubernetes.
    cluster.settings.CLUSTER_NAME.slice(0, 32).replace(/-+$/, ''),
    'CLUSTER_NAME',
  ],
  [
    'ipam.mode',
    'kubernetes',
    "pods get addresses of their node's spec.podCIDR, which is POD_CIDR_… of cluster.env",
  ],
  [
    'routingMode',
    'native',
    'no tunnel: the LAN carries pod packets as they are, so the control plane sees them too',
  ],
  [
    'ipv4NativeRoutingCIDR',
    K8S_POD_CIDR,
    "K8S_POD_CIDR: packets to it keep their source address, all others get the node's",
  ],
  [
    'autoDirectNodeRoutes',
    true,
    'a route to the pods of each other worker; false would remove the existing ones',
  ],
  ['kubeProxyReplacement', KUBE_PROXY_MODE === 'cilium', 'KUBE_PROXY_MODE'],
  [
    'k8sServiceHost',
    cluster.controlPlane.ip,
    'Cilium implements service addresses, so it cannot reach the API by one',
  ],
  ['k8sServicePort', API_PORT, 'API_PORT'],
  [
    'devices',
    ['lan', 'outside'],
    'the network interfaces as nixos-base.nix names them; services answer on both',
  ],
  [
    'nodePort.directRoutingDevice',
    'lan',
    'nodes reach each other there; outside has the same address on all of them',
  ],
  ['cgroup.autoMount.enabled', false, 'systemd has mounted cgroup2 already'],
  ['cgroup.hostRoot', '/sys/fs/cgroup', 'where systemd has mounted it'],
  [
    'sysctlfix.enabled',
    false,
    'it writes to /etc/sysctl.d, which NixOS manages; nixos-base.nix sets rp_filter',
  ],
  ['operator.replicas', 1, 'enough for a few nodes; the default is 2'],
  [
    'rollOutCiliumPods',
    true,
    'agents read their configuration only when they start: a changed value restarts them',
  ],
  ['operator.rollOutPods', true, 'the same for the operator'],
]

if (flags['print-values']) await kubectl.printAndExit(valuesFile())
const own = ownValues(flags.values)
const signal = interruption()
const namespace = 'kube-system'
await kubectl.printOrDelete('Cilium', manifest, flags, async () => {
  await kubectl.useCluster(cluster)
  await ensureHelm(cluster)
  if (await usableRelease('cilium', namespace)) {
    await $`helm uninstall cilium --namespace ${namespace} --wait`
  }
  await kubectl.deleteManifest(manifest)
})

await kubectl.useCluster(cluster)
if (cluster.workers.length === 0) {
  throw new StepError('the cluster has no workers, so no pod needs a network', {
    hint: 'WORKER_NODES in cluster.env is empty: make add-worker NAME=sigma',
  })
}
await step('the API server may call kubelets', () =>
  kubectl.apply(manifest, {
    manager: 'install-cilium',
    forceConflicts: flags['force-conflicts'],
    signal,
  }),
)
await step('pod ranges and labels of the workers', async (detail) => {
  const nodes = new Map((await kubectl.getNodes()).map((node) => [node.metadata.name, node.spec]))
  const missing = cluster.workers.map(({ name }) => name).filter((name) => !nodes.has(name))
  if (missing.length > 0) {
    throw new StepError(`not registered yet: ${missing.join(', ')}`, { hint: 'make wait' })
  }
  for (const { name, podCidr } of cluster.workers) {
    detail(name)
    const current = nodes.get(name)?.podCIDR
    if (current && current !== podCidr) {
      throw new StepError(`${name} has pod range ${current}, not ${podCidr}`, {
        output: `A node's range can be set once. The machines' routes follow POD_CIDR_${name.replaceAll('-', '_')}.`,
        hint: `kubectl delete node ${name}, restart its kubelet (make ssh-${name}: systemctl restart kubelet), and try again; or put ${current} back into cluster.env`,
      })
    }
    const patch = JSON.stringify({ spec: { podCIDR: podCidr, podCIDRs: [podCidr] } })
    await $`kubectl patch node ${name} --patch ${patch}`
    // A kubelet may not give itself a role.
    await $`kubectl label node ${name} node-role.kubernetes.io/worker= --overwrite`
  }
})
await step(`Cilium ${CILIUM_VERSION}`, (detail) =>
  withLock(cluster.path('run', 'helm.lock'), 'running helm', async () => {
    await ensureHelm(cluster)
    const release = await usableRelease('cilium', namespace)
    if (release?.status === 'deployed' && release.version === CILIUM_VERSION) {
      const changed = differences(merge(parse(valuesFile()), own), release.values)
      if (changed.length === 0) return detail('is there already')
      detail(`changed: ${changed.join(', ')}`)
    }
    await writeFileAtomic(cluster.path('run', 'cilium-values.yaml'), valuesFile())
    const files = ['run/cilium-values.yaml', ...(flags.values ? [resolve(flags.values)] : [])]
    const args = files.flatMap((file) => ['--values', file])
    const helm = $({ signal, env: { ...$.env, ...(await hostEnvironment(cluster)) } })
    // Values that others have set are kept. Not --wait: the next steps say what pods wait for.
    await helm`helm upgrade --install cilium ${await chart()} --namespace ${namespace} ${args} --reset-then-reuse-values`
  }),
)
for (const what of ['daemonset/cilium', 'deployment/cilium-operator']) {
  await step(`${what} is ready`, (detail) =>
    waitForRollout(what, { namespace, timeout, detail, signal }),
  )
}
await step('all workers are Ready', (detail) => {
  const hint = 'kubectl logs --namespace=kube-system daemonset/cilium'
  const wait = { failure: 'not all workers are Ready', timeout, detail, hint, signal }
  return waitFor(wait, async () => {
    const nodes = await kubectl.getNodes()
    const reasons = cluster.workers.flatMap(({ name }) => {
      const reason = kubectl.notReady(nodes.find(({ metadata }) => metadata.name === name))
      return reason ? [`${name}: ${reason}`] : []
    })
    return reasons.join('\n') || undefined
  })
})
console.log('Try: make dns, and then: kubectl get pods --all-namespaces --output=wide')

/** Where the chart is, as arguments of helm: in exactly CILIUM_VERSION. */
async function chart(): Promise<string[]> {
  const version = ['--version', CILIUM_VERSION]
  if (/^oci:\/\//.test(CILIUM_CHART)) return [CILIUM_CHART, ...version]
  if (/^https?:\/\//.test(CILIUM_CHART)) return ['cilium', '--repo', CILIUM_CHART, ...version]
  const path = resolve(cluster.root, CILIUM_CHART)
  if (!existsSync(path)) throw new StepError(`CILIUM_CHART ${CILIUM_CHART} does not exist`)
  const { version: found } = parse((await $`helm show chart ${path}`).stdout)
  if (found === CILIUM_VERSION) return [path]
  throw new StepError(`${CILIUM_CHART} is version ${found} of the chart, not ${CILIUM_VERSION}`, {
    hint: 'CILIUM_CHART and CILIUM_VERSION in cluster.env',
  })
}

/** The values as a file for Helm, each with its reason above it. */
function valuesFile(): string {
  const document = new Document({})
  for (const [name, value, why] of values) {
    const path = name.split('.')
    document.setIn(path, value)
    const parent = path.length > 1 ? document.getIn(path.slice(0, -1)) : document.contents
    const pair = isMap(parent) && parent.items.find(({ key }) => String(key) === path.at(-1))
    if (!pair) throw new Error(`${name} is not a key of the values`)
    const key = new Scalar(path.at(-1))
    key.commentBefore = ` ${why}`
    pair.key = key
  }
  return document.toString({ lineWidth: 0 })
}

type Values = Record<string, unknown>

function isValues(value: unknown): value is Values {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}

/** The values of --values FILE. @throws StepError if they are not YAML with names and values */
function ownValues(file: string | undefined): Values {
  if (!file) return {}
  try {
    const found: unknown = parse(readFileSync(file, 'utf8'))
    if (isValues(found)) return found
    throw new Error('it has no names and values, such as "hubble: {relay: {enabled: true}}"')
  } catch (cause) {
    throw new StepError(`the values in ${file} cannot be read: ${(cause as Error).message}`, {
      exitCode: 2,
      cause,
    })
  }
}

/** As Helm does: names are merged, lists are replaced. */
function merge(base: Values, over: Values): Values {
  const merged = Object.entries(over).map(([name, value]) => {
    const below = base[name]
    return [name, isValues(value) && isValues(below) ? merge(below, value) : value]
  })
  return { ...base, ...Object.fromEntries(merged) }
}

/** The names of values that a release was not given, or given differently. */
function differences(wanted: unknown, given: unknown, name = ''): string[] {
  if (!isValues(wanted)) return isDeepStrictEqual(wanted ?? null, given ?? null) ? [] : [name]
  return Object.entries(wanted).flatMap(([key, value]) =>
    differences(value, isValues(given) ? given[key] : undefined, name ? `${name}.${key}` : key),
  )
}
