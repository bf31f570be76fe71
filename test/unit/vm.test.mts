import assert from 'node:assert/strict'
import { type ChildProcess, execFile, spawn } from 'node:child_process'
import { once } from 'node:events'
import { chmod, mkdir, mkdtemp, readFile, rm, stat, symlink, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, it } from 'node:test'
import { promisify } from 'node:util'
import { which } from 'zx'
import { type Cluster, loadCluster } from '../../lib/cluster.mts'
import type { Host } from '../../lib/host.mts'
import { assertDiskSpace, filesOf, machineState, portsOf, prepareEfiVars } from '../../lib/vm.mts'
import { type Checkout, makeCheckout } from '../checkout.mts'

describe('a machine', () => {
  const cluster = loadCluster({ env: {} })

  it('opens a port for ssh and one for the LAN, the control plane also one for the API', () => {
    const variables = cluster.nodes.map((node) =>
      portsOf(cluster, node).map(({ variable, port }) => `${variable} ${port}`),
    )
    assert.deepEqual(variables, [
      ['SSH_PORT_alpha 2222', 'LAN_SWITCH_PORT 24110', 'API_PORT 6443'],
      ['SSH_PORT_sigma 2223', 'LAN_SWITCH_PORT 24111'],
      ['SSH_PORT_gamma 2224', 'LAN_SWITCH_PORT 24112'],
    ])
  })

  it('is refused where there is no disk space, but for macOS, which can purge some', async () => {
    const all = `not enough disk space for a file: 1000000 TB are needed, .* are free`
    const how = { what: ' for a file', hint: 'less' }
    await assertDiskSpace(tmpdir(), 1, { ...how, os: 'linux' })
    await assert.rejects(assertDiskSpace(tmpdir(), 1e18, { ...how, os: 'linux' }), RegExp(all))
    const warning = await assertDiskSpace(tmpdir(), 1e18, { ...how, os: 'darwin' })
    assert.match(warning ?? '', RegExp(`${all}; macOS may free more`))
  })
})

describe('whether a machine runs', () => {
  let checkout: Checkout
  let cluster: Cluster
  let qemu: ChildProcess | undefined
  beforeEach(async () => {
    checkout = await makeCheckout()
    cluster = loadCluster({ root: checkout.root })
    await mkdir(checkout.path('run'))
  })
  afterEach(async () => {
    qemu?.kill('SIGKILL')
    await checkout.remove()
  })

  /** Starts a process with the arguments of a QEMU, and notes it in alpha's pid file. */
  async function start(pidFile: string): Promise<void> {
    const program = checkout.path('qemu-system-x86_64')
    await writeFile(program, '#!/bin/sh\nsleep 1000 & wait\n')
    await chmod(program, 0o755)
    qemu = spawn(program, ['-pidfile', pidFile, '-name', 'alpha'], {
      stdio: 'ignore',
      detached: true,
    })
    await once(qemu, 'spawn')
    const { pid = 0 } = qemu
    qemu.kill = () => process.kill(-pid, 'SIGKILL')
    await writeFile(filesOf(cluster, cluster.controlPlane).pid, `${pid}\n`)
  }
  const state = () => machineState(cluster, cluster.controlPlane)

  it('is known by the pid file in its arguments', async () => {
    await start(filesOf(cluster, cluster.controlPlane).pid)
    assert.deepEqual(await state(), { state: 'running', pid: qemu?.pid })
  })

  it('is known by the same pid file in another spelling', async () => {
    await symlink(checkout.root, `${checkout.root}-link`)
    await start(join(`${checkout.root}-link`, 'run', 'alpha.pid'))
    assert.deepEqual(await state(), { state: 'running', pid: qemu?.pid })
  })

  it('is not mistaken for that of another checkout', async () => {
    const other = join(checkout.root, 'other', 'run')
    await mkdir(other, { recursive: true })
    await writeFile(join(other, 'alpha.pid'), '1')
    await start(join(other, 'alpha.pid'))
    assert.deepEqual(await state(), { state: 'stopped' })
  })

  it('is refused as unknown when the path of the pid file cannot be read', async () => {
    await start('/Users/m??ller/run/alpha.pid')
    await assert.rejects(state(), /may be alpha: it is a QEMU with a pid file \/Users\/m\?\?ller/)
  })
})

/** A raw file with these words in it, as the firmware takes it. */
const raw = (words: string) => Buffer.alloc(1024, words.padEnd(1024, '\0'))
const exec = promisify(execFile)
const noQemuIo = (await which('qemu-io', { nothrow: true })) ? false : 'qemu-io is missing'

describe('the UEFI variables', { skip: noQemuIo }, () => {
  let checkout: Checkout
  let cluster: Cluster
  let folder: string
  let host: Host
  beforeEach(async () => {
    checkout = await makeCheckout()
    cluster = loadCluster({ root: checkout.root })
    folder = await mkdtemp(join(tmpdir(), 'vars-'))
    const template = join(folder, 'vars.fd')
    await writeFile(template, raw('template'), { mode: 0o444 })
    host = {
      os: 'linux',
      arch: 'x86_64',
      accel: 'tcg',
      qemu: { path: 'qemu', version: '7.2' },
      firmware: {
        code: { path: '/none', format: 'raw' },
        vars: { path: template, format: 'raw' },
      },
    }
    await mkdir(checkout.path('images'))
  })
  afterEach(async () => {
    await checkout.remove()
    await rm(folder, { recursive: true })
  })

  const words = async (path: string) => {
    const copy = join(folder, 'copy')
    await exec('qemu-img', ['convert', '-f', 'qcow2', '-O', 'raw', path, copy])
    return (await readFile(copy, 'utf8')).replace(/\0+$/, '')
  }
  const prepare = (options?: { fresh: boolean }) =>
    prepareEfiVars(cluster, cluster.controlPlane, host, options)

  it('are a writable copy of the template, which can hold snapshots', async () => {
    const { efiVars } = filesOf(cluster, cluster.controlPlane)
    await prepare()
    assert.equal(await words(efiVars), 'template')
    assert.equal((await stat(efiVars)).mode & 0o777, 0o600)
  })

  it('are kept from boot to boot, and replaced for an installation', async () => {
    const { efiVars } = filesOf(cluster, cluster.controlPlane)
    await prepare()
    await exec('qemu-io', ['-f', 'qcow2', '-c', 'write -P 65 0 512', efiVars])
    await prepare()
    assert.equal(await words(efiVars), 'A'.repeat(512))
    await prepare({ fresh: true })
    assert.equal(await words(efiVars), 'template')
  })

  it('are replaced, and the old ones kept as .old, when the firmware has another size', async () => {
    const { efiVars } = filesOf(cluster, cluster.controlPlane)
    await exec('qemu-img', ['create', '-q', '-f', 'qcow2', efiVars, '2M'])
    await exec('qemu-io', ['-f', 'qcow2', '-c', 'write -P 65 0 512', efiVars])
    await prepare()
    assert.equal(await words(efiVars), 'template')
    assert.equal(await words(`${efiVars}.old`), 'A'.repeat(512))
  })

  it('have names that no other machine has, whatever it is called', () => {
    const paths = ['a', 'a-efivars', 'a-efivars-qcow2', 'a-qcow2', 'a-qcow2-partial'].flatMap(
      (name) => Object.values(filesOf(cluster, { name })),
    )
    assert.equal(new Set(paths).size, paths.length)
  })
})
