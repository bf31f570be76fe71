// Faults of a whole cluster: the real Kubernetes and Cilium in machines made of namespaces. A client
// writes all the while, and no write that was acknowledged may be lost; after a restore there are
// exactly those of its moment. Pods that have nothing to do with it run on.
import assert from 'node:assert/strict'
import { readdir, readFile, stat, writeFile } from 'node:fs/promises'
import { setTimeout as sleep } from 'node:timers/promises'
import { becomes } from '../../lib/wait.mts'
import type { Outcome } from '../checkout.mts'
import { releaseAfter } from '../rehearsal/own-tree.mts'
import { missing } from '../tools.mts'
import type { Writer } from '../writer.mts'
import type { Fault, Place } from './fault.mts'
import { SharedCluster } from './shared-cluster.mts'

const backup = 'bin/etcd-backup.mts'
const [save, restore] = [
  [backup, 'snapshot'],
  [backup, 'restore'],
]
const reconfig = ['bin/reconfig.mts', '--node', 'alpha']
const upgrade = ['bin/rolling-upgrade.mts', 'all']
const bootstrap = ['bin/bootstrap-cluster.mts']
/** Those whose restart a client would notice. (The others may end by themselves, as they elect leaders.) */
const stateful = ['etcd', 'kube-apiserver']
const kubernetes = ['kube-apiserver', 'kube-scheduler', 'kube-controller-manager']
const status = ['bin/cluster-status.mts', '--timeout=20']
const ready = ['bin/wait-for-cluster.mts', '--ready']

let opened: SharedCluster | undefined
function shared(): SharedCluster {
  if (!opened) throw new Error('there is no cluster')
  return opened
}

/** Raises the one cluster of all rows. @returns a reason to skip where that is not possible */
export async function openCluster(): Promise<(() => Place) | string> {
  const cluster = await SharedCluster.open()
  if (typeof cluster === 'string') return cluster
  opened = cluster
  return () => cluster.place()
}

/** Takes it away, however much of it there is. */
export const closeCluster = () => SharedCluster.close()

