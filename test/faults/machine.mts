// Faults of machines: a real QEMU without acceleration whose machine has an empty disk, so that its
// firmware runs; and the simulated installer, a shell in namespaces under the name of QEMU.
import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { createSocket } from 'node:dgram'
import { once } from 'node:events'
import { existsSync } from 'node:fs'
import { copyFile, readdir, readFile, rename, rm, stat, truncate } from 'node:fs/promises'
import { createServer } from 'node:net'
import { delimiter } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Node } from '../../lib/cluster.mts'
import { lanSwitchStatus, pidFileOf } from '../../lib/lan.mts'
import { isGone } from '../../lib/processes.mts'
import { Qmp } from '../../lib/qmp.mts'
import { filesOf, machineState } from '../../lib/vm.mts'
import { becomes } from '../../lib/wait.mts'
import type { Outcome } from '../checkout.mts'
import { installerFiles, makeIso, noIso } from '../installer-iso.mts'
import { makeLiveSystem, noLiveSystem } from '../live-system.mts'
import { missing } from '../tools.mts'
import { giveDisk, noMachines } from '../uefi-machine.mts'
import type { Fault, Place } from './fault.mts'

const [provision, snapshot] = ['bin/provision.mts', 'bin/snapshot.mts']
const [restore, shutdown] = ['bin/restore.mts', 'bin/shutdown.mts']
const qemu = 'qemu-system-x86_64'

/** For all of them. */
const common = {
  skip: noMachines,
  settings: {
    ...{ CONTROL_PLANE_MEM: 256, CONTROL_PLANE_CPUS: 1, WORKER_MEM: 256, WORKER_CPUS: 1 },
    ...{ DISK_SIZE: 2, QEMU_ACCEL: 'tcg', STOP_TIMEOUT: 1, BOOT_TIMEOUT: 60 },
  },
}
const installing = { ...common, skip: noMachines || noLiveSystem || noIso, keys: true }

