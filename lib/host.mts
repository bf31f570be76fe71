// This computer as far as QEMU is concerned: system, architecture, accelerator, and the program.
import { accessSync, constants } from 'node:fs'
import { arch as nodeArch } from 'node:os'
import { $, which } from 'zx/core'
import type { Cluster } from './cluster.mts'
import { type Architecture, type Firmware, findFirmware } from './firmware.mts'
import { StepError } from './step-error.mts'

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
  const accel = chooseAccelerator(QEMU_ACCEL, os, await hasVirtualization(os))
  const firmware = await findFirmware({
    arch,
    qemu: qemu.path,
    code: QEMU_FIRMWARE_CODE,
    vars: QEMU_FIRMWARE_VARS,
  })
  const sme = os === 'darwin' && (await sysctl('hw.optional.arm.FEAT_SME')) === '1'
  return {
    os,
    arch,
    accel,
    cpu: cpuModel({ os, arch, accel, sme }),
    qemu,
    firmware,
    ...(accel === 'tcg' ? { warning: slowness(QEMU_ACCEL, os) } : {}),
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
 * The accelerator for a value of QEMU_ACCEL.
 *
 * @param virtualization whether this computer lets us use its own (kvm, hvf)
 * @throws StepError if it was asked for and is not to be had
 */
export function chooseAccelerator(
  setting: Accelerator | 'auto',
  os: System,
  virtualization: boolean,
): Accelerator {
  const native = os === 'darwin' ? 'hvf' : 'kvm'
  if (setting === 'auto') return virtualization ? native : 'tcg'
  if (setting === 'tcg' || (setting === native && virtualization)) return setting
  if (setting !== native) {
    throw new StepError(`QEMU_ACCEL=${setting} is not for this system: it has ${native}`)
  }
  throw new StepError(`QEMU_ACCEL=${setting}, but ${obstacle[os]}`, { hint: remedy[os] })
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

const obstacle: Record<System, string> = {
  linux: '/dev/kvm cannot be opened',
  darwin: 'this Mac does not offer Hypervisor.framework',
}

const remedy: Record<System, string> = {
  linux:
    'virtualization on in the firmware, module kvm loaded, you in the group kvm: sudo usermod -aG kvm "$USER", then log in anew',
  darwin: 'QEMU_ACCEL=tcg works anywhere, slowly',
}

function slowness(setting: string, os: System): string {
  const reason = setting === 'tcg' ? 'QEMU_ACCEL=tcg' : obstacle[os]
  const advice = setting === 'tcg' ? '' : `; ${remedy[os]}`
  return `${reason}: QEMU emulates the processor, ten times slower or more${advice}`
}

async function hasVirtualization(os: System): Promise<boolean> {
  if (os === 'darwin') return (await sysctl('kern.hv_support')) === '1'
  try {
    accessSync('/dev/kvm', constants.R_OK | constants.W_OK)
    return true
  } catch {
    return false
  }
}

/** A value of macOS's sysctl; undefined if it has none of that name. */
async function sysctl(name: string): Promise<string | undefined> {
  const { exitCode, stdout } = await $({ quiet: true, nothrow: true })`sysctl -n ${name}`
  return exitCode === 0 ? stdout.trim() : undefined
}
