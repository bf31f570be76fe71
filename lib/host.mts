// This computer as far as QEMU is concerned: system, processor, accelerator, firmware, program.
import { open } from 'node:fs/promises'
import { arch as nodeArch } from 'node:os'
import { $, which } from 'zx/core'
import type { Cluster } from './cluster.mts'
import { lastLines, StepError } from './errors.mts'
import { type Architecture, type Firmware, findFirmware } from './firmware.mts'

export type System = 'linux' | 'darwin'
export type Accelerator = 'hvf' | 'kvm' | 'tcg'

/** The oldest QEMU with the dgram network that connects the machines. */
export const leastQemuVersion = '7.2'

/** What decides which machine, accelerator and processor QEMU is asked for. */
export interface Platform {
  os: System
  arch: Architecture
  accel: Accelerator
  qemu: { path: string; version: string }
}

export interface Host extends Platform {
  firmware: Firmware
  /** What the user should know before machines start. */
  warning?: string
}

/** @throws StepError if this computer cannot run the machines: system, QEMU, accelerator, firmware */
export async function detectHost({ settings }: Cluster): Promise<Host> {
  const os = detectSystem()
  const arch = await detectArchitecture(os)
  const qemu = await detectQemu(arch)
  const { QEMU_ACCEL, QEMU_FIRMWARE_CODE: code, QEMU_FIRMWARE_VARS: vars } = settings
  const { accel, warning } = await detectAccelerator(QEMU_ACCEL, os)
  const firmware = await findFirmware({ arch, qemu: qemu.path, code, vars })
  return { os, arch, accel, qemu, firmware, ...(warning ? { warning } : {}) }
}

/** @throws StepError on anything but Linux and macOS */
export function detectSystem(): System {
  if (process.platform === 'linux' || process.platform === 'darwin') return process.platform
  throw new StepError(`the machines run on Linux and macOS, not on ${process.platform}`, {
    hint: 'on Windows: in WSL 2',
  })
}

/** The processor's architecture: Node's differs where an Intel build runs on an Apple chip. */
export async function detectArchitecture(os: System): Promise<Architecture> {
  const arch = nodeArch()
  if (arch === 'arm64') return 'aarch64'
  if (arch !== 'x64') {
    throw new StepError(`the machines run on x86_64 and arm64 processors, not on ${arch}`)
  }
  return os === 'darwin' && (await sysctl('hw.optional.arm64')) === '1' ? 'aarch64' : 'x86_64'
}

/** The QEMU for an architecture, from PATH. @throws StepError if there is none, or it is too old */
export async function detectQemu(arch: Architecture): Promise<Platform['qemu']> {
  const program = `qemu-system-${arch}`
  const path = await which(program, { nothrow: true })
  const hint = 'install QEMU: ./bin/check-prereqs.mts names the package'
  if (!path) throw new StepError(`${program} is not installed`, { hint })
  const { stdout } = await $({ quiet: true })`${path} --version`
  const version = stdout.match(/version (\d+\.\d+(\.\d+)?)/)?.[1] ?? '0.0'
  if (!isOlder(version, leastQemuVersion)) return { path, version }
  throw new StepError(`QEMU ${version} is too old: ${leastQemuVersion} or newer is needed`, {
    command: `${path} --version`,
  })
}

/** Whether a version such as "10.1.0" comes before another; missing parts count as 0. */
export function isOlder(version: string, than: string): boolean {
  const [ours = [], theirs = []] = [version, than].map((text) => text.split('.').map(Number))
  const index = theirs.findIndex((part, at) => part !== (ours[at] ?? 0))
  return index >= 0 && (ours[index] ?? 0) < (theirs[index] ?? 0)
}

/** QEMU's -machine, -accel and -cpu. */
export function platformArguments({ os, arch, accel, qemu }: Platform): string[] {
  const intel = arch === 'x86_64'
  // In-kernel interrupt controller, the default from 11.1 on: Linux guests stall with it.
  const irqchip = accel === 'hvf' && !intel && !isOlder(qemu.version, '11.1')
  let cpu = 'host'
  // Flags that Intel Macs announce and Hypervisor.framework does not accept.
  if (os === 'darwin' && intel) cpu = 'host,-avx512vl,-pdpe1gb'
  // QEMU 7.2 with kernel 6.12: cmpxchg16b ends in a double fault half a minute into the boot. On
  // arm64, the architecture's own pointer authentication is slow to emulate; this hash is not.
  if (accel === 'tcg') cpu = intel ? 'max,-cx16' : 'max,pauth-impdef=on'
  return [
    ...['-machine', intel ? 'q35' : 'virt'],
    ...['-accel', irqchip ? 'hvf,kernel-irqchip=off' : accel],
    ...['-cpu', cpu],
  ]
}

