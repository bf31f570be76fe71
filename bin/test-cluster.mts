#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// The live cluster put to the test, from the machines' services up to a pod that asks another.
import { CheckList } from '../lib/check-list.mts'
import { loadCluster } from '../lib/cluster.mts'
import { StepError } from '../lib/errors.mts'
import { interruption } from '../lib/interrupt.mts'
import { Kubectl } from '../lib/kubernetes/kubectl.mts'
import { leaderOf } from '../lib/kubernetes/leader.mts'
import {
  makeScratchNamespace,
  removeScratchNamespace,
} from '../lib/kubernetes/scratch-namespace.mts'
import { encryptionOfSecrets } from '../lib/kubernetes/stored-secret.mts'
import { startWebPods, type WebPod, webService } from '../lib/kubernetes/web-pods.mts'
import {
  certificateProbe,
  type InstalledCertificate,
} from '../lib/machine/installed-certificates.mts'
import { Machine } from '../lib/machine/machine.mts'
import { runProbes } from '../lib/machine/probe.mts'
import { probeApiServer, probeServices } from '../lib/machine/probes.mts'
import { inspectTls } from '../lib/pki/tls-report.mts'
import { script } from '../lib/script.mts'

const { flags } = script({
  does: `Tests the running cluster: services, nodes, pods and their traffic, logs, exec, DNS, encryption
of Secrets, certificates. Does all checks, then sums up. What it makes it takes away again.`,
  reads: ['cluster.env', 'tls/', 'configs/admin.kubeconfig'],
  writes: [],
  flags: {
    json: { help: 'the results as JSON' },
    timeout: { value: 'SECONDS', number: true, help: 'how long to wait for pods (300)' },
  },
  examples: ['./bin/test-cluster.mts', "./bin/test-cluster.mts --json | jq '.[] | .result'"],
})
const { timeout = 300 } = flags
const cluster = loadCluster()
const signal = interruption()
const kubectl = new Kubectl(cluster, signal)
const alpha = new Machine(cluster, cluster.controlPlane, signal)
const machines = [alpha, ...cluster.workers.map((node) => new Machine(cluster, node, signal))]
const list = new CheckList(signal)

// ── Machines ─────────────────────────────────────────────────────────────────────────────────
for (const machine of machines) {
  const { name } = machine.node
  const answers = await list.check(`${name} is up`, {}, async () => {
    const { state, failedUnits } = await machine.systemState()
    if (failedUnits.length > 0) throw new StepError(`failed units: ${failedUnits.join(', ')}`)
    return state
  })
  const skip = !answers && `${name} is not up`
  await list.check(`the services of ${name} are healthy`, { skip }, async () => {
    const sick = (await probeServices(machine)).filter(({ healthy }) => !healthy)
    if (sick.length > 0) throw new StepError(sick.map(({ reason }) => reason).join('\n'))
  })
  await list.check(`the certificates on ${name} are valid for long enough`, { skip }, async () => {
    const { found } = await runProbes(machine, { found: certificateProbe }, 60)
    return assertLongEnough(found)
  })
}
await list.check('the certificates in tls/ are right', {}, async () => {
  const { certificates } = await inspectTls(cluster)
  const problems = certificates.flatMap(({ name, problems }) =>
    problems.map((p) => `${name}: ${p}`),
  )
  if (problems.length > 0) throw new StepError(problems.join('\n'), { hint: 'make certs-check' })
})

// ── Control plane ────────────────────────────────────────────────────────────────────────────
const api = await probeApiServer(cluster, { signal })
const skip = !api.ready && 'the API server is not ready'
await list.check('the API server is ready', {}, async () => {
  if (!api.ready) throw new StepError(api.reason)
})
for (const name of ['kube-controller-manager', 'kube-scheduler']) {
  await list.check(`${name} leads`, { skip }, () => leaderOf(kubectl, name))
}
await list.check('every worker is Ready, at its lan address', { skip }, async () => {
  for (const { name, ip } of cluster.workers) {
    const node = api.nodes?.get(name)
    if (!node) throw new StepError(`${name} has not registered`)
    if (!node.ready) throw new StepError(`${name}: ${node.reason}`, { hint: 'make network' })
    if (node.address !== ip) throw new StepError(`${name} is at ${node.address}, not ${ip}`)
  }
})

