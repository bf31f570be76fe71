import assert from 'node:assert/strict'
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync } from 'node:fs'
import { mkdir, writeFile } from 'node:fs/promises'
import { after, before, describe, it } from 'node:test'
import { lanSwitchStatus } from '../../lib/lan.mts'
import { withLock } from '../../lib/lock.mts'
import { Qmp } from '../../lib/qmp.mts'
import { filesOf, isRunning } from '../../lib/vm.mts'
import { becomes } from '../../lib/wait.mts'
import { type Outcome, run } from '../checkout.mts'
import { FakePrograms } from '../fake-programs.mts'
import { type Machines, makeMachines, noMachines, UefiShell } from '../uefi-machine.mts'

// The machines have no system: they do not answer ssh and do not notice the power button.
describe('bin/shutdown.mts', { skip: noMachines }, () => {
  let machines: Machines
  let foreign: ChildProcess
  const programs = new FakePrograms()
  before(async () => {
    machines = await makeMachines()
    foreign = spawn(
      machines.host.qemu.path,
      ['-name', 'sigma', '-machine', 'none', '-nodefaults', '-display', 'none'],
      { stdio: 'ignore' },
    )
    await once(foreign, 'spawn')
    // The ssh of a machine that types "reset -s" into the UEFI shell when it is asked to power off.
    await mkdir(machines.checkout.path('tls'))
    for (const name of ['ssh_config', 'ssh_ed25519', 'known_hosts']) {
      await writeFile(machines.checkout.path('tls', name), '')
    }
    const typing = `require('net').connect(process.argv[1] + '.console').end('reset -s\\r')`
    programs.add(
      'ssh',
      `[ -n "$POWERS_OFF" ] || exit 255
case "$*" in *"systemctl poweroff") cd run && "${process.execPath}" -e "${typing}" "$3" ;; esac`,
    )
  })
  after(async () => {
    foreign.kill('SIGKILL')
    await machines.remove()
    programs.remove()
  })

  const env = (more = {}) => ({ PATH: `${programs.path}:${process.env.PATH}`, ...more })
  const shutdown = (...args: string[]): Promise<Outcome> =>
    run(machines.checkout, 'bin/shutdown.mts', args, { env: env() })
  const running = async () => {
    const { cluster } = machines
    const states = await Promise.all(cluster.nodes.map((node) => isRunning(cluster, node)))
    return cluster.nodes.filter((_, index) => states[index]).map(({ name }) => name)
  }

  it('has nothing to do when nothing runs, and says so', async () => {
    // A pid file of the past, whose number another QEMU has now.
    const { pid } = filesOf(machines.cluster, machines.cluster.node('sigma'))
    await writeFile(pid, `${foreign.pid}\n`)
    const { stdout, stderr, exitCode } = await shutdown()
    assert.equal(exitCode, 0, stderr)
    for (const name of ['alpha', 'sigma', 'gamma']) {
      assert.match(stdout, new RegExp(`^${name} +was not running$`, 'm'))
    }
  })

  it('asks the machine over ssh to power off', async () => {
    const { cluster } = machines
    await machines.start(cluster.controlPlane)
    const shell = await UefiShell.of(cluster, cluster.controlPlane)
    shell.close()
    const { stdout, stderr } = await run(machines.checkout, 'bin/shutdown.mts', ['alpha'], {
      env: env({ POWERS_OFF: 'yes', STOP_TIMEOUT: '60' }),
    })
    assert.match(stdout, /^alpha {2}powered off \(/, stderr)
    assert.ok(programs.calls().includes('ssh -F tls/ssh_config alpha systemctl poweroff'))
    assert.doesNotMatch(stderr, /power button/)
    assert.deepEqual(await running(), [])
  })

  it('stops only the machines that are named, and keeps the LAN for the others', async () => {
    const { cluster } = machines
    for (const node of cluster.nodes) await machines.start(node)
    const { stdout, stderr, exitCode } = await shutdown('sigma')
    assert.equal(exitCode, 0, stderr)
    assert.match(stdout, /^sigma {2}did not power off in time and was switched off \(/)
    assert.match(stderr, /asked to power off[\s\S]*power button pressed[\s\S]*switched off/)
    assert.deepEqual(await running(), ['alpha', 'gamma'])
    assert.ok(await lanSwitchStatus(cluster))
  })

  it('changes nothing when a name is not a node’s', async () => {
    const { stderr, exitCode } = await shutdown('gamma', 'delta')
    assert.equal(exitCode, 2)
    assert.match(stderr, /there is no node "delta"/)
    assert.deepEqual(await running(), ['alpha', 'gamma'])
  })

  it('resumes a machine that is paused, and leaves it running when it is interrupted', async () => {
    const { checkout, cluster } = machines
    const { qmp: path } = filesOf(cluster, cluster.controlPlane)
    const status = async (command?: string) => {
      const qmp = await Qmp.connect(path, { timeout: 5 })
      if (command) await qmp.execute(command)
      const answer = (await qmp.execute('query-status')) as { status: string }
      qmp.close()
      return answer.status
    }
    assert.equal(await status('stop'), 'paused')
    const script = spawn(checkout.path('bin', 'shutdown.mts'), ['alpha'], {
      env: { ...process.env, ...env({ STOP_TIMEOUT: '600' }) },
      stdio: 'ignore',
    })
    assert.ok(await becomes(async () => (await status()) === 'running', 20))
    script.kill('SIGINT')
    assert.deepEqual(await once(script, 'exit'), [130, null])
    assert.deepEqual(await running(), ['alpha', 'gamma'])
  })

  it('stops workers before the control plane, and the LAN switch last', async () => {
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
    }
  })

  it('stops the others when one cannot be stopped, and reports each', async () => {
    const { cluster } = machines
    for (const node of cluster.nodes) await machines.start(node)
    const { lock } = filesOf(cluster, cluster.node('sigma'))
    const { stdout, stderr, exitCode } = await withLock(lock, 'testing sigma', () => shutdown())
    assert.equal(exitCode, 1)
    assert.match(stderr, /another process is testing sigma/)
    assert.match(stdout, /^sigma {2}was not stopped\ngamma {2}did not .*\nalpha {2}did not /)
    assert.deepEqual(await running(), ['sigma'])
    assert.ok(await lanSwitchStatus(cluster), 'sigma still needs it')
  })

  it('kills a QEMU that no longer answers, also with --now, and it can be started again', async () => {
    const { cluster } = machines
    const sigma = cluster.node('sigma')
    process.kill(await machines.start(sigma), 'SIGSTOP')
    const { stdout, stderr } = await shutdown('--now', 'sigma')
    assert.match(stdout, /^sigma {2}did not answer and was killed/)
    assert.doesNotMatch(stderr, /asked to power off/)
    await machines.start(sigma)
    const again = await shutdown('--now', '--verbose')
    assert.match(again.stdout, /^sigma +switched off \(/m)
    const quit = `$ echo '{"execute":"qmp_capabilities"} {"execute":"quit"}' | nc -U run/sigma.qmp`
    assert.ok(again.stderr.includes(quit), again.stderr)
    assert.deepEqual(await running(), [])
  })

  it('has left another program’s QEMU alone, although it has the name of a node', () => {
    assert.equal(foreign.exitCode ?? foreign.signalCode, null)
  })
})
