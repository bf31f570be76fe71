// The cluster of namespaces that all rows of the group share, and what breaks its machines.
import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { stringify } from 'yaml'
import type { Cluster } from '../../lib/cluster.mts'
import { isGone } from '../../lib/processes.mts'
import { machineState } from '../../lib/vm.mts'
import { becomes } from '../../lib/wait.mts'
import { type Checkout, type Outcome, run } from '../checkout.mts'
import { goPrograms } from '../kubernetes/programs.mts'
import {
  cannotRun,
  clusterFolder,
  type NamespaceCluster,
  raise,
  takeAway,
} from '../namespaces/namespace-cluster.mts'
import { Writer } from '../writer.mts'
import { Place } from './fault.mts'

const folder = join(clusterFolder, 'faults')
/** The first folder of a machine's PATH. */
const firstOnPath = '/run/wrappers/bin'

/** A workload of pods that do nothing. @param atEnd shell text that runs when one is asked to end */
function idlePods(
  kind: 'DaemonSet' | 'Deployment',
  { name, image, atEnd, node }: { name: string; image: string; atEnd: string; node?: string },
) {
  const labels = { app: name }
  const command = ['sh', '-c', `trap '${atEnd}' TERM; sleep 86400 & wait`]
  const container = { name: 'idle', image, imagePullPolicy: 'IfNotPresent', command }
  const nodeSelector = node ? { 'kubernetes.io/hostname': node } : {}
  const spec = { nodeSelector, containers: [container] }
  return {
    apiVersion: 'apps/v1',
    kind,
    metadata: { name, namespace: 'default' },
    spec: { selector: { matchLabels: labels }, template: { metadata: { labels }, spec } },
  }
}

export class SharedCluster {
  readonly cluster: Cluster
  private readonly env: Record<string, string>
  private readonly checkout: Checkout
  /** Its cluster.env as it was first. */
  private readonly settings: string
  private count = 0

  private constructor({ cluster, root, path }: NamespaceCluster, etcd: string) {
    this.cluster = cluster
    this.settings = readFileSync(cluster.path('cluster.env'), 'utf8')
    // Rows change it by `setVariable`.
    const set = async () => {}
    this.checkout = { root, path: (...parts) => cluster.path(...parts), set, remove: set }
    this.env = {
      PATH: [...path, etcd, process.env.PATH].join(':'),
      KUBECONFIG: cluster.path('configs', 'admin.kubeconfig'),
      TERM: 'dumb',
    }
  }

  /** Raises it, with Cilium and pods. @returns a reason to skip where that is not possible */
  static async open(): Promise<SharedCluster | string> {
    const reason = cannotRun()
    if (reason) return reason
    const { folder: etcd, reason: absent } = await goPrograms('etcd')
    if (!etcd) return absent ?? 'there is no etcd'
    const shared = new SharedCluster(await raise({ folder, settings: { WAIT_TIMEOUT: 240 } }), etcd)
    await shared.succeeds('bin/wait-for-cluster.mts')
    await shared.succeeds('bin/install-cilium.mts', '--values', 'differences.yaml')
    // Pods that no fault of the control plane may touch, one on each worker.
    const image = shared.cluster.settings.SMOKE_IMAGE
    await shared.apply(idlePods('DaemonSet', { name: 'bystanders', image, atEnd: 'exit' }))
    await shared.areReady('daemonset/bystanders')
    return shared
  }

  /** Takes it away, however much of it there is. */
  static close(): Promise<void> {
    return takeAway(folder)
  }

  place(): Place {
    const place = new Place(this.checkout, { kept: true })
    Object.assign(place.env, this.env)
    place.atEnd(() => this.reset())
    return place
  }

  /** Takes away what a row that failed may have left, so that the next one does not fail as well. */
  private async reset(): Promise<void> {
    const unmount = ['etcd', 'kube-apiserver'].map(
      (unit) => `${systemd} umount ${programOf(unit)} 2>/dev/null || true`,
    )
    const { cluster } = this
    const work = [
      () => writeFile(cluster.path('cluster.env'), this.settings),
      () =>
        this.on(
          'alpha',
          `systemctl kill --signal=CONT etcd; rm -rf ${firstOnPath}/{cat,etcdctl,etcdutl} /var/lib/etcd.new; ${unmount.join('; ')}`,
        ),
      ...cluster.workers.map(
        ({ name }) =>
          () =>
            this.lan(name, 'up'),
      ),
      async () => {
        const states = await Promise.all(cluster.nodes.map((node) => machineState(cluster, node)))
        if (states.some(({ state }) => state !== 'running')) await this.up()
      },
    ]
    const failed: string[] = []
    for (const step of work) await step().catch((error) => failed.push(`${error}`))
    if (failed.length > 0) throw new Error(failed.join('\n'))
  }

