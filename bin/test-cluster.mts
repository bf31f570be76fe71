#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// Tests the running cluster, from the machines' services up to a pod that requests a page of another.
import { randomBytes } from 'node:crypto'
import { $ } from 'zx/core'
import { loadCluster } from '../lib/cluster.mts'
import { describeError, StepError } from '../lib/errors.mts'
import { formatDuration } from '../lib/format.mts'
import { interruption } from '../lib/interrupt.mts'
import { apply, kubectlJson, useCluster } from '../lib/kubectl.mts'
import type { WebPod } from '../lib/pods.mts'
import { createScratchNamespace, deleteScratchNamespace, startWebPods } from '../lib/pods.mts'
import { script } from '../lib/script.mts'
import { remote } from '../lib/ssh.mts'
import { step } from '../lib/steps.mts'
import { waitFor } from '../lib/wait.mts'
import type { Status } from './cluster-status.mts'

const { flags } = script({
  does: `Tests the running cluster: services, nodes, pods and their traffic, logs, exec, DNS, encryption
of Secrets, certificates. Runs all checks, then sums up. What it creates is deleted again.`,
  reads: ['cluster.env', 'tls/', 'configs/admin.kubeconfig'],
  writes: ['the cluster: a namespace, deleted at the end'],
  flags: {
    json: { help: 'the results as JSON' },
    timeout: { value: 'SECONDS', number: true, help: 'how long to wait for pods (300)' },
  },
  examples: ['./bin/test-cluster.mts', "./bin/test-cluster.mts --json | jq '.[] | .result'"],
})
const { timeout = 300 } = flags
const cluster = loadCluster()
const { controlPlane, workers, settings } = cluster
const signal = interruption()

interface Result {
  name: string
  result: 'passed' | 'failed' | 'skipped'
  /** Why it failed or was skipped; what a check that passed found. */
  detail: string
  seconds: number
}
const results: Result[] = []
const began = performance.now()
const { machines, api, nodes, local } = await step('the state of the cluster', async () => {
  const status = await $({ signal })`./bin/cluster-status.mts --json --timeout 60`
  return JSON.parse(status.stdout) as Status
})
if (api.ready) await useCluster(cluster)

// ── Machines ─────────────────────────────────────────────────────────────────────────────────
for (const { name, system, services, certificates } of machines) {
  const up = await check(`${name} is up`, false, () => {
    if (!system.known) throw new StepError(system.reason)
    const { state, failedUnits } = system
    if (failedUnits.length > 0) throw new StepError(`failed units: ${failedUnits.join(', ')}`)
    return state
  })
  const skip = !up && `${name} is not up`
  await check(`the services of ${name} are healthy`, skip, () => {
    const unhealthy = services.known ? services.list.filter(({ healthy }) => !healthy) : []
    if (unhealthy.length > 0) throw new StepError(unhealthy.map(({ reason }) => reason).join('\n'))
  })
  await check(`the certificates on ${name} are valid long enough`, skip, () => {
    const list = certificates.known ? certificates.list : []
    const [first] = list.sort((a, b) => a.daysLeft - b.daysLeft)
    if (!first) throw new StepError('there are none')
    const { file, daysLeft } = first
    if (daysLeft >= settings.CERT_RENEW_DAYS) return `${daysLeft} days`
    const hint = 'make certs reconfig metrics'
    throw new StepError(`${file} has ${daysLeft} days left`, { hint })
  })
}
await check('the certificates in tls/ are right', false, () => {
  const problems = local.flatMap(({ name, problems }) => problems.map((one) => `${name}: ${one}`))
  if (problems.length > 0) throw new StepError(problems.join('\n'), { hint: 'make certs-check' })
})

