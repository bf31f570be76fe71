// Faults that need scripts and files only, no machine.
import assert from 'node:assert/strict'
import { type ChildProcess, spawn } from 'node:child_process'
import { createHash, randomBytes } from 'node:crypto'
import { existsSync } from 'node:fs'
import {
  copyFile,
  mkdir,
  readdir,
  readFile,
  rm,
  stat,
  symlink,
  truncate,
  writeFile,
} from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { retry } from 'zx'
import { isGone } from '../../lib/processes.mts'
import { type Outcome, projectRoot } from '../checkout.mts'
import { type FileServer, startFileServer } from '../file-server.mts'
import { noQemu } from '../idle-qemu.mts'
import { makeIso, noIso } from '../installer-iso.mts'
import { missing } from '../tools.mts'
import type { Fault, Place } from './fault.mts'

const [certs, staging] = ['bin/generate-certs.mts', 'bin/generate-nocloud-iso.mts']
const [download, bootstrap] = ['bin/download-iso.mts', 'bin/bootstrap-cluster.mts']
const noMount = missing('unshare', 'nsenter')
const small = {
  ...{ CONTROL_PLANE_MEM: 256, WORKER_MEM: 256, DISK_SIZE: 2 },
  // A rehearsal's computer has no other.
  QEMU_ACCEL: 'tcg',
}

