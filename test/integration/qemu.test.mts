import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { copyFile, rename, writeFile } from 'node:fs/promises'
import { after, before, describe, it } from 'node:test'
import { which } from 'zx'
import { type Architecture, findFirmware } from '../../lib/qemu/firmware.mts'
import { detectQemu, type Host } from '../../lib/qemu/host.mts'
import { filesOf } from '../../lib/qemu/machine-files.mts'
import { cpuModel } from '../../lib/qemu/processor.mts'
import { type Mode, qemuArguments } from '../../lib/qemu/qemu.mts'
import { Qmp } from '../../lib/qemu/qmp.mts'
import { giveDisk, type Machines, makeMachines, noMachines } from '../uefi-machine.mts'

/** This computer, were its processor of that architecture: QEMU emulates either. */
async function emulating(arch: Architecture): Promise<Host> {
  const qemu = await detectQemu(arch)
  const firmware = await findFirmware({ arch, qemu: qemu.path, code: '', vars: '' })
  const cpu = cpuModel({ os: 'linux', arch, accel: 'tcg', sme: false })
  return { os: 'linux', arch, accel: 'tcg', cpu, qemu, firmware }
}

describe('QEMU', { skip: noMachines }, () => {
  let machines: Machines
  before(async () => {
    machines = await makeMachines()
    const { cluster } = machines
    await giveDisk(cluster, cluster.controlPlane)
    const { disk, partialDisk } = filesOf(cluster, cluster.controlPlane)
    await copyFile(disk, partialDisk)
    await writeFile(cluster.path('images', 'empty.iso'), Buffer.alloc(65536))
  })
  after(() => machines.remove())

  for (const arch of ['x86_64', 'aarch64'] as const) {
    const program = `qemu-system-${arch}`
    const missing = which.sync(program, { nothrow: true }) ? false : `${program} is missing`
    for (const kind of ['boot', 'install'] as const) {
      it(`takes the arguments of ${arch}, to ${kind}, without a warning`, {
        skip: missing,
      }, async () => {
        const { cluster } = machines
        const node = cluster.controlPlane
        const host = await emulating(arch)
        const files = filesOf(cluster, node)
        await copyFile(host.firmware.vars.path, `${files.efiVars}.tmp`)
        await rename(`${files.efiVars}.tmp`, files.efiVars)
        const mode: Mode =
          kind === 'boot' ? { kind } : { kind, iso: cluster.path('images', 'empty.iso') }
        const args = qemuArguments({ cluster, node, host, mode })
        // -S: everything is set up, and nothing is begun.
        const qemu = spawn(host.qemu.path, [...args, '-S'], { cwd: cluster.path('run') })
        let said = ''
        qemu.stderr.on('data', (text) => {
          said += text
        })
        const exit = once(qemu, 'exit')
        let qmp: Qmp | undefined
        while (!qmp && qemu.exitCode === null) {
          qmp = await Qmp.connect(files.qmp, { timeout: 10 }).catch(() => undefined)
        }
        const status = (await qmp?.execute('query-status')) as { status: string } | undefined
        assert.equal(status?.status, 'prelaunch', said)
        await qmp?.execute('quit')
        assert.deepEqual(await exit, [0, null])
        assert.equal(said, '')
      })
    }
  }
})