// ── Control plane ────────────────────────────────────────────────────────────────────────────
const skip = !api.ready && 'the API server is not ready'
await check('the API server is ready', false, () => {
  if (!api.ready) throw new StepError(api.reason)
})
for (const name of ['kube-controller-manager', 'kube-scheduler']) {
  await check(`${name} has a leader`, skip, async () => {
    type Lease = { spec: { holderIdentity?: string; renewTime?: string } }
    const { spec } = await kubectlJson<Lease>('get', 'lease', name, '--namespace=kube-system')
    const age = (Date.now() - Date.parse(spec.renewTime ?? '')) / 1000
    // A leader renews its lease every two seconds.
    if (spec.holderIdentity && age < 60) return spec.holderIdentity
    throw new StepError(`no process has renewed the lease ${name} for a minute`)
  })
}
await check('every API answers, also those of add-ons', skip, () =>
  waitFor({ failure: 'APIs are not available', timeout: 30, signal }, async () => {
    const { stdout } = await $({ signal, timeout: '20s' })`kubectl get apiservices --no-headers`
    return stdout.match(/^.* (False|Unknown) .*$/gm)?.join('\n')
  }),
)
await check('every worker is Ready, at its LAN address', skip, () => {
  if (!nodes.known) throw new StepError(nodes.reason)
  for (const { name, ip } of workers) {
    const node = nodes.list.find((each) => each.name === name)
    if (!node) throw new StepError(`${name} has not registered`)
    if (!node.ready) throw new StepError(`${name}: ${node.reason}`, { hint: 'make network' })
    if (node.address !== ip) throw new StepError(`${name} is at ${node.address}, not ${ip}`)
  }
})

// ── Pods ─────────────────────────────────────────────────────────────────────────────────────
const namespace = 'cluster-test'
const inNamespace = `--namespace=${namespace}`
let pods: WebPod[] = []
const inEveryPod = async (command: string) => {
  for (const pod of pods) await pod.run(command)
}
try {
  const created = await check('a namespace can be created', skip, async () => {
    await createScratchNamespace(namespace, { timeout, signal })
    return namespace
  })
  const noNamespace = !created && 'there is no namespace'
  const noWorkers = workers.length === 0 && 'the cluster has no workers: make add-worker NAME=sigma'
  const run = await check('a pod runs on every worker', noNamespace || noWorkers, async () => {
    pods = await startWebPods(cluster, { namespace, workers, timeout, signal })
    return pods.map(({ name, ip }) => `${name} ${ip}`).join(', ')
  })
  const noPods = !run && 'there are no pods'
  await check('exec runs a program in every pod', noPods, async () => {
    for (const pod of pods) {
      const hostname = (await pod.run('hostname')).trim()
      if (hostname !== pod.name) throw new StepError(`the host name of ${pod.name} is ${hostname}`)
    }
  })
  await check('logs of every pod can be read', noPods, async () => {
    for (const { name } of pods) await $({ signal })`kubectl logs ${name} ${inNamespace}`
  })
  const connected = await check('every pod reaches every pod', noPods, () =>
    inEveryPod(pods.map(({ ip }) => `wget -q -T 10 -O /dev/null ${ip}:8080`).join('; ')),
  )
  await check('every pod reaches the service', noPods, async () => {
    const address = 'jsonpath={.spec.clusterIP}'
    const { stdout } = await $`kubectl get service web ${inNamespace} --output=${address}`
    await inEveryPod(`for i in 1 2 3 4 5 6; do wget -q -T 10 -O /dev/null ${stdout}:80; done`)
    return stdout
  })
  await check('every pod reaches the API server', noPods, () =>
    // It answers plain HTTP with an error, but it answers.
    inEveryPod(`wget -T 10 -O - ${settings.K8S_API_SERVICE_IP}:443 2>&1 | grep -q 400`),
  )
  const $$ = $({ nothrow: true, signal, timeout: '60s' })
  const isMissing = async (kind: string, name: string) => {
    const { stderr } = await $$`kubectl get ${kind} ${name} --namespace=kube-system`
    return /NotFound/.test(stderr)
  }
  const noDns = run && (await isMissing('deployment', 'coredns')) && 'CoreDNS is missing: make dns'
  await check('every pod finds a service by its name', noPods || noDns, () =>
    inEveryPod(`nslookup kubernetes.default.svc.${settings.K8S_CLUSTER_DOMAIN}.`),
  )
  await check(`${controlPlane.name} reaches every pod`, noPods, async () => {
    for (const { ip } of pods) {
      await remote(controlPlane, `curl -fsS -m 10 -o /dev/null ${ip}:8080`, { signal })
    }
  })
  const crd = 'ciliumnetworkpolicies.cilium.io'
  const noPolicies = run && (await isMissing('crd', crd)) && 'Cilium is missing: make network'
  const onePod = pods.length === 1 && 'it needs two workers'
  const unconnected = !connected && 'the pods do not reach each other'
  const noPolicy = noPods || noPolicies || onePod || unconnected
  await check('a network policy blocks traffic between pods', noPolicy, async () => {
    const spec = { podSelector: {}, policyTypes: ['Ingress'] }
    const policy = { apiVersion: 'networking.k8s.io/v1', kind: 'NetworkPolicy' }
    const manager = 'test-cluster'
    await apply([{ ...policy, metadata: { name: 'closed', namespace }, spec }], { manager, signal })
    const get = `wget -q -T 2 -O /dev/null ${pods[1]?.ip}:8080`
    await waitFor({ failure: 'the policy blocks nothing', timeout: 60, signal }, async () => {
      // Twice, as one request may fail for another reason.
      const answer = await pods[0]?.run(`${get} || ${get} || echo blocked`)
      return answer?.trim() ? undefined : `${pods[0]?.name} still reaches ${pods[1]?.name}`
    })
  })
  await check('a Secret is ciphertext in etcd', noNamespace, encryptionProvider)
} finally {
  if (api.ready) await deleteScratchNamespace(namespace)
}