export const hostFaults: Fault[] = [
  // ── Killed ─────────────────────────────────────────────────────────────────────────────────
  {
    name: 'bootstrap is killed at each of its steps',
    done: '`kill -9` of `bootstrap-cluster` and the step it runs, at the beginning of each step, and run again, up to the installation',
    holds:
      'each run continues where the last one ended; certificates, kubeconfigs and staged files are complete',
    exit: 137,
    skip: noQemu || noIso,
    settings: small,
    again: [certs, '--check'],
    async inject(place) {
      await place.checkout.set({ NIXOS_ISO_URL: await isoFor(place) })
      const steps = [
        ...['check-prereqs', 'download-iso', 'generate-certs', 'generate-kubeconfigs'],
        ...['generate-encryption-config', 'generate-nocloud-iso', 'provision'],
      ]
      let last: Outcome | undefined
      for (const step of steps) {
        last = await place.killWhen([bootstrap], (said) => said.includes(`$ ./bin/${step}.mts`))
      }
      return last as Outcome
    },
    async check(place) {
      assert.ok(existsSync(place.path('configs', 'encryption-config.yaml')))
      for (const { name } of place.cluster.nodes) {
        assert.ok(existsSync(place.path('cloud-init', name, 'nixos/etc/nixos/cluster.json')), name)
      }
      await takesLockOver(place)
    },
  },
  {
    name: 'generate-certs is killed while it writes',
    done: '`kill -9` when the first, the tenth and the twentieth file of `tls/` is there',
    holds: 'every certificate matches its key and is signed by the one authority',
    exit: 137,
    shortFormOf: 'generate-certs',
    again: [certs],
    async inject(place) {
      let last: Outcome | undefined
      for (const count of [1, 10, 20]) {
        last = await place.killWhen([certs], async () => (await filesIn(place, 'tls')) >= count)
      }
      return last as Outcome
    },
    check: (place) => succeeds(place, [certs, '--check']),
  },
  {
    name: 'staging is killed while it writes',
    done: '`kill -9` of `generate-nocloud-iso` when the first, the eighth and the 16th file is there',
    holds: 'each machine has exactly the files of an undisturbed run',
    exit: 137,
    keys: true,
    again: [staging],
    async inject(place) {
      await copyAside(place, 'cloud-init')
      let last: Outcome | undefined
      for (const count of [1, 8, 16]) {
        const when = async () => (await filesIn(place, 'cloud-init')) >= count
        // It may have written everything before the signal gets there: another attempt.
        last = await retry(20, async () => {
          await rm(place.path('cloud-init'), { recursive: true })
          const outcome = await place.killWhen([staging], when)
          if (outcome.exitCode !== 137) throw new Error('it has ended before the signal')
          return outcome
        })
      }
      return last as Outcome
    },
    check: (place) => assertAsAside(place, 'cloud-init'),
  },
  {
    name: 'clean is killed while it removes',
    done: '`kill -9` of `clean --disks` when it has said what it removes; before that, other scripts were killed while they wrote keys',
    holds: 'nothing is left but what a clone has, and the user’s own files',
    exit: 137,
    keys: true,
    again: ['bin/clean.mts', '--disks'],
    async inject(place) {
      await writeFile(place.path('images', 'alpha.qcow2'), 'a disk')
      const halves = [
        'tls/.sigma-key.pem.tmp-1-ab',
        'tls/.ssh_ed25519.tmp-1',
        'tls/.ssh_ed25519.tmp-1.pub',
      ]
      halves.push('configs/.admin.kubeconfig.tmp-1-ab', 'configs/.encryption-config.yaml.tmp-1-ab')
      for (const file of halves) await writeFile(place.path(file), 'half')
      return place.killWhen(['bin/clean.mts', '--disks'], (said) => said.includes('REMOVED'))
    },
    async check(place) {
      for (const name of ['tls', 'cloud-init', 'images/alpha.qcow2', 'configs/admin.kubeconfig']) {
        assert.equal(existsSync(place.path(name)), false, name)
      }
      const hidden = (await readdir(place.path('configs'))).filter((name) => /^\.|yaml/.test(name))
      assert.deepEqual(hidden, [])
    },
  },
  {
    name: 'a download is killed, and its curl is not',
    done: '`kill -9` of `download-iso` alone, which leaves its curl running; run again at once',
    holds: 'the ISO is that of the server, whatever both have written',
    exit: 137,
    skip: noIso,
    again: [download],
    async inject(place) {
      await serveIso(place, 100)
      return place.killWhen([download], async () => (await received(place)) > 100_000)
    },
    check: assertIso,
  },
  {
    name: 'the power fails while bootstrap downloads',
    done: '`kill -9` of all processes at once: script, step and curl',
    holds: 'the second run continues the download where it ended',
    exit: 137,
    skip: noIso || noQemu,
    settings: small,
    again: [download],
    async inject(place) {
      const server = await serveIso(place, 100)
      const script = place.start([bootstrap])
      while ((await received(place)) < 100_000) await pause()
      await place.powerCut()
      for (const file of server.files.values()) file.pause = 0
      server.requests.length = 0
      return script.outcome
    },
    async check(place) {
      const requests = servers.get(place)?.requests ?? []
      assert.ok(
        requests.some((line) => /^GET \/nixos\.iso bytes=\d{6,}-/.test(line)),
        `${requests}`,
      )
      await assertIso(place)
      await takesLockOver(place)
    },
  },

  // ── Interrupted, two at once ───────────────────────────────────────────────────────────────
  {
    name: 'Ctrl-C while bootstrap downloads',
    done: 'SIGINT to its process group, as a terminal sends it',
    holds: 'script, step and curl have ended; the second run continues the download',
    exit: 130,
    says: ['interrupted by SIGINT'],
    leaves: /\.iso\.partial$/,
    skip: noIso || noQemu,
    settings: small,
    shortFormOf: 'download-iso',
    again: [download],
    async inject(place) {
      const server = await serveIso(place, 100)
      const when = async () => (await received(place)) > 100_000
      const outcome = await place.killWhen([bootstrap], when, 'SIGINT')
      for (const file of server.files.values()) file.pause = 0
      return outcome
    },
    check: assertIso,
  },
  {
    name: 'other scripts are started while bootstrap works',
    done: '`bootstrap-cluster`, `clean --disks`, `snapshot`, `restore`, `etcd-backup` and `reconfig` during its download',
    holds: 'each names the lock holder and its pid, and has changed nothing; the first continues',
    exit: 1,
    says: [
      'another process is bootstrapping this cluster',
      '(pid ',
      'wait until it has finished, then try again',
    ],
    leaves: /\.iso\.partial$/,
    skip: noIso || noQemu,
    settings: small,
    shortFormOf: 'bootstrap-cluster',
    again: ['bin/clean.mts'],
    async inject(place) {
      await serveIso(place, 700)
      const first = place.start([bootstrap])
      place.atEnd(() => first.outcome)
      while ((await received(place)) === 0) await pause()
      const others = [
        ['bin/clean.mts', '--disks'],
        ['bin/snapshot.mts', 'mine'],
        ['bin/restore.mts'],
        ['bin/etcd-backup.mts', 'snapshot'],
        ['bin/reconfig.mts'],
        [bootstrap],
      ]
      const outcomes: Outcome[] = []
      for (const command of others) {
        const outcome = await place.run(command)
        assert.match(outcome.stderr, /another process is bootstrapping/, command.join(' '))
        assert.equal(outcome.exitCode, 1, command.join(' '))
        outcomes.push(outcome)
      }
      assert.equal(await isGone(first.pid), false, first.said())
      const before = await received(place)
      while ((await received(place)) === before) await pause()
      first.kill('SIGINT')
      await first.outcome
      return outcomes.at(-1) as Outcome
    },
  },
  {
    name: 'locks of holders that are dead',
    done: 'locks that name a dead process, a pid that another program has by now, half a lock and an empty one',
    holds: 'all of them are taken over',
    exit: 0,
    async inject(place) {
      await mkdir(place.path('run'), { mode: 0o700 })
      const holder = (pid: number) =>
        JSON.stringify({ pid, command: 'node ./bin/x.mts', purpose: 'working', nonce: 'f00d' })
      await writeFile(place.path('run', 'bootstrap.lock'), holder(2 ** 22 - 1))
      await writeFile(place.path('run', 'pki.lock'), holder(process.pid))
      await writeFile(place.path('run', 'encryption-config.lock'), holder(1).slice(0, 20))
      await writeFile(place.path('run', 'download-iso.lock'), '')
      await succeeds(place, [certs])
      await succeeds(place, ['bin/generate-encryption-config.mts'])
      await succeeds(place, [download, '--iso-url', await isoFor(place)])
      return place.run(['bin/clean.mts'])
    },
  },

  // ── Full and read-only file systems ────────────────────────────────────────────────────────
  {
    name: 'the disk is full while certificates are written',
    done: '`tls/` is a file system of 60 KB',
    holds: 'with more space the second run generates what is missing, and keeps what is there',
    exit: 1,
    says: ['the disk is full'],
    skip: noMount,
    again: [certs],
    async inject(place) {
      await place.mount('tls', '-t tmpfs -o size=60k none')
      return place.run([certs])
    },
    repair: (place) => place.remount('tls', 'size=10m'),
    check: (place) => succeeds(place, [certs, '--check']),
  },
  {
    name: 'the disk is full while machines are staged',
    done: '`cloud-init/` is a file system of 100 KB',
    holds: 'no machine has half of its files: what was begun has another name',
    exit: 1,
    says: ['a file: the disk is full'],
    leaves: /nixos\.new$/,
    skip: noMount,
    keys: true,
    again: [staging],
    async inject(place) {
      await copyAside(place, 'cloud-init')
      await place.mount('cloud-init', '-t tmpfs -o size=100k none')
      return place.run([staging])
    },
    repair: (place) => place.remount('cloud-init', 'size=10m'),
    check: (place) => assertAsAside(place, 'cloud-init'),
  },
  {
    name: 'the disk is full in the middle of a download',
    done: '`images/` is a file system of 1 MB, and the server does not say how large the ISO is',
    holds: 'with more space the second run continues the download',
    exit: 1,
    says: ['cannot be downloaded', 'curl: (23)'],
    leaves: /\.iso\.partial$/,
    skip: noIso || noMount,
    again: [download],
    async inject(place) {
      const server = await serveIso(place, 0)
      for (const file of server.files.values()) file.announced = 1000
      await place.mount('images', '-t tmpfs -o size=1m none')
      return place.run([download])
    },
    repair: (place) => place.remount('images', 'size=10m'),
    check: assertIso,
  },
  {
    name: 'tls/ is on a read-only file system',
    done: '`tls/` is mounted read-only',
    holds: 'nothing is written anywhere',
    exit: 1,
    says: ['the file system is read-only'],
    skip: noMount,
    again: [certs],
    async inject(place) {
      await place.mount('tls', '-t tmpfs -o ro none')
      return place.run([certs])
    },
    repair: (place) => place.remount('tls', 'rw'),
    check: (place) => succeeds(place, [certs, '--check']),
  },

  // ── Half a PKI ─────────────────────────────────────────────────────────────────────────────
  {
    name: 'the key of the authority is lost',
    done: '`tls/ca-key.pem` is gone',
    holds: 'nothing is replaced: the machines trust the old authority',
    exit: 1,
    says: ['the certificate authority cannot be used', 'restore tls/ca.pem and tls/ca-key.pem'],
    keys: true,
    shortFormOf: 'generate-certs',
    again: [certs],
    inject: (place) => withoutChange(place, () => rm(place.path('tls', 'ca-key.pem')), [certs]),
    repair: (place) => bringBack(place, 'tls'),
    check: (place) => assertAsAside(place, 'tls'),
  },
  {
    name: 'half of a key and an empty certificate',
    done: '`tls/sigma-key.pem` is cut in the middle, `tls/kubernetes.pem` has no content',
    holds: 'both are reissued by the same CA; all others are unchanged',
    exit: 0,
    keys: true,
    again: [certs, '--check'],
    async inject(place) {
      await copyAside(place, 'tls')
      await cutInHalf(place.path('tls', 'sigma-key.pem'))
      await truncate(place.path('tls', 'kubernetes.pem'))
      return place.run([certs])
    },
    async check(place) {
      const changed = ['kubernetes', 'sigma'].flatMap((name) => [`${name}-key.pem`, `${name}.pem`])
      const { stdout } = await place.run(['diff', '-rq', place.path('aside'), place.path('tls')])
      assert.deepEqual(stdout.match(/(?<=tls\/)\S+(?= differ)/g)?.sort(), changed.sort(), stdout)
    },
  },
  {
    name: 'half of an ssh host key',
    done: '`tls/ssh_host_sigma_ed25519` is cut in the middle',
    holds: 'it is not replaced: the machine could no longer be reached',
    exit: 1,
    says: ['ssh_host_sigma_ed25519', 'restore it from a copy'],
    keys: true,
    shortFormOf: 'generate-certs',
    again: [certs],
    inject: (place) =>
      withoutChange(place, () => cutInHalf(place.path('tls', 'ssh_host_sigma_ed25519')), [certs]),
    repair: (place) => bringBack(place, 'tls'),
    check: (place) => assertAsAside(place, 'tls'),
  },
  {
    name: 'half of the encryption key',
    done: '`configs/encryption-config.yaml` is cut in the middle',
    holds: 'it is not replaced: Secrets need its key',
    exit: 1,
    says: ['is not a valid EncryptionConfiguration', 'restore it from a copy'],
    keys: true,
    shortFormOf: 'generate-encryption-config',
    again: ['bin/generate-encryption-config.mts'],
    inject: (place) =>
      withoutChange(
        place,
        () => cutInHalf(place.path('configs', 'encryption-config.yaml')),
        ['bin/generate-encryption-config.mts'],
        'configs',
      ),
    repair: (place) => bringBack(place, 'configs'),
    check: (place) => assertAsAside(place, 'configs'),
  },
  {
    name: 'half of a kubeconfig',
    done: '`configs/sigma.kubeconfig` is cut in the middle',
    holds: 'it is rewritten with the same content; the others are kept',
    exit: 0,
    keys: true,
    again: [staging],
    async inject(place) {
      await copyAside(place, 'configs')
      await cutInHalf(place.path('configs', 'sigma.kubeconfig'))
      return place.run(['bin/generate-kubeconfigs.mts'])
    },
    check: (place) => assertAsAside(place, 'configs'),
  },
  {
    name: 'keys of installed machines are lost',
    done: '`tls/` is gone while there are disks',
    holds: 'no new keys are made, which no machine would accept',
    exit: 1,
    says: ['were installed with keys that are missing now: tls/ca.pem', 'restore them from a copy'],
    shortFormOf: 'bootstrap-cluster',
    async inject(place) {
      await writeFile(place.path('images', 'alpha.qcow2'), 'a disk')
      return place.run([bootstrap])
    },
    async check(place) {
      assert.equal(existsSync(place.path('tls')), false)
      assert.equal(await readFile(place.path('images', 'alpha.qcow2'), 'utf8'), 'a disk')
    },
  },

  // ── The clock ──────────────────────────────────────────────────────────────────────────────
  {
    name: 'the clock is 30 days behind',
    done: '`generate-certs` runs at a time before the certificates were issued',
    holds: 'good certificates are not renewed',
    exit: 1,
    says: ['the clock of this computer is behind, so nothing was renewed', 'set the clock'],
    keys: true,
    shortFormOf: 'generate-certs',
    again: [certs],
    async inject(place) {
      await copyAside(place, 'tls')
      return atAnotherTime(place, -30, [certs])
    },
    check: (place) => assertAsAside(place, 'tls'),
  },
  {
    name: 'certificates were issued while the clock was ahead',
    done: '`generate-certs` runs a year later, where it renews them, and then at the right time',
    holds: 'the hint is right: --force makes certificates that are valid now',
    exit: 1,
    says: ['the clock of this computer is behind', 'it is valid from', '--renew'],
    keys: true,
    again: [certs, '--force'],
    async inject(place) {
      const later = await atAnotherTime(place, 360, [certs])
      assert.equal(later.exitCode, 0, later.stderr)
      return place.run([certs])
    },
    check: (place) => succeeds(place, [certs, '--check']),
  },

  // ── Files that are wrong ───────────────────────────────────────────────────────────────────
  {
    name: 'cluster.env was edited by hand, wrongly',
    done: 'an open quote, a misspelt variable, a port twice, Windows line ends, a missing second half; each with `clean --disks` and `provision`',
    holds: 'every one is named with its line where it has one, and nothing has been changed',
    exit: 1,
    says: ['cluster.env'],
    again: [certs, '--help'],
    async inject(place) {
      const good = await readFile(place.path('cluster.env'), 'utf8')
      await writeFile(place.path('images', 'alpha.qcow2'), 'a disk')
      const before = await place.contentOf('images', 'configs')
      const mistakes: [string, RegExp][] = [
        [`${good}CLUSTER_NAME='open\n`, /cluster\.env:\d+: .*quote/],
        [good.replace('CLUSTER_NAME=', 'CLUSTER_NAMES='), /cluster\.env:\d+: CLUSTER_NAMES is not/],
        [`${good}SSH_PORT_alpha=2999\nSSH_PORT_sigma=2999\n`, /2999/],
        [good.replaceAll('\n', '\r\n'), /cluster\.env:1: ends in CR LF/],
        [good.slice(0, good.length / 2), /cluster\.env/],
      ]
      let last: Outcome | undefined
      for (const [text, message] of mistakes) {
        await writeFile(place.path('cluster.env'), text)
        for (const command of [['bin/provision.mts'], ['bin/clean.mts', '--disks']]) {
          last = await place.run(command)
          assert.match(last.stderr, message)
          assert.equal(last.exitCode, 1, last.stderr)
        }
      }
      await writeFile(place.path('cluster.env'), good)
      assert.equal(await place.contentOf('images', 'configs'), before)
      return last as Outcome
    },
  },
  {
    name: 'the ISO was cut off after it was verified',
    done: 'the verified ISO loses its second half; also given as --iso-file',
    holds: 'no machine is started, no disk made',
    exit: 1,
    says: [
      'has changed since ./bin/download-iso.mts verified it',
      'hint:    ./bin/download-iso.mts',
    ],
    skip: noIso || noQemu,
    settings: small,
    shortFormOf: 'provision',
    again: [download],
    async inject(place) {
      const source = await isoFor(place)
      await copyFile(source, place.path('kept.iso'))
      await succeeds(place, [download, '--iso-url', source])
      await cutInHalf(source)
      const given = await place.run(['bin/provision.mts', '--iso-file', source])
      assert.match(given.stderr, /is cut off: \d+ of \d+ bytes are there/)
      assert.equal(given.exitCode, 1)
      return place.run(['bin/provision.mts', '--iso'])
    },
    repair: (place) => place.checkout.set({ NIXOS_ISO_URL: place.path('kept.iso') }),
    async check(place) {
      const disks = (await readdir(place.path('images'))).filter((name) => /qcow2/.test(name))
      assert.deepEqual(disks, [])
    },
  },
  {
    name: 'the server has half an ISO',
    done: 'the file at the server is cut off, and has no checksum beside it',
    holds: 'it is not taken, and not continued when the server has the whole file',
    exit: 1,
    says: ['is cut off', './bin/download-iso.mts --force downloads it again'],
    skip: noIso,
    again: [download],
    async inject(place) {
      const server = await serveIso(place, 0)
      const file = server.files.get('/nixos.iso')
      assert.ok(file)
      server.files.delete('/nixos.iso.sha256')
      const { data } = file
      server.files.set('/nixos.iso', { data: data.subarray(0, data.length / 2) })
      const outcome = await place.run([download])
      server.files.set('/nixos.iso', { data })
      return outcome
    },
    check: assertIso,
  },
  {
    name: 'half of an etcd backup',
    done: 'a backup without its last byte, its checksum, its second half, with a byte changed, and an empty one',
    holds:
      'each is refused before anything is stopped; the whole file is accepted up to the missing machine',
    exit: 1,
    says: ['is not a complete etcd snapshot', 'nothing was changed; try another file of backups/'],
    keys: true,
    shortFormOf: 'etcd-backup',
    async inject(place) {
      const whole = await backupFor(place, await readFile(place.path('tls', 'ca.pem')))
      const data = await readFile(whole)
      const changed = Buffer.from(data)
      changed[5000] = (changed[5000] ?? 0) ^ 1
      const cut = [data.length - 1, data.length - 32, data.length / 2, 0]
      let last: Outcome | undefined
      for (const text of [...cut.map((length) => data.subarray(0, length)), changed]) {
        const file = place.path('backups', 'etcd-2026-01-02-000000.db')
        await writeFile(file, text)
        last = await place.run(['bin/etcd-backup.mts', 'restore'])
        assert.match(last.stderr, /is not a complete etcd snapshot/)
        await rm(file)
      }
      return last as Outcome
    },
    async check(place) {
      const { stderr } = await place.run(['bin/etcd-backup.mts', 'restore'])
      assert.doesNotMatch(stderr, /complete|another cluster/)
    },
  },
  {
    name: 'an etcd backup of another cluster',
    done: 'a complete backup in which the certificate of our authority does not occur',
    holds: 'it is refused before anything is stopped',
    exit: 1,
    says: ['is of another cluster', '--force restores it anyway'],
    keys: true,
    shortFormOf: 'etcd-backup',
    async inject(place) {
      await backupFor(place, Buffer.from('another certificate'))
      return place.run(['bin/etcd-backup.mts', 'restore'])
    },
  },

  // ── What is not ours ───────────────────────────────────────────────────────────────────────
  {
    name: 'a pid file names another cluster’s QEMU',
    done: '`run/alpha.pid` has the pid of a QEMU that another checkout has started, after a restart of this computer; then `clean --disks`',
    holds: 'that QEMU runs on',
    exit: 0,
    shortFormOf: 'clean',
    again: ['bin/clean.mts', '--disks'],
    async inject(place) {
      await foreignQemu(place, true)
      return place.run(['bin/clean.mts', '--disks'])
    },
    check: assertForeignRuns,
  },
  {
    name: 'a pid file names a QEMU that may be ours',
    done: 'the same, but the pid file that QEMU was started with is gone; then `clean --disks`',
    holds: 'nothing is removed, that QEMU runs on, and the hint is right',
    exit: 1,
    says: ['may be alpha: it is a QEMU with a pid file', 'hint:    if it is not, remove'],
    again: ['bin/clean.mts', '--disks'],
    async inject(place) {
      await foreignQemu(place, false)
      await writeFile(place.path('images', 'alpha.qcow2'), 'a disk')
      const outcome = await place.run(['bin/clean.mts', '--disks'])
      assert.ok(existsSync(place.path('images', 'alpha.qcow2')))
      await rm(place.path('run', 'alpha.pid'))
      return outcome
    },
    check: assertForeignRuns,
  },
  {
    name: 'the npm packages are gone',
    done: '`node_modules` is removed',
    holds: 'the script says in one line what to run',
    exit: 1,
    says: ['the npm packages are missing', '&& npm ci'],
    shortFormOf: 'makefile',
    again: ['bin/clean.mts', '--list'],
    async inject(place) {
      await rm(place.path('node_modules'))
      return place.run([bootstrap])
    },
    repair: (place) => symlink(join(projectRoot, 'node_modules'), place.path('node_modules')),
  },
]