/** The accelerator of each system, and why it cannot be used. */
const natives = { linux: 'kvm', darwin: 'hvf' } as const
type Setting = Accelerator | 'auto'
type Obstacle = { reason: string; hint: string } | undefined

/**
 * The accelerator of this computer, and a warning where it is the slow one. QEMU itself is asked,
 * because a device that can be opened need not work.
 */
export async function detectAccelerator(setting: Setting, os: System) {
  const slow = 'QEMU emulates the processor, at least ten times slower: too slow for Cilium'
  if (setting === 'tcg') return { accel: setting, warning: `QEMU_ACCEL=tcg: ${slow}` }
  const obstacle = await obstacleTo(os)
  const accel = chooseAccelerator(setting, os, obstacle)
  return obstacle ? { accel, warning: `${obstacle.reason}: ${slow}; ${obstacle.hint}` } : { accel }
}

/** The accelerator for a value of QEMU_ACCEL. @throws StepError if that is not available */
export function chooseAccelerator(setting: Setting, os: System, obstacle: Obstacle): Accelerator {
  const native = natives[os]
  if (setting === 'tcg' || (setting === 'auto' && obstacle)) return 'tcg'
  if (setting === 'auto' || (setting === native && !obstacle)) return native
  if (setting !== native) {
    throw new StepError(`QEMU_ACCEL=${setting} is not for this system: it has ${native}`)
  }
  throw new StepError(`QEMU_ACCEL=${setting}, but ${obstacle?.reason}`, { hint: obstacle?.hint })
}

async function obstacleTo(os: System): Promise<Obstacle> {
  if (os === 'darwin' && (await sysctl('kern.hv_support')) !== '1') {
    return { reason: 'this Mac has no Hypervisor.framework', hint: 'QEMU_ACCEL=tcg is slow' }
  }
  const device = os === 'linux' && (await open('/dev/kvm', 'r+').catch(() => undefined))
  if (os === 'linux' && !device) {
    return {
      reason: '/dev/kvm cannot be opened',
      hint: 'enable virtualization in the firmware, load the module kvm, join the group kvm: sudo usermod -aG kvm "$USER", then log in again',
    }
  }
  if (device) await device.close()
  const arch = await detectArchitecture(os)
  // Without QEMU nothing can be tried; detectQemu reports it.
  const qemu = await detectQemu(arch).catch(() => undefined)
  if (!qemu) return undefined
  const sme = os === 'darwin' && (await sysctl('hw.optional.arm.FEAT_SME')) === '1'
  if (sme && isOlder(qemu.version, '9.2.3')) {
    return {
      reason: `QEMU ${qemu.version} aborts on this processor (it has SME: Apple M4 and later)`,
      hint: 'brew upgrade qemu',
    }
  }
  // QEMU sets up a machine and quits: where the accelerator does not work, it fails or aborts.
  const platform = platformArguments({ os, arch, accel: natives[os], qemu })
  const idle = ['-m', '64', '-S', '-nodefaults', '-no-user-config', '-display', 'none']
  const $$ = $({ quiet: true, nothrow: true, timeout: 20_000 })
  // A here-string: writing to a pipe would fail when QEMU ends first.
  const { exitCode, stderr } = await $$`${qemu.path} ${platform} ${idle} -monitor stdio <<< quit`
  if (exitCode === 0) return undefined
  return {
    reason: `QEMU fails with ${natives[os]} here (${lastLines(stderr, 1) || 'no message'})`,
    hint: 'often a virtual machine in a virtual machine, or a QEMU too old for this processor',
  }
}

/** A value of macOS's sysctl; empty if it has none of that name. */
async function sysctl(name: string): Promise<string> {
  return (await $({ quiet: true, nothrow: true })`sysctl -n ${name}`).stdout.trim()
}