export const machineFaults: Fault[] = [
  // ── A QEMU that hangs, or ends ─────────────────────────────────────────────────────────────
  {
    ...common,
    name: 'a QEMU hangs when it is to be shut down',
    done: 'SIGSTOP to the QEMU of alpha, then `shutdown --now`',
    holds: 'it is killed, and alpha starts again',
    exit: 0,
    says: ['alpha  did not answer and was killed'],
    shortFormOf: 'shutdown',
    runs: ['alpha'],
    again: [provision, 'alpha'],
    async inject(place) {
      process.kill(await startMachine(place, 'alpha'), 'SIGSTOP')
      return place.run([shutdown, '--now', 'alpha'])
    },
  },
  {
    ...common,
    name: 'a QEMU hangs when a snapshot is taken',
    done: 'SIGSTOP to the QEMU of sigma, then `snapshot`; SIGCONT before the second run',
    holds: 'no disk has the snapshot that failed, and alpha was not left paused',
    exit: 1,
    says: ['QEMU'],
    shortFormOf: 'snapshot',
    runs: ['alpha', 'sigma'],
    again: [snapshot, 'second'],
    async inject(place) {
      await giveDisks(place)
      await startMachine(place, 'alpha')
      const pid = await startMachine(place, 'sigma')
      process.kill(pid, 'SIGSTOP')
      const outcome = await place.run([snapshot, 'first'])
      process.kill(pid, 'SIGCONT')
      assert.deepEqual(await snapshotsOn(place, 'alpha'), [])
      assert.equal(await statusOf(place, 'alpha'), 'running')
      return outcome
    },
    check: assertSnapshotsMatch,
  },
  {
    ...common,
    name: 'a QEMU crashes',
    done: '`kill -9` of the QEMU of alpha; its pid file and sockets stay',
    holds:
      'what needs the machine says that it is not running, and how to start it; the console of that run is kept',
    exit: 1,
    says: ['alpha is not running', 'hint:    make boot-alpha'],
    runs: ['alpha'],
    again: [provision, 'alpha'],
    async inject(place) {
      const pid = await startMachine(place, 'alpha')
      assert.ok(await becomes(async () => (await consoleOf(place, 'alpha')).length > 0, 60))
      process.kill(pid, 'SIGKILL')
      assert.ok(await becomes(() => isGone(pid), 10))
      return place.run(['bin/ssh.mts', 'alpha', 'true'])
    },
    async check(place) {
      assert.ok((await stat(place.path('images', 'alpha-console.log.1'))).size > 0)
    },
  },
  {
    ...common,
    name: 'the control socket of a QEMU is gone',
    done: '`run/alpha.qmp` is removed while alpha runs, then `snapshot`',
    holds: 'alpha runs on; it can be stopped and started again',
    exit: 1,
    says: ['alpha.qmp'],
    runs: ['alpha'],
    again: [provision, 'alpha'],
    async inject(place) {
      await giveDisks(place)
      const pid = await startMachine(place, 'alpha')
      await rm(filesOf(place.cluster, place.cluster.controlPlane).qmp)
      const outcome = await place.run([snapshot, 'first'])
      assert.equal(await isGone(pid), false)
      return outcome
    },
    repair: (place) => place.run([shutdown, '--now']),
    check: assertSnapshotsMatch,
  },
  {
    ...common,
    name: 'the pid file of a machine is gone',
    done: '`run/alpha.pid` is removed while alpha runs, then `provision`',
    holds: 'no second QEMU is started for the same disk; the first runs on, and is named',
    exit: 1,
    says: ['is taken by qemu-system', 'end that process'],
    runs: ['alpha'],
    again: [provision, 'alpha'],
    async inject(place) {
      const pid = await startMachine(place, 'alpha')
      await rm(place.path('run', 'alpha.pid'))
      const outcome = await place.run([provision, 'alpha'])
      assert.equal(await isGone(pid), false)
      process.kill(pid, 'SIGKILL')
      assert.ok(await becomes(() => isGone(pid), 10))
      return outcome
    },
  },

  // ── The LAN ────────────────────────────────────────────────────────────────────────────────
  {
    ...common,
    name: 'the LAN switch ends',
    done: '`kill -9` of the switch while alpha runs, then `provision`',
    holds: 'a new switch has the ports of all machines; the QEMU is the same',
    exit: 0,
    says: ['alpha  runs already'],
    shortFormOf: 'lan-switch',
    runs: ['alpha'],
    again: [provision, 'alpha'],
    inject: (place) => withSwitch(place, 'SIGKILL'),
    check: assertSwitch,
  },
  {
    ...common,
    name: 'the LAN switch hangs',
    done: 'SIGSTOP to the switch while alpha runs, then `provision`',
    holds: 'it is replaced by a switch that answers',
    exit: 0,
    says: ['alpha  runs already'],
    runs: ['alpha'],
    again: [provision, 'alpha'],
    inject: (place) => withSwitch(place, 'SIGSTOP'),
    check: assertSwitch,
  },

  // ── Killed, interrupted, without power ─────────────────────────────────────────────────────
  {
    ...common,
    name: 'provision is killed while it starts a machine',
    done: '`kill -9` when its lock, the LAN switch, the QEMU is there',
    holds: 'in the end there is exactly one QEMU',
    exit: 137,
    runs: ['alpha'],
    again: [provision, 'alpha'],
    async inject(place) {
      await giveDisks(place)
      let last: Outcome | undefined
      for (const file of ['alpha.lock', 'lan-switch.pid', 'alpha.pid']) {
        await place.run([shutdown, '--now'])
        for (const name of ['alpha.lock', 'alpha.pid']) {
          await rm(place.path('run', name), { force: true })
        }
        last = await place.killWhen([provision, 'alpha'], () => existsSync(place.path('run', file)))
      }
      return last as Outcome
    },
    async check(place) {
      const found = (await place.processes()).filter(({ line }) => line.includes('-name alpha'))
      assert.equal(found.length, 1, JSON.stringify(found))
    },
  },
  {
    ...common,
    name: 'three at once start a machine',
    done: 'three `provision alpha` at the same time',
    holds: 'one starts it, two find it running, and there is one QEMU',
    exit: 0,
    says: ['alpha'],
    shortFormOf: 'vm',
    runs: ['alpha'],
    again: [provision, 'alpha'],
    async inject(place) {
      await giveDisks(place)
      const all = await Promise.all([1, 2, 3].map(() => place.run([provision, 'alpha'])))
      const started = all.filter(({ stdout }) => /^alpha +started/m.test(stdout))
      assert.equal(started.length, 1, all.map(({ stdout, stderr }) => stdout + stderr).join('\n'))
      for (const { exitCode, stderr } of all) assert.equal(exitCode, 0, stderr)
      return all[0] as Outcome
    },
  },
  {
    ...common,
    name: 'a snapshot is killed',
    done: '`kill -9` of `snapshot` 400, 150 and 0 ms after it has begun to write, with two running machines',
    holds:
      'the machines are not left paused; each snapshot is on all disks and in the list, or nowhere',
    exit: 137,
    shortFormOf: 'snapshot',
    runs: ['alpha', 'sigma'],
    again: [snapshot, 'last'],
    async inject(place) {
      await giveDisks(place)
      await startMachine(place, 'alpha')
      await startMachine(place, 'sigma')
      let last: Outcome | undefined
      for (const delay of [400, 150, 0]) {
        const script = place.start([snapshot, `after-${delay}`])
        while (!existsSync(place.path('snapshots', `.after-${delay}.partial`))) {
          assert.equal(await isGone(script.pid), false, script.said())
          await sleep(5)
        }
        await sleep(delay)
        if (!(await isGone(script.pid))) script.kill('SIGKILL')
        last = await script.outcome
      }
      return last as Outcome
    },
    async check(place) {
      await assertSnapshotsMatch(place)
      // Before it takes the next one, a snapshot resumes what a killed one has left.
      for (const name of ['alpha', 'sigma']) assert.equal(await statusOf(place, name), 'running')
    },
  },
  {
    ...common,
    name: 'Ctrl-C while a snapshot is taken',
    done: 'SIGINT to the process group of `snapshot` when it has begun to write, with a running machine',
    holds: 'nothing of it is left, and the machine runs on',
    exit: 130,
    says: ['interrupted by SIGINT'],
    runs: ['alpha'],
    again: [snapshot, 'first'],
    async inject(place) {
      await giveDisks(place)
      await startMachine(place, 'alpha')
      const begun = () => existsSync(place.path('snapshots', '.first.partial'))
      const outcome = await place.killWhen([snapshot, 'first'], begun, 'SIGINT')
      assert.deepEqual(await snapshotsOn(place, 'alpha'), [])
      assert.equal(await statusOf(place, 'alpha'), 'running')
      return outcome
    },
    check: assertSnapshotsMatch,
  },
  {
    ...common,
    name: 'a restore is killed while it puts disks back',
    done: '`kill -9` of `restore` and the scripts it runs, when it puts back disks, keys and settings',
    holds: 'a second restore brings back all disks and settings of that moment',
    exit: 137,
    runs: ['alpha', 'sigma', 'gamma'],
    again: [restore, '--start-only', 'first'],
    async inject(place) {
      await giveDisks(place)
      await fill(place, 1)
      const outcome = await place.run([snapshot, 'first'])
      assert.equal(outcome.exitCode, 0, outcome.stderr)
      await fill(place, 2)
      await place.checkout.set({ CERT_DAYS: 300 })
      return place.killWhen([restore, '--start-only', 'first'], (said) => said.includes('put back'))
    },
    async check(place) {
      await place.run([shutdown, '--now'])
      await assertFilled(place, 1)
      assert.equal(place.cluster.settings.CERT_DAYS, 365)
    },
  },
  {
    ...common,
    name: 'the power fails while a snapshot is taken',
    done: '`kill -9` of everything at once, three QEMUs, LAN switch and scripts, when `snapshot` has begun to write',
    holds: 'all machines start again; nothing of that snapshot is left after the next one',
    exit: 137,
    runs: ['alpha', 'sigma', 'gamma'],
    again: [provision],
    async inject(place) {
      await giveDisks(place)
      const outcome = await place.run([provision])
      assert.equal(outcome.exitCode, 0, outcome.stderr)
      const script = place.start([snapshot, 'first'])
      while (!existsSync(place.path('snapshots', '.first.partial'))) await sleep(5)
      await place.powerCut()
      return script.outcome
    },
    async check(place) {
      for (const { name } of place.cluster.nodes) {
        assert.equal(await statusOf(place, name), 'running')
      }
      const outcome = await place.run([snapshot, 'second'])
      assert.equal(outcome.exitCode, 0, outcome.stderr)
      await assertSnapshotsMatch(place)
    },
  },

  // ── Files that are damaged, disks that are full ────────────────────────────────────────────
  {
    ...common,
    name: 'a disk without content',
    done: '`images/sigma.qcow2` has length 0, as a file system may leave it after a power cut, then `provision alpha sigma`',
    holds:
      'alpha runs, no QEMU of sigma does; the log is named; with the disk from a copy sigma starts',
    exit: 1,
    says: ['QEMU of sigma ended at once', 'log:     '],
    runs: ['alpha'],
    again: [provision, 'alpha', 'sigma'],
    async inject(place) {
      await giveDisks(place)
      const { disk } = filesOf(place.cluster, place.cluster.node('sigma'))
      await copyFile(disk, place.path('kept.qcow2'))
      await truncate(disk)
      const outcome = await place.run([provision, 'alpha', 'sigma'])
      assert.equal(await statusOf(place, 'alpha'), 'running')
      assert.equal(
        (await machineState(place.cluster, place.cluster.node('sigma'))).state,
        'stopped',
      )
      return outcome
    },
    repair: (place) =>
      copyFile(place.path('kept.qcow2'), filesOf(place.cluster, place.cluster.node('sigma')).disk),
  },
  {
    ...common,
    name: 'another program has a disk open',
    done: 'a QEMU of somebody else uses `images/alpha.qcow2`, then `provision alpha`',
    holds: 'alpha is not started, and the other QEMU runs on',
    exit: 1,
    says: ['QEMU of alpha ended at once: another program has this disk open'],
    shortFormOf: 'vm',
    runs: ['alpha'],
    again: [provision, 'alpha'],
    async inject(place) {
      await giveDisks(place)
      const { disk } = filesOf(place.cluster, place.cluster.controlPlane)
      const idle = ['-machine', 'none', '-nodefaults', '-display', 'none', '-monitor', 'stdio']
      const drive = ['-drive', `if=none,id=disk,file=${disk}`]
      const holder = spawn(qemu, [...idle, ...drive], { stdio: ['pipe', 'pipe', 'ignore'] })
      const ended = once(holder, 'exit')
      await once(holder.stdout, 'data')
      const outcome = await place.run([provision, 'alpha'])
      assert.equal(holder.exitCode, null)
      holder.kill('SIGKILL')
      await ended
      return outcome
    },
  },
  {
    ...common,
    name: 'half of a file in a snapshot',
    done: '`snapshots/first/cluster.env` is cut in the middle while alpha runs, then `restore`',
    holds: 'alpha runs on, the same QEMU; nothing else is changed',
    exit: 1,
    says: ['snapshots/first/cluster.env is missing or was changed', 'nothing was changed'],
    shortFormOf: 'snapshot',
    runs: ['alpha', 'sigma', 'gamma'],
    again: [restore, '--start-only', 'first'],
    async inject(place) {
      await giveDisks(place)
      const taken = await place.run([snapshot, 'first'])
      assert.equal(taken.exitCode, 0, taken.stderr)
      const pid = await startMachine(place, 'alpha')
      const file = place.path('snapshots', 'first', 'cluster.env')
      await truncate(file, Math.floor((await stat(file)).size / 2))
      const outcome = await place.run([restore, '--start-only', 'first'])
      assert.equal(await isGone(pid), false)
      return outcome
    },
    repair: (place) =>
      copyFile(place.path('cluster.env'), place.path('snapshots', 'first', 'cluster.env')),
  },
  {
    ...common,
    name: 'half of the record of a snapshot',
    done: '`snapshots/first/snapshot.json` is cut in the middle, then `restore`; then the command of the hint',
    holds: 'no disk was touched; that command removes the snapshot from the disks',
    exit: 1,
    says: [
      'snapshots/first/snapshot.json cannot be read',
      'mv snapshots/first snapshots/.first.partial && ./bin/snapshot.mts --delete first',
    ],
    again: [snapshot, '--delete', 'first'],
    async inject(place) {
      await giveDisks(place)
      await fill(place, 1)
      const taken = await place.run([snapshot, 'first'])
      assert.equal(taken.exitCode, 0, taken.stderr)
      await fill(place, 2)
      const file = place.path('snapshots', 'first', 'snapshot.json')
      await truncate(file, Math.floor((await stat(file)).size / 2))
      return place.run([restore])
    },
    repair: (place) =>
      rename(place.path('snapshots', 'first'), place.path('snapshots', '.first.partial')),
    async check(place) {
      await assertFilled(place, 2)
      await assertSnapshotsMatch(place)
    },
  },
  {
    ...common,
    name: 'too little space for a snapshot',
    done: '`images/` is a file system of 100 MB with the disk of a running machine, then `snapshot`',
    holds: 'nothing is written, and the machine runs on; with more space the snapshot is taken',
    exit: 1,
    says: ['not enough disk space', 'free space where images/ is, or remove a snapshot'],
    skip: noMachines || missing('unshare', 'nsenter'),
    runs: ['alpha'],
    again: [snapshot, 'first'],
    async inject(place) {
      await place.mount('images', '-t tmpfs -o size=100m none')
      for (const node of place.cluster.nodes) {
        const { disk } = filesOf(place.cluster, node)
        await place.run(['qemu-img', 'create', '-q', '-f', 'qcow2', disk, '1G'])
      }
      const started = await place.run([provision, 'alpha'])
      assert.equal(started.exitCode, 0, started.stderr)
      const outcome = await place.run([snapshot, 'first'])
      assert.equal(await statusOf(place, 'alpha'), 'running')
      assert.equal(existsSync(place.path('snapshots', 'first')), false)
      return outcome
    },
    repair: (place) => place.remount('images', 'size=8g'),
  },
  {
    ...common,
    name: 'ports are taken',
    done: 'other programs listen on the ssh port (TCP) and the LAN port (UDP) of alpha, then `provision alpha`',
    holds: 'both are named with their program; they are still served by it; no QEMU is started',
    exit: 1,
    says: ['2 ports are taken', '(SSH_PORT_alpha)', '(LAN_SWITCH_PORT)', 'end that process'],
    shortFormOf: 'provision',
    runs: ['alpha'],
    again: [provision, 'alpha'],
    async inject(place) {
      await giveDisks(place)
      const alpha = place.cluster.controlPlane
      const server = createServer().listen(alpha.sshPort, '127.0.0.1')
      const socket = createSocket('udp4')
      socket.bind(alpha.lanPort, '127.0.0.1')
      await Promise.all([once(server, 'listening'), once(socket, 'listening')])
      const outcome = await place.run([provision, 'alpha'])
      assert.ok(server.listening)
      assert.ok(outcome.stderr.includes(`(pid ${process.pid})`), outcome.stderr)
      assert.equal((await machineState(place.cluster, alpha)).state, 'stopped')
      await Promise.all([
        new Promise((resolve) => server.close(resolve)),
        new Promise<void>((resolve) => socket.close(() => resolve())),
      ])
      return outcome
    },
  },

  // ── Installation ───────────────────────────────────────────────────────────────────────────
  {
    ...installing,
    name: 'an installation is killed at each of its steps',
    done: '`kill -9` of `provision --iso` at the beginning of each step, from the boot of the installer to power-off',
    holds:
      'its machine has ended with it, and there is no disk that could be taken for an installed one; the second run installs',
    exit: 137,
    shortFormOf: 'provision',
    again: [provision, '--iso-file', 'installer.iso', 'alpha'],
    async inject(place) {
      await prepareInstallation(place)
      const steps = [
        ...['boot the installer', 'partition the disk', 'copy the configuration'],
        ...['nixos-install', 'check the boot files', 'power off'],
      ]
      let last: Outcome | undefined
      for (const step of steps) {
        const begun = (said: string) => said.includes(`alpha · ${step} …`)
        last = await place.killWhen(install, begun)
        const ended = async () => (await place.processes()).length === 0
        assert.ok(await becomes(ended, 15), JSON.stringify(await place.processes()))
        assert.equal(existsSync(place.path('images', 'alpha.qcow2')), false, step)
      }
      return last as Outcome
    },
    check: assertInstalled,
  },
  {
    ...installing,
    name: 'Ctrl-C during nixos-install',
    done: 'SIGINT to `provision --iso` while nixos-install hangs',
    holds: 'no machine and no disk is left',
    exit: 130,
    says: ['interrupted by SIGINT'],
    shortFormOf: 'provision',
    again: [provision, '--iso-file', 'installer.iso', 'alpha'],
    async inject(place) {
      await prepareInstallation(place)
      place.env.LIVE_FAULTS = 'stuck'
      const outcome = await place.killWhen(install, () => isStuck(place), 'SIGINT')
      assert.deepEqual((await readdir(place.path('images'))).sort(), [
        'alpha-install.log',
        'own.txt',
      ])
      place.env.LIVE_FAULTS = ''
      return outcome
    },
    check: assertInstalled,
  },
  {
    ...installing,
    name: 'QEMU is killed during nixos-install',
    done: '`kill -9` of the machine while nixos-install hangs',
    holds: 'the script makes a second attempt on its own, which succeeds',
    exit: 0,
    says: ['second attempt, because: alpha, nixos-install: ended by signal 9'],
    shortFormOf: 'provision',
    again: ['bin/clean.mts', '--list'],
    async inject(place) {
      await prepareInstallation(place)
      place.env.LIVE_FAULTS = 'stuck-once'
      const script = place.start(install)
      while (!(await isStuck(place))) await sleep(20)
      const found = await machineState(place.cluster, place.cluster.controlPlane)
      assert.ok(found.state === 'installing')
      process.kill(found.pid, 'SIGKILL')
      return script.outcome
    },
    check: assertInstalled,
  },
  {
    ...installing,
    name: 'the console of an installation is flooded',
    done: 'the kernel prints 300 messages a second over the prompts and into the output of commands',
    holds: "each command's status is still read back, and the machine is installed",
    exit: 0,
    shortFormOf: 'provision',
    again: ['bin/clean.mts', '--list'],
    async inject(place) {
      await prepareInstallation(place)
      place.env.LIVE_FAULTS = 'noise'
      return place.run(install)
    },
    check: assertInstalled,
  },
]