const pause = () => new Promise((resolve) => setTimeout(resolve, 5))

async function filesIn(place: Place, folder: string): Promise<number> {
  return (await readdir(place.path(folder), { recursive: true }).catch(() => [])).length
}

async function succeeds(place: Place, command: readonly string[]): Promise<void> {
  const { exitCode, stdout, stderr } = await place.run(command)
  assert.equal(exitCode, 0, `${command.join(' ')}:\n${stdout}${stderr}`)
}

/** The lock of a bootstrap that was killed is in the way of no other script. */
async function takesLockOver(place: Place): Promise<void> {
  assert.ok(existsSync(place.path('run', 'bootstrap.lock')))
  await succeeds(place, ['bin/clean.mts'])
}

/** Keeps a copy of a folder in aside/. */
async function copyAside(place: Place, folder: string): Promise<void> {
  await copy(place.path(folder), place.path('aside'))
}

async function bringBack(place: Place, folder: string): Promise<void> {
  await copy(place.path('aside'), place.path(folder))
}

/** With times, so that the scripts see what they saw before. */
async function copy(from: string, to: string): Promise<void> {
  const child = spawn('cp', ['-aT', from, to])
  await new Promise((resolve) => child.on('exit', resolve))
}

async function assertAsAside(place: Place, folder: string): Promise<void> {
  await succeeds(place, ['diff', '-r', place.path('aside'), place.path(folder)])
}

