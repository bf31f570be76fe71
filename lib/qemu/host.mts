// This computer as far as QEMU is concerned: processor, accelerator, firmware, and the program.
import { $, which } from 'zx/core'
import type { Cluster } from '../cluster.mts'
import { StepError } from '../errors.mts'
import { detectAccelerator } from './accelerator.mts'
import { type Architecture, type Firmware, findFirmware } from './firmware.mts'
import {
  type Accelerator,
  cpuModel,
  detectArchitecture,
  detectSystem,
  hasSme,
  type System,
} from './processor.mts'

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
