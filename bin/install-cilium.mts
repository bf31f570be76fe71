#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// The pod network. Until it is installed, kubelets have no CNI plugin and no node is Ready; and the
// API server may not read logs from kubelets until RBAC allows it.
import { existsSync, readFileSync } from 'node:fs'
import { resolve } from 'node:path'
import { parse, parseDocument } from 'yaml'
import { $ } from 'zx/core'
import { loadCluster } from '../lib/cluster.mts'
import { StepError } from '../lib/errors.mts'
import { writeFileAtomic } from '../lib/files.mts'
import { interruption } from '../lib/interrupt.mts'
import * as kubectl from '../lib/kubectl.mts'
import { waitForRollout } from '../lib/pods.mts'
import { runScript, script } from '../lib/script.mts'
import { step } from '../lib/steps.mts'
import { waitFor } from '../lib/wait.mts'

const { flags } = script({
  does: `Allows the API server to call kubelets, sets each worker's POD_CIDR, and installs Cilium with
Helm (fetched into tools/ if it is not on the PATH), or upgrades it if the version or a value has
changed. Waits until its agents run and all workers are Ready.`,
  reads: ['cluster.env', 'configs/admin.kubeconfig'],
  writes: ['tools/helm-VERSION', 'run/cilium-values.yaml', 'the cluster: Cilium, RBAC'],
  flags: {
    ...kubectl.addOnFlags,
    print: { help: 'write the RBAC manifest to stdout and do nothing' },
    'print-values': { help: "write Cilium's values to stdout, each with its reason" },
    values: { value: 'FILE', help: 'your own values in YAML; they are kept by later runs' },
    timeout: { value: 'SECONDS', number: true, help: 'how long to wait until it is ready (600)' },
  },
  examples: ['./bin/install-cilium.mts', './bin/install-cilium.mts --print-values'],
})
const { timeout = 600, 'force-conflicts': forceConflicts } = flags
const cluster = loadCluster()
const { CILIUM_VERSION, CILIUM_CHART, CLUSTER_NAME, KUBE_PROXY_MODE, K8S_POD_CIDR, API_PORT } =
  cluster.settings

// The API server calls kubelets as user "kubernetes", the CN of its certificate; each kubelet then
// asks it back what this user may do. A request is one of these subresources and an HTTP method (GET
// is get, POST is create): https://kubernetes.io/docs/reference/access-authn-authz/kubelet-authn-authz/
// What has no subresource of its own there, such as container logs, exec and port-forward, is proxy.
const manifest = `\
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: kubelet-api-full}
rules:
  - {apiGroups: [''], resources: [nodes/proxy], verbs: [get, create]}
  # For kubectl get --raw /api/v1/nodes/NODE/proxy/...: these are not part of proxy.
  - {apiGroups: [''], resources: [nodes/stats, nodes/log, nodes/metrics], verbs: [get]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: kubelet-api-full}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: kubelet-api-full}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: kubernetes}]
`

// Names as in https://docs.cilium.io/en/stable/helm-reference/, each value with its reason.
const values = `\
cluster:
  # CLUSTER_NAME; at most 32 characters, unlike a name in Kubernetes
  name: "${CLUSTER_NAME.slice(0, 32).replace(/-+$/, '')}"
ipam:
  # pods get addresses of their node's spec.podCIDR, which is POD_CIDR_… of cluster.env
  mode: kubernetes
# no tunnel: the LAN carries pod packets as they are, so the control plane sees them too
routingMode: native
# K8S_POD_CIDR: packets to it keep their source address, all others get the node's
ipv4NativeRoutingCIDR: ${K8S_POD_CIDR}
# a route to the pods of each other worker; false would remove the existing ones
autoDirectNodeRoutes: true
# KUBE_PROXY_MODE
kubeProxyReplacement: ${KUBE_PROXY_MODE === 'cilium'}
# not the API's service address, which Cilium itself may have to implement
k8sServiceHost: ${cluster.controlPlane.ip}
# API_PORT
k8sServicePort: ${API_PORT}
# the network interfaces as nixos-base.nix names them; services answer on both
devices: [lan, outside]
nodePort:
  # nodes reach each other there; outside has the same address on all of them
  directRoutingDevice: lan
cgroup:
  # systemd has mounted cgroup2 already
  autoMount: {enabled: false}
  # where systemd has mounted it
  hostRoot: /sys/fs/cgroup
sysctlfix:
  # it writes to /etc/sysctl.d, which NixOS manages; nixos-base.nix sets rp_filter
  enabled: false
# agents read their configuration only when they start: a changed value restarts them
rollOutCiliumPods: true
operator:
  # enough for a few nodes; the default is 2
  replicas: 1
  # as rollOutCiliumPods
  rollOutPods: true
`

