import assert from 'node:assert/strict'
import { existsSync } from 'node:fs'
import { copyFile, mkdir, readdir, readFile, rename, stat, writeFile } from 'node:fs/promises'
import { after, before, describe, it } from 'node:test'
import { $ } from 'zx'
import { type Cluster, loadCluster, type Node } from '../../lib/cluster.mts'
import { withLock } from '../../lib/lock.mts'
import { filesOf } from '../../lib/qemu/machine-files.mts'
import { Qmp } from '../../lib/qemu/qmp.mts'
import { isRunning } from '../../lib/qemu/vm.mts'
import { listSnapshots, type Snapshot } from '../../lib/snapshot/snapshots.mts'
import { type Outcome, run } from '../checkout.mts'
import { giveDisk, type Machines, makeMachines, noMachines } from '../uefi-machine.mts'

// Two machines run, in their firmware; gamma is off. What is on their disks is written by QEMU.
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
    await writeFile(cluster.path('configs', 'encryption-config.yaml'), 'first', { mode: 0o600 })
    await machines.start(alpha)
    await machines.start(sigma)
  })
  after(() => machines.remove())

  const snapshot = (...args: string[]): Promise<Outcome> =>
    run(machines.checkout, 'bin/snapshot.mts', args)
  const restore = (...args: string[]): Promise<Outcome> =>
    run(machines.checkout, 'bin/restore.mts', args)
  const snapshots = async (): Promise<Record<string, Snapshot>> => {
    const all = JSON.parse((await snapshot('--list', '--json')).stdout) as Snapshot[]
    return Object.fromEntries(all.map((each) => [each.name, each]))
  }

  /** One command to the QEMU of a machine. */
  async function tell(node: Node, command: string, args?: Record<string, unknown>) {
    const qmp = await Qmp.connect(filesOf(cluster, node).qmp)
    return qmp.execute(command, args).finally(() => qmp.close())
  }
  const status = async (node: Node) =>
    ((await tell(node, 'query-status')) as { status: string }).status

  /** A running machine's disk is QEMU's, which has the very same commands as qemu-io. */
  async function qemuIo(node: Node, command: string): Promise<string> {
    if (await isRunning(cluster, node)) {
      const line = `qemu-io disk "${command}"`
      return String(await tell(node, 'human-monitor-command', { 'command-line': line }))
    }
    const done = await $({
      quiet: true,
    })`qemu-io -f qcow2 -c ${command} ${filesOf(cluster, node).disk}`
    return done.stdout
  }
  const fill = (node: Node, pattern: number) => qemuIo(node, `write -P ${pattern} 1M 1M`)
  async function assertFilled(node: Node, pattern: number): Promise<void> {
    // qemu-io tells a difference, and ends well all the same.
    const said = await qemuIo(node, `read -P ${pattern} 1M 1M`)
    assert.doesNotMatch(said, /verification failed/i, `${node.name} has not ${pattern}`)
  }
  const namesOn = async (node: Node): Promise<string[]> => {
    const info = (await isRunning(cluster, node))
      ? (
          (await tell(node, 'query-block')) as { device: string; inserted?: { image: object } }[]
        ).find(({ device }) => device === 'disk')?.inserted?.image
      : JSON.parse(
          (await $({ quiet: true })`qemu-img info --output=json ${filesOf(cluster, node).disk}`)
            .stdout,
        )
    return ((info as { snapshots?: { name: string }[] }).snapshots ?? []).map(({ name }) => name)
  }

  it('there are none at first', async () => {
    assert.match((await snapshot('--list')).stdout, /There is no snapshot yet/)
    const { stderr, exitCode } = await restore()
    assert.match(stderr, /there is no snapshot yet/)
    assert.equal(exitCode, 2)
  })

  it('a snapshot is on every disk, of running machines and of stopped ones', async () => {
    for (const node of cluster.nodes) await fill(node, 1)
    await writeFile(filesOf(cluster, gamma).efiVars, 'variables of gamma')
    const { stdout, stderr, exitCode } = await snapshot('first')
    assert.equal(exitCode, 0, stderr)
    for (const node of cluster.nodes) assert.deepEqual(await namesOn(node), ['first'], node.name)
    const pause = Number(stdout.match(/alpha, sigma stood still for (\d+) ms/)?.[1])
    assert.ok(pause > 0 && pause < 2000, stdout)
    assert.equal(await status(alpha), 'running')
    assert.equal(await status(sigma), 'running')
  })

  it('keys and settings are kept with it, for their owner alone', async () => {
    const { first } = await snapshots()
    const paths = first?.files.map(({ path }) => path)
    assert.deepEqual(paths?.toSorted(), [
      'cluster.env',
      'configs/encryption-config.yaml',
      'images/alpha-efivars.fd',
      'images/gamma-efivars.fd',
      'images/sigma-efivars.fd',
      'tls/ca-key.pem',
      'tls/ca.pem',
    ])
    const entries = await readdir(cluster.path('snapshots'), {
      recursive: true,
      withFileTypes: true,
    })
    for (const entry of entries) {
      const { mode } = await stat(`${entry.parentPath ?? entry.path}/${entry.name}`)
      assert.equal(mode & 0o077, 0, entry.name)
    }
  })

  it('it is listed with its date, the size of the disks and what it holds', async () => {
    const { stdout } = await snapshot('--list')
    const today = new Date().toLocaleDateString('sv')
    assert.match(
      stdout,
      new RegExp(
        `^first +${today} \\d\\d:\\d\\d:\\d\\d +\\d.* [kM]B +alpha, sigma, gamma \\(was off\\); NixOS`,
        'm',
      ),
    )
  })

  it('its name cannot be taken twice, in whatever case', async () => {
    for (const name of ['first', 'FIRST']) {
      const { stderr, exitCode } = await snapshot(name)
      assert.match(stderr, /there is a snapshot "first" already/)
      assert.equal(exitCode, 1)
    }
    assert.deepEqual(await namesOn(alpha), ['first'])
  })

  it('a name that is no name is refused', async () => {
    for (const name of ['../a', 'a b', '17']) {
      for (const script of [snapshot, restore]) {
        const { stderr, exitCode } = await script(name)
        assert.match(stderr, /cannot be named/, name)
        assert.equal(exitCode, 2, name)
      }
    }
    assert.equal((await snapshot('--delete', '../first')).exitCode, 2)
    assert.equal((await snapshot('one', 'two')).exitCode, 2)
    assert.equal((await snapshot('--list', 'one')).exitCode, 2)
    assert.deepEqual(Object.keys(await snapshots()), ['first'])
  })

  it('a restore brings back disks, variables, keys and settings, and starts all machines', async () => {
    for (const node of cluster.nodes) await fill(node, 2)
    await writeFile(filesOf(cluster, gamma).efiVars, 'others')
    await writeFile(cluster.path('tls', 'ca.pem'), 'second CA')
    await writeFile(cluster.path('tls', 'ca-key.pem'), 'second key')
    await writeFile(cluster.path('tls', 'mine.txt'), 'of somebody')
    await machines.checkout.set({ WORKER_MEM: 300 })

    const { stdout, stderr, exitCode } = await restore('--start-only')
    assert.equal(exitCode, 0, stderr)
    assert.match(stdout, /restored in \d/)
    for (const node of cluster.nodes) {
      assert.ok(await isRunning(cluster, node), node.name)
      await assertFilled(node, 1)
    }
    // They are none that this firmware could use, so the start has put them aside.
    assert.equal(
      await readFile(`${filesOf(cluster, gamma).efiVars}.old`, 'utf8'),
      'variables of gamma',
    )
    assert.equal(await readFile(cluster.path('tls', 'ca.pem'), 'utf8'), 'first CA')
    assert.equal(await readFile(cluster.path('tls', 'ca-key.pem'), 'utf8'), 'first key')
    assert.equal((await stat(cluster.path('tls', 'ca-key.pem'))).mode & 0o777, 0o600)
    assert.equal(await readFile(cluster.path('tls', 'mine.txt'), 'utf8'), 'of somebody')
    assert.equal(loadCluster({ root: cluster.root, env: {} }).settings.WORKER_MEM, 256)
    const memory = (await tell(sigma, 'query-memory-size-summary')) as { 'base-memory': number }
    assert.equal(memory['base-memory'] / 2 ** 20, 256, 'the machine starts as cluster.env was')
  })

  it('what it overwrote is kept, and can be had back', async () => {
    const aside = Object.keys(await snapshots()).find((name) => name.startsWith('before-restore-'))
    assert.ok(aside)
    const { stderr, exitCode } = await restore('--start-only', aside)
    assert.equal(exitCode, 0, stderr)
    for (const node of cluster.nodes) await assertFilled(node, 2)
    assert.equal(await readFile(cluster.path('tls', 'ca.pem'), 'utf8'), 'second CA')
    assert.equal(loadCluster({ root: cluster.root, env: {} }).settings.WORKER_MEM, 300)
  })

  it('only the last of what restores overwrote is kept', async () => {
    const { exitCode, stderr } = await restore('--start-only', 'first')
    assert.equal(exitCode, 0, stderr)
    const { exitCode: again } = await restore('--start-only', 'first')
    assert.equal(again, 0)
    const names = Object.keys(await snapshots())
    assert.equal(names.length, 2, names.join(' '))
    assert.deepEqual((await namesOn(gamma)).toSorted(), names.toSorted())
  })

  it('what a restore overwrote that was killed half-way is kept until one is whole', async () => {
    const aside = async () =>
      (await listSnapshots(cluster)).find(({ automatic }) => automatic)?.name
    const whole = (await aside()) ?? ''
    await writeFile(machines.checkout.path('snapshots', '.restoring'), `${whole}\n`)
    assert.equal((await restore('--start-only', 'first')).exitCode, 0)
    assert.ok(Object.keys(await snapshots()).includes(whole))
    assert.equal((await restore('--start-only', 'first')).exitCode, 0)
    assert.ok(!Object.keys(await snapshots()).includes(whole))
  })

  it('without a name a restore takes the newest that was asked for', async () => {
    await fill(alpha, 3)
    assert.equal((await snapshot()).exitCode, 0)
    const newest = (await listSnapshots(cluster)).at(-1)
    assert.match(newest?.name ?? '', /^\d{4}-\d\d-\d\d-\d{6}$/)
    await fill(alpha, 4)
    const { stderr, exitCode } = await restore('--start-only')
    assert.equal(exitCode, 0, stderr)
    await assertFilled(alpha, 3)
    assert.equal((await snapshot('--delete', newest?.name ?? '')).exitCode, 0)
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

  it('while another script is at work a second one is turned away, and told which', async () => {
    const lock = cluster.path('run', 'bootstrap.lock')
    await withLock(lock, 'bootstrapping this cluster', async () => {
      for (const work of [snapshot('late'), restore('first'), snapshot('--delete', 'first')]) {
        const { stderr, exitCode } = await work
        assert.match(stderr, /another process is bootstrapping this cluster/)
        assert.match(stderr, new RegExp(`\\(pid ${process.pid}\\)`))
        assert.equal(exitCode, 1)
      }
      assert.equal((await snapshot('--list')).exitCode, 0, 'reading is not in the way')
    })
    const gone = { pid: 4194305, command: 'restore.mts', purpose: 'restoring', nonce: 'gone' }
    await writeFile(lock, JSON.stringify(gone))
    assert.equal((await snapshot('late')).exitCode, 0, 'the lock of one that has ended is none')
    assert.equal((await snapshot('--delete', 'late')).exitCode, 0)
  })

  it('after one that was killed in its pause, the machines go on and its rest is cleared away', async () => {
    await mkdir(cluster.path('snapshots', '.killed.partial'))
    await writeFile(cluster.path('snapshots', '.killed.partial', 'touching-disks'), '')
    await tell(alpha, 'stop')
    const data = { device: 'disk', name: 'killed' }
    await tell(alpha, 'blockdev-snapshot-internal-sync', data)

    assert.equal((await run(machines.checkout, 'bin/provision.mts', ['alpha'])).exitCode, 0)
    assert.equal(await status(alpha), 'running')
    assert.equal((await snapshot('next')).exitCode, 0)
    assert.ok(!(await namesOn(alpha)).includes('killed'))
    assert.ok(!existsSync(cluster.path('snapshots', '.killed.partial')))
    assert.equal((await snapshot('--delete', 'next')).exitCode, 0)
  })

  it('a QEMU that does not answer makes it fail, and leaves nothing on the other disks', async () => {
    const pid = Number(await readFile(filesOf(cluster, sigma).pid, 'utf8'))
    process.kill(pid, 'SIGSTOP')
    const { stderr, exitCode } = await snapshot('half').finally(() => process.kill(pid, 'SIGCONT'))
    assert.equal(exitCode, 1)
    assert.match(stderr, /QEMU does not answer/)
    assert.equal(await status(alpha), 'running')
    assert.ok(!(await namesOn(alpha)).includes('half'))
    assert.deepEqual(
      await readdir(cluster.path('snapshots')).then((names) =>
        names.filter((name) => /half/.test(name)),
      ),
      [],
    )
  })

  describe('a restore is refused before anything is touched', () => {
    let pids: string[]
    const pidsNow = () =>
      Promise.all([alpha, sigma, gamma].map((node) => readFile(filesOf(cluster, node).pid, 'utf8')))
    async function assertRefused(reason: RegExp): Promise<void> {
      pids ??= await pidsNow()
      const { stderr, exitCode } = await restore('--start-only', 'first')
      assert.match(stderr, reason)
      assert.match(stderr, /nothing was touched/)
      assert.equal(exitCode, 1)
      assert.deepEqual(await pidsNow(), pids, 'the machines run on')
      await assertFilled(alpha, 4)
      assert.equal(await readFile(cluster.path('tls', 'ca.pem'), 'utf8'), 'third CA')
    }
    before(async () => {
      await fill(alpha, 4)
      await writeFile(cluster.path('tls', 'ca.pem'), 'third CA')
    })

    it('when a disk is missing', async () => {
      const { disk } = filesOf(cluster, gamma)
      await rename(disk, `${disk}.away`)
      await assertRefused(/gamma has no disk: images\/gamma.qcow2 is missing/)
      await rename(`${disk}.away`, disk)
    })

    it('when a file that was kept is missing, or not what it was', async () => {
      const file = cluster.path('snapshots', 'first', 'tls', 'ca.pem')
      await rename(file, `${file}.away`)
      await writeFile(cluster.path('snapshots', 'first', 'cluster.env'), '')
      await assertRefused(
        /snapshots\/first\/cluster.env is missing or was changed(.|\n)*snapshots\/first\/tls\/ca.pem is missing/,
      )
      await rename(`${file}.away`, file)
      await copyFile(cluster.path('cluster.env'), cluster.path('snapshots', 'first', 'cluster.env'))
    })

    it('when the cluster has other machines than the snapshot', async () => {
      await machines.checkout.set({ WORKER_NODES: 'sigma' })
      const text = await readFile(cluster.path('cluster.env'), 'utf8')
      const without = text.replaceAll(/^\w+_gamma=.*\n/gm, '')
      await writeFile(cluster.path('cluster.env'), without)
      await assertRefused(/it is also of gamma \(worker\)/)
      await writeFile(cluster.path('cluster.env'), text)
      await machines.checkout.set({ WORKER_NODES: 'sigma gamma' })
    })

    it('when the snapshot is missing on one disk, or it is another of that name', async () => {
      await tell(sigma, 'blockdev-snapshot-delete-internal-sync', { device: 'disk', name: 'first' })
      await assertRefused(/the disk of sigma does not have it/)
      await tell(sigma, 'blockdev-snapshot-internal-sync', { device: 'disk', name: 'first' })
      await assertRefused(/the disk of sigma has another snapshot of that name/)
    })
  })

  it('a machine that does not stop ends a restore, and those that had stopped start again', async () => {
    assert.equal((await snapshot('third')).exitCode, 0)
    await fill(alpha, 5)
    await withLock(filesOf(cluster, gamma).lock, 'doing what never ends', async () => {
      const { stderr, exitCode } = await restore('--start-only', 'third')
      assert.match(stderr, /another process is doing what never ends/)
      assert.equal(exitCode, 1)
    })
    for (const node of cluster.nodes) assert.ok(await isRunning(cluster, node), node.name)
    await assertFilled(alpha, 5)
    assert.ok(!Object.keys(await snapshots()).some((name) => name > 'third'))
  })
})