export const clusterFaults: Fault[] = [
  {
    name: 'etcd crashes while a client writes',
    done: '`kill -9` of etcd, which then crashes at each start until `etcd-backup snapshot` was attempted; systemd starts it again',
    holds: 'no acknowledged write is lost, and the client can write again',
    exit: 1,
    says: ['a command on alpha failed'],
    again: save,
    async inject(place) {
      const writer = await startWriter(place)
      const before = await backupsOf(place)
      await shared().crash('etcd')
      const outcome = await place.run(save)
      assert.deepEqual(await backupsOf(place), before)
      await shared().repaired('etcd')
      await writer.continues()
      return outcome
    },
    check: (place) => assertNothingLost(place),
  },
  {
    name: 'the API server crashes while a client writes',
    done: '`kill -9` of the API server, which then crashes at each start until `etcd-backup snapshot` was done; systemd starts it again',
    holds:
      'etcd is saved without it; no acknowledged write is lost, and the client can write again',
    exit: 0,
    says: ['keys at revision'],
    again: save,
    async inject(place) {
      const writer = await startWriter(place)
      const before = await shared().runs('alpha', 'kube-apiserver')
      await shared().crash('kube-apiserver')
      const outcome = await place.run(save)
      await shared().repaired('kube-apiserver')
      await writer.continues()
      assert.notDeepEqual(await shared().runs('alpha', 'kube-apiserver'), before)
      return outcome
    },
    check: (place) => assertNothingLost(place),
  },
  {
    name: 'the whole control plane crashes while a client writes',
    done: '`kill -9` of etcd, API server, scheduler and controller manager at the same moment, while `etcd-backup snapshot` asks for the health of etcd, which then crashes at each start until the backup was attempted',
    holds: 'no acknowledged write is lost, and the client can write again',
    exit: 1,
    says: ['a command on alpha failed'],
    again: save,
    async inject(place) {
      const writer = await startWriter(place)
      const units = ['etcd', ...kubernetes]
      const before = await shared().runs('alpha', ...units)
      const backups = await backupsOf(place)
      await shared().slow('etcdctl', 'true')
      const script = place.start(save)
      await shared().called('etcdctl')
      await shared().crash('etcd', ...kubernetes)
      await shared().restoreProgram('etcdctl')
      const outcome = await script.outcome
      assert.deepEqual(await backupsOf(place), backups)
      await shared().repaired('etcd')
      await writer.continues()
      const now = await shared().runs('alpha', ...units)
      for (const unit of units) assert.notEqual(now[unit], before[unit], `${unit} did not restart`)
      return outcome
    },
    check: (place) => assertNothingLost(place),
  },
  {
    name: 'etcd hangs while a client writes',
    done: 'SIGSTOP to etcd, and `etcd-backup snapshot` meanwhile; then SIGCONT',
    holds:
      'the backup does not wait for etcd; no acknowledged write is lost, and the client can write again',
    exit: 1,
    says: ['a command on alpha failed'],
    again: save,
    async inject(place) {
      const writer = await startWriter(place)
      const backups = await backupsOf(place)
      await shared().signal('STOP', 'alpha', 'etcd')
      const before = writer.last
      const outcome = await place.run(save)
      assert.ok(writer.last <= before + 1, 'etcd has answered')
      assert.deepEqual(await backupsOf(place), backups)
      await shared().signal('CONT', 'alpha', 'etcd')
      await writer.continues()
      return outcome
    },
    check: (place) => assertNothingLost(place),
  },
  {
    name: 'the control plane loses power while it is saved',
    done: '`kill -9` of the QEMU of alpha when `etcd-backup snapshot` has copied the first 100 KB; then `make up`',
    holds:
      'a partial backup is not kept; no acknowledged write is lost, and the client can write again; the pods of the test run on',
    exit: 1,
    says: ['the connection to the machine was lost', 'hint:    make status'],
    again: save,
    async inject(place) {
      const writer = await startWriter(place)
      const before = await backupsOf(place)
      const copy = 'case $1 in */snapshot.db) ;; *) false ;; esac'
      await shared().slow('cat', copy, 'head -c 100000 "$1"')
      const script = place.start(save)
      await shared().called('cat')
      const copied = async () => {
        const partial = (await backupsOf(place)).find((file) => file.endsWith('.partial'))
        return partial !== undefined && (await stat(partial)).size >= 100_000
      }
      assert.ok(await becomes(copied, 60), 'nothing was copied')
      await shared().powerCut('alpha')
      const outcome = await script.outcome
      assert.deepEqual(await backupsOf(place), before)
      await shared().up()
      await writer.continues()
      return outcome
    },
    check: (place) => assertNothingLost(place),
  },
  {
    name: 'all machines lose power while a client writes',
    done: '`kill -9` of all QEMUs at the same moment, and `etcd-backup snapshot` while they are off; then `make up`',
    holds:
      'no acknowledged write is lost, and the client can write again; all nodes are Ready, and their pods run, again',
    exit: 1,
    says: ['alpha is not running', 'hint:    make boot-alpha'],
    again: save,
    async inject(place) {
      const writer = await startWriter(place)
      await shared().powerCut('alpha', 'sigma', 'gamma')
      const outcome = await place.run(save)
      await shared().up()
      await writer.continues()
      return outcome
    },
    check: (place) => assertNothingLost(place, ['sigma', 'gamma']),
  },
  {
    name: 'a worker loses power',
    done: '`kill -9` of the QEMU of sigma; `cluster-status` meanwhile; then `make up`',
    holds: 'sigma is Ready, and its pods run, again; those of gamma run on',
    exit: 0,
    says: ['✗ sigma: it is switched off'],
    again: ready,
    async inject(place) {
      await startWriter(place)
      await shared().powerCut('sigma')
      const outcome = await place.run(status)
      await shared().up()
      return outcome
    },
    check: (place) => assertNothingLost(place, ['sigma']),
  },
  {
    name: 'a worker loses its LAN connection',
    done: 'the cable between sigma and the switch is pulled out until the condition Ready of node sigma is Unknown; `wait-for-cluster --ready` meanwhile; then it is plugged in',
    holds: 'sigma is Ready again by itself; the pods of the test run on',
    exit: 1,
    says: ['not all are active', 'Kubelet stopped posting node status'],
    again: ready,
    async inject(place) {
      await startWriter(place)
      await shared().lan('sigma', 'down')
      const unknown = ['--for=condition=Ready=Unknown', '--timeout=180s']
      await shared().succeeds('kubectl', 'wait', 'node/sigma', ...unknown)
      const outcome = await place.run([...ready, '--timeout=20'])
      await shared().lan('sigma', 'up')
      return outcome
    },
    check: (place) => assertNothingLost(place),
  },
  {
    name: 'the kubelet crashes',
    done: '`kill -9` of the kubelet of sigma; then `wait-for-cluster --ready`',
    holds: 'systemd starts it again, and the pods of the test run on',
    exit: 0,
    says: ['all are active'],
    again: ready,
    async inject(place) {
      await startWriter(place)
      const before = await shared().runs('sigma', 'kubelet')
      await shared().signal('KILL', 'sigma', 'kubelet')
      const outcome = await place.run(ready)
      assert.notDeepEqual(await shared().runs('sigma', 'kubelet'), before)
      return outcome
    },
    check: (place) => assertNothingLost(place),
  },
  {
    name: 'reconfig is killed while it restarts the control plane',
    done: 'another log level for the Kubernetes programs; `kill -9` of `reconfig --node alpha` when the machine has begun to restart them',
    holds:
      'no acknowledged write is lost, and the client can write again; the second run finishes the change',
    exit: 137,
    again: reconfig,
    async inject(place) {
      const writer = await startWriter(place)
      await shared().setVariable('KUBE_LOG_LEVEL', '2')
      let restarted = false
      const watch = shared()
        .restarts()
        .then(() => {
          restarted = true
        })
      // It is awaited only if reconfig gets that far.
      watch.catch(() => {})
      const outcome = await place.killWhen(reconfig, () => restarted)
      await watch
      await writer.continues()
      return outcome
    },
    // The machine finishes the switch, although the script was killed.
    repair: () => shared().on('alpha', 'flock --timeout 120 /var/lib/reconfig/lock true'),
    async check(place) {
      for (const unit of kubernetes) assert.match(await shared().commandLine(unit), / --v=2 /)
      assert.equal(await shared().on('alpha', 'ls /var/lib/reconfig | grep unfinished || true'), '')
      await assertNothingLost(place)
      await shared().setVariable('KUBE_LOG_LEVEL', '1')
      await shared().succeeds('bin/reconfig.mts')
    },
  },
  {
    name: 'the disk is full when etcd is saved',
    done: '`backups/` is a file system of 100 KB',
    holds: 'a partial backup is not kept; with more space it is saved',
    exit: 1,
    says: ['etcd-backup: the disk is full', 'hint:    df -h .'],
    skip: missing('unshare', 'nsenter'),
    again: save,
    async inject(place) {
      await startWriter(place)
      await place.mount('backups', '-t tmpfs -o size=100k none')
      const outcome = await place.run(save)
      assert.deepEqual(await readdir(place.seen('backups')), [])
      return outcome
    },
    repair: (place) => place.remount('backups', 'size=100m'),
    check: (place) => assertNothingLost(place),
  },
  {
    name: 'etcd is restored while a client writes',
    done: '`etcd-backup restore` of a backup taken some writes earlier; the client writes until the API server stops',
    holds: 'there are exactly the writes of the backup, not one more',
    exit: 0,
    says: ['restored in'],
    shortFormOf: 'etcd-backup',
    again: save,
    async inject(place) {
      const writer = await startWriter(place)
      await saved(place)
      await writer.continues()
      writer.stopWhenRefused()
      const outcome = await place.run(restore)
      await writer.untilRefused()
      assert.ok(writer.last > (await inBackup(place)), 'the writer wrote nothing after the backup')
      await writer.assertExactly(await inBackup(place))
      return outcome
    },
    async check(place) {
      await assertTidy()
      await assertBystanders(place)
    },
  },
  {
    name: 'a partial backup is restored while a client writes',
    done: 'the newest backup loses its second half; then `etcd-backup restore`',
    holds: 'no service was stopped, no write is lost; the whole file is restored',
    exit: 1,
    says: ['is not a complete etcd snapshot', 'nothing was changed; try another file of backups/'],
    shortFormOf: 'etcd-backup',
    again: restore,
    async inject(place) {
      const writer = await startWriter(place)
      const file = await saved(place)
      whole.set(place, await readFile(file))
      await writeFile(file, (await readFile(file)).subarray(0, (await stat(file)).size / 2))
      const before = await shared().runs('alpha', ...stateful)
      const outcome = await place.run(restore)
      assert.deepEqual(await shared().runs('alpha', ...stateful), before)
      await writer.continues()
      await writer.stop()
      await writer.assertNothingLost()
      return outcome
    },
    repair: async (place) => writeFile(await newest(place), whole.get(place) ?? ''),
    check: assertRestored,
  },
  {
    name: 'ssh is cut while etcd is restored',
    done: '`kill -9` of the sshd of the connection while the machine makes a data directory of the backup',
    holds: 'no service was stopped, no write is lost; the second run restores',
    exit: 1,
    says: ['alpha does not answer ssh'],
    shortFormOf: 'etcd-backup',
    again: restore,
    async inject(place) {
      const writer = await startWriter(place)
      await saved(place)
      // Among the parents of the shell that runs there is the session's sshd.
      const cut = `[ "$2" = restore ] || exec $real "$@"
pid=$PPID
until grep -q ^sshd /proc/$pid/comm; do pid=$(cut -d' ' -f4 /proc/$pid/stat); done
kill -9 $pid
sleep 1
exit 1`
      await shared().program('etcdutl', cut)
      const before = await shared().runs('alpha', ...stateful)
      const outcome = await place.run(restore)
      await shared().restoreProgram('etcdutl')
      assert.deepEqual(await shared().runs('alpha', ...stateful), before)
      await writer.continues()
      await writer.stop()
      await writer.assertNothingLost()
      return outcome
    },
    check: assertRestored,
  },
  {
    name: 'a restore of etcd is killed before the change',
    done: '`kill -9` of the script while the machine makes a data directory of the backup',
    holds: 'no service was stopped, no write is lost; the second run restores',
    exit: 137,
    again: restore,
    async inject(place) {
      const writer = await startWriter(place)
      await saved(place)
      await shared().slow('etcdutl', '[ "$2" = restore ]')
      const before = await shared().runs('alpha', ...stateful)
      const script = place.start(restore)
      await shared().called('etcdutl')
      script.kill('SIGKILL')
      const outcome = await script.outcome
      await shared().restoreProgram('etcdutl')
      await writer.continues()
      assert.deepEqual(await shared().runs('alpha', ...stateful), before)
      await writer.stop()
      await writer.assertNothingLost()
      return outcome
    },
    check: assertRestored,
  },
  {
    name: 'a restore of etcd is killed in the middle of the change',
    done: '`kill -9` of the script when it has stopped the API server',
    holds: 'the second run restores, exactly the writes of the backup',
    exit: 137,
    again: restore,
    async inject(place) {
      const writer = await startWriter(place)
      await saved(place)
      await writer.continues()
      writer.stopWhenRefused()
      return place.killWhen(restore, (said) => {
        return said.includes('changing the data') && writer.hasEnded
      })
    },
    // The folder with the previous data is named by the second.
    repair: () => sleep(1100),
    check: assertRestored,
  },
  {
    name: 'Ctrl-C while the restored control plane starts',
    done: 'SIGINT to `etcd-backup restore` when it waits for the control plane',
    holds:
      'alpha has its previous data back, with every acknowledged write; the second run restores',
    exit: 130,
    says: ['etcd was not restored: alpha has its previous data back', 'interrupted by SIGINT'],
    again: restore,
    async inject(place) {
      const writer = await startWriter(place)
      await saved(place)
      await writer.continues()
      writer.stopWhenRefused()
      const waits = (said: string) => said.includes('waiting for the control plane')
      const outcome = await place.killWhen(restore, waits, 'SIGINT')
      await writer.untilRefused()
      await writer.assertNothingLost()
      return outcome
    },
    check: assertRestored,
  },
  {
    name: 'etcd does not start with the restored data',
    done: 'the database that the machine has made of the backup is cut off before etcd is started with it',
    holds:
      'alpha has its previous data back, with every acknowledged write; the second run restores',
    exit: 1,
    says: ['etcd was not restored: alpha has its previous data back'],
    again: restore,
    async inject(place) {
      const writer = await startWriter(place)
      await saved(place)
      await writer.continues()
      const cut = `$real "$@" || exit
for word; do case $word in --data-dir=*) truncate -s 8192 "\${word#*=}/member/snap/db";; esac; done`
      await shared().program('etcdutl', cut)
      writer.stopWhenRefused()
      const outcome = await place.run(restore)
      await shared().restoreProgram('etcdutl')
      await writer.untilRefused()
      await writer.assertNothingLost()
      return outcome
    },
    check: assertRestored,
  },
  {
    name: 'Ctrl-C in an upgrade of all machines while a client writes',
    done: 'SIGINT to `rolling-upgrade all` when alpha has the next release of NixOS, and sigma is being drained',
    holds:
      'sigma is as it was, and takes pods again; the second run upgrades it and gamma; no acknowledged write is lost',
    exit: 130,
    says: ['not touched: gamma', 'interrupted by SIGINT'],
    again: upgrade,
    async inject(place) {
      await startWriter(place)
      const { NIXOS_VERSION: former } = shared().cluster.settings
      const release = releaseAfter(former)
      await shared().startSlowPod('sigma')
      const before = await upgradeState('sigma')
      await shared().setVariable('NIXOS_VERSION', release)
      const isDrained = async (said: string) => said.includes('sigma: drain') && isCordoned('sigma')
      const outcome = await place.killWhen(upgrade, isDrained, 'SIGINT')
      assert.equal(await isCordoned('sigma'), false)
      assert.equal(await upgradeState('sigma'), before)
      assert.deepEqual(await releases(), [release, former, former])
      return outcome
    },
    async check(place) {
      const release = releaseAfter(shared().cluster.settings.NIXOS_VERSION)
      assert.deepEqual(await releases(), [release, release, release])
      await assertNothingLost(place, ['sigma', 'gamma'])
    },
  },
  {
    name: 'bootstrap is killed at each of its steps after the installation',
    done: '`kill -9` of `bootstrap-cluster` and the step it runs, at the beginning of each step from the boot to the add-ons, and run again',
    holds: 'each run continues where the last one ended; in the end DNS, storage and metrics work',
    exit: 137,
    again: bootstrap,
    async inject(place) {
      bystanders.set(place, await shared().bystandersRun())
      let last: Outcome | undefined
      const addOns = ['deploy-coredns', 'deploy-local-storage', 'deploy-metrics-server']
      for (const step of ['provision', 'wait-for-cluster', 'install-cilium', ...addOns]) {
        last = await place.killWhen(bootstrap, (said) => said.includes(`$ ./bin/${step}.mts`))
      }
      assert.ok(last)
      return last
    },
    async check(place) {
      await assertBystanders(place)
      for (const name of ['coredns', 'metrics-server']) {
        await shared().succeeds('kubectl', 'get', 'deployment', name, '--namespace=kube-system')
      }
      await shared().succeeds('kubectl', 'get', 'storageclass', 'local-path')
      await shared().succeeds('kubectl', 'top', 'nodes')
    },
  },
]