  /** A client that writes, in a namespace of its own. */
  writer(): Promise<Writer> {
    this.count += 1
    return Writer.start(this.cluster, `counter-${this.count}`, { every: 100 })
  }

  /** Runs a program outside of all rows. @returns its standard output @throws if it fails */
  async succeeds(program: string, ...args: string[]): Promise<string> {
    const outcome = await this.run(program, ...args)
    assert.equal(outcome.exitCode, 0, `${program} ${args.join(' ')}: ${outcome.stderr}`)
    return outcome.stdout
  }

  run(program: string, ...args: string[]): Promise<Outcome> {
    return run(this.checkout, program, args, { env: this.env, timeout: 600_000 })
  }

  /** Runs shell text on a machine, as root. */
  on(name: string, command: string): Promise<string> {
    return this.succeeds('bin/ssh.mts', name, '--', command)
  }

  async apply(object: object): Promise<void> {
    const file = this.cluster.path('run', 'object.yaml')
    await writeFile(file, stringify(object))
    await this.succeeds('kubectl', 'apply', '--filename', file)
  }

  /** Sets a variable of cluster.env. */
  async setVariable(name: string, value: string): Promise<void> {
    const text = this.settings.replace(new RegExp(`^${name}=.*$`, 'm'), `${name}=${value}`)
    await writeFile(this.cluster.path('cluster.env'), text)
  }

  // ── Services ──

  /** Sends a signal to the main processes of units. */
  async signal(signal: 'KILL' | 'STOP' | 'CONT', name: string, ...units: string[]): Promise<void> {
    const kill = `systemctl kill --kill-whom=main --signal=${signal} ${units.join(' ')}`
    await this.on(name, kill)
  }

  /** Kills units of alpha; the first then crashes at each start, whenever systemd tries. */
  async crash(unit: string, ...others: string[]): Promise<void> {
    await this.on('alpha', `${systemd} mount --bind $(type -P false) ${programOf(unit)}`)
    await this.signal('KILL', 'alpha', unit, ...others)
  }

  /** Removes the cause, so systemd's next start succeeds. */
  async repaired(unit: string): Promise<void> {
    await this.on('alpha', `${systemd} umount ${programOf(unit)}`)
  }

  /** The invocation IDs of units; every start gets a new one. */
  async runs(name: string, ...units: string[]): Promise<Record<string, string>> {
    const show = `systemctl show --property=InvocationID --value ${units.join(' ')}`
    const ids = (await this.on(name, show)).trim().split(/\n+/)
    assert.equal(ids.length, units.length)
    return Object.fromEntries(units.map((unit, index) => [unit, ids[index] ?? '']))
  }

  /** The command line with which the main process of a unit of alpha runs. */
  commandLine(unit: string): Promise<string> {
    const pid = `$(systemctl show --property=MainPID --value ${unit})`
    return this.on('alpha', `tr '\\0' ' ' </proc/${pid}/cmdline`)
  }

  /** Waits on alpha until the API server is started again, at most five minutes. */
  async restarts(): Promise<void> {
    const run = 'systemctl show --property=InvocationID --value kube-apiserver'
    await this.on(
      'alpha',
      `before=$(${run}); for _ in $(seq 6000); do [ "$(${run})" = "$before" ] || exit 0; sleep 0.05; done; exit 1`,
    )
  }

  // ── Programs on alpha, as etcd-backup calls them ──

  /** Puts a shell script in the place of one; in it, `real` is the real one. */
  async program(name: string, text: string): Promise<void> {
    const script = `#!/bin/sh\nreal=/run/current-system/sw/bin/${name}\n${text}\n`
    const file = `${firstOnPath}/${name}`
    const write = `cat >${file} <<'END' && chmod 755 ${file}\n${script}END`
    await this.on('alpha', `mkdir -p ${firstOnPath} && ${write}`)
  }

