// What one does to a cluster that runs, and that nothing is lost by it: snapshots, backups of etcd,
// a changed setting, a renewed certificate.
import assert from 'node:assert/strict'
import { X509Certificate } from 'node:crypto'
import { readFile, writeFile } from 'node:fs/promises'
import type { Node } from '../../lib/cluster.mts'
import { Kubectl } from '../../lib/kubernetes/kubectl.mts'
import { waitForReady } from '../../lib/kubernetes/wait-for-node.mts'
import { Machine } from '../../lib/machine/machine.mts'
import type { Rehearsal } from './rehearsal.mts'

const namespace = 'day-two'
const word = 'swordfish'

type Check = (rehearsal: Rehearsal, kubectl: Kubectl, worker: Node) => Promise<void>

const checks: readonly [what: string, check: Check][] = [
  ['snapshot, break things, restore', snapshotAndRestore],
  ['etcd backup, delete, restore', backupAndRestore],
  ['reconfig with a changed kubelet setting', changedSetting],
  ['reconfig with a renewed certificate', renewedCertificate],
]

/** All of them, one after the other; the cluster is then as it was. */
export async function dayTwoChecks(rehearsal: Rehearsal): Promise<void> {
  const kubectl = new Kubectl(rehearsal.cluster, rehearsal.signal)
  const [worker] = rehearsal.cluster.workers
  if (!worker) throw new Error('day two needs a worker')
  for (const [what, check] of checks) {
    console.error(`\n── ${what}`)
    await rehearsal.timed(what, () => check(rehearsal, kubectl, worker))
  }
}

async function snapshotAndRestore(
  rehearsal: Rehearsal,
  kubectl: Kubectl,
  worker: Node,
): Promise<void> {
  await makeSecret(kubectl)
  await rehearsal.script('snapshot', 'day-two')
  await removeNamespace(kubectl)
  // A flag that the kubelet does not know: it ends again and again.
  const machine = new Machine(rehearsal.cluster, worker)
  const broken = "sed -i 's/--node-ip=/--no-such-flag=/' /etc/nixos/worker.nix"
  await machine.succeed(`${broken}; nixos-rebuild switch >/dev/null 2>&1 || true`, { timeout: 300 })
  const { status } = await machine.execute('curl -fs -m 3 http://127.0.0.1:10248/healthz')
  assert.notEqual(status, 0, 'the kubelet is well with a flag that it does not know')

  await rehearsal.script('restore', 'day-two')
  await assertSecret(kubectl)
  const { WAIT_TIMEOUT } = rehearsal.cluster.settings
  await waitForReady(rehearsal.cluster, worker, { timeout: WAIT_TIMEOUT })
  await removeNamespace(kubectl)
  await rehearsal.script('snapshot', '--delete', 'day-two')
}

async function backupAndRestore(rehearsal: Rehearsal, kubectl: Kubectl): Promise<void> {
  await makeSecret(kubectl)
  await rehearsal.script('etcd-backup', 'snapshot')
  await removeNamespace(kubectl)
  await rehearsal.script('etcd-backup', 'restore')
  await assertSecret(kubectl)
  await removeNamespace(kubectl)
}

async function changedSetting(rehearsal: Rehearsal, kubectl: Kubectl, worker: Node): Promise<void> {
  const module = rehearsal.cluster.path('configs', 'worker.nix')
  const text = await readFile(module, 'utf8')
  const changed = text.replace('podPidsLimit = 4096', 'podPidsLimit = 4000')
  assert.notEqual(changed, text)
  const path = `/api/v1/nodes/${worker.name}/proxy/configz`
  const limit = async () =>
    (await kubectl.run(['get', '--raw', path])).match(/"podPidsLimit":(\d+)/)?.[1]
  try {
    await writeFile(module, changed)
    await rehearsal.script('reconfig', '--node', worker.name)
    assert.equal(await limit(), '4000')
  } finally {
    await writeFile(module, text)
  }
  await rehearsal.script('reconfig', '--node', worker.name)
  assert.equal(await limit(), '4096')
}

async function renewedCertificate(
  rehearsal: Rehearsal,
  _kubectl: Kubectl,
  worker: Node,
): Promise<void> {
  const { cluster } = rehearsal
  const machines = cluster.nodes.map((node) => new Machine(cluster, node))
  const since = 'systemctl show --property=Id,ActiveEnterTimestampMonotonic'
  const units = 'etcd kube-apiserver kube-controller-manager kube-scheduler containerd kubelet sshd'
  const times = () => Promise.all(machines.map((machine) => machine.succeed(`${since} ${units}`)))
  const before = await times()
  await rehearsal.script('generate-certs', '--renew', worker.name)
  await rehearsal.script('reconfig')

  const differing = (await times()).flatMap((text, index) => {
    const former = before[index]?.split('\n\n')
    const changed = text.split('\n\n').filter((block, at) => block !== former?.[at])
    return changed.map((block) => `${machines[index]?.node.name} ${block.match(/Id=(\S+)/)?.[1]}`)
  })
  assert.deepEqual(differing, [`${worker.name} kubelet.service`])
  const pem = await readFile(cluster.path('tls', `${worker.name}.pem`))
  const ask = `timeout 10 openssl s_client -connect ${worker.ip}:10250 </dev/null 2>/dev/null`
  const { stdout } = await new Machine(cluster, worker).execute(
    `${ask} || true; cat /var/lib/kubernetes/pki/${worker.name}.pem`,
  )
  const there = stdout.match(/-----BEGIN CERTIFICATE-----[^-]*-----END CERTIFICATE-----/)?.[0] ?? ''
  assert.equal(new X509Certificate(there).serialNumber, new X509Certificate(pem).serialNumber)
}

async function makeSecret(kubectl: Kubectl): Promise<void> {
  await kubectl.run(['create', 'namespace', namespace])
  const literal = `--from-literal=word=${word}`
  await kubectl.run(['create', 'secret', 'generic', 'kept', `--namespace=${namespace}`, literal])
}

async function assertSecret(kubectl: Kubectl): Promise<void> {
  const { data } = await kubectl.get<{ data: { word: string } }>(
    'secret',
    'kept',
    `--namespace=${namespace}`,
  )
  assert.equal(Buffer.from(data.word, 'base64').toString(), word)
}

async function removeNamespace(kubectl: Kubectl): Promise<void> {
  await kubectl.run(['delete', 'namespace', namespace, '--timeout=300s'], { timeout: 330 })
}
