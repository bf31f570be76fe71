// The project's scripts on a running namespace cluster, as far as the rehearsal's checks have not
// got them: each says what has to be true afterwards.
import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { setTimeout as sleep } from 'node:timers/promises'
import { $ } from 'zx'
import { loadCluster, type Node } from '../../lib/cluster.mts'
import { describeError } from '../../lib/errors.mts'
import { servicesOf } from '../../lib/health.mts'
import { kubectlJson } from '../../lib/kubectl.mts'
import { becomes } from '../../lib/wait.mts'
import { projectRoot } from '../checkout.mts'
import type { Rehearsal } from '../rehearsal/rehearsal.mts'

/** With the values for what differs from a real machine. */
export function installCilium(rehearsal: Rehearsal): Promise<void> {
  const values = rehearsal.cluster.path('differences.yaml')
  return rehearsal.script('install-cilium', '--values', values)
}

export async function ciliumStatus(rehearsal: Rehearsal): Promise<void> {
  const cluster = loadCluster({ root: rehearsal.cluster.root })
  const replaces = cluster.settings.KUBE_PROXY_MODE === 'cilium' ? 'True' : 'False'
  for (const { name } of cluster.workers) {
    const of = ['--namespace=kube-system', '--selector=k8s-app=cilium', '--output=name']
    const pod = (await $`kubectl get pods ${of} --field-selector=spec.nodeName=${name}`).stdout
    const status = await $`kubectl exec --namespace=kube-system ${pod.trim()} -- cilium-dbg status`
    assert.match(status.stdout, new RegExp(`^KubeProxyReplacement: +${replaces}`, 'm'))
    assert.match(status.stdout, /^Routing: +Network: Native/m)
  }
}

/** Objects whose generation or revision would show a change. */
export async function generations(): Promise<string> {
  const output = 'jsonpath={range .items[*]}{.kind}/{.metadata.name} {.metadata.generation}\n{end}'
  const kinds = 'daemonsets,deployments'
  const workloads = await $`kubectl get ${kinds} --all-namespaces --output=${output}`
  const release = await $`helm list --all-namespaces --output=json`
  const revisions = (JSON.parse(release.stdout) as { name: string; revision: string }[]).map(
    ({ name, revision }) => `${name} ${revision}`,
  )
  return `${workloads.stdout}${revisions.join('\n')}`
}

/** A node that was deleted registers again, without range and role; `make network` gives it both. */
export async function forgottenNode(rehearsal: Rehearsal): Promise<void> {
  const worker = firstWorker(rehearsal)
  type Found = { metadata: { uid: string }; spec: { podCIDR?: string } }
  const find = () => kubectlJson<Found>('get', 'node', worker.name)
  const before = await find()
  await $`kubectl delete node ${worker.name}`
  await rehearsal.on(worker, 'systemctl restart kubelet')
  const after = () => find().catch(() => before)
  const registered = async () => (await after()).metadata.uid !== before.metadata.uid
  assert.ok(await becomes(registered, 60, rehearsal.signal), 'it does not register again')
  assert.equal((await after()).spec.podCIDR, undefined)
  await installCilium(rehearsal)
  assert.equal((await find()).spec.podCIDR, worker.podCidr)
  await rehearsal.script('wait-for-cluster', '--ready')
}

type Reached = { what: string; after: number }

export async function looks(rehearsal: Rehearsal): Promise<void> {
  const { cluster } = rehearsal
  const { controlPlane } = cluster
  const status = JSON.parse(await rehearsal.output('cluster-status', '--json'))
  assert.deepEqual((status as { problems: unknown[] }).problems, [])
  const boots = JSON.parse(await rehearsal.output('cluster-status', '--boot', '--json'))
  for (const { name, events } of boots as { name: string; events: Reached[] }[]) {
    const node = cluster.node(name)
    const units = ['systemd', 'sshd', ...servicesOf(cluster, node)]
    const expected = node.role === 'worker' ? [...units, 'node Ready'] : units
    const reached = new Set(events.map(({ what }) => what))
    assert.deepEqual(
      expected.filter((what) => !reached.has(what)),
      [],
      name,
    )
    const times = events.map(({ after }) => after)
    assert.deepEqual(
      times,
      [...times].sort((a, b) => a - b),
      name,
    )
  }
  const health = JSON.parse(await rehearsal.output('cluster-health', '--json'))
  assert.equal((health as { healthy: boolean }).healthy, true, JSON.stringify(health))
  const logs = await rehearsal.output('logs', '--lines', '5000', controlPlane.name)
  for (const unit of servicesOf(cluster, controlPlane)) {
    assert.ok(logs.includes(` ${unit}[`), `${unit} has no line in the journals`)
  }
  for (const { name } of cluster.nodes) {
    assert.equal(await rehearsal.output('ssh', name, '--', 'uname', '-n'), `${name}\n`)
    // What `rsync -e 'ssh -F tls/ssh_config'` needs there.
    assert.match(await rehearsal.output('ssh', name, '--', 'rsync', '--version'), /^rsync +version/)
  }
}