if (flags['print-values']) await kubectl.printAndExit(values)
const merged = flags.values ? valuesWith(flags.values) : values
const signal = interruption()
const namespace = 'kube-system'
const release = ['--release=cilium', `--namespace=${namespace}`]
await kubectl.printOrDelete(cluster, "the RBAC rules for the kubelets' API", manifest, flags, () =>
  runScript('helm-deploy', [...release, '--delete', 'cilium']),
)
if (cluster.workers.length === 0) {
  throw new StepError('the cluster has no workers, so no pod needs a network', {
    hint: 'WORKER_NODES in cluster.env is empty: make add-worker NAME=sigma',
  })
}
await step('the API server may call kubelets', () =>
  kubectl.apply(manifest, { manager: 'install-cilium', forceConflicts, signal }),
)
const $$ = $({ signal, timeout: '60s' })
await step('pod CIDRs and labels of the workers', async (detail) => {
  const nodes = await kubectl.getNodes()
  const missing = cluster.workers.map(({ name }) => name).filter((name) => !nodes.has(name))
  const reason = `not registered yet: ${missing.join(', ')}`
  if (missing.length > 0) throw new StepError(reason, { hint: 'make wait' })
  for (const { name, podCidr } of cluster.workers) {
    detail(name)
    const current = nodes.get(name)?.spec.podCIDR
    if (current && current !== podCidr) {
      throw new StepError(`${name} has pod CIDR ${current}, not ${podCidr}`, {
        output: `A node's pod CIDR can be set once. The machines' routes follow POD_CIDR_${name.replaceAll('-', '_')}.`,
        hint: `put ${current} back into cluster.env, or let the node register again:
kubectl delete node ${name} && ./bin/ssh.mts ${name} -- systemctl restart kubelet
then try again`,
      })
    }
    const patch = JSON.stringify({ spec: { podCIDR: podCidr, podCIDRs: [podCidr] } })
    await $$`kubectl patch node ${name} --patch ${patch}`
    // A kubelet may not give itself a role.
    await $$`kubectl label node ${name} node-role.kubernetes.io/worker= --overwrite`
  }
})
const file = 'run/cilium-values.yaml'
await writeFileAtomic(cluster.path(file), merged)
// Values that others have set are kept. Its timeout is 0, as the next steps say what pods wait for.
const opts = ['--keep-values', `--values=${file}`, `--version=${CILIUM_VERSION}`, '--timeout=0']
await runScript('helm-deploy', [...release, ...opts, ...chart()], {
  hint: 'CILIUM_CHART and CILIUM_VERSION in cluster.env',
})
const ofCilium = [`--namespace=${namespace}`, '--selector=app.kubernetes.io/part-of=cilium']
const { stdout } = await $$`kubectl get daemonsets ${ofCilium} --output=name`
// "daemonset.apps/cilium", and cilium-envoy where there is one.
const daemonSets = stdout.replaceAll('.apps/', '/').match(/\S+/g) ?? ['daemonset/cilium']
for (const what of [...daemonSets, 'deployment/cilium-operator']) {
  await step(`${what} is ready`, (detail) =>
    waitForRollout(what, { namespace, timeout, detail, signal }),
  )
}
await step('all workers are Ready', (detail) => {
  const hint = 'kubectl logs --namespace=kube-system daemonset/cilium'
  const wait = { failure: 'not all workers are Ready', timeout, detail, hint, signal }
  return waitFor(wait, async () => {
    const reasons = [...(await kubectl.unreadyWorkers(cluster))]
    return reasons.map(([name, reason]) => `${name}: ${reason}`).join('\n') || undefined
  })
})
kubectl.suggest('kubectl get nodes --output=wide') // Pods that need DNS wait for make dns.

/** Where the chart is, as arguments of helm-deploy. */
function chart(): string[] {
  if (/^oci:\/\//.test(CILIUM_CHART)) return [CILIUM_CHART]
  if (/^https?:\/\//.test(CILIUM_CHART)) return [`--repo=${CILIUM_CHART}`, 'cilium']
  if (existsSync(resolve(cluster.root, CILIUM_CHART))) return [CILIUM_CHART]
  throw new StepError(`CILIUM_CHART ${CILIUM_CHART} does not exist`)
}

/** The values with those of FILE, which are merged as Helm does: names below names, lists as a whole. */
function valuesWith(file: string): string {
  const document = parseDocument(values)
  const put = (value: unknown, path: string[]): void => {
    if (!isMap(value)) document.setIn(path, value)
    else for (const [name, below] of Object.entries(value)) put(below, [...path, name])
  }
  try {
    const own: unknown = parse(readFileSync(file, 'utf8'))
    if (!isMap(own)) throw new Error('it has no names, such as "hubble: {relay: {enabled: true}}"')
    put(own, [])
    return document.toString({ lineWidth: 0 })
  } catch (cause) {
    const reason = `the values in ${file} cannot be read: ${(cause as Error).message}`
    throw new StepError(reason, { exitCode: 2, cause })
  }
}

function isMap(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}
