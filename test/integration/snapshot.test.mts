import assert from 'node:assert/strict'
import { existsSync } from 'node:fs'
import { copyFile, mkdir, readdir, readFile, rename, stat, writeFile } from 'node:fs/promises'
import { after, before, describe, it } from 'node:test'
import { $ } from 'zx'
import { type Cluster, loadCluster, type Node } from '../../lib/cluster.mts'
import { withLock } from '../../lib/lock.mts'
import { Qmp } from '../../lib/qmp.mts'
import type { Snapshot } from '../../lib/snapshots.mts'
import { filesOf, isRunning } from '../../lib/vm.mts'
import { type Outcome, run } from '../checkout.mts'
import { giveDisk, type Machines, makeMachines, noMachines } from '../uefi-machine.mts'

// Two machines run their firmware; gamma is off. QEMU writes the contents of the disks.
describe('snapshot and restore', { skip: noMachines, timeout: 600_000 }, () => {
  let machines: Machines
  let cluster: Cluster
  let alpha: Node
  let sigma: Node
  let gamma: Node
  before(async () => {
    machines = await makeMachines()
    cluster = machines.cluster
    const [first, second, third] = cluster.nodes
    assert.ok(first && second && third)
    alpha = first
    sigma = second
    gamma = third
    for (const node of cluster.nodes) await giveDisk(cluster, node)
    await mkdir(cluster.path('tls'), { mode: 0o700 })
    await writeFile(cluster.path('tls', 'ca.pem'), 'first CA')
    await writeFile(cluster.path('tls', 'ca-key.pem'), 'first key', { mode: 0o600 })
    await writeFile(cluster.path('tls', '.ca.pem.tmp-1'), 'half')
    await writeFile(cluster.path('configs', 'encryption-config.yaml'), 'first', { mode: 0o600 })
    await machines.start(alpha)
    await machines.start(sigma)
  })
  after(() => machines.remove())

  const snapshot = (...args: string[]): Promise<Outcome> =>
    run(machines.checkout, 'bin/snapshot.mts', args)
  const restore = (...args: string[]): Promise<Outcome> =>
    run(machines.checkout, 'bin/restore.mts', ['--start-only', ...args])
  const list = async (): Promise<Snapshot[]> =>
    JSON.parse((await snapshot('--list', '--json')).stdout) as Snapshot[]
  const names = async () => (await list()).map(({ name }) => name)
  /** What the last restore replaced. */
  const replaced = async () => (await list()).findLast(({ automatic }) => automatic)?.name ?? ''

  /** Sends one command to the QEMU of a machine. */
  async function qmp(node: Node, command: string, args?: Record<string, unknown>) {
    const connection = await Qmp.connect(filesOf(cluster, node).qmp)
    return connection.execute(command, args).finally(() => connection.close())
  }
  const status = async (node: Node) =>
    ((await qmp(node, 'query-status')) as { status: string }).status

  /** A running machine's disk belongs to QEMU, which has the commands of qemu-io as well. */
  async function qemuIo(node: Node, command: string): Promise<string> {
    if (await isRunning(cluster, node)) {
      const line = `qemu-io disk "${command}"`
      return String(await qmp(node, 'human-monitor-command', { 'command-line': line }))
    }
    const { disk } = filesOf(cluster, node)
    return (await $({ quiet: true })`qemu-io -f qcow2 -c ${command} ${disk}`).stdout
  }
  const fill = (node: Node, pattern: number) => qemuIo(node, `write -P ${pattern} 1M 1M`)
  async function assertFilled(node: Node, pattern: number): Promise<void> {
    // qemu-io exits 0 in spite of a difference.
    const output = await qemuIo(node, `read -P ${pattern} 1M 1M`)
    assert.doesNotMatch(output, /verification failed/i, `${node.name} does not contain ${pattern}`)
  }
  const namesOn = async (node: Node): Promise<string[]> => {
    const { disk } = filesOf(cluster, node)
    const { stdout } = await $({ quiet: true })`qemu-img info -U --output=json ${disk}`
    return (JSON.parse(stdout).snapshots ?? []).map(({ name }: { name: string }) => name)
  }

  it('there are none at first', async () => {
    assert.match((await snapshot('--list')).stdout, /There is no snapshot yet/)
    const { stderr, exitCode } = await restore()
    assert.match(stderr, /there is no snapshot yet/)
    assert.equal(exitCode, 2)
  })

  it('a snapshot is on every disk, of running machines and of stopped ones', async () => {
    for (const node of cluster.nodes) await fill(node, 1)
    const { stdout, stderr, exitCode } = await snapshot('first')
    assert.equal(exitCode, 0, stderr)
    for (const node of cluster.nodes) assert.deepEqual(await namesOn(node), ['first'], node.name)
    const pause = Number(stdout.match(/paused for (\d+) ms: alpha, sigma$/m)?.[1])
    assert.ok(pause > 0 && pause < 2000, stdout)
    assert.equal(await status(alpha), 'running')
    assert.equal(await status(sigma), 'running')
  })

  it('keys and settings are kept with it, readable by their owner only', async () => {
    const [first] = await list()
    assert.deepEqual(first?.files.map(({ path }) => path).toSorted(), [
      'cluster.env',
      'configs/encryption-config.yaml',
      'tls/ca-key.pem',
      'tls/ca.pem',
    ])
    const folder = cluster.path('snapshots')
    const options = { recursive: true, withFileTypes: true } as const
    for (const entry of await readdir(folder, options)) {
      const { mode } = await stat(`${entry.parentPath ?? entry.path}/${entry.name}`)
      assert.equal(mode & 0o077, 0, entry.name)
    }
  })

  it('it is listed with its date, the size of the disks and its contents', async () => {
    const { stdout } = await snapshot('--list')
    const today = new Date().toLocaleDateString('sv')
    const row = `^first +${today} \\d\\d:\\d\\d:\\d\\d +\\d.* [kM]B +alpha, sigma, gamma \\(was off\\); NixOS`
    assert.match(stdout, new RegExp(row, 'm'))
  })

  it('its name cannot be used again, in any case', async () => {
    for (const name of ['first', 'FIRST']) {
      const { stderr, exitCode } = await snapshot(name)
      assert.match(stderr, /there is a snapshot "first" already/)
      assert.equal(exitCode, 1)
    }
    assert.deepEqual(await namesOn(alpha), ['first'])
  })

  it('a restore brings back disks, keys and settings, and starts all machines', async () => {
    for (const node of cluster.nodes) await fill(node, 2)
    await writeFile(cluster.path('tls', 'ca.pem'), 'second CA')
    await writeFile(cluster.path('tls', 'ca-key.pem'), 'second key')
    await writeFile(cluster.path('tls', 'mine.txt'), 'of somebody')
    // As an earlier version has recorded it.
    const file = cluster.path('snapshots', 'first', 'snapshot.json')
    const { kind, hardware, ...older } = JSON.parse(await readFile(file, 'utf8')) as Snapshot
    assert.deepEqual({ kind, hardware }, { kind: 'disks', hardware: {} })
    await writeFile(file, JSON.stringify(older))
    await machines.checkout.set({ WORKER_MEM: 300 })

    const { stdout, stderr, exitCode } = await restore()
    assert.equal(exitCode, 0, stderr)
    assert.match(stdout, /restored in \d/)
    for (const node of cluster.nodes) {
      assert.ok(await isRunning(cluster, node), node.name)
      await assertFilled(node, 1)
    }
    assert.equal(await readFile(cluster.path('tls', 'ca.pem'), 'utf8'), 'first CA')
    assert.equal(await readFile(cluster.path('tls', 'ca-key.pem'), 'utf8'), 'first key')
    assert.equal((await stat(cluster.path('tls', 'ca-key.pem'))).mode & 0o777, 0o600)
    assert.equal((await stat(cluster.path('tls', 'ca.pem'))).mode & 0o777, 0o644)
    assert.equal(await readFile(cluster.path('tls', 'mine.txt'), 'utf8'), 'of somebody')
    assert.equal(loadCluster({ root: cluster.root, env: {} }).settings.WORKER_MEM, 256)
    const memory = (await qmp(sigma, 'query-memory-size-summary')) as { 'base-memory': number }
    assert.equal(memory['base-memory'] / 2 ** 20, 256, 'the machine starts with that cluster.env')
  })

  it('what it replaced can be restored', async () => {
    const before = await replaced()
    assert.match(before, /^before-restore-/)
    const { stderr, exitCode } = await restore(before)
    assert.equal(exitCode, 0, stderr)
    for (const node of cluster.nodes) await assertFilled(node, 2)
    assert.equal(await readFile(cluster.path('tls', 'ca.pem'), 'utf8'), 'second CA')
    assert.equal(loadCluster({ root: cluster.root, env: {} }).settings.WORKER_MEM, 300)
  })

  it('only the last of what restores replaced is kept', async () => {
    const { exitCode, stderr } = await restore('first')
    assert.equal(exitCode, 0, stderr)
    const left = await names()
    assert.equal(left.length, 2, left.join(' '))
    assert.deepEqual((await namesOn(gamma)).toSorted(), left.toSorted())
  })

  it('without a name a restore takes the newest that was taken on purpose; what a killed restore replaced is kept until one succeeds', async () => {
    const killed = await replaced()
    await writeFile(machines.checkout.path('snapshots', '.restoring'), `${killed}\n`)
    await fill(alpha, 3)
    const taken = await snapshot()
    assert.equal(taken.exitCode, 0, taken.stderr)
    const newest = (await names()).at(-1) ?? ''
    assert.match(newest, /^\d{4}-\d\d-\d\d-\d{6}$/)
    await fill(alpha, 4)
    const { stderr, exitCode } = await restore()
    assert.equal(exitCode, 0, stderr)
    await assertFilled(alpha, 3)
    assert.ok((await names()).includes(killed))
    assert.equal((await restore('first')).exitCode, 0)
    assert.ok(!(await names()).includes(killed))
    assert.equal((await snapshot('--delete', newest)).exitCode, 0)
  })

  it('one that is removed is gone from all disks, while the machines run', async () => {
    assert.equal((await snapshot('second')).exitCode, 0)
    const { stdout, exitCode } = await snapshot('--delete', 'second', '--json')
    assert.equal(exitCode, 0)
    assert.deepEqual(JSON.parse(stdout), { removed: 'second' })
    for (const node of cluster.nodes) assert.ok(!(await namesOn(node)).includes('second'))
    assert.ok(!existsSync(cluster.path('snapshots', 'second')))
    const again = await snapshot('--delete', 'second')
    assert.match(again.stderr, /there is no snapshot "second"\n.*there are first/)
    assert.equal(again.exitCode, 2)
  })

  it('while another script works, a second one is refused and names it', async () => {
    const lock = cluster.path('run', 'bootstrap.lock')
    await withLock(lock, 'bootstrapping this cluster', async () => {
      for (const work of [snapshot('late'), restore('first'), snapshot('--delete', 'first')]) {
        const { stderr, exitCode } = await work
        assert.match(stderr, /another process is bootstrapping this cluster/)
        assert.match(stderr, new RegExp(`\\(pid ${process.pid}\\)`))
        assert.equal(exitCode, 1)
      }
      assert.equal((await snapshot('--list')).exitCode, 0, 'reading does not disturb')
    })
    const gone = { pid: 4194305, command: 'restore.mts', purpose: 'restoring', nonce: 'gone' }
    await writeFile(lock, JSON.stringify(gone))
    assert.equal((await snapshot('late')).exitCode, 0, 'the lock of a process that has ended')
    assert.equal((await snapshot('--delete', 'late')).exitCode, 0)
  })

  it('after one that was killed in its pause, the machines continue and its remains are removed', async () => {
    await mkdir(cluster.path('snapshots', '.killed.partial'))
    await qmp(alpha, 'stop')
    await qmp(alpha, 'blockdev-snapshot-internal-sync', { device: 'disk', name: 'killed' })

    const booted = await run(machines.checkout, 'bin/provision.mts', ['alpha'])
    assert.equal(booted.exitCode, 0, booted.stderr)
    assert.equal(await status(alpha), 'running')
    assert.equal((await snapshot('next')).exitCode, 0)
    assert.ok(!(await namesOn(alpha)).includes('killed'))
    assert.ok(!existsSync(cluster.path('snapshots', '.killed.partial')))
    assert.equal((await snapshot('--delete', 'next')).exitCode, 0)
  })

  it('a QEMU that does not answer makes it fail, and nothing is left on the other disks', async () => {
    const pid = Number(await readFile(filesOf(cluster, sigma).pid, 'utf8'))
    process.kill(pid, 'SIGSTOP')
    const { stderr, exitCode } = await snapshot('half').finally(() => process.kill(pid, 'SIGCONT'))
    assert.equal(exitCode, 1)
    assert.match(stderr, /QEMU does not answer/)
    assert.equal(await status(alpha), 'running')
    assert.ok(!(await namesOn(alpha)).includes('half'))
    const left = await readdir(cluster.path('snapshots'))
    assert.deepEqual(
      left.filter((name) => name.includes('half')),
      [],
    )
  })

  describe('a restore is refused before anything is changed', () => {
    let pids: string[]
    const pidsNow = () =>
      Promise.all([alpha, sigma, gamma].map((node) => readFile(filesOf(cluster, node).pid, 'utf8')))
    async function assertRefused(reason: RegExp): Promise<void> {
      pids ??= await pidsNow()
      const { stderr, exitCode } = await restore('first')
      assert.match(stderr, reason)
      assert.match(stderr, /nothing was changed/)
      assert.equal(exitCode, 1)
      assert.deepEqual(await pidsNow(), pids, 'the machines continue')
      await assertFilled(alpha, 4)
      assert.equal(await readFile(cluster.path('tls', 'ca.pem'), 'utf8'), 'third CA')
    }
    before(async () => {
      await fill(alpha, 4)
      await writeFile(cluster.path('tls', 'ca.pem'), 'third CA')
    })

    it('when a disk is missing', async () => {
      const { disk } = filesOf(cluster, gamma)
      await rename(disk, `${disk}.moved`)
      await assertRefused(/gamma has no disk: images\/gamma.qcow2 is missing/)
      await rename(`${disk}.moved`, disk)
    })

    it('when a kept file is missing or was changed', async () => {
      const file = cluster.path('snapshots', 'first', 'tls', 'ca.pem')
      await rename(file, `${file}.moved`)
      await writeFile(cluster.path('snapshots', 'first', 'cluster.env'), '')
      await assertRefused(
        /snapshots\/first\/cluster.env is missing or was changed(.|\n)*snapshots\/first\/tls\/ca.pem is missing/,
      )
      await rename(`${file}.moved`, file)
      await copyFile(cluster.path('cluster.env'), cluster.path('snapshots', 'first', 'cluster.env'))
    })

    it('when the snapshot also contains a worker that was removed', async () => {
      await machines.checkout.set({ WORKER_NODES: 'sigma' })
      const text = await readFile(cluster.path('cluster.env'), 'utf8')
      await writeFile(cluster.path('cluster.env'), text.replaceAll(/^\w+_gamma=.*\n/gm, ''))
      await assertRefused(/it also contains gamma \(worker\)/)
      await writeFile(cluster.path('cluster.env'), text)
      await machines.checkout.set({ WORKER_NODES: 'sigma gamma' })
    })

    it('when the snapshot is missing on one disk, or it is another of that name', async () => {
      const data = { device: 'disk', name: 'first' }
      await qmp(sigma, 'blockdev-snapshot-delete-internal-sync', data)
      await assertRefused(/the disk of sigma does not have it/)
      await qmp(sigma, 'blockdev-snapshot-internal-sync', data)
      await assertRefused(/the disk of sigma has another snapshot of that name/)
    })
  })

  it('a machine that does not stop ends a restore, and those that had stopped start again', async () => {
    assert.equal((await snapshot('third')).exitCode, 0)
    await fill(alpha, 5)
    await withLock(filesOf(cluster, gamma).lock, 'doing what never ends', async () => {
      const { stderr, exitCode } = await restore('third')
      assert.match(stderr, /another process is doing what never ends/)
      assert.equal(exitCode, 1)
    })
    for (const node of cluster.nodes) assert.ok(await isRunning(cluster, node), node.name)
    await assertFilled(alpha, 5)
    assert.ok(!(await names()).some((name) => name > 'third'))
  })
})