const writers = new WeakMap<Place, Writer>()
const bystanders = new WeakMap<Place, Record<string, string>>()
const whole = new WeakMap<Place, Buffer>()

function writerOf(place: Place): Writer {
  const writer = writers.get(place)
  assert.ok(writer)
  return writer
}

async function startWriter(place: Place): Promise<Writer> {
  bystanders.set(place, await shared().bystandersRun())
  const writer = await shared().writer()
  writers.set(place, writer)
  place.atEnd(async () => {
    await writer.stop()
    await writer.remove()
  })
  return writer
}

/** Nothing of a backup or restore is left on alpha but the previous data. */
async function assertTidy(): Promise<void> {
  assert.equal(await shared().on('alpha', 'ls -d /var/lib/etcd.new 2>/dev/null || true'), '')
}

/** @param restarted nodes whose pods were started again; those of all others run on */
async function assertNothingLost(place: Place, restarted: readonly string[] = []): Promise<void> {
  await assertTidy()
  await writerOf(place).stop()
  await writerOf(place).assertNothingLost()
  await assertBystanders(place, restarted)
}

/** What the second run has restored is the newest backup, without what was written after it. */
async function assertRestored(place: Place): Promise<void> {
  await assertTidy()
  await writerOf(place).stop()
  const number = await inBackup(place)
  assert.ok(writerOf(place).last > number, 'nothing was written after the backup')
  await writerOf(place).assertExactly(number)
  await assertBystanders(place)
}

