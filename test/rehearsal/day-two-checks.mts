// Operations on a running cluster, and that they lose nothing: snapshots, backups of etcd, a changed
// setting, a renewed certificate.
import assert from 'node:assert/strict'
import { X509Certificate } from 'node:crypto'
import { readFile, writeFile } from 'node:fs/promises'
import { $ } from 'zx'
import type { Node } from '../../lib/cluster.mts'
import { formatDuration } from '../../lib/format.mts'
import { servicesOf, waitForReady } from '../../lib/health.mts'
import { kubectlJson } from '../../lib/kubectl.mts'
import type { Snapshot } from '../../lib/snapshots.mts'
import { isRunning } from '../../lib/vm.mts'
import { waitFor } from '../../lib/wait.mts'
import type { Writer } from '../writer.mts'
import { podsTalk } from './pods-talk.mts'
import type { Rehearsal, Step } from './rehearsal.mts'
import { whileWriting, withWriter } from './while-writing.mts'

const namespace = 'day-two'
const word = 'swordfish'
const snapshot = 'day-two'

export const dayTwoChecks: readonly Step[] = [
  ['make snapshot, breaking a worker, make restore', snapshotAndRestore],
  ['make restore of the disks alone', restoreDisks],
  ['make suspend, make up', suspendAndUp],
  ['make etcd-snapshot, deleting objects, make etcd-restore', backupAndRestore],
  ['make reconfig with a changed setting of a kubelet', changedSetting],
  ['make reconfig with a renewed certificate', renewedCertificate],
]

async function snapshotAndRestore(rehearsal: Rehearsal): Promise<void> {
  const worker = firstWorker(rehearsal)
  await makeSecret()
  const running = await containers()
  const healthz = 'curl -fs -m 10 http://127.0.0.1:10248/healthz >/dev/null && echo yes || echo no'
  const healthy = async () => (await rehearsal.on(worker, healthz)) === 'yes\n'
  await withWriter(rehearsal, async (writer) => {
    const moment = await snapshotOf(rehearsal, writer)
    await removeNamespace()
    assert.equal(await healthy(), true, 'the kubelet is unhealthy before anything was broken')
    // A flag that the kubelet does not know: it keeps crashing.
    const breakIt = "sed -i 's/--node-ip=/--no-such-flag=/' /etc/nixos/worker.nix"
    const switchTo = 'nixos-rebuild switch >/dev/null 2>&1 || true'
    await rehearsal.on(worker, `${breakIt}; ${switchTo}`, 900)
    assert.equal(await healthy(), false, 'the kubelet is healthy with a flag that it does not know')

    writer.stopWhenRefused()
    await untilReady('restored', () => rehearsal.script('restore', '--start-only', snapshot))
    await settled(rehearsal)
    await assertMoment(writer, moment)
  })
  await assertSecret()
  assert.deepEqual(await containers(), running, 'a container was started again')
  await rehearsal.on(worker, 'grep -q -e --node-ip= /etc/nixos/worker.nix')
  assert.equal(await healthy(), true)
  await assertWorks(rehearsal)
  await removeNamespace()
  await removeSnapshots(rehearsal)
}

/** The machines boot, so all containers are started again; what was in etcd and on disks is as then. */
async function restoreDisks(rehearsal: Rehearsal): Promise<void> {
  await makeSecret()
  await withWriter(rehearsal, async (writer) => {
    const moment = await snapshotOf(rehearsal, writer, '--disks-only')
    await removeNamespace()
    writer.stopWhenRefused()
    // Emulated machines that boot, and a client that writes: a node may be slow to become Ready.
    await untilReady('restored', () => rehearsal.script('restore', snapshot), 300)
    await settled(rehearsal)
    await assertMoment(writer, moment)
  })
  await assertSecret()
  await assertWorks(rehearsal)
  await removeNamespace()
  await removeSnapshots(rehearsal)
}

async function suspendAndUp(rehearsal: Rehearsal): Promise<void> {
  const running = await containers()
  await whileWriting(rehearsal, async () => {
    await rehearsal.script('snapshot', '--suspend')
    for (const node of rehearsal.cluster.nodes) {
      assert.equal(await isRunning(rehearsal.cluster, node), false, node.name)
    }
    await untilReady('continued', () => rehearsal.script('provision'))
    await settled(rehearsal)
  })
  assert.deepEqual(await containers(), running, 'a container was started again')
  await assertWorks(rehearsal)
}