/** A chart of one's own: installed, upgraded, deleted. */
export async function ownChart(rehearsal: Rehearsal): Promise<void> {
  const { cluster } = rehearsal
  const chart = join(projectRoot, 'test/charts/web')
  const values = cluster.path('run/web.yaml')
  const options = ['--namespace=own', '--release=web', `--values=${values}`]
  for (const replicas of [1, 2]) {
    await writeFile(values, JSON.stringify({ image: cluster.settings.SMOKE_IMAGE, replicas }))
    const notes = await rehearsal.output('helm-deploy', ...options, chart)
    assert.match(notes, new RegExp(`web has ${replicas} replicas\\.`))
    const { status } = await kubectlJson<{ status: { readyReplicas: number } }>(
      ...['get', 'deployment', 'web', '--namespace=own'],
    )
    assert.equal(status.readyReplicas, replicas)
  }
  await rehearsal.script('helm-deploy', '--namespace=own', '--release=web', '--delete', chart)
  const left = await $`kubectl get all --namespace=own --output=name`
  assert.doesNotMatch(left.stdout, /service|deployment/)
  await $`kubectl delete namespace own --wait=false`
}

export async function restartedServices(rehearsal: Rehearsal): Promise<void> {
  const units = 'etcd kube-apiserver kube-controller-manager kube-scheduler'
  // One after the other: an API server whose etcd stops at the same time takes 90 s to end.
  const restart = `for unit in ${units}; do systemctl restart $unit; done`
  await rehearsal.on(rehearsal.cluster.controlPlane, restart, 300)
  await rehearsal.script('wait-for-cluster', '--ready')
  const nodes = await kubectlJson<{ items: unknown[] }>('get', 'nodes')
  assert.equal(nodes.items.length, rehearsal.cluster.workers.length)
}

/** A flag that the kubelet does not know: reconfig finds it unhealthy, and takes the change back. */
export async function brokenKubelet(rehearsal: Rehearsal): Promise<void> {
  const worker = firstWorker(rehearsal)
  await withModule(rehearsal, ['--node-ip=', '--no-such-flag='], async () => {
    let error: unknown
    const failed = rehearsal.script('reconfig', '--node', worker.name, '--timeout', '15')
    await failed.catch((reason) => {
      error = reason
    })
    assert.match(describeError(error), /reconfig ended with status 1/)
  })
  const pid = '$(systemctl show --property=MainPID --value kubelet)'
  const command = await rehearsal.on(worker, `tr '\\0' ' ' </proc/${pid}/cmdline`)
  assert.match(command, / --node-ip=/)
  assert.equal(await rehearsal.on(worker, 'grep -r no-such-flag /etc/nixos || true'), '')
  await rehearsal.script('wait-for-cluster', '--ready')
  assert.match(await rehearsal.output('reconfig', '--dry-run'), /^sigma: no file changes$/m)
}

/** Milliseconds from its announcement until a transfer is killed: it begins, is under way, has ended. */
const killedAfter = [0, 100, 300]

/** A transfer that is killed changes nothing, or all; the next run finishes it. */
export async function killedTransfer(rehearsal: Rehearsal): Promise<void> {
  const { cluster } = rehearsal
  const worker = firstWorker(rehearsal)
  const limit = 'podPidsLimit = '
  const limits = `grep -h -o '${limit}[0-9]*' /etc/nixos/worker.nix`
  const before = await rehearsal.on(worker, limits)
  const args = ['--node', worker.name]
  // Neither a transfer nor a switch continues there.
  const quiet = `cd /var/lib/reconfig 2>/dev/null || exit 0
    [ ! -e new ] && [ ! -e archive ] && flock --nonblock lock true`
  const isQuiet = () =>
    rehearsal.on(worker, quiet).then(
      () => true,
      () => false,
    )
  await withModule(rehearsal, [`${limit}4096`, `${limit}4001`], async () => {
    for (const delay of killedAfter) {
      const reconfig = spawn(cluster.path('bin/reconfig.mts'), args, {
        detached: true,
        stdio: ['ignore', 'ignore', 'pipe'],
        env: { ...process.env, TERM: 'dumb' },
      })
      const ended = once(reconfig, 'exit')
      for await (const line of createInterface({ input: reconfig.stderr })) {
        if (line.includes('copying the files')) break
      }
      await sleep(delay)
      assert.equal(reconfig.exitCode, null, 'it has ended before it was killed')
      process.kill(-(reconfig.pid ?? 0), 'SIGKILL')
      await ended
      assert.ok(await becomes(isQuiet, 90, rehearsal.signal), 'the machine still works on it')
      const now = await rehearsal.on(worker, limits)
      assert.ok([before, `${limit}4001\n`].includes(now), `the module has ${now}`)
    }
    await rehearsal.script('reconfig', ...args)
    assert.equal(await rehearsal.on(worker, limits), `${limit}4001\n`)
  })
  await rehearsal.script('reconfig', ...args)
  assert.equal(await rehearsal.on(worker, limits), before)
}

/** Works with a changed worker.nix, which then gets its former text again. */
async function withModule(
  { cluster }: Rehearsal,
  [from, to]: readonly [string, string],
  work: () => Promise<void>,
): Promise<void> {
  const module = cluster.path('configs', 'worker.nix')
  const text = await readFile(module, 'utf8')
  assert.ok(text.includes(from), `${from} is not in worker.nix`)
  try {
    await writeFile(module, text.replace(from, to))
    await work()
  } finally {
    await writeFile(module, text)
  }
}

function firstWorker({ cluster }: Rehearsal): Node {
  const [worker] = cluster.workers
  assert.ok(worker, 'a worker is needed')
  return worker
}

/** Machines are switched off and on; nothing but the disks is left in between. */
export async function offAndOn(rehearsal: Rehearsal): Promise<void> {
  await rehearsal.script('shutdown')
  await rehearsal.script('provision', '--wait')
  await rehearsal.script('wait-for-cluster', '--ready')
}
