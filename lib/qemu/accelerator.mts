// Whether QEMU can run the machines on this computer's processor, or has to emulate one: asked of
// QEMU itself, as a device that can be opened need not work.
import { closeSync, openSync } from 'node:fs'
import { $, which } from 'zx/core'
import { StepError } from '../errors.mts'
import {
  type Accelerator,
  cpuModel,
  detectArchitecture,
  hasSme,
  type System,
  sysctl,
} from './processor.mts'

const slow = 'QEMU emulates the processor, ten times slower or more'

/**
 * The accelerator of this computer, and a warning where it is the slow one.
 *
 * @throws StepError if QEMU_ACCEL asks for one that is not to be had
 */
export async function detectAccelerator(
  setting: Accelerator | 'auto',
  os: System,
): Promise<{ accel: Accelerator; warning?: string }> {
  if (setting === 'tcg') return { accel: 'tcg', warning: `QEMU_ACCEL=tcg: ${slow}` }
  const obstacle = await obstacleTo(os)
  const accel = chooseAccelerator(setting, os, obstacle)
  return obstacle ? { accel, warning: `${obstacle.reason}: ${slow}; ${obstacle.hint}` } : { accel }
}

interface Obstacle {
  reason: string
  hint: string
}

/**
 * The accelerator for a value of QEMU_ACCEL.
 *
 * @param obstacle why this computer's own (kvm, hvf) cannot be used; undefined if it can
 * @throws StepError if it was asked for and is not to be had
 */
export function chooseAccelerator(
  setting: Accelerator | 'auto',
  os: System,
  obstacle: Obstacle | undefined,
): Accelerator {
  const native = os === 'darwin' ? 'hvf' : 'kvm'
  if (setting === 'auto') return obstacle ? 'tcg' : native
  if (setting === 'tcg') return 'tcg'
  if (setting !== native) {
    throw new StepError(`QEMU_ACCEL=${setting} is not for this system: it has ${native}`)
  }
  if (!obstacle) return native
  throw new StepError(`QEMU_ACCEL=${setting}, but ${obstacle.reason}`, { hint: obstacle.hint })
}

/** Why the machines cannot use this computer's virtualization; undefined if they can. */
async function obstacleTo(os: System): Promise<Obstacle | undefined> {
  if (os === 'darwin' && (await sysctl('kern.hv_support')) !== '1') {
    return { reason: 'this Mac has no Hypervisor.framework', hint: 'QEMU_ACCEL=tcg is slow' }
  }
  if (os === 'linux' && !canOpen('/dev/kvm')) {
    return {
      reason: '/dev/kvm cannot be opened',
      hint: 'virtualization on in the firmware, module kvm loaded, you in the group kvm: sudo usermod -aG kvm "$USER", then log in anew',
    }
  }
  const accel = os === 'darwin' ? 'hvf' : 'kvm'
  const failure = await tryAccelerator(os, accel)
  if (failure === undefined) return undefined
  return {
    reason: `QEMU fails with ${accel} here (${failure})`,
    hint: 'often a virtual machine in a virtual machine, or a QEMU too old for this processor',
  }
}

function canOpen(device: string): boolean {
  try {
    closeSync(openSync(device, 'r+'))
    return true
  } catch {
    return false
  }
}

/**
 * Has QEMU set up a machine and quit: where a device can be opened and does not work, it aborts.
 *
 * @returns its last words; undefined if it works, or there is no QEMU to try with
 */
async function tryAccelerator(os: System, accel: Accelerator): Promise<string | undefined> {
  const arch = await detectArchitecture(os)
  const qemu = await which(`qemu-system-${arch}`, { nothrow: true })
  if (!qemu) return undefined
  const machine = arch === 'x86_64' ? 'q35' : 'virt'
  const cpu = cpuModel({ os, arch, accel, sme: await hasSme(os) })
  const settings = ['-machine', machine, '-accel', accel, '-cpu', cpu, '-m', '64']
  const quiet = ['-nodefaults', '-no-user-config', '-display', 'none', '-S', '-monitor', 'stdio']
  const options = { quiet: true, nothrow: true, input: 'quit\n', timeout: 20_000 }
  const { exitCode, stderr } = await $(options)`${qemu} ${settings} ${quiet}`
  return exitCode === 0 ? undefined : (stderr.trim().split('\n')[0] ?? 'without a word')
}