/** Measures the work together with the time until the API server says that all nodes are Ready. */
async function untilReady(done: string, work: () => Promise<void>, timeout = 60): Promise<void> {
  const began = performance.now()
  await work()
  const started = performance.now()
  await waitFor({ failure: 'nodes not Ready', timeout, every: 100 }, async () => {
    const wait = $({ nothrow: true })`kubectl wait node --all --for=condition=Ready --timeout=5s`
    const { exitCode, stderr } = await wait
    return exitCode === 0 ? undefined : stderr
  })
  const [all, first] = [performance.now() - began, started - began].map(formatDuration)
  console.error(`${done} in ${first}, all nodes Ready after ${all}`)
}

interface Moment {
  /** The last number that was acknowledged when the machines stopped. */
  last: number
  /** The next one, which may have been written without an answer. */
  atMost: number
}

/** Takes the snapshot while the writer writes. @returns the writer's number of that moment */
async function snapshotOf(
  rehearsal: Rehearsal,
  writer: Writer,
  ...args: string[]
): Promise<Moment> {
  await rehearsal.script('snapshot', ...args, snapshot)
  await writer.continues()
  const list: Snapshot[] = JSON.parse(await rehearsal.output('snapshot', '--list', '--json'))
  const found = list.find(({ name }) => name === snapshot)
  // QEMU records the time of this computer, when all machines have stopped.
  const alpha = found?.machines.find(({ name }) => name === rehearsal.cluster.controlPlane.name)
  assert.ok(alpha, `no snapshot ${snapshot} of alpha`)
  const last = writer.acknowledgedBy(alpha.disk.time * 1000)
  return { last, atMost: last + 1 }
}

/** Exactly the writes of that moment are there, none of the many afterwards. */
async function assertMoment(writer: Writer, { last, atMost }: Moment): Promise<void> {
  await writer.stop()
  assert.ok(writer.last > atMost, 'the writer wrote nothing after the snapshot')
  await writer.assertExactly(last, atMost)
  const there = (await writer.numbers()).length
  console.error(
    `writes: ${last} acknowledged at the snapshot, ${writer.last} before the restore, ${there} after it`,
  )
}

/** The containers of all pods, as the API server knows them. */
async function containers(): Promise<string[]> {
  const ids = '{.items[*].status.containerStatuses[*].containerID}'
  const { stdout } = await $`kubectl get pods --all-namespaces --output=jsonpath=${ids}`
  return stdout.split(' ').sort()
}

/** That of the test, and the one that restore took before it overwrote anything. */
async function removeSnapshots(rehearsal: Rehearsal): Promise<void> {
  const list = JSON.parse(await rehearsal.output('snapshot', '--list', '--json'))
  const names = (list as { name: string }[]).map(({ name }) => name)
  assert.ok(names.includes(snapshot), `no snapshot ${snapshot} among ${names}`)
  assert.ok(names.some((name) => name.startsWith('before-restore-')))
  for (const name of names) await rehearsal.script('snapshot', '--delete', name)
}

async function backupAndRestore(rehearsal: Rehearsal): Promise<void> {
  await makeSecret()
  await rehearsal.script('etcd-backup', 'snapshot')
  await removeNamespace()
  await $`kubectl create namespace ${namespace}-later`
  await rehearsal.script('etcd-backup', 'restore')
  // All clients of the API server have to list and watch again, all at once.
  await settled(rehearsal)
  await assertSecret()
  const later = await $`kubectl get namespace ${namespace}-later --ignore-not-found --output=name`
  assert.equal(later.stdout, '')
  await assertWorks(rehearsal)
  await removeNamespace()
}

async function changedSetting(rehearsal: Rehearsal): Promise<void> {
  const worker = firstWorker(rehearsal)
  const module = rehearsal.cluster.path('configs', 'worker.nix')
  const text = await readFile(module, 'utf8')
  const changed = text.replace('podPidsLimit = 4096', 'podPidsLimit = 4000')
  assert.notEqual(changed, text)
  const path = `/api/v1/nodes/${worker.name}/proxy/configz`
  const limit = async () =>
    (await $`kubectl get --raw ${path}`).stdout.match(/"podPidsLimit":(\d+)/)?.[1]
  assert.equal(await limit(), '4096')
  try {
    await writeFile(module, changed)
    assert.match(await rehearsal.output('reconfig', '--dry-run'), /^\+ *podPidsLimit = 4000;$/m)
    assert.equal(await limit(), '4096', '--dry-run has changed something')
    await rehearsal.script('reconfig', '--node', worker.name)
    assert.equal(await limit(), '4000')
  } finally {
    await writeFile(module, text)
  }
  await rehearsal.script('reconfig', '--node', worker.name)
  assert.equal(await limit(), '4096')
}