const install = [provision, '--iso-file', 'installer.iso', 'alpha']

async function giveDisks(place: Place): Promise<void> {
  for (const node of place.cluster.nodes) await giveDisk(place.cluster, node)
}

/** Gives a node a disk and starts it. @returns its pid */
async function startMachine(place: Place, name: string): Promise<number> {
  await giveDisk(place.cluster, place.cluster.node(name))
  const { exitCode, stdout, stderr } = await place.run([provision, name])
  assert.equal(exitCode, 0, stderr)
  return Number(stdout.match(/\(pid (\d+)\)/)?.[1])
}

/** The state of a machine as its QEMU calls it: running, paused, … */
async function statusOf(place: Place, name: string): Promise<string> {
  const qmp = await Qmp.connect(filesOf(place.cluster, place.cluster.node(name)).qmp)
  const answer = (await qmp.execute('query-status')) as { status: string }
  qmp.close()
  return answer.status
}

function consoleOf(place: Place, name: string): Promise<string> {
  const { consoleLog } = filesOf(place.cluster, place.cluster.node(name))
  return readFile(consoleLog, 'utf8').catch(() => '')
}

// ── Snapshots ────────────────────────────────────────────────────────────────────────────────
async function snapshotsOn(place: Place, name: string): Promise<string[]> {
  const { disk } = filesOf(place.cluster, place.cluster.node(name))
  const { stdout } = await place.run(['qemu-img', 'info', '-U', '--output=json', disk])
  const all: { name: string }[] = JSON.parse(stdout).snapshots ?? []
  return all.map((each) => each.name).sort()
}

