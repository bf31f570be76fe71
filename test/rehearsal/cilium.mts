// Stands in for the cilium command where Cilium's images cannot be had. It takes what
// install-cilium gives it and nothing else, keeps its record as Helm does, and has a DaemonSet set
// up the stock bridge plugin with each worker's POD_CIDR; the machines' routes do the rest.
import { readFileSync } from 'node:fs'
import { dirname } from 'node:path'
import { parse } from 'yaml'
import { loadCluster } from '../../lib/cluster.mts'
import { describeError } from '../../lib/errors.mts'
import { type HelmRelease, helmRelease } from '../../lib/kubernetes/helm.mts'
import { Kubectl } from '../../lib/kubernetes/kubectl.mts'
import { helmRecord } from '../kubernetes/helm-record.mts'

type Values = Record<string, unknown>

/** The release whose chart has these values, found in its values.yaml, templates and schema. */
const chartVersions = /^1\.20\.\d+$/
const known: Readonly<Record<string, (value: unknown) => boolean>> = {
  autoDirectNodeRoutes: isBoolean,
  'cgroup.autoMount.enabled': isBoolean,
  'cgroup.hostRoot': isText,
  'cluster.name': (value) => isText(value) && /^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$/.test(value),
  devices: (value) => isText(value) || (Array.isArray(value) && value.every(isText)),
  'ipam.mode': isText,
  ipv4NativeRoutingCIDR: isText,
  k8sServiceHost: isText,
  k8sServicePort: (value) => isText(value) || Number.isInteger(value),
  kubeProxyReplacement: (value) => isBoolean(value) || value === 'true' || value === 'false',
  'nodePort.directRoutingDevice': isText,
  'operator.replicas': Number.isInteger,
  'operator.rollOutPods': isBoolean,
  rollOutCiliumPods: isBoolean,
  routingMode: (value) => value === 'native' || value === 'tunnel',
  'sysctlfix.enabled': isBoolean,
}

// Its programs are the machine's: a container of the image enters the machine's file system.
const podCidrOf = `sed -n '/"node": {/,/}/s/.*"podCidr": "\\(.*\\)".*/\\1/p' /etc/nixos/cluster.json`
const setUp = `\
set -eu
PATH=/run/current-system/sw/bin:$(echo /nix/store/*iptables*/bin | tr ' ' :)
cidr=$(${podCidrOf})
cat >/etc/cni/net.d/10-bridge.conflist.new <<END
{"cniVersion": "1.0.0", "name": "bridge", "plugins": [
  {"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true,
   "ipam": {"type": "host-local", "ranges": [[{"subnet": "$cidr"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
END
mv /etc/cni/net.d/10-bridge.conflist.new /etc/cni/net.d/10-bridge.conflist
# To the outside a pod is its machine; other pods see it as it is.
set -- POSTROUTING --source $cidr --out-interface outside --jump MASQUERADE
iptables --table nat --check "$@" 2>/dev/null || iptables --table nat --append "$@"
`

// install-cilium tells by it which cluster is meant.
const cluster = loadCluster({ root: dirname(dirname(process.env.KUBECONFIG ?? '')) })
const kubectl = new Kubectl(cluster)
const manifest = `\
apiVersion: apps/v1
kind: DaemonSet
metadata:
  name: cilium
  namespace: kube-system
spec:
  selector:
    matchLabels: {k8s-app: cilium}
  template:
    metadata:
      labels: {k8s-app: cilium}
    spec:
      hostNetwork: true
      hostPID: true
      priorityClassName: system-node-critical
      tolerations: [{operator: Exists}]
      initContainers:
        - name: set-up
          image: ${cluster.settings.SMOKE_IMAGE}
          imagePullPolicy: IfNotPresent
          command: [nsenter, -t, '1', -m, --, /bin/sh, -c, ${JSON.stringify(setUp)}]
          securityContext: {privileged: true, runAsUser: 0}
      containers:
        - name: sleep
          image: ${cluster.settings.SMOKE_IMAGE}
          imagePullPolicy: IfNotPresent
          command: [sleep, infinity]
---
apiVersion: apps/v1
kind: Deployment
metadata:
  name: cilium-operator
  namespace: kube-system
spec:
  selector:
    matchLabels: {io.cilium/app: operator}
  template:
    metadata:
      labels: {io.cilium/app: operator}
    spec:
      hostNetwork: true
      tolerations: [{operator: Exists}]
      containers:
        - name: sleep
          image: ${cluster.settings.SMOKE_IMAGE}
          imagePullPolicy: IfNotPresent
          command: [sleep, infinity]
`
const [command = '', ...args] = process.argv.slice(2)
try {
  await obey()
} catch (error) {
  console.error(`Error: ${describeError(error)}`)
  process.exit(1)
}

