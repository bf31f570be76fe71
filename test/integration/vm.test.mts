import assert from 'node:assert/strict'
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { copyFile, readFile, rename, stat, writeFile } from 'node:fs/promises'
import { createServer } from 'node:net'
import { after, afterEach, before, beforeEach, describe, it } from 'node:test'
import { loadCluster, type Node } from '../../lib/cluster.mts'
import type { StepError } from '../../lib/errors.mts'
import { detectHost } from '../../lib/qemu/host.mts'
import { filesOf } from '../../lib/qemu/machine-files.mts'
import { commandLine } from '../../lib/qemu/processes.mts'
import { qemuArguments } from '../../lib/qemu/qemu.mts'
import { Qmp } from '../../lib/qemu/qmp.mts'
import { stopMachine } from '../../lib/qemu/stop-machine.mts'
import { machineState, startMachine } from '../../lib/qemu/vm.mts'
import { becomes } from '../../lib/wait.mts'
import { run } from '../checkout.mts'
import { giveDisk, type Machines, makeMachines, noMachines, UefiShell } from '../uefi-machine.mts'

describe('starting a machine', { skip: noMachines }, () => {
  let machines: Machines
  let alpha: Node
  beforeEach(async () => {
    machines = await makeMachines()
    alpha = machines.cluster.controlPlane
  })
  afterEach(() => machines.remove())

  const start = () => startMachine(machines.cluster, alpha, machines.host)
  const state = () => machineState(machines.cluster, alpha)

  it('leaves QEMU in the background, with pid file, QMP and console', async () => {
    const { cluster } = machines
    const files = filesOf(cluster, alpha)
    await giveDisk(cluster, alpha)
    const { pid, alreadyRunning } = await start()
    assert.equal(alreadyRunning, false)
    assert.deepEqual(await state(), { state: 'running', pid, mode: 'boot' })
    assert.equal(Number(await readFile(files.pid, 'utf8')), pid)
    assert.match((await commandLine(pid)) ?? '', /qemu-system-.* -name alpha /)

    const qmp = await Qmp.connect(files.qmp)
    assert.deepEqual(await qmp.execute('query-name'), { name: 'alpha' })
    qmp.close()
    assert.equal((await stat(cluster.path('run'))).mode & 0o777, 0o700, 'QMP is not for others')

    const shell = await UefiShell.of(cluster, alpha)
    shell.close()
    const said = await readFile(files.consoleLog, 'utf8')
    assert.match(said, /Shell>/, 'what the console said is in the log too')
  })

  it('does nothing when it runs already, however many ask at once', async () => {
    await giveDisk(machines.cluster, alpha)
    const results = await Promise.all([start(), start(), start()])
    assert.equal(new Set(results.map(({ pid }) => pid)).size, 1)
    assert.equal(results.filter(({ alreadyRunning }) => !alreadyRunning).length, 1)
    assert.deepEqual(await start(), { pid: results[0]?.pid, alreadyRunning: true })
  })

  it('works from a script, which ends while the machine runs on', async () => {
    const { checkout, cluster } = machines
    await giveDisk(cluster, alpha)
    const text = `
      const { loadCluster } = await import('./lib/cluster.mts')
      const { detectHost } = await import('./lib/qemu/host.mts')
      const { startMachine } = await import('./lib/qemu/vm.mts')
      const cluster = loadCluster()
      const { pid } = await startMachine(cluster, cluster.controlPlane, await detectHost(cluster))
      console.log(pid)`
    const { stdout, stderr, exitCode } = await run(checkout, 'node', [
      ...['--import', 'tsx', '--input-type=module', '--eval', text],
    ])
    assert.equal(exitCode, 0, stderr)
    assert.deepEqual(await state(), { state: 'running', pid: Number(stdout), mode: 'boot' })
  })

  it('keeps the console log of the time before', async () => {
    const { consoleLog } = filesOf(machines.cluster, alpha)
    await writeFile(consoleLog, 'Kernel panic - not syncing')
    await machines.start(alpha)
    assert.equal(await readFile(`${consoleLog}.1`, 'utf8'), 'Kernel panic - not syncing')
  })

  it('is refused without a disk', async () => {
    await assert.rejects(start(), ({ message, explanation }: StepError) => {
      assert.equal(message, 'alpha has no disk: images/alpha.qcow2 is missing')
      assert.match(explanation.hint ?? '', /make install-alpha/)
      return true
    })
    assert.deepEqual(await state(), { state: 'stopped' })
  })

  it('is refused while another program has its port, which is named', async () => {
    await giveDisk(machines.cluster, alpha)
    const server = createServer().listen(alpha.sshPort, '127.0.0.1')
    await once(server, 'listening')
    const reason = new RegExp(`SSH_PORT_alpha\\) is taken by .*\\(pid ${process.pid}\\)`)
    await assert.rejects(start(), reason)
    server.close()
    assert.deepEqual(await state(), { state: 'stopped' })
  })

  it('is refused when the firmware is not there', async () => {
    await machines.checkout.set({ QEMU_FIRMWARE_CODE: '/none', QEMU_FIRMWARE_VARS: '/none' })
    const cluster = loadCluster({ root: machines.checkout.root })
    await assert.rejects(detectHost(cluster), /QEMU_FIRMWARE_CODE names a file that is not there/)
  })

  it('that fails tells what QEMU said, and where', async () => {
    const { cluster } = machines
    const files = filesOf(cluster, alpha)
    await writeFile(files.disk, 'no qcow2 file')
    await assert.rejects(start(), ({ message, explanation }: StepError) => {
      assert.match(message, /^QEMU of alpha ended at once, with status 1$/)
      assert.match(explanation.output ?? '', /Image is not in qcow2 format/)
      assert.equal(explanation.log, files.qemuLog)
      return true
    })
    assert.deepEqual(await state(), { state: 'stopped' })
  })
})

