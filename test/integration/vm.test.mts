import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { copyFile, mkdir, readFile, rename, rm, stat, writeFile } from 'node:fs/promises'
import { createServer } from 'node:net'
import { afterEach, beforeEach, describe, it } from 'node:test'
import type { Node } from '../../lib/cluster.mts'
import { commandLine } from '../../lib/processes.mts'
import { qemuArguments } from '../../lib/qemu.mts'
import { Qmp } from '../../lib/qmp.mts'
import { filesOf, machineState, prepareEfiVars, startMachine } from '../../lib/vm.mts'
import { becomes } from '../../lib/wait.mts'
import { type Outcome, run } from '../checkout.mts'
import { giveDisk, type Machines, makeMachines, noMachines, UefiShell } from '../uefi-machine.mts'

describe('starting a machine', { skip: noMachines }, () => {
  let machines: Machines
  let alpha: Node
  beforeEach(async () => {
    machines = await makeMachines()
    alpha = machines.cluster.controlPlane
  })
  afterEach(() => machines.remove())

  const provision = (): Promise<Outcome> => run(machines.checkout, 'bin/provision.mts', ['alpha'])
  const state = () => machineState(machines.cluster, alpha)

  it('leaves QEMU in the background, with pid file, QMP and console', async () => {
    const { cluster } = machines
    const files = filesOf(cluster, alpha)
    await giveDisk(cluster, alpha)
    await writeFile(files.consoleLog, 'output of the previous run')
    const { stdout, stderr, exitCode } = await provision()
    assert.equal(exitCode, 0, stderr)
    const pid = Number(stdout.match(/^alpha +started \(pid (\d+)\)$/m)?.[1])
    assert.deepEqual(await state(), { state: 'running', pid })
    assert.equal(Number(await readFile(files.pid, 'utf8')), pid)
    assert.match((await commandLine(pid)) ?? '', /qemu-system-.* -name alpha /)

    const qmp = await Qmp.connect(files.qmp)
    assert.deepEqual(await qmp.execute('query-name'), { name: 'alpha' })
    qmp.close()
    assert.equal((await stat(cluster.path('run'))).mode & 0o777, 0o700, 'QMP is private')

    const shell = await UefiShell.of(cluster, alpha)
    shell.close()
    assert.match(await readFile(files.consoleLog, 'utf8'), /Shell>/)
    assert.equal(await readFile(`${files.consoleLog}.1`, 'utf8'), 'output of the previous run')
  })

  it('does nothing when it runs already, however many ask at once', async () => {
    await giveDisk(machines.cluster, alpha)
    const outcomes = await Promise.all([provision(), provision(), provision()])
    const lines = outcomes.map(({ stdout }) => stdout.trim()).sort()
    const found = await state()
    assert.equal(found.state, 'running')
    const pid = `(pid ${found.state === 'running' && found.pid})`
    const [already, started] = [`alpha  runs already ${pid}`, `alpha  started ${pid}`]
    assert.deepEqual(lines, [already, already, started], outcomes.map((one) => one.stderr).join())
  })

  it('resumes one that a killed snapshot has left paused', async () => {
    await machines.start(alpha)
    const { qmp: path } = filesOf(machines.cluster, alpha)
    const status = async (command?: string) => {
      const qmp = await Qmp.connect(path)
      if (command) await qmp.execute(command)
      const answer = (await qmp.execute('query-status')) as { status: string }
      qmp.close()
      return answer.status
    }
    assert.equal(await status('stop'), 'paused')
    assert.match((await provision()).stdout, /^alpha +runs already/)
    assert.equal(await status(), 'running')
  })

  it('boots one that a killed restore has left without memory', async () => {
    const { cluster, host } = machines
    await giveDisk(cluster, alpha)
    await startMachine(cluster, alpha, host, async () => {})
    assert.match((await provision()).stdout, /^alpha +runs already/)
    const qmp = await Qmp.connect(filesOf(cluster, alpha).qmp)
    const { status } = (await qmp.execute('query-status')) as { status: string }
    qmp.close()
    assert.equal(status, 'running')
  })

  it('is refused while another program has its port, which is named', async () => {
    await giveDisk(machines.cluster, alpha)
    const server = createServer().listen(alpha.sshPort, '127.0.0.1')
    await once(server, 'listening')
    const { stderr, exitCode } = await provision()
    server.close()
    assert.equal(exitCode, 1)
    assert.match(stderr, new RegExp(`SSH_PORT_alpha\\) is taken by .*\\(pid ${process.pid}\\)`))
    assert.deepEqual(await state(), { state: 'stopped' })
  })

  it('is refused when the firmware is not there', async () => {
    await machines.checkout.set({ QEMU_FIRMWARE_CODE: '/none', QEMU_FIRMWARE_VARS: '/none' })
    await giveDisk(machines.cluster, alpha)
    assert.match((await provision()).stderr, /QEMU_FIRMWARE_CODE names a file that is not there/)
  })

  it('reports why QEMU fails, and where its log is', async () => {
    const files = filesOf(machines.cluster, alpha)
    await writeFile(files.disk, 'no qcow2 file')
    const { stderr, exitCode } = await provision()
    assert.equal(exitCode, 1)
    assert.match(stderr, /QEMU of alpha ended at once/)
    assert.match(stderr, /Image is not in qcow2 format/)
    assert.ok(stderr.includes(`log:     ${files.qemuLog}`), stderr)
    assert.deepEqual(await state(), { state: 'stopped' })
  })

  it('reports that another program has the disk open', async () => {
    const { cluster } = machines
    await giveDisk(cluster, alpha)
    const { disk } = filesOf(cluster, alpha)
    const program = machines.host.qemu.path
    const idle = ['-machine', 'none', '-nodefaults', '-display', 'none', '-monitor', 'stdio']
    const drive = ['-drive', `if=none,id=disk,file=${disk}`]
    const holder = spawn(program, [...idle, ...drive], { stdio: ['pipe', 'pipe', 'ignore'] })
    await once(holder.stdout, 'data')
    const { stderr } = await provision()
    holder.kill('SIGKILL')
    assert.match(stderr, /QEMU of alpha ended at once: another program has this disk open/)
  })

  it('is refused when a script that it waited for has suspended the machines', async () => {
    const { cluster, host } = machines
    await giveDisk(cluster, alpha)
    await mkdir(cluster.path('snapshots', '_suspended'), { recursive: true })
    await assert.rejects(startMachine(cluster, alpha, host), /were suspended meanwhile/)
    await rm(cluster.path('snapshots'), { recursive: true })
    assert.equal((await state()).state, 'stopped')
  })

  it('is refused while it is being installed, which counts as running', async () => {
    const { cluster, host } = machines
    const files = filesOf(cluster, alpha)
    await giveDisk(cluster, alpha)
    await copyFile(files.disk, files.partialDisk)
    await prepareEfiVars(cluster, alpha, host)
    const iso = cluster.path('images', 'empty.iso')
    await writeFile(iso, Buffer.alloc(65536))

    const args = qemuArguments({ cluster, node: alpha, host, mode: { kind: 'install', iso } })
    const qemu = spawn(host.qemu.path, args, { cwd: cluster.path('run'), stdio: 'pipe' })
    let output = ''
    let errors = ''
    qemu.stderr.on('data', (text) => {
      errors += text
    })
    qemu.stdout.on('data', (text) => {
      output += text
    })
    assert.ok(await becomes(async () => (await state()).state === 'installing', 20))
    assert.deepEqual(await state(), { state: 'installing', pid: qemu.pid })
    assert.match((await provision()).stderr, /alpha is being installed/)
    assert.ok(await becomes(() => /BdsDxe|Shell>/.test(output), 60), output)

    // It has nothing to save, so its system is not asked.
    const { stdout, stderr } = await run(machines.checkout, 'bin/shutdown.mts', ['alpha'])
    assert.doesNotMatch(stderr, /asked to power off/)
    assert.match(stdout, /^alpha +.*switched off \(\d\.\ds\)/)
    // By this provision knows that it is not to try again.
    assert.match(errors, /terminating on signal 15/)
    await rename(files.partialDisk, `${files.disk}.2`)
  })
})
