// What a snapshot asks each QEMU and when: simulated ones note it, and refuse what a test wants. Their
// images are real. (Real machines: snapshot.test.mts.)
import assert from 'node:assert/strict'
import { type ChildProcess, execFile, spawn } from 'node:child_process'
import { mkdir, readdir, readFile, rm, writeFile } from 'node:fs/promises'
import { createServer, type Server } from 'node:net'
import { after, before, describe, it } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { promisify } from 'node:util'
import { which } from 'zx'
import { type Cluster, loadCluster } from '../../lib/cluster.mts'
import type { Snapshot } from '../../lib/snapshots.mts'
import { filesOf } from '../../lib/vm.mts'
import { type Checkout, makeCheckout, type Outcome, run } from '../checkout.mts'

const exec = promisify(execFile)
const skip = (await which('qemu-img', { nothrow: true })) ? false : 'qemu-img is missing'
const create = 'blockdev-snapshot-internal-sync'
const remove = 'blockdev-snapshot-delete-internal-sync'
const save = 'snapshot-save'

let checkout: Checkout
let cluster: Cluster
const snapshot = (...args: string[]): Promise<Outcome> => run(checkout, 'bin/snapshot.mts', args)
const restore = (...args: string[]): Promise<Outcome> => run(checkout, 'bin/restore.mts', args)
const record = async (name: string) =>
  JSON.parse(await readFile(checkout.path('snapshots', name, 'snapshot.json'), 'utf8')) as Snapshot

before(async () => {
  checkout = await makeCheckout()
  cluster = loadCluster({ root: checkout.root, env: {} })
  for (const folder of ['images', 'run']) await mkdir(checkout.path(folder))
})
after(() => checkout.remove())