async function assertBystanders(place: Place, restarted: readonly string[] = []): Promise<void> {
  await shared().ready()
  const before = bystanders.get(place)
  const now = await (restarted.length > 0 ? shared().bystandersRun() : shared().bystanders())
  for (const { name } of shared().cluster.workers) {
    if (restarted.includes(name)) continue
    assert.equal(now[name], before?.[name], `the pod on ${name} was started again`)
  }
}

async function backupsOf(place: Place): Promise<string[]> {
  const names = await readdir(place.path('backups')).catch(() => [])
  return names.sort().map((name) => place.path('backups', name))
}

async function newest(place: Place): Promise<string> {
  return (await backupsOf(place)).at(-1) ?? ''
}

/** The last number in the newest backup. */
async function inBackup(place: Place): Promise<number> {
  return writerOf(place).numberAt(await shared().revisionOf(await newest(place)))
}

/** Saves etcd. @returns the file */
async function saved(place: Place): Promise<string> {
  const { exitCode, stderr } = await place.run(save)
  assert.equal(exitCode, 0, stderr)
  return newest(place)
}

async function isCordoned(name: string): Promise<boolean> {
  const unschedulable = '--output=jsonpath={.spec.unschedulable}'
  return (await shared().succeeds('kubectl', 'get', 'node', name, unschedulable)) === 'true'
}

/** What an upgrade changes on a machine before it restarts: the channel, and notes of its progress. */
function upgradeState(name: string): Promise<string> {
  const notes = 'ls /var/lib/reconfig | grep -E "^(unfinished|cordoned|former-channel)$" || true'
  return shared().on(name, `nix-channel --list; ${notes}`)
}

/** The releases of NixOS that the machines run: "26.05". */
async function releases(): Promise<string[]> {
  const look = 'cut -c -5 /run/current-system/nixos-version'
  const { nodes } = shared().cluster
  return Promise.all(nodes.map(async ({ name }) => (await shared().on(name, look)).trim()))
}