/** Every snapshot of the list is on every disk, and no other is on any. */
async function assertSnapshotsMatch(place: Place): Promise<void> {
  const { stdout } = await place.run([snapshot, '--list', '--json'])
  const listed = (JSON.parse(stdout) as { name: string }[]).map((each) => each.name).sort()
  for (const { name } of place.cluster.nodes) {
    assert.deepEqual(await snapshotsOn(place, name), listed, name)
  }
}

/** Writes a pattern to all disks, whose machines are off. */
async function fill(place: Place, pattern: number): Promise<void> {
  for (const node of place.cluster.nodes) {
    const { exitCode, stderr } = await qemuIo(place, node, `write -P ${pattern} 1M 1M`)
    assert.equal(exitCode, 0, stderr)
  }
}

async function assertFilled(place: Place, pattern: number): Promise<void> {
  for (const node of place.cluster.nodes) {
    const { stdout } = await qemuIo(place, node, `read -P ${pattern} 1M 1M`)
    // It exits 0 in spite of a difference.
    assert.match(stdout, /read 1048576/)
    assert.doesNotMatch(stdout, /verification failed/i, node.name)
  }
}

const qemuIo = (place: Place, node: Node, command: string) =>
  place.run(['qemu-io', '-f', 'qcow2', '-c', command, filesOf(place.cluster, node).disk])

