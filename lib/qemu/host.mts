// This computer as far as QEMU is concerned: system, architecture, accelerator, and the program.
import { closeSync, openSync } from 'node:fs'
import { arch as nodeArch } from 'node:os'
import { $, which } from 'zx/core'
import type { Cluster } from '../cluster.mts'
import { StepError } from '../step-error.mts'
import { type Architecture, type Firmware, findFirmware } from './firmware.mts'

export type System = 'linux' | 'darwin'
export type Accelerator = 'hvf' | 'kvm' | 'tcg'

/** The oldest QEMU with the dgram network that the lan is made of. */
export const leastQemuVersion = '7.2'

export interface Host {
  os: System
  arch: Architecture
  accel: Accelerator
  /** QEMU's -cpu. */
  cpu: string
  qemu: { path: string; version: string }
  firmware: Firmware
  /** What the user should know before machines start. */
  warning?: string
}

/**
 * Looks at this computer.
 *
 * @throws StepError if it cannot run the machines: system, QEMU, accelerator or firmware
 */
export async function detectHost(cluster: Cluster): Promise<Host> {
  const { QEMU_ACCEL, QEMU_FIRMWARE_CODE, QEMU_FIRMWARE_VARS } = cluster.settings
  const os = detectSystem()
  const arch = await detectArchitecture(os)
  const qemu = await detectQemu(arch)
  const { accel, warning } = await detectAccelerator(QEMU_ACCEL, os)
  const firmware = await findFirmware({
    arch,
    qemu: qemu.path,
    code: QEMU_FIRMWARE_CODE,
    vars: QEMU_FIRMWARE_VARS,
  })
  return {
    os,
    arch,
    accel,
    cpu: cpuModel({ os, arch, accel, sme: await hasSme(os) }),
    qemu,
    firmware,
    ...(warning ? { warning } : {}),
  }
}

/** @throws StepError on anything but Linux and macOS */
export function detectSystem(): System {
  if (process.platform === 'linux' || process.platform === 'darwin') return process.platform
  throw new StepError(`the machines run on Linux and macOS, not on ${process.platform}`, {
    hint: 'on Windows: inside WSL 2',
  })
}

/** The processor's, which is not Node's where an Intel build runs on an Apple chip. */
export async function detectArchitecture(os: System): Promise<Architecture> {
  const arch = nodeArch()
  if (arch === 'arm64') return 'aarch64'
  if (arch !== 'x64') {
    throw new StepError(`the machines run on x86_64 and arm64 processors, not on ${arch}`)
  }
  return os === 'darwin' && (await sysctl('hw.optional.arm64')) === '1' ? 'aarch64' : 'x86_64'
}

/**
 * The QEMU for this processor, from PATH.
 *
 * @throws StepError if there is none, or it is older than `leastQemuVersion`
 */
export async function detectQemu(arch: Architecture): Promise<Host['qemu']> {
  const program = `qemu-system-${arch}`
  const path = await which(program, { nothrow: true })
  const hint = 'install QEMU: ./bin/check-prereqs.mts names the package'
  if (!path) throw new StepError(`${program} is not installed`, { hint })
  const { stdout } = await $({ quiet: true })`${path} --version`
  const version = stdout.match(/version (\d+\.\d+(\.\d+)?)/)?.[1] ?? '0.0'
  const [major = 0, minor = 0] = version.split('.').map(Number)
  const [leastMajor = 0, leastMinor = 0] = leastQemuVersion.split('.').map(Number)
  if (major < leastMajor || (major === leastMajor && minor < leastMinor)) {
    throw new StepError(`QEMU ${version} is too old: ${leastQemuVersion} or newer is needed`, {
      command: `${path} --version`,
    })
  }
  return { path, version }
}

/**
 * The accelerator of this computer, and a warning where it is the slow one.
 *
 * @throws StepError if QEMU_ACCEL asks for one that is not to be had
 */
export async function detectAccelerator(
  setting: Accelerator | 'auto',
  os: System,
): Promise<Pick<Host, 'accel' | 'warning'>> {
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

/** QEMU's -cpu. @param host.sme an Apple chip with the Scalable Matrix Extension (M4 on) */
export function cpuModel(host: {
  os: System
  arch: Architecture
  accel: Accelerator
  sme: boolean
}): string {
  const { os, arch, accel, sme } = host
  if (accel === 'tcg') {
    // QEMU 7.2 with kernel 6.12: cmpxchg16b ends in a double fault half a minute into the boot.
    if (arch === 'x86_64') return 'max,-cx16'
    // Pointer authentication as the architecture has it is slow to emulate; this hash is not.
    return 'max,pauth-impdef=on'
  }
  if (os === 'darwin') {
    // Flags that Intel Macs announce and Hypervisor.framework then does not take.
    if (arch === 'x86_64') return 'host,-avx512vl,-pdpe1gb'
    // QEMU 9.2 fails with "Property 'host-arm-cpu.sme' not found" there.
    if (sme) return 'max'
  }
  return 'host'
}

const slow = 'QEMU emulates the processor, ten times slower or more'

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

/** A value of macOS's sysctl; undefined if it has none of that name. */
async function sysctl(name: string): Promise<string | undefined> {
  const { exitCode, stdout } = await $({ quiet: true, nothrow: true })`sysctl -n ${name}`
  return exitCode === 0 ? stdout.trim() : undefined
}

/** Apple chips from the M4 on. */
async function hasSme(os: System): Promise<boolean> {
  return os === 'darwin' && (await sysctl('hw.optional.arm.FEAT_SME')) === '1'
}