async function cutInHalf(file: string): Promise<void> {
  await truncate(file, Math.floor((await stat(file)).size / 2))
}

/** Damages something, then runs a script that must change nothing of a folder. */
async function withoutChange(
  place: Place,
  damage: () => Promise<void>,
  command: readonly string[],
  folder = 'tls',
): Promise<Outcome> {
  await copyAside(place, folder)
  await damage()
  const before = await place.contentOf(folder)
  const outcome = await place.run(command)
  assert.equal(await place.contentOf(folder), before, `${folder}/ was changed`)
  return outcome
}

/** Runs a script while the clock of this computer is wrong: Node sees it so many days later. */
async function atAnotherTime(
  place: Place,
  days: number,
  command: readonly string[],
): Promise<Outcome> {
  const text = `const now = Date.now
globalThis.Date = class extends Date {
  constructor(...args) { super(...(args.length > 0 ? args : [Date.now()])) }
  static now() { return now() + ${days} * 24 * 3600e3 }
}`
  await writeFile(place.path('clock.mjs'), text)
  return place.run(command, { NODE_OPTIONS: `--import=${place.path('clock.mjs')}` })
}

// ── The ISO ──────────────────────────────────────────────────────────────────────────────────
const servers = new WeakMap<Place, FileServer>()

/** A file of the user's that can be the installer. */
async function isoFor(place: Place): Promise<string> {
  const iso = place.path('installer.iso')
  await makeIso(iso)
  return iso
}

