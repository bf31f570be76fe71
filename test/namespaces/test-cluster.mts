// The project's own scripts, unchanged, against a cluster of namespaces with the real Cilium:
// `npm run test:cluster`. As with the rehearsal, whose checks are used: the first failure ends it.
import assert from 'node:assert/strict'
import { join } from 'node:path'
import { $ } from 'zx'
import { describeError } from '../../lib/errors.mts'
import { servicesOf } from '../../lib/health.mts'
import { interruption } from '../../lib/interrupt.mts'
import { kubectlJson } from '../../lib/kubectl.mts'
import { becomes } from '../../lib/wait.mts'
import { addOnChecks } from '../rehearsal/add-on-checks.mts'
import { rehearseSteps } from '../rehearsal/cluster-steps.mts'
import { dayTwoChecks } from '../rehearsal/day-two-checks.mts'
import { networkChecks } from '../rehearsal/network-checks.mts'
import { podsTalk } from '../rehearsal/pods-talk.mts'
import { Rehearsal, type Step } from '../rehearsal/rehearsal.mts'
import { cannotRun, clusterFolder, makeParts, raise, takeAway } from './namespace-cluster.mts'

const folder = join(clusterFolder, 'test')
const signal = interruption()
const values = join(folder, 'checkout', 'differences.yaml')
const cilium = ['install-cilium', '--values', values]

/** From machines without pods to a whole cluster. */
const upToGreen: readonly Step[] = [
  ['make wait', (rehearsal) => rehearsal.script('wait-for-cluster')],
  ['make network', (rehearsal) => script(rehearsal, cilium)],
  ['make dns', (rehearsal) => rehearsal.script('deploy-coredns')],
  ['make storage', (rehearsal) => rehearsal.script('deploy-local-storage')],
  ['make metrics', (rehearsal) => rehearsal.script('deploy-metrics-server')],
  ['make test', (rehearsal) => rehearsal.script('test-cluster')],
]

const further: readonly Step[] = [
  ['Cilium replaces kube-proxy, without a tunnel', ciliumStatus],
  ['each install and deploy again changes nothing', nothingChanges],
  ['network checks', networkChecks],
  ['add-on checks', addOnChecks],
  ['a network policy blocks and lets through', networkPolicy],
  ['make smoke', (rehearsal) => rehearsal.script('smoke')],
  ['make smoke, deleted again', (rehearsal) => rehearsal.script('smoke', '--cleanup')],
  ['make status', (rehearsal) => rehearsal.script('cluster-status')],
  ['make logs', logs],
  ...dayTwoChecks.filter(([what]) => !/^make (snapshot|suspend)/.test(what)),
  ['the services of the control plane are restarted', restartedServices],
  ['add-on checks, at the end', addOnChecks],
  ['make test, at the end', (rehearsal) => rehearsal.script('test-cluster')],
]

try {
  const reason = cannotRun()
  if (reason) console.error(`skipped: ${reason}`)
  else await test()
} catch (error) {
  console.error(`test:cluster: ${describeError(error)}`)
  process.exitCode = 1
} finally {
  await takeAway(folder)
}

async function test(): Promise<void> {
  // What is built once does not count.
  await makeParts()
  const began = performance.now()
  const { cluster, path } = await raise({ folder })
  const raised = performance.now() - began
  process.env.PATH = [...path, process.env.PATH].join(':')
  const rehearsal = new Rehearsal(cluster, cluster.nodes, signal)
  rehearsal.note('machines, from nothing', raised)
  await rehearsal.enter()
  try {
    await rehearseSteps(rehearsal, upToGreen)
    rehearsal.note('from nothing to a green test', performance.now() - began)
    await rehearseSteps(rehearsal, further)
  } finally {
    console.log(`\n${rehearsal.timeTable()}`)
  }
}

function script(rehearsal: Rehearsal, [name = '', ...args]: readonly string[]): Promise<void> {
  return rehearsal.script(name, ...args)
}

async function ciliumStatus({ cluster }: Rehearsal): Promise<void> {
  for (const { name } of cluster.workers) {
    const of = ['--namespace=kube-system', '--selector=k8s-app=cilium', '--output=name']
    const pod = (await $`kubectl get pods ${of} --field-selector=spec.nodeName=${name}`).stdout
    const status = await $`kubectl exec --namespace=kube-system ${pod.trim()} -- cilium-dbg status`
    assert.match(status.stdout, /^KubeProxyReplacement: +True/m)
    assert.match(status.stdout, /^Routing: +Network: Native/m)
  }
}

/** Objects whose generation or revision would show a change. */
async function generations(): Promise<string> {
  const output = 'jsonpath={range .items[*]}{.kind}/{.metadata.name} {.metadata.generation}\n{end}'
  const kinds = 'daemonsets,deployments'
  const workloads = await $`kubectl get ${kinds} --all-namespaces --output=${output}`
  const release = await $`helm list --all-namespaces --output=json`
  const revisions = (JSON.parse(release.stdout) as { name: string; revision: string }[]).map(
    ({ name, revision }) => `${name} ${revision}`,
  )
  return `${workloads.stdout}${revisions.join('\n')}`
}

async function nothingChanges(rehearsal: Rehearsal): Promise<void> {
  const before = await generations()
  const add = ['deploy-coredns', 'deploy-local-storage', 'deploy-metrics-server']
  for (const command of [cilium, ...add.map((name) => [name])]) await script(rehearsal, command)
  assert.equal(await generations(), before)
}

async function networkPolicy({ cluster, signal }: Rehearsal): Promise<void> {
  await podsTalk(cluster, signal, async ([from, to]) => {
    assert.ok(from && to, 'two pods are needed')
    const reaches = () =>
      from.run(`wget -q -T 2 -O /dev/null http://${to.ip}:8080/`).then(
        () => true,
        () => false,
      )
    const policy = JSON.stringify({
      apiVersion: 'networking.k8s.io/v1',
      kind: 'NetworkPolicy',
      metadata: { name: 'closed', namespace: 'pods-talk' },
      spec: { podSelector: {}, policyTypes: ['Ingress'] },
    })
    assert.equal(await reaches(), true)
    await $({ input: policy })`kubectl apply --filename=-`
    assert.ok(
      await becomes(async () => !(await reaches()), 60, signal),
      'the policy blocks nothing',
    )
    await $`kubectl delete networkpolicy closed --namespace=pods-talk`
    assert.ok(await becomes(reaches, 60, signal), 'blocked although the policy is gone')
  })
}

async function logs({ cluster }: Rehearsal): Promise<void> {
  const { controlPlane } = cluster
  const found = await $`./bin/logs.mts --lines 5000 ${controlPlane.name}`
  for (const unit of servicesOf(cluster, controlPlane)) {
    assert.ok(found.stdout.includes(` ${unit}[`), `${unit} has no line in the journals`)
  }
}

async function restartedServices(rehearsal: Rehearsal): Promise<void> {
  const units = 'etcd kube-apiserver kube-controller-manager kube-scheduler'
  // One after the other: an API server whose etcd stops at the same time takes 90 s to end.
  const restart = `for unit in ${units}; do systemctl restart $unit; done`
  await rehearsal.on(rehearsal.cluster.controlPlane, restart, 300)
  await rehearsal.script('wait-for-cluster', '--ready')
  const nodes = await kubectlJson<{ items: unknown[] }>('get', 'nodes')
  assert.equal(nodes.items.length, rehearsal.cluster.workers.length)
  await podsTalk(rehearsal.cluster, rehearsal.signal)
}