async function renewedCertificate(rehearsal: Rehearsal): Promise<void> {
  const { cluster } = rehearsal
  const worker = firstWorker(rehearsal)
  const pem = () => readFile(cluster.path('tls', `${worker.name}.pem`))
  const former = new X509Certificate(await pem()).serialNumber
  assert.equal(await servedBy(rehearsal, worker), former)
  const before = await startTimes(rehearsal)

  await rehearsal.script('generate-certs', '--renew', worker.name)
  await rehearsal.script('generate-kubeconfigs')
  await rehearsal.script('reconfig')

  assert.deepEqual(restartedSince(before, await startTimes(rehearsal)), [
    `${worker.name} kubelet.service`,
  ])
  const renewed = new X509Certificate(await pem()).serialNumber
  assert.notEqual(renewed, former)
  assert.equal(await servedBy(rehearsal, worker), renewed)
  const { WAIT_TIMEOUT } = cluster.settings
  await waitForReady(cluster, worker, { timeout: WAIT_TIMEOUT, signal: rehearsal.signal })
}

/** The serial number of the certificate that a kubelet serves, seen from alpha. */
async function servedBy(rehearsal: Rehearsal, worker: Node): Promise<string> {
  const ask = `curl -sk -m 30 -o /dev/null -w '%{certs}' https://${worker.ip}:10250/healthz`
  const said = await rehearsal.on(rehearsal.cluster.controlPlane, ask)
  const found = said.match(/-----BEGIN CERTIFICATE-----[^-]*-----END CERTIFICATE-----/)?.[0]
  assert.ok(found, `no certificate in: ${said}`)
  return new X509Certificate(found).serialNumber
}

interface Start {
  time: string
  /** How often systemd has restarted it after a crash. */
  repeats: number
}

/** "MACHINE UNIT" to its last start, of all units that a change might restart. */
async function startTimes(rehearsal: Rehearsal): Promise<Map<string, Start>> {
  const found = new Map<string, Start>()
  const { cluster } = rehearsal
  for (const node of cluster.nodes) {
    const own = servicesOf(cluster, node)
    const units = [...own, 'sshd', 'systemd-networkd', 'systemd-resolved', 'dbus'].join(' ')
    const show = `systemctl show --property=Id,ActiveEnterTimestampMonotonic,NRestarts ${units}`
    const text = await rehearsal.on(node, show)
    for (const block of text.trim().split(/\n\n+/)) {
      const value = (name: string) => block.match(new RegExp(`^${name}=(.*)$`, 'm'))?.[1] ?? ''
      const repeats = Number(value('NRestarts'))
      const time = value('ActiveEnterTimestampMonotonic')
      found.set(`${node.name} ${value('Id')}`, { time, repeats })
    }
  }
  return found
}

/** The units that were restarted on purpose; a crash on a busy host does not count. */
function restartedSince(before: Map<string, Start>, after: Map<string, Start>): string[] {
  return [...before].flatMap(([unit, { time, repeats }]) => {
    const now = after.get(unit)
    const byItself = now !== undefined && now.repeats > repeats
    return now?.time === time || byItself ? [] : [unit]
  })
}

function firstWorker({ cluster }: Rehearsal): Node {
  const [worker] = cluster.workers
  assert.ok(worker, 'day two needs a worker')
  return worker
}

/** All components are active, and the nodes Ready. */
function settled(rehearsal: Rehearsal): Promise<void> {
  return rehearsal.script('wait-for-cluster', '--ready')
}

/** Not only the API server works, but also what depends on it. */
async function assertWorks({ cluster, signal }: Rehearsal): Promise<void> {
  const timeout = cluster.settings.WAIT_TIMEOUT
  await waitFor({ failure: 'no answer of the API server', timeout, signal }, async () => {
    const { exitCode, stderr } = await $({ nothrow: true })`kubectl get namespaces --output=name`
    return exitCode === 0 ? undefined : stderr
  })
  await podsTalk(cluster, signal)
}

async function makeSecret(): Promise<void> {
  await $`kubectl create namespace ${namespace}`
  await $`kubectl create secret generic kept --namespace=${namespace} --from-literal=word=${word}`
}

async function assertSecret(): Promise<void> {
  const { data } = await kubectlJson<{ data: { word: string } }>(
    ...['get', 'secret', 'kept', `--namespace=${namespace}`],
  )
  assert.equal(Buffer.from(data.word, 'base64').toString(), word)
}

async function removeNamespace(): Promise<void> {
  await $`kubectl delete namespace ${namespace} --timeout=300s`
}