/** Lets cluster.env lead to a server with an ISO. @param pause of the server, in ms for 64 KB */
async function serveIso(place: Place, pause: number): Promise<FileServer> {
  const server = await startFileServer()
  servers.set(place, server)
  place.atEnd(() => server.close())
  const data = await readFile(await isoFor(place))
  const sum = createHash('sha256').update(data).digest('hex')
  server.files.set('/nixos.iso', { data, pause })
  server.files.set('/nixos.iso.sha256', { data: Buffer.from(`${sum}  nixos.iso\n`) })
  await place.checkout.set({ NIXOS_ISO_URL: `${server.url}/nixos.iso` })
  return server
}

/** Bytes of a download that have arrived. */
async function received(place: Place): Promise<number> {
  const names = await readdir(place.path('images')).catch(() => [])
  const partial = names.find((name) => name.endsWith('.iso.partial'))
  return partial ? (await stat(place.path('images', partial)).catch(() => ({ size: 0 }))).size : 0
}

async function assertIso(place: Place): Promise<void> {
  const names = (await readdir(place.seen('images'))).filter((name) => name.endsWith('.iso'))
  const [name = ''] = names
  const found = await readFile(place.seen('images', name))
  assert.ok(found.equals(await readFile(place.path('installer.iso'))), 'it is another ISO')
}