describe('a machine and a QEMU of somebody else', { skip: noMachines }, () => {
  let machines: Machines
  let alpha: Node
  let foreign: ChildProcess
  before(async () => {
    machines = await makeMachines()
    alpha = machines.cluster.controlPlane
    foreign = spawn(
      machines.host.qemu.path,
      ['-name', 'alpha', '-machine', 'none', '-nodefaults', '-display', 'none'],
      { stdio: 'ignore' },
    )
    await once(foreign, 'spawn')
  })
  after(async () => {
    foreign.kill('SIGKILL')
    await machines.remove()
  })

  it('are not mistaken for each other, even if a pid file of the past has its number', async () => {
    const { cluster, host } = machines
    const files = filesOf(cluster, alpha)
    await writeFile(files.pid, `${foreign.pid}\n`)
    assert.deepEqual(await machineState(cluster, alpha), { state: 'stopped' })
    assert.deepEqual(await stopMachine(cluster, alpha), { ended: 'not running', seconds: 0 })

    await giveDisk(cluster, alpha)
    const { pid, alreadyRunning } = await startMachine(cluster, alpha, host)
    assert.equal(alreadyRunning, false)
    assert.notEqual(pid, foreign.pid)
    assert.equal((await stopMachine(cluster, alpha)).ended, 'quit')
    assert.equal(foreign.exitCode ?? foreign.signalCode, null, 'it is alive still')
  })
})