  /**
   * Lets a program wait until `restoreProgram`, up to two minutes.
   *
   * @param when shell text, true for the calls that wait
   * @param before shell text that runs first
   */
  async slow(name: string, when: string, before = ''): Promise<void> {
    await this.on('alpha', `rm -f /run/${name}-runs /run/${name}-may-continue`)
    await this.program(
      name,
      `${when} || exec $real "$@"
${before}
touch /run/${name}-runs
for _ in $(seq 1200); do [ ! -e /run/${name}-may-continue ] || break; sleep 0.1; done
exec $real "$@"`,
    )
  }

  /** Waits until the slow program was called. */
  async called(name: string): Promise<void> {
    const there = async () =>
      (await this.run('bin/ssh.mts', 'alpha', '--', `test -e /run/${name}-runs`)).exitCode === 0
    assert.ok(await becomes(there, 60), `${name} was not called`)
  }

  /** Puts the real program back, and lets a call that waits continue. */
  async restoreProgram(name: string): Promise<void> {
    await this.on('alpha', `rm -f ${firstOnPath}/${name}; touch /run/${name}-may-continue`)
  }

  /** etcd's revision in a backup. */
  async revisionOf(file: string): Promise<number> {
    const args = ['snapshot', 'status', '--write-out=json', file]
    return JSON.parse(await this.succeeds('etcdutl', ...args)).revision
  }

  // ── Machines ──

  /** `kill -9` of the QEMUs of machines at the same moment. */
  async powerCut(...names: string[]): Promise<void> {
    const nodes = names.map((name) => this.cluster.node(name))
    const pids = await Promise.all(
      nodes.map(async (node) => {
        const found = await machineState(this.cluster, node)
        assert.ok(found.state === 'running', `${node.name} is ${found.state}`)
        return found.pid
      }),
    )
    for (const pid of pids) process.kill(pid, 'SIGKILL')
    for (const pid of pids) assert.ok(await becomes(() => isGone(pid), 30), 'a QEMU does not end')
  }

  /** What `make up` does, and then the whole cluster again. */
  async up(): Promise<void> {
    await this.succeeds('bin/provision.mts', '--wait')
    await this.ready()
  }

  /** Waits until all components work and the nodes are Ready. */
  async ready(): Promise<void> {
    await this.succeeds('bin/wait-for-cluster.mts', '--ready')
  }

  /** Pulls the cable of a machine's LAN out, or plugs it in. */
  async lan(name: string, state: 'up' | 'down'): Promise<void> {
    const pid = (await readFile(join(folder, 'supervisor.pid'), 'utf8')).trim()
    const link = ['ip', 'link', 'set', `l-${name}`, state]
    await this.succeeds('nsenter', `--target=${pid}`, '--net', ...link)
  }

  /** The processes of the bystanders by node, which any restart would change; '' where none runs. */
  async bystanders(): Promise<Record<string, string>> {
    const found: Record<string, string> = {}
    for (const { name } of this.cluster.workers) {
      const theirs = "pgrep --full '[t]rap .exit. TERM' || true"
      found[name] = await this.on(name, theirs)
    }
    return found
  }

  /** Waits until one runs on each worker. (The API server may report those from before a power cut.) */
  async bystandersRun(): Promise<Record<string, string>> {
    let found: Record<string, string> = {}
    const all = async () => {
      found = await this.bystanders()
      return Object.values(found).every(Boolean)
    }
    assert.ok(await becomes(all, 300), `pods of the test do not run: ${JSON.stringify(found)}`)
    return found
  }

  /** Waits until all pods of a workload are ready. */
  async areReady(workload: string): Promise<void> {
    await this.succeeds('kubectl', 'rollout', 'status', workload, '--timeout=300s')
  }

  /** Starts a pod on a worker that takes ten seconds to end: draining the worker takes as long. */
  async startSlowPod(node: string): Promise<void> {
    const image = this.cluster.settings.SMOKE_IMAGE
    const atEnd = 'sleep 10; exit'
    await this.apply(idlePods('Deployment', { name: 'slow-pod', image, atEnd, node }))
    await this.areReady('deployment/slow-pod')
  }
}

/** Shell text: with the mounts of systemd, which are not those of an ssh session. */
const systemd = 'nsenter --target=1 --mount --'

/** Shell text for the file of a unit's program. */
function programOf(unit: string): string {
  const show = `systemctl show --property=ExecStart --value ${unit}`
  return `$(readlink -f $(${show} | sed 's/{ path=\\([^ ]*\\) .*/\\1/'))`
}
