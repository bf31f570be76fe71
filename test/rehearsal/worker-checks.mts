// A worker is added to a running cluster, takes part in it, and is removed without a trace.
import assert from 'node:assert/strict'
import { readdir, readFile } from 'node:fs/promises'
import { $ } from 'zx'
import { type Cluster, loadCluster, type Node } from '../../lib/cluster.mts'
import { type ApiObject, apply, kubectlJson } from '../../lib/kubectl.mts'
import { lanSwitchStatus } from '../../lib/lan.mts'
import { waitForRollout } from '../../lib/pods.mts'
import { connect, remote } from '../../lib/ssh.mts'
import { isRunning } from '../../lib/vm.mts'
import { waitFor } from '../../lib/wait.mts'
import { podsTalk } from './pods-talk.mts'
import type { Rehearsal } from './rehearsal.mts'

const name = 'delta'
const namespace = 'on-delta'

/** @param meanwhile a further check with three workers */
export async function workerCheck(
  rehearsal: Rehearsal,
  meanwhile?: (rehearsal: Rehearsal) => Promise<void>,
): Promise<void> {
  const { cluster, signal } = rehearsal
  const original = await settingsText(cluster)
  await addInTwoAttempts(rehearsal)

  const longer = loadCluster({ root: cluster.root })
  const worker = longer.node(name)
  await assertDescribed(worker)
  await rehearsal.timed('pods of all workers talk', () =>
    podsTalk(longer, signal, (pods) =>
      fromControlPlane(
        longer,
        pods.map(({ ip }) => ip),
      ),
    ),
  )
  await startAppOn(longer)
  await meanwhile?.(rehearsal)

  await rehearsal.timed('make remove-worker', () =>
    rehearsal.script('remove-worker', name, '--purge'),
  )
  await assertAppElsewhere(longer)
  await assertNothingLeft(rehearsal, { original, longer, worker })
  await rehearsal.script('wait-for-cluster', '--ready')
  await podsTalk(cluster, signal)
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
  assert.equal(await settingsText(cluster), first, 'the second attempt has chosen other addresses')
}

function settingsText(cluster: Cluster): Promise<string> {
  return readFile(cluster.path('cluster.env'), 'utf8')
}

async function assertDescribed(worker: Node): Promise<void> {
  const { metadata, spec } = await kubectlJson<ApiObject & { spec: { podCIDR?: string } }>(
    ...['get', 'node', name],
  )
  assert.equal(spec.podCIDR, worker.podCidr)
  assert.equal(metadata.labels?.['node-role.kubernetes.io/worker'], '')
  assert.ok((await storageClasses()).includes(`storageclass.storage.k8s.io/local-path-${name}`))
}

async function storageClasses(): Promise<string[]> {
  return (await $`kubectl get storageclasses --output=name`).stdout.trim().split('\n')
}

/** The control plane is not a node, but webhooks need it to reach pods. */
async function fromControlPlane(longer: Cluster, ips: readonly string[]): Promise<void> {
  await connect(longer, longer.controlPlane)
  for (const ip of ips) {
    await remote(longer.controlPlane, `curl -fsS -m 30 -o /dev/null http://${ip}:8080/`)
  }
  await remote(longer.controlPlane, `ping -c 1 -W 30 ${name}`)
}

/** A pod that prefers the worker, but can run elsewhere. */
async function startAppOn(longer: Cluster): Promise<void> {
  const matchExpressions = [{ key: 'kubernetes.io/hostname', operator: 'In', values: [name] }]
  const preferred = [{ weight: 100, preference: { matchExpressions } }]
  const labels = { app: 'wanderer' }
  const image = longer.settings.SMOKE_IMAGE
  // One that ignores SIGTERM would hold up the machine's end.
  const wait = 'trap exit TERM; sleep 3600 & wait'
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
              { name: 'wait', image, imagePullPolicy: 'IfNotPresent', command: ['sh', '-c', wait] },
            ],
          },
        },
      },
    },
  ]
  await apply(objects, { manager: 'rehearsal' })
  const timeout = longer.settings.WAIT_TIMEOUT
  await waitForRollout('deployment/wanderer', { namespace, timeout })
  assert.deepEqual(await nodesOfApp(), [name])
}

async function nodesOfApp(): Promise<(string | undefined)[]> {
  const { items } = await kubectlJson<{ items: { spec: { nodeName?: string } }[] }>(
    ...['get', 'pods', `--namespace=${namespace}`],
  )
  return items.map(({ spec }) => spec.nodeName)
}

async function assertAppElsewhere(longer: Cluster): Promise<void> {
  const timeout = longer.settings.WAIT_TIMEOUT
  await waitForRollout('deployment/wanderer', { namespace, timeout })
  const nodes = await nodesOfApp()
  assert.equal(nodes.length, 1)
  assert.notEqual(nodes[0], name)
  await $`kubectl delete namespace ${namespace} --timeout=300s`
}

async function assertNothingLeft(
  rehearsal: Rehearsal,
  { original, longer, worker }: { original: string; longer: Cluster; worker: Node },
): Promise<void> {
  const { cluster, signal } = rehearsal
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
  assert.ok(!(await storageClasses()).some((storageClass) => storageClass.includes(name)))
  const known = await readFile(cluster.path('tls', 'known_hosts'), 'utf8')
  assert.ok(!known.includes(`:${worker.sshPort} `), known)

  for (const node of cluster.nodes) {
    const found = await rehearsal.on(
      node,
      `grep -rlw ${name} /etc/hosts /etc/nixos /var/lib/kubernetes || true
      ip route show exact ${worker.podCidr}`,
    )
    assert.equal(found, '', `on ${node.name}`)
  }
  const there = async (...what: string[]) =>
    (await $`kubectl get ${what} --ignore-not-found --output=name`).stdout
  assert.equal(await there('node', name), '')
  const onNode = `--field-selector=spec.nodeName=${name}`
  assert.equal(await there('pods', '--all-namespaces', onNode), '')
  // It belongs to the node, and is collected after it.
  const timeout = cluster.settings.WAIT_TIMEOUT
  await waitFor({ failure: `the lease of ${name} still exists`, timeout, signal }, async () => {
    const lease = await there('lease', name, '--namespace=kube-node-lease')
    return lease ? 'not collected yet' : undefined
  })
}
