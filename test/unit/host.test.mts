import assert from 'node:assert/strict'
import { afterEach, beforeEach, describe, it } from 'node:test'
import { StepError } from '../../lib/errors.mts'
import {
  chooseAccelerator,
  detectAccelerator,
  detectArchitecture,
  detectQemu,
  detectSystem,
} from '../../lib/host.mts'
import { FakePrograms } from '../fake-programs.mts'

const path = process.env.PATH ?? ''

describe('the QEMU program', () => {
  let programs: FakePrograms
  beforeEach(() => {
    programs = new FakePrograms()
    process.env.PATH = `${programs.path}:/usr/bin:/bin`
  })
  afterEach(() => {
    process.env.PATH = path
    programs.remove()
  })

  for (const [text, version] of [
    ['7.2.22 (Debian 1:7.2+dfsg-7)', '7.2.22'],
    ['10.1.0', '10.1.0'],
    ['11.0', '11.0'],
  ] as const) {
    it(`is found with its version, ${version}`, async () => {
      programs.say('qemu-system-aarch64', `QEMU emulator version ${text}`)
      const qemu = { path: `${programs.path}/qemu-system-aarch64`, version }
      assert.deepEqual(await detectQemu('aarch64'), qemu)
    })
  }

  it('is refused when it is too old for the LAN', async () => {
    programs.say('qemu-system-aarch64', 'QEMU emulator version 6.2.0 (Debian 1:6.2+dfsg-2ubuntu6)')
    await assert.rejects(detectQemu('aarch64'), /QEMU 6\.2\.0 is too old: 7\.2 or newer/)
  })

  it('is reported as missing with a hint', async () => {
    process.env.PATH = '/nonexistent'
    await assert.rejects(detectQemu('x86_64'), (error: StepError) => {
      assert.equal(error.message, 'qemu-system-x86_64 is not installed')
      assert.match(error.explanation.hint ?? '', /check-prereqs/)
      return error instanceof StepError
    })
  })
})

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

  it('is never replaced silently when QEMU_ACCEL asks for one', () => {
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

  it('that is chosen automatically works with the QEMU of this computer', async () => {
    const { accel, warning } = await detectAccelerator('auto', detectSystem())
    assert.equal(accel === 'tcg', warning !== undefined)
    if (accel === 'tcg') {
      const native = detectSystem() === 'darwin' ? 'hvf' : 'kvm'
      await assert.rejects(detectAccelerator(native, detectSystem()), /^StepError: QEMU_ACCEL=/)
    }
  })
})

describe('the accelerator of a Mac', () => {
  let programs: FakePrograms
  beforeEach(() => {
    programs = new FakePrograms()
    process.env.PATH = `${programs.path}:/usr/bin:/bin`
  })
  afterEach(() => {
    process.env.PATH = path
    programs.remove()
  })

  /** An Apple chip with this QEMU. @param probe what QEMU does when it is tried */
  function mac(version: string, { sme = 0, probe = 'read -r _' } = {}): void {
    programs.add(
      'sysctl',
      `case $2 in kern.hv_support | hw.optional.arm64) echo 1 ;; *SME) echo ${sme} ;; esac`,
    )
    programs.add(
      'qemu-system-aarch64',
      `[ "$1" = --version ] && echo 'QEMU emulator version ${version}' && exit; ${probe}`,
    )
  }
  const probes = () => programs.calls().filter((call) => /qemu.*-accel/.test(call))

  it('is hvf, tried with the arguments that the machines get', async () => {
    mac('10.1.0')
    assert.equal(await detectArchitecture('darwin'), 'aarch64')
    assert.deepEqual(await detectAccelerator('auto', 'darwin'), { accel: 'hvf' })
    assert.match(probes().join(), /-machine virt -accel hvf -cpu host /)
  })

  it('is tried without Apple’s interrupt controller from QEMU 11.1 on', async () => {
    mac('11.1.0')
    assert.deepEqual(await detectAccelerator('auto', 'darwin'), { accel: 'hvf' })
    assert.match(probes().join(), /-accel hvf,kernel-irqchip=off /)
  })

  it('is not tried on a chip with SME where QEMU would abort, and the hint is to upgrade', async () => {
    mac('9.2.2', { sme: 1 })
    const { accel, warning } = await detectAccelerator('auto', 'darwin')
    assert.equal(accel, 'tcg')
    assert.match(warning ?? '', /QEMU 9\.2\.2 aborts on this processor.*brew upgrade qemu/)
    assert.deepEqual(probes(), [])
    await assert.rejects(detectAccelerator('hvf', 'darwin'), ({ explanation }: StepError) => {
      assert.equal(explanation.hint, 'brew upgrade qemu')
      return true
    })
    mac('9.2.3', { sme: 1 })
    assert.deepEqual(await detectAccelerator('auto', 'darwin'), { accel: 'hvf' })
  })

  it('is not an error of this script when QEMU ends before it reads anything', async () => {
    mac('10.1.0', { probe: 'echo "hvf: HV_DENIED" >&2; exec 0<&-; exit 1' })
    for (let attempt = 0; attempt < 12; attempt += 1) {
      const { warning } = await detectAccelerator('auto', 'darwin')
      assert.match(warning ?? '', /QEMU fails with hvf here \(hvf: HV_DENIED\)/)
    }
  })
})
