// What one does to a cluster that runs, and that nothing is lost by it: snapshots, backups of etcd,
// a changed setting, a renewed certificate.
import assert from 'node:assert/strict'
import { X509Certificate } from 'node:crypto'
import { readFile, writeFile } from 'node:fs/promises'
import type { Node } from '../../lib/cluster.mts'
import { Kubectl } from '../../lib/kubernetes/kubectl.mts'
import { waitForReady } from '../../lib/kubernetes/wait-for-node.mts'
import { Machine } from '../../lib/machine/machine.mts'
import { servicesOf } from '../../lib/machine/probes.mts'
import { waitFor } from '../../lib/wait.mts'
import { podsTalk } from './pods-talk.mts'
import type { Rehearsal, Step } from './rehearsal.mts'

const namespace = 'day-two'
const word = 'swordfish'
const snapshot = 'day-two'

export const dayTwoChecks: readonly Step[] = [
  ['make snapshot, things are broken, make restore', snapshotAndRestore],
  ['make etcd-snapshot, things are deleted, make etcd-restore', backupAndRestore],
  ['make reconfig with a changed setting of a kubelet', changedSetting],
  ['make reconfig with a renewed certificate', renewedCertificate],
]

async function snapshotAndRestore(rehearsal: Rehearsal): Promise<void> {
  const { cluster } = rehearsal
  const kubectl = new Kubectl(cluster, rehearsal.signal)
  const worker = firstWorker(rehearsal)
  await makeSecret(kubectl)
  await rehearsal.script('snapshot', snapshot)
  await removeNamespace(kubectl)
  const machine = new Machine(cluster, worker, rehearsal.signal)
  const healthy = async () => {
    const { status } = await machine.execute('curl -fs -m 10 http://127.0.0.1:10248/healthz')
    return status === 0
  }
  assert.equal(await healthy(), true, 'the kubelet is not well before anything was broken')
  // A flag that the kubelet does not know: it ends again and again.
  const breakIt = "sed -i 's/--node-ip=/--no-such-flag=/' /etc/nixos/worker.nix"
  const switchTo = 'nixos-rebuild switch >/dev/null 2>&1 || true'
  await machine.succeed(`${breakIt}; ${switchTo}`, { timeout: 900 })
  assert.equal(await healthy(), false, 'the kubelet is well with a flag that it does not know')

  await rehearsal.script('restore', snapshot)
  await settled(rehearsal)
  await assertSecret(kubectl)
  await machine.succeed('grep -q -e --node-ip= /etc/nixos/worker.nix')
  assert.equal(await healthy(), true)
  await assertWorks(rehearsal, kubectl)
  await removeNamespace(kubectl)
  await removeSnapshots(rehearsal)
}

/** That of the test, and the one that the restore has made of what it overwrote. */
async function removeSnapshots(rehearsal: Rehearsal): Promise<void> {
  const list = JSON.parse(await rehearsal.output('snapshot', '--list', '--json'))
  const names = (list as { name: string }[]).map(({ name }) => name)
  assert.ok(names.includes(snapshot), `no snapshot ${snapshot} among ${names}`)
  assert.ok(names.some((name) => name.startsWith('before-restore-')))
  for (const name of names) await rehearsal.script('snapshot', '--delete', name)
}

async function backupAndRestore(rehearsal: Rehearsal): Promise<void> {
  const kubectl = new Kubectl(rehearsal.cluster, rehearsal.signal)
  await makeSecret(kubectl)
  await rehearsal.script('etcd-backup', 'snapshot')
  await removeNamespace(kubectl)
  await kubectl.run(['create', 'namespace', `${namespace}-later`])
  await rehearsal.script('etcd-backup', 'restore')
  // All who watch the API server have to read anew what they know, all at once.
  await settled(rehearsal)
  await assertSecret(kubectl)
  assert.equal(await kubectl.exists('namespace', `${namespace}-later`), false)
  await assertWorks(rehearsal, kubectl)
  await removeNamespace(kubectl)
}