describe('the moment of a snapshot', { skip }, () => {
  /** What the simulated QEMUs were asked, in order: "stop alpha begins", "stop alpha ends". */
  const events: string[] = []
  /** As "cont sigma". */
  let refused: string[] = []
  let pause = async () => {}
  const ended: (() => void)[] = []
  const at = (event: string) => {
    const found = events.indexOf(event)
    assert.notEqual(found, -1, `no "${event}" in:\n${events.join('\n')}`)
    return found
  }

  before(async () => {
    for (const { name } of cluster.nodes) {
      const image = checkout.path('images', `${name}.qcow2`)
      await exec('qemu-img', ['create', '-q', '-f', 'qcow2', image, '1M'])
    }
    for (const name of ['alpha', 'sigma']) await simulate(name)
  })
  after(() => ended.map((end) => end()))

  /** A machine that runs, as far as the scripts can see: a process with a pid file, and QMP. */
  async function simulate(name: string): Promise<void> {
    const files = filesOf(cluster, cluster.node(name))
    const args = ['-c', 'read -r _', 'qemu-system-x86_64', '-pidfile', files.pid, '-S']
    const child: ChildProcess = spawn('sh', args, { stdio: ['pipe', 'ignore', 'ignore'] })
    await writeFile(files.pid, `${child.pid}`)
    const job = (id: string, error?: string) => ({ id, status: 'concluded', error })
    let jobs: ReturnType<typeof job>[] = []
    const server: Server = createServer((socket) => {
      socket.write('{"QMP": {}}\n')
      socket.on('error', () => {})
      const execute = async (line: string) => {
        const { execute: command, id, arguments: given } = JSON.parse(line)
        events.push(`${command} ${name} begins`)
        const failed = refused.includes(`${command} ${name}`)
        if (!failed && (command === create || command === save)) {
          await pause()
          await exec('qemu-img', ['snapshot', '-c', given.tag ?? given.name, files.disk])
        }
        if (command === save) jobs = [job(given['job-id'], failed ? `${name} refuses` : undefined)]
        if (command === remove) await exec('qemu-img', ['snapshot', '-d', given.name, files.disk])
        await sleep(Math.random() * 20)
        events.push(`${command} ${name} ends`)
        const refusal = failed && command !== save
        const answers: Record<string, unknown> = {
          'query-jobs': jobs,
          'query-version': { qemu: { major: 7, minor: 2, micro: 22 } },
        }
        const answer = refusal
          ? { error: { desc: `${name} refuses` } }
          : { return: answers[command] ?? {} }
        if (command === 'quit') child.stdin?.end()
        socket.write(`${JSON.stringify({ ...answer, id })}\n`)
      }
      // One command after the other.
      let last = Promise.resolve()
      socket.on('data', (data) => {
        for (const line of data.toString().trim().split('\n')) last = last.then(() => execute(line))
      })
    })
    await new Promise<void>((resolve) => server.listen(files.qmp, resolve))
    ended.push(() => {
      child.stdin?.end()
      server.close()
    })
  }

  async function take(name: string, ...refuse: string[]): Promise<Outcome> {
    events.length = 0
    refused = refuse
    const outcome = await snapshot(name)
    if (outcome.exitCode === 0) await snapshot('--delete', name)
    return outcome
  }
  async function assertNothingLeft(name: string): Promise<void> {
    for (const node of cluster.nodes) {
      const { stdout } = await exec('qemu-img', ['snapshot', '-l', filesOf(cluster, node).disk])
      assert.ok(!stdout.includes(name), `${node.name}: ${stdout}`)
    }
    assert.deepEqual(await readdir(checkout.path('snapshots')), [])
  }

  it('begins when all machines are paused and ends when all disks are done; a machine that is off is done before', async () => {
    const { stderr, exitCode } = await take('x')
    assert.equal(exitCode, 0, stderr)
    const names = ['alpha', 'sigma']
    const paused = Math.max(...names.map((name) => at(`stop ${name} ends`)))
    const done = Math.max(...names.map((name) => at(`${create} ${name} ends`)))
    for (const name of names) {
      assert.ok(paused < at(`${create} ${name} begins`), events.join('\n'))
      assert.ok(done < at(`cont ${name} begins`), events.join('\n'))
    }
  })

  it('lasts as long as the machines are paused', async () => {
    pause = () => sleep(300)
    refused = []
    const { stderr, exitCode } = await snapshot('timed')
    pause = async () => {}
    assert.equal(exitCode, 0, stderr)
    const { pause: seconds } = await record('timed')
    assert.ok(seconds >= 0.3 && seconds < 2, `${seconds} s`)
    await snapshot('--delete', 'timed')
  })

  it('is over for all machines when a disk refuses, and nothing is left', async () => {
    const { stderr, exitCode } = await take('half', `${create} sigma`)
    assert.equal(exitCode, 1)
    assert.match(stderr, /sigma refuses/)
    assert.ok(at('cont alpha ends') > at(`${create} sigma ends`))
    assert.ok(at('cont sigma ends') > at(`${create} alpha ends`))
    await assertNothingLeft('half')
  })

  it('is over for all machines when one cannot be paused', async () => {
    const { stderr, exitCode } = await take('never', 'stop sigma')
    assert.equal(exitCode, 1)
    assert.match(stderr, /sigma refuses/)
    assert.ok(at('cont alpha ends') > at('stop alpha ends'))
    assert.ok(!events.some((event) => event.startsWith(create)))
    await assertNothingLeft('never')
  })

  it('names a machine that does not continue', async () => {
    const { stderr, exitCode } = await take('stuck', 'cont sigma')
    assert.equal(exitCode, 1)
    assert.match(stderr, /sigma may still be paused: make up resumes it/)
    assert.doesNotMatch(stderr, /alpha may still be paused/)
    await assertNothingLeft('stuck')
  })

  it('is not cut off by Ctrl-C', async () => {
    events.length = 0
    refused = []
    let child: ChildProcess | undefined
    pause = async () => {
      // Once: a second Ctrl-C would end it at once.
      if (!child?.killed) child?.kill('SIGINT')
      await sleep(200)
    }
    child = spawn(checkout.path('bin', 'snapshot.mts'), ['late'], { stdio: 'ignore' })
    const status = await new Promise((resolve) => child?.once('exit', resolve))
    pause = async () => {}
    assert.equal(status, 130)
    for (const name of ['alpha', 'sigma']) {
      assert.ok(at(`cont ${name} ends`) > at(`${create} ${name} ends`))
    }
    assert.equal((await record('late')).machines.length, 3)
    assert.equal((await snapshot('--delete', 'late')).exitCode, 0)
    await assertNothingLeft('late')
  })

  describe('with memory', () => {
    const names = ['alpha', 'sigma', 'gamma']
    before(() => simulate('gamma'))

    it('is saved by all machines while all are paused', async () => {
      const { stderr, exitCode } = await take('memory')
      assert.equal(exitCode, 0, stderr)
      const paused = Math.max(...names.map((name) => at(`stop ${name} ends`)))
      const done = Math.max(...names.map((name) => at(`${save} ${name} ends`)))
      for (const name of names) {
        assert.ok(paused < at(`${save} ${name} begins`), events.join('\n'))
        assert.ok(done < at(`cont ${name} begins`), events.join('\n'))
      }
      assert.ok(!events.some((event) => event.startsWith(create)))
    })

    it('is given up for all when one cannot save it, and the disks are of the same pause', async () => {
      const { stderr, exitCode } = await take('disks', `${save} sigma`)
      assert.equal(exitCode, 0)
      assert.match(stderr, /! disks only: sigma: QEMU failed at snapshot-save: sigma refuses/)
      const saved = Math.max(...names.map((name) => at(`${save} ${name} ends`)))
      const done = Math.max(...names.map((name) => at(`${create} ${name} ends`)))
      for (const name of names) {
        assert.ok(saved < at(`${create} ${name} begins`), events.join('\n'))
        assert.ok(done < at(`cont ${name} begins`), events.join('\n'))
      }
      await assertNothingLeft('disks')
    })

    it('needs disk space for what the machines use', async (t) => {
      events.length = 0
      // 1 MiB more than the disks need; each process uses about that.
      const small =
        'mount -t tmpfs -o size=3073m none images && truncate -s 0 images/{alpha,sigma,gamma}.qcow2'
      const args = ['--mount', 'bash', '-c', `${small} && ./bin/snapshot.mts x`]
      const { stderr, exitCode } = await run(checkout, 'unshare', args)
      if (/unshare|mount:/.test(stderr)) return t.skip('a file system cannot be mounted here')
      assert.match(stderr, /not enough disk space: 3.2 GB are needed/)
      assert.match(stderr, /hint: +--disks-only needs less/)
      assert.equal(exitCode, 1)
      assert.ok(!events.some((event) => event.startsWith('stop')))
    })

    it('is not left behind by make suspend when it is interrupted: all machines continue', async () => {
      events.length = 0
      refused = []
      let child: ChildProcess | undefined
      pause = async () => {
        if (!child?.killed) child?.kill('SIGINT')
        await sleep(200)
      }
      child = spawn(checkout.path('bin', 'snapshot.mts'), ['--suspend'], { stdio: 'ignore' })
      const status = await new Promise((resolve) => child?.once('exit', resolve))
      pause = async () => {}
      assert.equal(status, 130)
      for (const name of names) assert.ok(at(`cont ${name} ends`) > at(`${save} ${name} ends`))
      assert.ok(!events.some((event) => event.startsWith('quit')))
      await assertNothingLeft('_suspended')
    })

    it('is the end of the machines with make suspend, none of which continues', async () => {
      events.length = 0
      const { stderr, exitCode } = await snapshot('--suspend')
      assert.equal(exitCode, 0, stderr)
      assert.ok(!events.some((event) => event.startsWith('cont')))
      const saved = Math.max(...names.map((name) => at(`${save} ${name} ends`)))
      for (const name of names) assert.ok(at(`quit ${name} begins`) > saved)
      const { automatic, kind } = await record('_suspended')
      assert.deepEqual({ automatic, kind }, { automatic: true, kind: 'live' })
    })
  })
})