// ── Pods ─────────────────────────────────────────────────────────────────────────────────────
const namespace = 'cluster-test'
const { K8S_API_SERVICE_IP: API_SERVICE, K8S_CLUSTER_DOMAIN: DOMAIN } = cluster.settings
let pods: WebPod[] = []
const fromEveryPod = async (command: string) => {
  for (const pod of pods) await pod.succeed(command)
}
try {
  const made = await list.check('a namespace can be made', { skip }, async () => {
    await makeScratchNamespace(kubectl, { name: namespace, timeout })
    return namespace
  })
  const skipAll = !made && 'there is no namespace'
  const run = await list.check('a pod runs on every worker', { skip: skipAll }, async () => {
    const options = { namespace, timeout, workers: cluster.workers }
    pods = await startWebPods(cluster, kubectl, options)
    return pods.map(({ name, ip }) => `${name} ${ip}`).join(', ')
  })
  const skipPods = !run && 'there are no pods'
  await list.check('exec runs a program in every pod', { skip: skipPods }, async () => {
    for (const pod of pods) {
      const said = await pod.succeed('hostname')
      if (said.trim() !== pod.name) throw new StepError(`${pod.name} calls itself ${said}`)
    }
  })
  await list.check('logs of every pod can be read', { skip: skipPods }, async () => {
    for (const { name } of pods) await kubectl.run(['logs', name, `--namespace=${namespace}`])
  })
  await list.check('every pod reaches every pod', { skip: skipPods }, () =>
    fromEveryPod(pods.map(({ ip }) => `wget -q -T 10 -O /dev/null ${ip}:8080`).join('; ')),
  )
  await list.check('every pod reaches the service', { skip: skipPods }, async () => {
    const ip = await webService(kubectl, namespace)
    await fromEveryPod(`for i in 1 2 3 4 5 6; do wget -q -T 10 -O /dev/null ${ip}:80; done`)
    return ip
  })
  await list.check('every pod reaches the API server', { skip: skipPods }, () =>
    // Who speaks plain HTTP to it is told off, but told.
    fromEveryPod(`wget -T 10 -O - ${API_SERVICE}:443 2>&1 | grep -q 400`),
  )
  const coredns = ['deployment/coredns', '--namespace=kube-system']
  // If that cannot be found out, the lookups will tell why.
  const noDns = run && !(await kubectl.exists(...coredns).catch(() => true))
  const skipDns = skipPods || (noDns && 'CoreDNS is not deployed: make dns')
  await list.check('every pod finds a service by its name', { skip: skipDns }, () =>
    fromEveryPod(`nslookup kubernetes.default.svc.${DOMAIN}.`),
  )
  await list.check(`${alpha.node.name} reaches every pod`, { skip: skipPods }, async () => {
    for (const { ip } of pods) await alpha.succeed(`curl -fsS -m 10 -o /dev/null ${ip}:8080`)
  })
  await list.check('a Secret is ciphertext in etcd', { skip: skipAll }, async () => {
    const provider = await encryptionOfSecrets(kubectl, alpha, namespace)
    if (!provider) throw new StepError('etcd has it in the clear')
    return provider
  })
} finally {
  if (api.ready) await removeScratchNamespace(cluster, namespace)
}

console.error(`\n${list.summary()}`)
if (flags.json) console.log(JSON.stringify(list.results, null, 2))
list.assertPassed()

function assertLongEnough(found: InstalledCertificate[]): string {
  const [first] = found.sort((a, b) => a.daysLeft - b.daysLeft)
  if (!first) throw new StepError('there are none')
  if (first.daysLeft >= cluster.settings.CERT_RENEW_DAYS) return `${first.daysLeft} days`
  throw new StepError(`${first.file} has ${first.daysLeft} days left`, {
    hint: 'make certs, make reconfig',
  })
}
