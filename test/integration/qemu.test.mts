import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { copyFile, writeFile } from 'node:fs/promises'
import { after, before, describe, it } from 'node:test'
import { which } from 'zx'
import { type Architecture, findFirmware } from '../../lib/firmware.mts'
import { detectQemu, detectSystem, type Host } from '../../lib/host.mts'
import { filesOf, type Mode, qemuArguments } from '../../lib/qemu.mts'
import { Qmp } from '../../lib/qmp.mts'
import { prepareEfiVars } from '../../lib/vm.mts'
import { giveDisk, type Machines, makeMachines, noMachines } from '../uefi-machine.mts'

/** This computer as if its processor had that architecture: QEMU emulates either. */
async function emulating(arch: Architecture): Promise<Host> {
  const qemu = await detectQemu(arch)
  const firmware = await findFirmware({ arch, qemu: qemu.path, code: '', vars: '' })
  return { os: detectSystem(), arch, accel: 'tcg', qemu, firmware }
}

describe('QEMU', { skip: noMachines }, () => {
  let machines: Machines
  before(async () => {
    machines = await makeMachines()
    const { cluster } = machines
    for (const node of cluster.nodes) {
      await giveDisk(cluster, node)
      const { disk, partialDisk } = filesOf(cluster, node)
      await copyFile(disk, partialDisk)
    }
    await writeFile(cluster.path('images', 'empty.iso'), Buffer.alloc(65536))
  })
  after(() => machines.remove())

  for (const arch of ['x86_64', 'aarch64'] as const) {
    const program = `qemu-system-${arch}`
    const missing = which.sync(program, { nothrow: true }) ? false : `${program} is missing`
    const cases = ['alpha', 'sigma'].flatMap((name) =>
      (['boot', 'install'] as const).map((kind) => ({ name, kind })),
    )
    for (const { name, kind } of cases) {
      it(`accepts the arguments of ${name} on ${arch}, to ${kind}, without a warning`, {
        skip: missing,
      }, async () => {
        const { cluster } = machines
        const node = cluster.node(name)
        const host = await emulating(arch)
        const files = filesOf(cluster, node)
        await prepareEfiVars(cluster, node, host, { fresh: true })
        const mode: Mode =
          kind === 'boot' ? { kind } : { kind, iso: cluster.path('images', 'empty.iso') }
        const args = qemuArguments({ cluster, node, host, mode })
        // -S: everything is set up, and nothing runs.
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
