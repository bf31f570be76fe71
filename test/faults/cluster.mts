// Faults of the cluster's state: the real etcd and control plane as processes of this computer, an
// sshd in the place of alpha. A client writes all the while, and no write that was acknowledged may
// be lost; after a restore there are exactly those of its moment.
import assert from 'node:assert/strict'
import { readdir, readFile, stat, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { becomes } from '../../lib/wait.mts'
import { noQemu } from '../idle-qemu.mts'
import { AlphaOverSsh } from '../kubernetes/alpha-over-ssh.mts'
import { services } from '../kubernetes/mapping.mts'
import { findTools } from '../kubernetes/prepared.mts'
import { noSshd } from '../sshd.mts'
import { missing } from '../tools.mts'
import { type Fault, Place } from './fault.mts'
import { Writer } from './writer.mts'

const backup = 'bin/etcd-backup.mts'
const [save, restore] = [
  [backup, 'snapshot'],
  [backup, 'restore'],
]

let shared: AlphaOverSsh | undefined
function alpha(): AlphaOverSsh {
  if (!shared) throw new Error('there is no control plane')
  return shared
}

/** Starts the one control plane of all rows. @returns a reason to skip where that is not possible */
export async function openCluster(): Promise<{ place(): Place; close(): Promise<void> } | string> {
  // Only now, as it builds the programs where there are none.
  const tools = await findTools()
  const reason = typeof tools === 'string' ? tools : noSshd || noQemu
  if (typeof tools === 'string' || reason) return String(reason)
  shared = await AlphaOverSsh.start(tools)
  return {
    place: () => {
      const place = new Place(alpha().checkout, { kept: true })
      place.env.PATH = alpha().path
      return place
    },
    close: () => alpha().stop(),
  }
}

export const clusterFaults: Fault[] = [
  {
    name: 'etcd is killed under a writer',
    done: '`kill -9` of etcd, and a backup while it is down; then it is started again, as systemd does',
    holds: 'no acknowledged write is lost, and the writer continues',
    exit: 1,
    says: ['a command on alpha failed'],
    again: save,
    async inject(place) {
      const writer = await startWriter(place)
      alpha().controlPlane.signal('SIGKILL', 'etcd')
      const outcome = await place.run(save)
      await alpha().controlPlane.recover()
      await writer.writesOn()
      return outcome
    },
    check: assertNothingLost,
  },
  {
    name: 'the API server is killed under a writer',
    done: '`kill -9` of the API server, and a backup while it is down; then it is started again',
    holds: 'etcd can be saved without it; no acknowledged write is lost, and the writer continues',
    exit: 0,
    says: ['keys at revision'],
    again: save,
    async inject(place) {
      const writer = await startWriter(place)
      alpha().controlPlane.signal('SIGKILL', 'kube-apiserver')
      const outcome = await place.run(save)
      await alpha().controlPlane.recover()
      await writer.writesOn()
      return outcome
    },
    check: assertNothingLost,
  },
  {
    name: 'the power of the control plane fails while it is saved',
    done: '`kill -9` of etcd, API server, scheduler and controller manager at the same moment, during `etcd-backup snapshot`',
    holds: 'half a backup is not kept; no acknowledged write is lost, and the writer continues',
    exit: 1,
    says: ['a command on alpha failed'],
    again: save,
    async inject(place) {
      const writer = await startWriter(place)
      await slow('etcdctl')
      const before = await backupsOf(place)
      const script = place.start(save)
      await reached(place, 'etcdctl')
      alpha().controlPlane.signal('SIGKILL', ...services)
      const outcome = await script.outcome
      assert.deepEqual(await backupsOf(place), before)
      await alpha().useReal('etcdctl')
      await alpha().controlPlane.recover()
      await writer.writesOn()
      return outcome
    },
    check: assertNothingLost,
  },
  {
    name: 'etcd hangs under a writer',
    done: 'SIGSTOP to etcd, and a backup meanwhile; then SIGCONT',
    holds:
      'the backup does not wait for etcd; no acknowledged write is lost, and the writer continues',
    exit: 1,
    says: ['a command on alpha failed'],
    again: save,
    async inject(place) {
      const writer = await startWriter(place)
      alpha().controlPlane.signal('SIGSTOP', 'etcd')
      const before = writer.last
      const outcome = await place.run(save)
      assert.ok(writer.last <= before + 1, 'etcd has answered')
      alpha().controlPlane.signal('SIGCONT', 'etcd')
      await alpha().controlPlane.recover()
      await writer.writesOn()
      return outcome
    },
    check: assertNothingLost,
  },
  {
    name: 'the disk is full when etcd is saved',
    done: '`backups/` is a file system of 100 KB',
    holds: 'half a backup is not kept; with more space it is saved',
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
    check: assertNothingLost,
  },
  {
    name: 'etcd is restored under a writer',
    done: '`etcd-backup restore` of a moment some writes ago, while the writer continues until the API server stops',
    holds: 'there are exactly the writes of the backup, not one more',
    exit: 0,
    says: ['restored in'],
    shortFormOf: 'etcd-backup',
    again: save,
    async inject(place) {
      const writer = await startWriter(place)
      await saved(place)
      await writer.writesOn()
      writer.stopWhenRefused()
      const outcome = await place.run(restore)
      await writer.refused()
      assert.ok(writer.last > (await inBackup(place)), 'the writer wrote nothing after the backup')
      await writer.assertExactly(await inBackup(place))
      return outcome
    },
  },
  {
    name: 'half a backup is restored under a writer',
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
      const before = alpha().changes().length
      const outcome = await place.run(restore)
      assert.equal(alpha().changes().length, before)
      await writer.writesOn()
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
      // The parent of the shell that runs there is the session's sshd.
      const cut = `#!/bin/bash
pid=$PPID
while [ "$(cat /proc/$pid/comm)" != sshd ]; do pid=$(cut -d" " -f4 /proc/$pid/stat); done
kill -9 $pid
sleep 1
exit 1
`
      await alpha().sshd.program('etcdutl', cut)
      const before = alpha().changes().length
      const outcome = await place.run(restore)
      await alpha().useReal('etcdutl')
      assert.equal(alpha().changes().length, before)
      await writer.writesOn()
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
      await slow('etcdutl')
      const before = alpha().changes().length
      const script = place.start(restore)
      await reached(place, 'etcdutl')
      script.kill('SIGKILL')
      const outcome = await script.outcome
      await alpha().useReal('etcdutl')
      await writer.writesOn()
      assert.equal(alpha().changes().length, before)
      await writer.stop()
      await writer.assertNothingLost()
      return outcome
    },
    check: assertRestored,
  },
  {
    name: 'a restore of etcd is killed in the middle of the change',
    done: '`kill -9` of the script when it has begun to change the data',
    holds: 'the second run restores, exactly the writes of the backup',
    exit: 137,
    again: restore,
    async inject(place) {
      const writer = await startWriter(place)
      await saved(place)
      writer.stopWhenRefused()
      return place.killWhen(restore, (said) => said.includes('changing the data'))
    },
    // Former data are named by the second.
    repair: () => becomes(() => false, 1.1),
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
      await writer.writesOn()
      writer.stopWhenRefused()
      const waits = (said: string) => said.includes('waiting for the control plane')
      const outcome = await place.killWhen(restore, waits, 'SIGINT')
      await writer.refused()
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
      await writer.writesOn()
      const real = join(alpha().controlPlane.place.etcd, 'etcdutl')
      const cut = `#!/bin/bash
${real} "$@" || exit
for word; do case $word in --data-dir=*) truncate -s 8192 "\${word#*=}/member/snap/db";; esac; done
`
      await alpha().sshd.program('etcdutl', cut)
      writer.stopWhenRefused()
      const outcome = await place.run(restore)
      await alpha().useReal('etcdutl')
      await writer.refused()
      await writer.assertNothingLost()
      return outcome
    },
    check: assertRestored,
  },
]

