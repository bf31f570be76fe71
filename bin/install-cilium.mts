#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// The pod network. Until it is there kubelets wait for a CNI plugin and no node is Ready; and the
// API server may not ask kubelets for logs until RBAC says so.
import { $ } from 'zx/core'
import { loadCluster } from '../lib/cluster.mts'
import { StepError } from '../lib/errors.mts'
import { writeFileAtomic } from '../lib/files.mts'
import { interruption } from '../lib/interrupt.mts'
import {
  addOnFlags,
  getNodes,
  notReady,
  printAndExit,
  printOrDelete,
} from '../lib/kubernetes/add-on.mts'
import { ciliumCommand, ciliumEnvironment } from '../lib/kubernetes/cilium-cli.mts'
import { describeWorkers } from '../lib/kubernetes/describe-workers.mts'
import {
  differingValues,
  type HelmValue,
  helmRelease,
  valuesFile,
} from '../lib/kubernetes/helm.mts'
import { Kubectl } from '../lib/kubernetes/kubectl.mts'
import { script } from '../lib/script.mts'
import { step } from '../lib/steps.mts'
import { waitFor } from '../lib/wait.mts'

const { flags } = script({
  does: `Lets the API server call kubelets, writes each worker its POD_CIDR, and installs Cilium with
the cilium command (fetched into tools/ if it is not on the PATH), or upgrades it if version or
values have changed. Waits until its agents run and all workers are Ready.`,
  reads: ['cluster.env', 'configs/admin.kubeconfig'],
  writes: ['tools/cilium-VERSION', 'run/cilium-values.yaml'],
  flags: {
    ...addOnFlags,
    print: { help: 'write the RBAC manifest to stdout and do nothing' },
    'print-values': { help: "write Cilium's values to stdout, each with its reason" },
  },
  examples: ['./bin/install-cilium.mts', './bin/install-cilium.mts --print-values'],
})
const { timeout = 600 } = flags
const cluster = loadCluster()
const { CILIUM_VERSION, KUBE_PROXY_MODE, K8S_POD_CIDR, API_PORT } = cluster.settings

// The API server calls kubelets as user "kubernetes", the CN of its certificate; each kubelet then
// asks it back what this user may. A request is one of these subresources and an HTTP method (GET
// is get, POST is create): https://kubernetes.io/docs/reference/access-authn-authz/kubelet-authn-authz/
// What has no subresource of its own there, as logs of containers, exec and port-forward, is proxy.
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

// Names as in https://docs.cilium.io/en/stable/helm-reference/
const values: HelmValue[] = [
  {
    name: 'cluster.name',
    // At most 32 characters, unlike a name in Kubernetes.
    value: cluster.settings.CLUSTER_NAME.slice(0, 32).replace(/-+$/, ''),
    why: 'CLUSTER_NAME; without it, the command takes it from the kubeconfig',
  },
  {
    name: 'ipam.mode',
    value: 'kubernetes',
    why: "pods get addresses of their node's spec.podCIDR, which is POD_CIDR_… of cluster.env",
  },
  {
    name: 'routingMode',
    value: 'native',
    why: 'no tunnel: the lan carries packets of pods as they are, and alpha sees them too',
  },
  {
    name: 'ipv4NativeRoutingCIDR',
    value: K8S_POD_CIDR,
    why: 'K8S_POD_CIDR: what goes there keeps its source address, all else gets the node’s',
  },
  {
    name: 'autoDirectNodeRoutes',
    value: true,
    why: 'a route to the pods of each other worker; set to false, it removes those that are there',
  },
  {
    name: 'kubeProxyReplacement',
    value: KUBE_PROXY_MODE === 'cilium',
    why: 'KUBE_PROXY_MODE; unset, the command takes kube-proxy for missing, as it is no DaemonSet',
  },
  {
    name: 'k8sServiceHost',
    value: cluster.controlPlane.ip,
    why: 'service addresses are its own work, so it cannot reach the API by one',
  },
  { name: 'k8sServicePort', value: API_PORT, why: 'API_PORT' },
  {
    name: 'devices',
    value: ['lan', 'outside'],
    why: 'the cards as nixos-base.nix names them; services answer on both',
  },
  {
    name: 'nodePort.directRoutingDevice',
    value: 'lan',
    why: 'nodes reach each other there; outside has the same address on all of them',
  },
  {
    name: 'cgroup.autoMount.enabled',
    value: false,
    why: 'systemd has mounted cgroup2 already',
  },
  { name: 'cgroup.hostRoot', value: '/sys/fs/cgroup', why: 'where it is' },
  {
    name: 'sysctlfix.enabled',
    value: false,
    why: 'it writes to /etc/sysctl.d, which NixOS owns; nixos-base.nix sets rp_filter',
  },
  { name: 'operator.replicas', value: 1, why: 'enough for a few nodes; the chart has 2' },
  {
    name: 'rollOutCiliumPods',
    value: true,
    why: 'agents read their configuration at start only: a change of values restarts them',
  },
  { name: 'operator.rollOutPods', value: true, why: 'the same for the operator' },
]

