// The project's own scripts, unchanged, against a cluster of namespaces with the real Cilium:
// `npm run test:cluster`. As with the rehearsal, whose checks are used: the first failure ends it.
// With --kube-proxy (`npm run test:cluster:kube-proxy`) the same up to a green test, and then Cilium
// beside kube-proxy. With --list it names the steps; with words it runs those whose names have one of
// them, with the present scripts, on the cluster that `npm run cluster` has raised.
import assert from 'node:assert/strict'
import { cp } from 'node:fs/promises'
import { join } from 'node:path'
import { $ } from 'zx'
import { describeError } from '../../lib/errors.mts'
import { interruption } from '../../lib/interrupt.mts'
import { projectRoot } from '../checkout.mts'
import { addOnChecks } from '../rehearsal/add-on-checks.mts'
import { rehearseSteps } from '../rehearsal/cluster-steps.mts'
import { dayTwoChecks } from '../rehearsal/day-two-checks.mts'
import { networkChecks } from '../rehearsal/network-checks.mts'
import { Rehearsal, type Step } from '../rehearsal/rehearsal.mts'
import { SecretWatch } from '../rehearsal/secrets.mts'
import { whileWriting } from '../rehearsal/while-writing.mts'
import { workerCheck } from '../rehearsal/worker-checks.mts'
import { kubeProxySteps } from './kube-proxy.mts'
import {
  cannotRun,
  clusterFolder,
  keptCluster,
  makeParts,
  type NamespaceCluster,
  raise,
  takeAway,
} from './namespace-cluster.mts'
import {
  brokenKubelet,
  ciliumStatus,
  forgottenNode,
  generations,
  installCilium,
  killedTransfer,
  looks,
  offAndOn,
  ownChart,
  restartedServices,
} from './operations.mts'
import { podNetwork } from './pod-network.mts'

const folder = join(clusterFolder, 'test')
const signal = interruption()
const addOns = ['deploy-coredns', 'deploy-local-storage', 'deploy-metrics-server']

/** From machines without pods to a whole cluster. */
const upToGreen: readonly Step[] = [
  ['make wait', (rehearsal) => rehearsal.script('wait-for-cluster')],
  ['make network', installCilium],
  ['make dns, storage and metrics', deployAddOns],
  ['make test', allTestsPass],
]

const further: readonly Step[] = [
  ['Cilium replaces kube-proxy, without a tunnel', ciliumStatus],
  ['pod network', podNetwork],
  ['each install and deploy again changes nothing', nothingChanges],
  ['a node that was deleted comes back', forgottenNode],
  ['network checks', networkChecks],
  ['add-on checks', addOnChecks],
  ['make smoke', (rehearsal) => rehearsal.script('smoke')],
  ['make smoke, deleted again', (rehearsal) => rehearsal.script('smoke', '--cleanup')],
  ['make status, health, logs, ssh', looks],
  ['make helm-deploy with an own chart', ownChart],
  // Snapshots are of disks, which only virtual machines have.
  ...dayTwoChecks
    .filter(([what]) => !/^make (snapshot|restore|suspend)/.test(what))
    .flatMap(([what, work]): Step[] => [
      [what, work],
      [`pod network after ${what}`, podNetwork],
    ]),
  ['make reconfig with a flag that breaks the kubelet', brokenKubelet],
  ['make reconfig, killed while it sends', killedTransfer],
  [
    'the services of the control plane are restarted',
    (rehearsal) => whileWriting(rehearsal, () => restartedServices(rehearsal)),
  ],
  ['pod network after the restart', podNetwork],
  ['a worker is added and removed', (rehearsal) => workerCheck(rehearsal, withAnother)],
  ['pod network after the removal', podNetwork],
  ['make down and make up', (rehearsal) => whileWriting(rehearsal, () => offAndOn(rehearsal))],
  ['pod network after make up', podNetwork],
]

const words = process.argv.slice(2)
const kubeProxy = words.includes('--kube-proxy')
const all = [...upToGreen, ...(kubeProxy ? kubeProxySteps : further)]
try {
  const reason = cannotRun()
  if (reason) console.error(`skipped: ${reason}`)
  else if (words.includes('--list')) console.log(all.map(([what]) => what).join('\n'))
  else if (words.length > (kubeProxy ? 1 : 0)) await again()
  else await test().finally(() => takeAway(folder))
} catch (error) {
  console.error(`test:cluster: ${describeError(error)}`)
  process.exitCode = 1
}

async function test(): Promise<void> {
  // What is built once does not count.
  await makeParts()
  const watch = await SecretWatch.start()
  const began = performance.now()
  const settings = { KUBE_PROXY_MODE: kubeProxy ? 'nftables' : 'cilium' }
  try {
    const raised = await raise({ folder, settings })
    const took = performance.now() - began
    await inCluster(raised, async (rehearsal) => {
      rehearsal.note('machines, from nothing', took)
      await rehearseSteps(rehearsal, upToGreen)
      rehearsal.note('from nothing to a green test', performance.now() - began)
      await rehearseSteps(rehearsal, all.slice(upToGreen.length))
      await rehearseSteps(rehearsal, [['secrets', () => watch.check(rehearsal)]])
      rehearsal.note('all of it', performance.now() - began)
    })
  } finally {
    await watch.end()
  }
}

async function again(): Promise<void> {
  const kept = await keptCluster()
  for (const name of ['bin', 'lib']) {
    await cp(join(projectRoot, name), join(kept.root, name), { recursive: true })
  }
  const steps = all.filter(([what]) => words.some((word) => what.includes(word)))
  await inCluster(kept, (rehearsal) => rehearseSteps(rehearsal, steps))
}

async function inCluster(
  { cluster, path }: NamespaceCluster,
  work: (rehearsal: Rehearsal) => Promise<void>,
): Promise<void> {
  process.env.PATH = [...path, process.env.PATH].join(':')
  const rehearsal = new Rehearsal(cluster, cluster.nodes, signal)
  await rehearsal.enter()
  try {
    await work(rehearsal)
  } finally {
    console.log(`\n${rehearsal.timeTable()}`)
  }
}

async function withAnother(rehearsal: Rehearsal): Promise<void> {
  await podNetwork(rehearsal)
  // A pod of it that is still ending would keep the worker from being drained.
  await $`kubectl delete namespace pods-talk --ignore-not-found --timeout=120s`
}

/** All at the same time, with plain lines, as bootstrap-cluster does. */
async function deployAddOns(rehearsal: Rehearsal): Promise<void> {
  const { TERM } = process.env
  process.env.TERM = 'dumb'
  const all = await Promise.allSettled(addOns.map((name) => rehearsal.script(name)))
  process.env.TERM = TERM
  for (const ended of all) if (ended.status === 'rejected') throw ended.reason
}

async function allTestsPass(rehearsal: Rehearsal): Promise<void> {
  const results = JSON.parse(await rehearsal.output('test-cluster', '--json'))
  const others = (results as { result: string }[]).filter(({ result }) => result !== 'passed')
  assert.deepEqual(others, [])
  assert.equal(results.length, 26)
}

async function nothingChanges(rehearsal: Rehearsal): Promise<void> {
  const before = await generations()
  await installCilium(rehearsal)
  await deployAddOns(rehearsal)
  assert.equal(await generations(), before)
}