// ── etcd ─────────────────────────────────────────────────────────────────────────────────────
/** A file of the form of an etcd snapshot, in backups/. @param certificate that is in it */
async function backupFor(place: Place, certificate: Buffer): Promise<string> {
  const data = randomBytes(16 * 1024)
  Buffer.from('edda0ced', 'hex').copy(data, 16)
  certificate.copy(data, 8192)
  const file = place.path('backups', 'etcd-2026-01-01-000000.db')
  await mkdir(dirname(file), { mode: 0o700 })
  await writeFile(file, Buffer.concat([data, createHash('sha256').update(data).digest()]))
  return file
}

// ── A process with the arguments of a QEMU ───────────────────────────────────────────────────
const foreign = new WeakMap<Place, ChildProcess>()

/** @param known whether the pid file that it was started with is there */
async function foreignQemu(place: Place, known: boolean): Promise<void> {
  const pidFile = join(place.path('..', 'other'), 'run', 'alpha.pid')
  const args = ['-c', 'read -r _', '-name', 'alpha', '-pidfile', pidFile, '-nodefaults']
  const stdio = ['pipe', 'ignore', 'ignore'] as const
  const qemu = spawn('sh', args, { argv0: 'qemu-system-x86_64', stdio: [...stdio] })
  foreign.set(place, qemu)
  place.atEnd(async () => qemu.kill('SIGKILL'))
  await mkdir(place.path('run'), { mode: 0o700 })
  await writeFile(place.path('run', 'alpha.pid'), `${qemu.pid}\n`)
  if (!known) return
  await mkdir(dirname(pidFile), { recursive: true })
  await writeFile(pidFile, `${qemu.pid}\n`)
}

async function assertForeignRuns(place: Place): Promise<void> {
  assert.equal(await isGone(foreign.get(place)?.pid ?? 0), false, 'the other QEMU was ended')
}
