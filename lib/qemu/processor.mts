// This computer's system and processor, as QEMU names them, and the processor that the machines get.
import { arch as nodeArch } from 'node:os'
import { $ } from 'zx/core'
import { StepError } from '../errors.mts'
import type { Architecture } from './firmware.mts'

export type System = 'linux' | 'darwin'
export type Accelerator = 'hvf' | 'kvm' | 'tcg'

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

/** A value of macOS's sysctl; undefined if it has none of that name. */
export async function sysctl(name: string): Promise<string | undefined> {
  const { exitCode, stdout } = await $({ quiet: true, nothrow: true })`sysctl -n ${name}`
  return exitCode === 0 ? stdout.trim() : undefined
}

/** Apple chips from the M4 on. */
export async function hasSme(os: System): Promise<boolean> {
  return os === 'darwin' && (await sysctl('hw.optional.arm.FEAT_SME')) === '1'
}