const count = (wanted: string) => results.filter(({ result }) => result === wanted).length
const counts = ['passed', 'failed', 'skipped'].map((result) => `${count(result)} ${result}`)
console.error(`\n${counts.join(', ')} (${formatDuration(performance.now() - began)})`)
if (flags.json) console.log(JSON.stringify(results, null, 2))
if (count('failed') > 0) {
  throw new StepError(`${count('failed')} of ${results.length} checks failed`, {
    output: results.flatMap(({ name, result }) => (result === 'failed' ? [name] : [])).join('\n'),
    hint: 'make status, make logs',
  })
}

/**
 * Does a check and prints it as a line. It passes unless `work` throws; a text that it returns is
 * noted. @param skip why there is nothing to check, if so @returns whether it passed
 */
async function check(name: string, skip: string | false, work: () => unknown): Promise<boolean> {
  const began = performance.now()
  const note = (result: Result['result'], detail: string) => {
    const seconds = Math.round((performance.now() - began) / 100) / 10
    results.push({ name, result, detail, seconds })
    return result === 'passed'
  }
  if (skip) {
    console.error(`- ${name}: skipped, ${skip}`)
    return note('skipped', skip)
  }
  try {
    const found = await step(name, work)
    return note('passed', typeof found === 'string' ? found : '')
  } catch (error) {
    signal.throwIfAborted()
    const reason = describeError(error)
    console.error(reason.replace(/^/gm, '    '))
    return note('failed', reason)
  }
}

/** Creates a Secret and reads it from etcd. @returns what encrypted it, such as "secretbox" */
async function encryptionProvider(): Promise<string> {
  const value = randomBytes(16).toString('hex')
  const metadata = { name: 'probe', namespace }
  const secret = { apiVersion: 'v1', kind: 'Secret', metadata, stringData: { value } }
  await apply([secret], { manager: 'test-cluster', signal })
  const pki = '/var/lib/kubernetes/pki'
  const etcdctl = `etcdctl --endpoints=https://127.0.0.1:2379 --cacert=${pki}/ca.pem --cert=${pki}/kubernetes.pem --key=${pki}/kubernetes-key.pem`
  const key = `/registry/secrets/${namespace}/${metadata.name}`
  const stored = await remote(controlPlane, `${etcdctl} get ${key} | tr -d '\\000'`, { signal })
  const [, provider] = stored.match(/k8s:enc:(\w+):/) ?? []
  if (provider && !stored.includes(value)) return provider
  throw new StepError('etcd has it in plain text')
}