if (flags['print-values']) await printAndExit(valuesFile(values))
const signal = interruption()
const kubectl = new Kubectl(cluster, signal)
await printOrDelete('Cilium', manifest, flags, async () => {
  if (await helmRelease(kubectl, 'cilium', 'kube-system')) await cilium('uninstall', '--wait')
  await kubectl.delete(manifest)
})

await step('the API server may call kubelets', () =>
  kubectl.apply(manifest, {
    manager: 'install-cilium',
    forceConflicts: flags['force-conflicts'],
  }),
)
await step('pod ranges and labels of the workers', (detail) =>
  describeWorkers(kubectl, cluster.workers, detail),
)
await step(`Cilium ${CILIUM_VERSION}`, install)
for (const what of ['daemonset/cilium', 'deployment/cilium-operator']) {
  await step(`${what} is ready`, (detail) =>
    kubectl.rollout(what, { namespace: 'kube-system', timeout, detail }),
  )
}
await step('all workers are Ready', waitUntilReady)
console.log('Try: make dns, and then: kubectl get pods --all-namespaces --output=wide')

/** Installs or upgrades, as needed: nothing if version and values are those that are there. */
async function install(detail: (text: string) => void): Promise<void> {
  let release = await helmRelease(kubectl, 'cilium', 'kube-system')
  if (release?.status.startsWith('pending-')) {
    // Left by an interruption; Helm would wait for its end for ever.
    await kubectl.run(['delete', 'secret', release.secret, '--namespace=kube-system'])
    release = await helmRelease(kubectl, 'cilium', 'kube-system')
  }
  if (release?.status === 'deployed' && release.chartVersion === CILIUM_VERSION) {
    const different = differingValues(values, release)
    if (different.length === 0) return detail('is there already')
    detail(`other ${different.join(', ')}`)
  }
  const file = cluster.path('run', 'cilium-values.yaml')
  await writeFileAtomic(file, valuesFile(values))
  const command = release ? 'upgrade' : 'install'
  await cilium(command, '--version', CILIUM_VERSION, '--values', file)
}

async function cilium(...args: string[]): Promise<void> {
  const program = await ciliumCommand(cluster, { signal })
  const env = { ...process.env, ...(await ciliumEnvironment(cluster)) }
  const output = await $({ nothrow: true, quiet: true, env, signal })`${program} ${args}`
  signal.throwIfAborted()
  if (output.exitCode === 0) return
  throw new StepError(`cilium ${args[0]} ended with status ${output.exitCode}`, {
    output: `${output.stdout}${output.stderr}`.trim().split('\n').slice(-15).join('\n'),
    command: `KUBECONFIG=configs/admin.kubeconfig cilium ${args.join(' ')}`,
    hint: 'is CILIUM_VERSION of cluster.env a released one, and the internet (PROXY_…) reachable?',
  })
}

function waitUntilReady(detail: (text: string) => void): Promise<void> {
  const hint = 'kubectl logs --namespace=kube-system daemonset/cilium'
  return waitFor({ failure: 'not all workers are Ready', timeout, detail, hint }, async () => {
    const nodes = await getNodes(kubectl)
    const reasons = cluster.workers.flatMap(({ name }) => {
      const reason = notReady(nodes.find(({ metadata }) => metadata.name === name))
      return reason ? [`${name}: ${reason}`] : []
    })
    return reasons.join('\n') || undefined
  })
}