describe('a snapshot', () => {
  it('has a name that works on every file system and is no number', async () => {
    const names = ['../a', 'a b', '17', '.a', 'ä', 'a\n', '', 'x'.repeat(64)]
    const outcomes = await Promise.all(names.map((name) => snapshot(name)))
    for (const [index, { stderr, exitCode }] of outcomes.entries()) {
      assert.match(stderr, /cannot be named/, JSON.stringify(names[index]))
      assert.equal(exitCode, 2)
    }
    for (const args of [
      ['--delete', '../a'],
      ['one', 'two'],
      ['--list', 'one'],
    ]) {
      assert.equal((await snapshot(...args)).exitCode, 2, args.join(' '))
    }
    const { stderr, exitCode } = await restore('../a')
    assert.match(stderr, /there is no snapshot "\.\.\/a"/)
    assert.equal(exitCode, 2)
  })

  it('is not taken where the disks could not grow any more', async (t) => {
    const small =
      'mount -t tmpfs -o size=3071m none images && truncate -s 0 images/{alpha,sigma,gamma}.qcow2'
    const args = ['--mount', 'bash', '-c', `${small} && ./bin/snapshot.mts x`]
    const { stderr, exitCode } = await run(checkout, 'unshare', args)
    if (/unshare|mount:/.test(stderr)) return t.skip('a file system cannot be mounted here')
    assert.match(stderr, /not enough disk space: 3.2 GB are needed, 3.2 GB are free/)
    assert.equal(exitCode, 1)
  })
})

describe('a snapshot of other machines', { skip }, () => {
  let original: string
  before(async () => {
    original = await readFile(checkout.path('cluster.env'), 'utf8')
    const machines = cluster.nodes.map(({ name, role }) => ({
      ...{ name, role, running: true, bytes: 0 },
      disk: { name: 'before', id: '1', time: 0 },
    }))
    const old = { taken: '2026-11-22T18:00:00.000Z', automatic: false, nixos: '26.05', pause: 1 }
    await mkdir(checkout.path('snapshots', 'before'), { recursive: true })
    const text = JSON.stringify({ name: 'before', ...old, machines, files: [] })
    await writeFile(checkout.path('snapshots', 'before', 'snapshot.json'), text)
    for (const { pid } of cluster.nodes.map((node) => filesOf(cluster, node)))
      await rm(pid, { force: true })
  })

  it('cannot be restored: the workers that were added later are named, with the command', async () => {
    const delta = `WORKER_NODES="$WORKER_NODES delta"
SSH_PORT_delta=2225
NODE_IP_delta=192.168.100.13
MAC_delta=52:54:00:12:34:59
POD_CIDR_delta=10.200.3.0/24
`
    await writeFile(checkout.path('cluster.env'), original + delta)
    const { stderr, exitCode } = await restore('before')
    assert.equal(exitCode, 1)
    assert.match(stderr, /"before" cannot be restored; nothing was changed/)
    assert.match(stderr, /it does not contain delta \(worker\)$/m)
    assert.match(stderr, /added after it: make remove-worker NAME=delta$/m)
  })
})
