import assert from 'node:assert/strict'
import { existsSync } from 'node:fs'
import { mkdir, readdir, readFile, rename, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import { $, which } from 'zx'
import type { Cluster, Node } from '../../lib/cluster.mts'
import { Qmp } from '../../lib/qmp.mts'
import type { Snapshot } from '../../lib/snapshots.mts'
import { filesOf, isRunning } from '../../lib/vm.mts'
import { becomes } from '../../lib/wait.mts'
import { type Outcome, run } from '../checkout.mts'
import { type Machines, makeMachines, noMachines, UefiShell } from '../uefi-machine.mts'

// The shell of the firmware keeps variables in the machine's memory only: `set -v`.
describe('memory of running machines', { skip: noMachines, timeout: 600_000 }, () => {
  let machines: Machines
  let cluster: Cluster
  let sigma: Node
  before(async () => {
    // Two machines are enough, for the scripts as well.
    process.env.WORKER_NODES = 'sigma'
    machines = await makeMachines()
    cluster = machines.cluster
    sigma = cluster.node('sigma')
    const start = async (node: Node) => {
      await machines.start(node)
      ;(await UefiShell.of(cluster, node)).close()
    }
    await Promise.all(cluster.nodes.map(start))
  })
  after(() => machines.remove())

  const script = (name: string, ...args: string[]): Promise<Outcome> =>
    run(machines.checkout, `bin/${name}.mts`, args)
  async function succeeds(name: string, ...args: string[]): Promise<Outcome> {
    const outcome = await script(name, ...args)
    assert.equal(outcome.exitCode, 0, outcome.stderr)
    return outcome
  }
  const restore = (...args: string[]) => script('restore', '--start-only', ...args)
  const record = async (name: string): Promise<Snapshot> =>
    JSON.parse(await readFile(cluster.path('snapshots', name, 'snapshot.json'), 'utf8'))
  const namesOn = async (image: string): Promise<string[]> => {
    const { stdout } = await $({ quiet: true })`qemu-img info -U --output=json ${image}`
    return (JSON.parse(stdout).snapshots ?? []).map(({ name }: { name: string }) => name)
  }
  const pids = () =>
    Promise.all(cluster.nodes.map((node) => readFile(filesOf(cluster, node).pid, 'utf8')))
  const isUp = async () => Promise.all(cluster.nodes.map((node) => isRunning(cluster, node)))
  async function qmp(node: Node, command: string, args?: Record<string, unknown>) {
    const connection = await Qmp.connect(filesOf(cluster, node).qmp)
    return connection.execute(command, args).finally(() => connection.close())
  }
  async function assertRunning(): Promise<void> {
    for (const node of cluster.nodes) {
      const { status } = (await qmp(node, 'query-status')) as { status: string }
      assert.equal(status, 'running', node.name)
    }
  }
  async function remember(word: string): Promise<void> {
    for (const node of cluster.nodes) await type(node, `set -v word ${word}`)
  }
  async function assertRemembered(word: string): Promise<void> {
    for (const node of cluster.nodes) {
      assert.match(await type(node, 'set word'), new RegExp(`word = ${word}`), node.name)
    }
  }
  async function type(node: Node, command: string): Promise<string> {
    const shell = UefiShell.at(cluster, node)
    return shell.run(command).finally(() => shell.close())
  }
  /** A boot writes to the console; what continues is silent there. */
  const booted = async (node: Node) =>
    (await readFile(filesOf(cluster, node).consoleLog, 'utf8').catch(() => '')) !== ''

  it('is in a snapshot, for which all are paused for a time that is measured', async () => {
    await remember('first')
    const { stdout, stderr } = await succeeds('snapshot', 'one')
    assert.doesNotMatch(stderr, /disks only/)
    const { kind, pause, hardware } = await record('one')
    assert.equal(kind, 'live')
    assert.match(stdout, /alpha, sigma with memory/)
    assert.match(
      stdout,
      new RegExp(`^paused for ${Math.round(pause * 1000)} ms: alpha, sigma$`, 'm'),
    )
    assert.ok(pause > 0 && pause < 10, `${pause} s`)
    for (const { name } of cluster.nodes) assert.match(hardware[name] ?? '', /^QEMU \d.* -m 256$/)
    for (const node of cluster.nodes) {
      const { disk, efiVars } = filesOf(cluster, node)
      assert.deepEqual([await namesOn(disk), await namesOn(efiVars)], [['one'], ['one']])
    }
    await assertRunning()
    await assertRemembered('first')
  })

  it('comes back with a restore, without a boot, as often as one likes', async () => {
    for (const word of ['second', 'third']) {
      await remember(word)
      const before = await pids()
      const { exitCode, stderr } = await restore('one')
      assert.equal(exitCode, 0, stderr)
      // Nobody has generated the keys for ssh.
      assert.match(stderr, /^! sigma: its clock was not set: tls\/ssh_config is missing$/m)
      await assertRunning()
      for (const [index, pid] of (await pids()).entries()) assert.notEqual(pid, before[index])
      for (const node of cluster.nodes) assert.equal(await booted(node), false, node.name)
      await assertRemembered('first')
    }
  })

  describe('is not loaded, and nothing is changed', () => {
    async function assertRefused(reason: RegExp, env: Record<string, string> = {}): Promise<void> {
      const before = await pids()
      const args = ['--start-only', 'one']
      const { stderr, exitCode } = await run(machines.checkout, 'bin/restore.mts', args, { env })
      assert.match(stderr, reason)
      assert.match(stderr, /nothing was changed/)
      assert.match(stderr, /its disks alone: \.\/bin\/restore\.mts --disks-only one/)
      assert.equal(exitCode, 1)
      assert.deepEqual(await pids(), before)
    }

    it('by another QEMU, machine type or CPU', async () => {
      const file = cluster.path('snapshots', 'one', 'snapshot.json')
      const text = await readFile(file, 'utf8')
      for (const [of, other] of [
        [/QEMU [\d.]+/g, 'QEMU 6.1.0'],
        [/-machine \w+/g, '-machine pc'],
        [/-cpu \S+/g, '-cpu qemu64'],
      ] as const) {
        await writeFile(file, text.replaceAll(of, other))
        await assertRefused(new RegExp(`sigma was saved on QEMU .*${other.split(' ')[1]}`))
      }
      await writeFile(file, text)
    })

    it('into a machine of another size', () =>
      assertRefused(/sigma was saved on .* -m 256, and would be on .* -m 300/, {
        WORKER_MEM: '300',
      }))

    it('without the UEFI variables of that moment', async () => {
      const { efiVars } = filesOf(cluster, sigma)
      await rename(efiVars, `${efiVars}.away`)
      try {
        await $({ quiet: true })`qemu-img create -q -f qcow2 ${efiVars} 64M`
        await assertRefused(/the UEFI variables of sigma do not have it/)
      } finally {
        await rename(`${efiVars}.away`, efiVars)
      }
    })
  })

  it('can be left out of a restore: the machines boot from the disks of that moment', async () => {
    const { exitCode, stderr } = await restore('--disks-only', 'one')
    assert.equal(exitCode, 0, stderr)
    assert.ok(await becomes(() => booted(sigma), 60))
  })

  it('is left out of a snapshot where a machine cannot save it, which says why; all continue', async () => {
    const image = cluster.path('images', 'other.vdi')
    await $({ quiet: true })`qemu-img create -q -f vdi ${image} 1M`
    const file = { driver: 'file', filename: image }
    // QEMU cannot migrate a machine with such a disk, which is what saving is to it.
    await qmp(sigma, 'blockdev-add', { driver: 'vdi', 'node-name': 'other', file })
    const { stderr } = await succeeds('snapshot', 'two')
    assert.match(stderr, /! disks only: sigma: QEMU failed at snapshot-save: .*vdi/)
    assert.equal((await record('two')).kind, 'disks')
    for (const node of cluster.nodes) {
      const { disk, efiVars } = filesOf(cluster, node)
      for (const path of [disk, efiVars]) assert.ok((await namesOn(path)).includes('two'), path)
    }
    await assertRunning()

    const suspend = await script('snapshot', '--suspend')
    assert.match(suspend.stderr, /cannot suspend: sigma: .*vdi/)
    assert.equal(suspend.exitCode, 1)
    await assertRunning()
    await qmp(sigma, 'blockdev-del', { 'node-name': 'other' })
    await succeeds('snapshot', '--delete', 'two')
  })

  it('is kept by make suspend, which ends the machines; make up continues from there', async () => {
    assert.equal((await restore('one')).exitCode, 0)
    await remember('suspended')
    const { stdout } = await succeeds('snapshot', '--suspend')
    assert.match(stdout, /^continue: make up$/m)
    assert.deepEqual(await isUp(), [false, false])
    assert.match((await succeeds('snapshot', '--list')).stdout, /^_suspended .* with memory/m)

    const env = { WORKER_MEM: '300' }
    const other = await run(machines.checkout, 'bin/provision.mts', [], { env })
    assert.match(
      other.stderr,
      /sigma was saved on .* -m 256, and would be on .* -m 300(.|\n)*--disks-only _suspended/,
    )
    assert.deepEqual(await isUp(), [false, false])

    const marker = cluster.path('snapshots', '.restoring')
    await writeFile(marker, 'before-restore-1\n')
    const halfway = await script('provision')
    assert.match(
      halfway.stderr,
      /a restore was interrupted halfway(.|\n)*make restore NAME=before-restore-1/,
    )
    assert.doesNotMatch(halfway.stderr, /load its memory/)
    assert.deepEqual(await isUp(), [false, false])
    await rm(marker)

    await succeeds('provision', 'alpha')
    await assertRunning()
    for (const node of cluster.nodes) assert.equal(await booted(node), false, node.name)
    await assertRemembered('suspended')
    for (const node of cluster.nodes) {
      const { disk, efiVars } = filesOf(cluster, node)
      for (const path of [disk, efiVars]) assert.ok(!(await namesOn(path)).includes('_suspended'))
    }
    assert.deepEqual(
      (await readdir(cluster.path('snapshots'))).filter((name) => name.includes('suspended')),
      [],
    )
  })

  it('of suspended machines is given up by make up with --disks-only, and by a restore', async () => {
    await succeeds('snapshot', '--suspend')
    const given = await restore('one')
    assert.equal(given.exitCode, 0, given.stderr)
    assert.doesNotMatch(given.stderr, /is still there/)
    assert.ok(!existsSync(cluster.path('snapshots', '_suspended')))
    await assertRemembered('first')

    // Even after Ctrl-C before it is removed from the disks, make up does not go back to it.
    await succeeds('snapshot', '--suspend')
    const stub = cluster.path('run', 'stub')
    await mkdir(stub)
    const text = `#!/bin/sh
case "$*" in *' -a one '*)
  pid=$PPID
  until ps -o args= -p $pid | grep -q restore.mts; do pid=$(ps -o ppid= -p $pid | tr -d ' '); done
  # A second one would end it at once.
  mkdir '${stub}/once' 2>/dev/null && kill -INT $pid ;;
esac
exec ${await which('qemu-img')} "$@"
`
    await writeFile(join(stub, 'qemu-img'), text, { mode: 0o755 })
    const env = { PATH: `${stub}:${process.env.PATH}` }
    const restored = await run(machines.checkout, 'bin/restore.mts', ['--start-only', 'one'], {
      env,
    })
    assert.equal(restored.exitCode, 130, restored.stderr)
    assert.match(restored.stderr, /! what an earlier restore replaced is still there/)
    await assertRemembered('first')
    await remember('later')
    const before = await pids()
    await succeeds('provision')
    assert.deepEqual(await pids(), before)
    await assertRemembered('later')

    await succeeds('snapshot', '--suspend')
    await succeeds('provision', '--disks-only')
    await assertRunning()
    assert.ok(!existsSync(cluster.path('snapshots', '_suspended')))
  })

  it('is left out where a machine is off, which is named', async () => {
    await succeeds('shutdown', '--now', 'sigma')
    const { stderr } = await succeeds('snapshot', 'three')
    assert.match(stderr, /^! disks only: sigma is off$/m)
    const { stderr: reason, exitCode } = await script('snapshot', '--suspend')
    assert.match(reason, /cannot suspend: sigma is off/)
    assert.equal(exitCode, 1)
    const given = await succeeds('snapshot', '--disks-only', 'four')
    assert.doesNotMatch(given.stderr, /disks only/)
  })
})