const writers = new WeakMap<Place, Writer>()
const whole = new WeakMap<Place, Buffer>()
let count = 0

function writerOf(place: Place): Writer {
  const writer = writers.get(place)
  assert.ok(writer)
  return writer
}

async function startWriter(place: Place): Promise<Writer> {
  count += 1
  const writer = await Writer.start(alpha().cluster, `counter-${count}`)
  writers.set(place, writer)
  place.atEnd(() => writer.stop())
  return writer
}

/** Nothing of a restore is left on the machine but the previous data. */
async function assertTidy(): Promise<void> {
  const tidy = async () => !(await readdir(join(alpha().data, '..'))).includes('etcd.new')
  assert.ok(await becomes(tidy, 10), 'etcd.new is left on alpha')
}

async function assertNothingLost(place: Place): Promise<void> {
  await assertTidy()
  await writerOf(place).stop()
  await writerOf(place).assertNothingLost()
}

/** What the second run has restored is the newest backup. */
async function assertRestored(place: Place): Promise<void> {
  await assertTidy()
  await writerOf(place).stop()
  await writerOf(place).assertExactly(await inBackup(place))
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
  const status = ['snapshot', 'status', '--write-out=json', await newest(place)]
  const { stdout } = await alpha().controlPlane.run('etcdutl', status)
  return writerOf(place).numberAt(JSON.parse(stdout).revision)
}

/** Saves etcd. @returns the file */
async function saved(place: Place): Promise<string> {
  const { exitCode, stderr } = await place.run(save)
  assert.equal(exitCode, 0, stderr)
  return newest(place)
}

const signOf = (place: Place, program: string) => place.path(`${program}-runs`)

/** Lets a program of etcd take two seconds on the machine, and say that it runs. */
async function slow(program: 'etcdctl' | 'etcdutl'): Promise<void> {
  const real = join(alpha().controlPlane.place.etcd, program)
  const sign = alpha().checkout.path(`${program}-runs`)
  const text = `#!/bin/sh\necho >'${sign}'\nsleep 2\nrm -f '${sign}'\nexec ${real} "$@"\n`
  await alpha().sshd.program(program, text)
}

async function reached(place: Place, program: string): Promise<void> {
  const there = () =>
    stat(signOf(place, program)).then(
      () => true,
      () => false,
    )
  assert.ok(await becomes(there, 60), `${program} was not called`)
}
