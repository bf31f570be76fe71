// A worker that is added to a running cluster, takes part in it, and is removed: nothing of it stays.
import assert from 'node:assert/strict'
import { readdir, readFile } from 'node:fs/promises'
import { type Cluster, loadCluster, type Node } from '../../lib/cluster.mts'
import type { ApiObject } from '../../lib/kubernetes/kubectl.mts'
import { Kubectl } from '../../lib/kubernetes/kubectl.mts'
import type { WebPod } from '../../lib/kubernetes/web-pods.mts'
import { lanSwitchStatus } from '../../lib/lan/lan-switch.mts'
import { Machine } from '../../lib/machine/machine.mts'
import { isRunning } from '../../lib/qemu/vm.mts'
import { waitFor } from '../../lib/wait.mts'
import { podsTalk } from './pods-talk.mts'
import type { Rehearsal } from './rehearsal.mts'

const name = 'delta'
const namespace = 'on-delta'

export async function workerCheck(rehearsal: Rehearsal): Promise<void> {
  const { cluster, signal } = rehearsal
  const kubectl = new Kubectl(cluster, signal)
  const original = await settingsText(cluster)
  await addInTwoAttempts(rehearsal)

  const longer = loadCluster({ root: cluster.root })
  const worker = longer.node(name)
  await assertDescribed(kubectl, worker)
  await rehearsal.timed('pods of all workers talk', () =>
    podsTalk(longer, kubectl, (pods) => fromControlPlane(longer, pods)),
  )
  await startAppOn(longer, kubectl)

  await rehearsal.timed('make remove-worker', () =>
    rehearsal.script('remove-worker', name, '--purge'),
  )
  await assertAppElsewhere(longer, kubectl)
  await assertNothingLeft(rehearsal, { original, longer, worker, kubectl })
  await rehearsal.script('wait-for-cluster', '--ready')
  await podsTalk(cluster, kubectl)
}

/** The first ends early in the installation, when the worker is in cluster.env already. */
async function addInTwoAttempts(rehearsal: Rehearsal): Promise<void> {
  const { cluster } = rehearsal
  const { INSTALL_TIMEOUT } = process.env
  process.env.INSTALL_TIMEOUT = '1'
  try {
    await assert.rejects(rehearsal.script('add-worker', name))
  } finally {
    if (INSTALL_TIMEOUT === undefined) delete process.env.INSTALL_TIMEOUT
    else process.env.INSTALL_TIMEOUT = INSTALL_TIMEOUT
  }
  const first = await settingsText(cluster)
  assert.match(first, /^WORKER_NODES="\$WORKER_NODES delta"$/m)
  await rehearsal.timed('make add-worker', () => rehearsal.script('add-worker', name))
  assert.equal(await settingsText(cluster), first, 'the addresses were chosen anew')
}

function settingsText(cluster: Cluster): Promise<string> {
  return readFile(cluster.path('cluster.env'), 'utf8')
}

async function assertDescribed(kubectl: Kubectl, worker: Node): Promise<void> {
  const { metadata, spec } = await kubectl.get<ApiObject & { spec: { podCIDR?: string } }>(
    ...['node', name],
  )
  assert.equal(spec.podCIDR, worker.podCidr)
  assert.equal(metadata.labels?.['node-role.kubernetes.io/worker'], '')
}

/** The control plane is no node, and reaches pods all the same, as webhooks need it. */
async function fromControlPlane(longer: Cluster, pods: readonly WebPod[]): Promise<void> {
  const machine = new Machine(longer, longer.controlPlane)
  for (const { ip } of pods) {
    await machine.succeed(`curl -fsS -m 30 -o /dev/null http://${ip}:8080/`)
  }
  await machine.succeed(`ping -c 1 -W 30 ${name}`)
}

