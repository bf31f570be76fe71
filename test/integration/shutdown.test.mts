import assert from 'node:assert/strict'
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync } from 'node:fs'
import { after, before, describe, it } from 'node:test'
import { lanSwitchStatus } from '../../lib/lan/lan-switch.mts'
import { withLock } from '../../lib/lock.mts'
import { filesOf } from '../../lib/qemu/machine-files.mts'
import { isRunning } from '../../lib/qemu/vm.mts'
import { type Outcome, run } from '../checkout.mts'
import { type Machines, makeMachines, noMachines } from '../uefi-machine.mts'

describe('bin/shutdown.mts', { skip: noMachines }, () => {
  let machines: Machines
  let foreign: ChildProcess
  before(async () => {
    machines = await makeMachines()
    foreign = spawn(
      machines.host.qemu.path,
      ['-name', 'sigma', '-machine', 'none', '-nodefaults', '-display', 'none'],
      { stdio: 'ignore' },
    )
    await once(foreign, 'spawn')
  })
  after(async () => {
    foreign.kill('SIGKILL')
    await machines.remove()
  })

  const shutdown = (...args: string[]): Promise<Outcome> =>
    run(machines.checkout, 'bin/shutdown.mts', args)
  const running = async () => {
    const { cluster } = machines
    const states = await Promise.all(cluster.nodes.map((node) => isRunning(cluster, node)))
    return cluster.nodes.filter((_, index) => states[index]).map(({ name }) => name)
  }

  it('has nothing to do when nothing runs, and says so', async () => {
    const { stdout, exitCode } = await shutdown()
    assert.equal(exitCode, 0)
    for (const name of ['alpha', 'sigma', 'gamma']) {
      assert.match(stdout, new RegExp(`^${name} +was not running$`, 'm'))
    }
  })

  it('stops only the machines that are named, and keeps the lan for the others', async () => {
    const { cluster } = machines
    for (const node of cluster.nodes) await machines.start(node)
    const { stdout, exitCode } = await shutdown('sigma')
    assert.equal(exitCode, 0)
    assert.match(stdout, /^sigma {2}did not power off in time and was switched off \(/)
    assert.deepEqual(await running(), ['alpha', 'gamma'])
    assert.ok(await lanSwitchStatus(cluster))
  })

  it('changes nothing when a name is no node’s', async () => {
    const { stderr, exitCode } = await shutdown('gamma', 'delta')
    assert.equal(exitCode, 2)
    assert.match(stderr, /there is no node "delta"/)
    assert.deepEqual(await running(), ['alpha', 'gamma'])
  })

  it('stops workers before the control plane, and the lan switch last', async () => {
    const { cluster } = machines
    const { stdout, stderr, exitCode } = await shutdown()
    assert.equal(exitCode, 0, stderr)
    assert.match(stdout, /^sigma +was not running\ngamma +did not .*\nalpha +did not /)
    const [gammaEnds, alphaBegins] = [/✓ gamma/, /• alpha/].map((event) => stderr.search(event))
    assert.ok(gammaEnds !== undefined && alphaBegins !== undefined)
    assert.ok(gammaEnds >= 0 && gammaEnds < alphaBegins, stderr)
    assert.deepEqual(await running(), [])
    assert.equal(await lanSwitchStatus(cluster, 0.2), undefined)
    for (const node of cluster.nodes) {
      assert.equal(existsSync(filesOf(cluster, node).disk), true, 'disks stay')
      assert.equal(existsSync(filesOf(cluster, node).pid), false)
    }
  })

  it('stops the others when one cannot be stopped, and tells of each', async () => {
    const { cluster } = machines
    for (const node of cluster.nodes) await machines.start(node)
    const { lock } = filesOf(cluster, cluster.node('sigma'))
    const { stdout, stderr, exitCode } = await withLock(lock, 'testing sigma', () => shutdown())
    assert.equal(exitCode, 1)
    assert.match(stderr, /another process is testing sigma/)
    assert.match(stdout, /^sigma {2}was not stopped\ngamma {2}did not .*\nalpha {2}did not /)
    assert.deepEqual(await running(), ['sigma'])
    assert.ok(await lanSwitchStatus(cluster), 'sigma still needs it')
    assert.equal((await shutdown()).exitCode, 0)
    assert.deepEqual(await running(), [])
  })

  it('has left the QEMU of somebody else alone, although that has the name of a node', () => {
    assert.equal(foreign.exitCode ?? foreign.signalCode, null)
  })
})