async function changedSetting(rehearsal: Rehearsal): Promise<void> {
  const kubectl = new Kubectl(rehearsal.cluster, rehearsal.signal)
  const worker = firstWorker(rehearsal)
  const module = rehearsal.cluster.path('configs', 'worker.nix')
  const text = await readFile(module, 'utf8')
  const changed = text.replace('podPidsLimit = 4096', 'podPidsLimit = 4000')
  assert.notEqual(changed, text)
  const path = `/api/v1/nodes/${worker.name}/proxy/configz`
  const limit = async () =>
    (await kubectl.run(['get', '--raw', path])).match(/"podPidsLimit":(\d+)/)?.[1]
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

/** The serial number of the certificate that a kubelet proves itself with, seen from alpha. */
async function servedBy({ cluster, signal }: Rehearsal, worker: Node): Promise<string> {
  const ask = `curl -sk -m 30 -o /dev/null -w '%{certs}' https://${worker.ip}:10250/healthz`
  const said = await new Machine(cluster, cluster.controlPlane, signal).succeed(ask)
  const found = said.match(/-----BEGIN CERTIFICATE-----[^-]*-----END CERTIFICATE-----/)?.[0]
  assert.ok(found, `no certificate in: ${said}`)
  return new X509Certificate(found).serialNumber
}

interface Start {
  time: string
  /** How often systemd has started it again after it had ended by itself. */
  repeats: number
}

/** "MACHINE UNIT" to its last start, of all that a change might restart. */
async function startTimes({ cluster, signal }: Rehearsal): Promise<Map<string, Start>> {
  const found = new Map<string, Start>()
  for (const node of cluster.nodes) {
    const own = servicesOf(cluster, node).map(({ unit }) => unit)
    const units = [...own, 'sshd', 'systemd-networkd', 'systemd-resolved', 'dbus'].join(' ')
    const show = `systemctl show --property=Id,ActiveEnterTimestampMonotonic,NRestarts ${units}`
    const text = await new Machine(cluster, node, signal).succeed(show)
    for (const block of text.trim().split(/\n\n+/)) {
      const value = (name: string) => block.match(new RegExp(`^${name}=(.*)$`, 'm'))?.[1] ?? ''
      const repeats = Number(value('NRestarts'))
      const time = value('ActiveEnterTimestampMonotonic')
      found.set(`${node.name} ${value('Id')}`, { time, repeats })
    }
  }
  return found
}

/** What somebody has restarted. What ended by itself, on a busy host, is not counted. */
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

/** The API server is not only there, but what depends on it works. */
async function assertWorks({ cluster, signal }: Rehearsal, kubectl: Kubectl): Promise<void> {
  const timeout = cluster.settings.WAIT_TIMEOUT
  await waitFor({ failure: 'the API server is slow to answer', timeout }, async () => {
    signal.throwIfAborted()
    const { exitCode, stderr } = await kubectl.execute(['get', 'namespaces', '--output=name'])
    return exitCode === 0 ? undefined : stderr
  })
  await podsTalk(cluster, kubectl)
}

async function makeSecret(kubectl: Kubectl): Promise<void> {
  await kubectl.run(['create', 'namespace', namespace])
  const literal = `--from-literal=word=${word}`
  await kubectl.run(['create', 'secret', 'generic', 'kept', `--namespace=${namespace}`, literal])
}

async function assertSecret(kubectl: Kubectl): Promise<void> {
  const { data } = await kubectl.get<{ data: { word: string } }>(
    ...['secret', 'kept', `--namespace=${namespace}`],
  )
  assert.equal(Buffer.from(data.word, 'base64').toString(), word)
}

async function removeNamespace(kubectl: Kubectl): Promise<void> {
  await kubectl.run(['delete', 'namespace', namespace, '--timeout=300s'], { timeout: 330 })
}