async function obey(): Promise<void> {
  const release = await helmRelease(kubectl, 'cilium', 'kube-system')
  if (command === 'uninstall') {
    flags('wait')
    if (!release)
      throw new Error('Unable to uninstall Cilium: uninstall: Release not loaded: cilium')
    await kubectl.delete(manifest)
    const selector = '--selector=owner=helm,name=cilium'
    await kubectl.run(['delete', 'secrets', '--namespace=kube-system', selector])
    return
  }
  if (command !== 'install' && command !== 'upgrade')
    throw new Error(`unknown command "${command}"`)
  const { version = '', values: file = '' } = flags('version', 'values')
  if (!chartVersions.test(version)) {
    throw new Error(`Unable to ${command} Cilium: chart "cilium" version "${version}" not found`)
  }
  const values = check(parse(readFileSync(file, 'utf8')) as Values)
  if (release?.status.startsWith('pending-')) {
    throw new Error('another operation (install/upgrade/rollback) is in progress')
  }
  if (command === 'install' && release) throw new Error('cannot re-use a name that is still in use')
  if (command === 'upgrade' && !release) throw new Error('"cilium" has no deployed releases')

  const next = {
    revision: (release?.revision ?? 0) + 1,
    chartVersion: version,
    values: merge(release?.values ?? {}, values),
  }
  await write({ ...next, status: `pending-${command}` })
  await kubectl.apply(manifest, { manager: 'helm', forceConflicts: true })
  if (release) await write({ ...release, status: 'superseded' })
  await write({ ...next, status: 'deployed' })
  console.log(`stand-in for Cilium ${version}: ${command} done`)
}

/** The flags, each with a value but for --wait; all are needed, and no other is known. */
function flags<Name extends string>(...names: Name[]): Record<Name, string> {
  const found: Partial<Record<Name, string>> = {}
  for (let index = 0; index < args.length; index += 1) {
    const name = names.find((each) => args[index] === `--${each}`)
    if (!name) throw new Error(`unknown flag: ${args[index]}`)
    if (name !== 'wait') index += 1
    found[name] = args[index] ?? ''
  }
  for (const name of names) if (found[name] === undefined) throw new Error(`--${name} is missing`)
  return found as Record<Name, string>
}

/** Values as the chart takes them, all of which the stand-in can do. */
function check(values: Values): Values {
  for (const [name, value] of leaves(values)) {
    const fits = known[name]
    if (!fits) throw new Error(`the chart has no value ${name}`)
    if (!fits(value)) throw new Error(`${name} cannot be ${JSON.stringify(value)}`)
  }
  if (String(values.kubeProxyReplacement) !== 'false') {
    throw new Error('the stand-in cannot do the work of kube-proxy: KUBE_PROXY_MODE=iptables')
  }
  return values
}

function leaves(values: Values, above = ''): [name: string, value: unknown][] {
  return Object.entries(values).flatMap(([key, value]): [string, unknown][] =>
    isMap(value) ? leaves(value, `${above}${key}.`) : [[`${above}${key}`, value]],
  )
}

/** As `--reset-then-reuse-values` does, which is the command's default. */
function merge(former: Values, given: Values): Values {
  const merged = { ...former }
  for (const [key, value] of Object.entries(given)) {
    const old = merged[key]
    merged[key] = isMap(value) && isMap(old) ? merge(old, value) : value
  }
  return merged
}

async function write(release: Omit<HelmRelease, 'secret'>): Promise<void> {
  await kubectl.run(['apply', '--server-side', '--force-conflicts', '--filename=-'], {
    input: JSON.stringify(helmRecord('cilium', release)),
  })
}

function isMap(value: unknown): value is Values {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}

function isText(value: unknown): value is string {
  return typeof value === 'string' && value !== ''
}

function isBoolean(value: unknown): boolean {
  return typeof value === 'boolean'
}