/** A pod that is on the worker by choice, not by need. */
async function startAppOn(longer: Cluster, kubectl: Kubectl): Promise<void> {
  const matchExpressions = [{ key: 'kubernetes.io/hostname', operator: 'In', values: [name] }]
  const preferred = [{ weight: 100, preference: { matchExpressions } }]
  const labels = { app: 'wanderer' }
  const image = longer.settings.SMOKE_IMAGE
  const objects = [
    { apiVersion: 'v1', kind: 'Namespace', metadata: { name: namespace } },
    {
      apiVersion: 'apps/v1',
      kind: 'Deployment',
      metadata: { name: 'wanderer', namespace },
      spec: {
        replicas: 1,
        selector: { matchLabels: labels },
        template: {
          metadata: { labels },
          spec: {
            affinity: {
              nodeAffinity: { preferredDuringSchedulingIgnoredDuringExecution: preferred },
            },
            terminationGracePeriodSeconds: 0,
            containers: [
              { name: 'wait', image, imagePullPolicy: 'IfNotPresent', command: ['sleep', '3600'] },
            ],
          },
        },
      },
    },
  ]
  const manifest = objects.map((object) => JSON.stringify(object)).join('\n---\n')
  await kubectl.apply(manifest, { manager: 'rehearsal' })
  const timeout = longer.settings.WAIT_TIMEOUT
  await kubectl.rollout('deployment/wanderer', { namespace, timeout })
  assert.deepEqual(await nodesOfApp(kubectl), [name])
}

async function nodesOfApp(kubectl: Kubectl): Promise<(string | undefined)[]> {
  const { items } = await kubectl.get<{ items: { spec: { nodeName?: string } }[] }>(
    ...['pods', `--namespace=${namespace}`],
  )
  return items.map(({ spec }) => spec.nodeName)
}

async function assertAppElsewhere(longer: Cluster, kubectl: Kubectl): Promise<void> {
  const timeout = longer.settings.WAIT_TIMEOUT
  await kubectl.rollout('deployment/wanderer', { namespace, timeout })
  const nodes = await nodesOfApp(kubectl)
  assert.equal(nodes.length, 1)
  assert.notEqual(nodes[0], name)
  await kubectl.run(['delete', 'namespace', namespace, '--timeout=300s'], { timeout: 330 })
}

async function assertNothingLeft(
  { cluster, signal }: Rehearsal,
  was: { original: string; longer: Cluster; worker: Node; kubectl: Kubectl },
): Promise<void> {
  const { original, longer, worker, kubectl } = was
  assert.equal(await settingsText(cluster), original)
  assert.equal(await isRunning(longer, worker), false)
  const status = await lanSwitchStatus(cluster)
  assert.deepEqual(
    status?.ports,
    cluster.nodes.map(({ lanPort }) => lanPort),
  )
  const files = await Promise.all(
    ['tls', 'configs', 'cloud-init', 'images', 'logs', 'run', 'snapshots'].map(async (folder) => {
      const names = await readdir(cluster.path(folder)).catch(() => [])
      return names.filter((file) => file.includes(name)).map((file) => `${folder}/${file}`)
    }),
  )
  assert.deepEqual(files.flat(), [])
  const known = await readFile(cluster.path('tls', 'known_hosts'), 'utf8')
  assert.ok(!known.includes(`:${worker.sshPort} `), known)

  for (const node of cluster.nodes) {
    const machine = new Machine(cluster, node, signal)
    const found = await machine.succeed(
      `grep -rlw ${name} /etc/hosts /etc/nixos /var/lib/kubernetes || true
      ip route show exact ${worker.podCidr}`,
    )
    assert.equal(found, '', `on ${node.name}`)
  }
  assert.equal(await kubectl.exists('node', name), false)
  const onNode = `--field-selector=spec.nodeName=${name}`
  assert.equal(await kubectl.run(['get', 'pods', '--all-namespaces', onNode, '--output=name']), '')
  // It belongs to the node, and is collected after it.
  const timeout = cluster.settings.WAIT_TIMEOUT
  await waitFor({ failure: `the lease of ${name} is still there`, timeout }, async () => {
    signal.throwIfAborted()
    const there = await kubectl.exists('lease', name, '--namespace=kube-node-lease')
    return there ? 'not collected yet' : undefined
  })
}