// ── The LAN switch ───────────────────────────────────────────────────────────────────────────
/** Starts alpha, sends a signal to the switch, and runs provision again. */
async function withSwitch(place: Place, signal: NodeJS.Signals): Promise<Outcome> {
  const machine = await startMachine(place, 'alpha')
  const pid = Number(await readFile(pidFileOf(place.cluster), 'utf8'))
  process.kill(pid, signal)
  const outcome = await place.run([provision, 'alpha'])
  assert.equal(await isGone(machine), false)
  assert.notEqual((await lanSwitchStatus(place.cluster))?.pid, pid)
  assert.ok(await becomes(() => isGone(pid), 10))
  return outcome
}

async function assertSwitch(place: Place): Promise<void> {
  const { cluster } = place
  const status = await lanSwitchStatus(cluster)
  assert.deepEqual(
    status?.ports,
    cluster.nodes.map(({ lanPort }) => lanPort),
  )
}

// ── Installation ─────────────────────────────────────────────────────────────────────────────
/** Puts the simulated installer in the place of QEMU. */
async function prepareInstallation(place: Place): Promise<void> {
  const system = await makeLiveSystem()
  place.atEnd(() => system.remove())
  const path = `${system.folder}${delimiter}${process.env.PATH}`
  Object.assign(place.env, system.env(), { PATH: path, http_proxy: '', NIX_SSL_CERT_FILE: '' })
  await makeIso(place.path('installer.iso'), installerFiles)
}

async function isStuck(place: Place): Promise<boolean> {
  const { installLog } = filesOf(place.cluster, place.cluster.controlPlane)
  return /^stuck here$/m.test(await readFile(installLog, 'utf8').catch(() => ''))
}

async function assertInstalled(place: Place): Promise<void> {
  const names = (await readdir(place.path('images'))).sort()
  assert.ok(names.includes('alpha.qcow2'), `${names}`)
  assert.ok(!names.some((name) => name.includes('partial')), `${names}`)
}
