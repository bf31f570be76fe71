import assert from 'node:assert/strict'
import { describe, it } from 'node:test'
import { chooseAccelerator, detectAccelerator } from '../../../lib/qemu/accelerator.mts'
import { detectSystem } from '../../../lib/qemu/processor.mts'

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
