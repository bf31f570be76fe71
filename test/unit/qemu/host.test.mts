import assert from 'node:assert/strict'
import { chmod, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import {
  chooseAccelerator,
  detectAccelerator,
  detectQemu,
  detectSystem,
} from '../../../lib/qemu/host.mts'
import { StepError } from '../../../lib/step-error.mts'

describe('the accelerator', () => {
  const none = undefined
  const obstacle = { reason: '/dev/kvm cannot be opened', hint: 'load the module' }
  for (const [setting, os, inTheWay, accelerator] of [
    ['auto', 'darwin', none, 'hvf'],
    ['auto', 'darwin', obstacle, 'tcg'],
    ['auto', 'linux', none, 'kvm'],
    ['auto', 'linux', obstacle, 'tcg'],
    ['tcg', 'linux', none, 'tcg'],
    ['kvm', 'linux', none, 'kvm'],
    ['hvf', 'darwin', none, 'hvf'],
  ] as const) {
    const can = inTheWay ? 'without' : 'with'
    it(`is ${accelerator} for QEMU_ACCEL=${setting} on ${os} ${can} virtualization`, () => {
      assert.equal(chooseAccelerator(setting, os, inTheWay), accelerator)
    })
  }

  it('is not quietly another one than was asked for', () => {
    const choose = chooseAccelerator
    assert.throws(() => choose('kvm', 'linux', obstacle), /\/dev\/kvm cannot be opened/)
    assert.throws(() => choose('hvf', 'linux', none), /not for this system: it has kvm/)
    assert.throws(() => choose('kvm', 'darwin', none), /not for this system: it has hvf/)
  })

  it('comes with a warning when it is the slow one', async () => {
    const { accel, warning } = await detectAccelerator('tcg', detectSystem())
    assert.equal(accel, 'tcg')
    assert.match(warning ?? '', /^QEMU_ACCEL=tcg: QEMU emulates the processor/)
  })

  it('that is chosen by itself is one that QEMU works with', async () => {
    const { accel, warning } = await detectAccelerator('auto', detectSystem())
    assert.equal(accel === 'tcg', warning !== undefined)
    if (accel === 'tcg') {
      const native = detectSystem() === 'darwin' ? 'hvf' : 'kvm'
      await assert.rejects(detectAccelerator(native, detectSystem()), /^StepError: QEMU_ACCEL=/)
    }
  })
})

describe('the QEMU program', () => {
  let folder: string
  const before_ = process.env.PATH
  before(async () => {
    folder = await mkdtemp(join(tmpdir(), 'host with space-'))
  })
  after(async () => {
    process.env.PATH = before_
    await rm(folder, { recursive: true })
  })

  async function pretend(version: string): Promise<void> {
    const program = join(folder, 'qemu-system-aarch64')
    await writeFile(program, `#!/bin/sh\necho 'QEMU emulator version ${version}'\n`)
    await chmod(program, 0o755)
    process.env.PATH = `${folder}:/usr/bin:/bin`
  }

  for (const [text, version] of [
    ['7.2.22 (Debian 1:7.2+dfsg-7)', '7.2.22'],
    ['10.1.0', '10.1.0'],
    ['11.0', '11.0'],
  ] as const) {
    it(`is found with its version, ${version}`, async () => {
      await pretend(text)
      const path = join(folder, 'qemu-system-aarch64')
      assert.deepEqual(await detectQemu('aarch64'), { path, version })
    })
  }

  it('is refused when it is too old for the lan', async () => {
    await pretend('6.2.0 (Debian 1:6.2+dfsg-2ubuntu6)')
    await assert.rejects(detectQemu('aarch64'), /QEMU 6\.2\.0 is too old: 7\.2 or newer/)
  })

  it('is missed with a hint when there is none', async () => {
    process.env.PATH = '/nonexistent'
    await assert.rejects(detectQemu('x86_64'), (error: StepError) => {
      assert.equal(error.message, 'qemu-system-x86_64 is not installed')
      assert.match(error.explanation.hint ?? '', /check-prereqs/)
      return error instanceof StepError
    })
  })
})