describe('stopping a machine', { skip: noMachines }, () => {
  let machines: Machines
  let alpha: Node
  beforeEach(async () => {
    machines = await makeMachines()
    alpha = machines.cluster.controlPlane
  })
  afterEach(() => machines.remove())

  it('ends well when its system powers off as it is asked to', async () => {
    const { cluster } = machines
    await machines.start(alpha)
    const shell = await UefiShell.of(cluster, alpha)
    await machines.checkout.set({ STOP_TIMEOUT: 60 })
    const patient = loadCluster({ root: cluster.root })
    const powerOff = async () => shell.type('reset -s')
    const { ended } = await stopMachine(patient, patient.controlPlane, { powerOff })
    assert.equal(ended, 'powered off')
    assert.deepEqual(await machineState(cluster, alpha), { state: 'stopped' })
  })

  it('switches it off when it does not, and says so', async () => {
    const { cluster } = machines
    await machines.start(alpha)
    const said: string[] = []
    // The firmware does not heed the power button, and nothing else can be asked here.
    const powerOff = () => Promise.reject(new Error('no ssh'))
    const { ended, seconds } = await stopMachine(cluster, alpha, {
      powerOff,
      report: (text) => said.push(text),
    })
    assert.equal(ended, 'quit')
    assert.ok(seconds >= 1 && seconds < 15, `${seconds} s`)
    assert.deepEqual(said, ['asked to power off', 'still up after 1 s: switched off'])
  })

  it('kills QEMU itself when that does not answer any more', async () => {
    const { cluster } = machines
    const pid = await machines.start(alpha)
    process.kill(pid, 'SIGSTOP')
    const { ended } = await stopMachine(cluster, alpha)
    assert.equal(ended, 'killed')
    assert.deepEqual(await machineState(cluster, alpha), { state: 'stopped' })
    // What was left behind is in nobody's way.
    await machines.start(alpha)
  })

  it('resumes it first when it is paused, and leaves it running when it is interrupted', async () => {
    const { cluster } = machines
    const { qmp: path } = filesOf(cluster, alpha)
    await machines.start(alpha)
    const qmp = await Qmp.connect(path)
    await qmp.execute('stop')
    assert.equal(((await qmp.execute('query-status')) as { status: string }).status, 'paused')
    qmp.close()

    await machines.checkout.set({ STOP_TIMEOUT: 600 })
    const patient = loadCluster({ root: cluster.root })
    const controller = new AbortController()
    const { signal } = controller
    const stopping = stopMachine(patient, patient.controlPlane, { signal })
    const isRunningAgain = async () => {
      const other = await Qmp.connect(path, { timeout: 5 })
      const { status } = (await other.execute('query-status')) as { status: string }
      other.close()
      return status === 'running'
    }
    assert.ok(await becomes(isRunningAgain, 20))
    controller.abort(new Error('interrupted'))
    await assert.rejects(stopping, /interrupted/)
    assert.equal((await machineState(cluster, alpha)).state, 'running')
  })
})

describe('a machine that is being installed', { skip: noMachines }, () => {
  let machines: Machines
  before(async () => {
    machines = await makeMachines()
  })
  after(() => machines.remove())

  it('has its console on stdin and stdout, counts as running, is not started, and is stopped at once', async () => {
    const { cluster, host } = machines
    const alpha = cluster.controlPlane
    const files = filesOf(cluster, alpha)
    await giveDisk(cluster, alpha)
    await rename(files.disk, files.partialDisk)
    await copyFile(host.firmware.vars.path, files.efiVars)
    const iso = cluster.path('images', 'empty.iso')
    await writeFile(iso, Buffer.alloc(65536))

    const mode = { kind: 'install', iso } as const
    const args = qemuArguments({ cluster, node: alpha, host, mode })
    const qemu = spawn(host.qemu.path, args, { cwd: cluster.path('run'), stdio: 'pipe' })
    let said = ''
    qemu.stdout.on('data', (text) => {
      said += text
    })
    const isUp = async () => (await machineState(cluster, alpha)).state === 'running'
    assert.ok(await becomes(isUp, 20))
    assert.deepEqual(await machineState(cluster, alpha), {
      state: 'running',
      pid: qemu.pid,
      mode: 'install',
    })
    assert.ok(await becomes(() => /BdsDxe|Shell>/.test(said), 60), said)

    await assert.rejects(startMachine(cluster, alpha, host), /alpha is being installed/)
    const { ended, seconds } = await stopMachine(cluster, alpha)
    assert.equal(ended, 'quit')
    assert.ok(seconds < 10, `${seconds} s`)
  })
})
