// Whether the programs of the table of prerequisites are there, and the right ones.
import { execFile } from 'node:child_process'
import { which } from 'zx/core'
import type { Cluster } from '../cluster.mts'
import { detectAccelerator } from '../qemu/accelerator.mts'
import { type Architecture, findFirmware } from '../qemu/firmware.mts'
import type { System } from '../qemu/processor.mts'
import { type Finding, problem } from './finding.mts'
import { type Prerequisite, prerequisites } from './prerequisites.mts'
import { checkDisk, checkMemory, checkPorts } from './resource-checks.mts'

/** All checks, in the order of the report. What is wrong is a finding, not an error. */
export async function checkPrerequisites(
  cluster: Cluster,
  host: { os: System; arch: Architecture },
): Promise<Finding[]> {
  const { KUBERNETES_VERSION } = cluster.settings
  return Promise.all([
    checkNode(),
    ...prerequisites(host, KUBERNETES_VERSION).map((prerequisite) =>
      prerequisite.programs.length === 0
        ? checkFirmware(prerequisite, cluster, host.arch)
        : checkProgram(prerequisite, KUBERNETES_VERSION),
    ),
    checkAccelerator(cluster, host.os),
    checkMemory(cluster),
    checkDisk(cluster),
    checkPorts(cluster),
  ])
}

/** lib/launch.mjs has refused every older one. */
function checkNode(): Finding {
  return { name: 'Node', found: process.versions.node, wanted: '20.11 or newer', state: 'ok' }
}

/** A program on PATH, and its version. @param kubernetes the version of the cluster */
export async function checkProgram(
  prerequisite: Prerequisite,
  kubernetes: string,
): Promise<Finding> {
  const { name, why, least } = prerequisite
  const wanted = wantedVersion(prerequisite, kubernetes)
  for (const program of prerequisite.programs) {
    const path = await which(program, { nothrow: true })
    const found = path ? await versionOf(path, prerequisite) : undefined
    // There is none, or another program of that name.
    if (found === undefined) continue
    if (least && isOlder(found, least)) {
      const advice = `${program} ${found} is too old; it ${why}`
      return { name, found, wanted, state: 'missing', advice, prerequisite }
    }
    if (name === 'kubectl' && Math.abs(minor(found) - minor(kubernetes)) > 1) {
      const advice = `kubectl is made for API servers one minor version older or newer, and the cluster has ${kubernetes}`
      return { name, found, wanted, state: 'warning', advice }
    }
    return { name, found, wanted, state: 'ok' }
  }
  return { name, found: '-', wanted, state: 'missing', advice: `it ${why}`, prerequisite }
}

function wantedVersion({ name, least }: Prerequisite, kubernetes: string): string {
  if (least) return `${least} or newer`
  if (name !== 'kubectl') return 'any'
  return [-1, 1].map((step) => `1.${minor(kubernetes) + step}`).join(' to ')
}

/** What a program says of itself; undefined if the one that is wanted would not say that. */
function versionOf(path: string, { version }: Prerequisite): Promise<string | undefined> {
  // Without zx, whose commands need the bash that is looked for here.
  return new Promise((resolve) => {
    execFile(path, version?.args ?? [], { timeout: 20_000 }, (_, stdout, stderr) => {
      resolve(`${stdout}\n${stderr}`.match(version?.pattern ?? /^/)?.[1])
    })
  })
}

async function checkFirmware(
  prerequisite: Prerequisite,
  { settings }: Cluster,
  arch: Architecture,
): Promise<Finding> {
  const { name, why } = prerequisite
  const { QEMU_FIRMWARE_CODE: code, QEMU_FIRMWARE_VARS: vars } = settings
  const qemu = (await which(`qemu-system-${arch}`, { nothrow: true })) ?? '/usr/bin/qemu'
  const wanted = `for ${arch}`
  try {
    const firmware = await findFirmware({ arch, qemu, code, vars })
    return { name, found: firmware.code.path, wanted, state: 'ok' }
  } catch (error) {
    // A wrong setting is nothing that a package would mend.
    if (code || vars) return problem(name, '-', wanted, error)
    return { name, found: '-', wanted, state: 'missing', advice: `it ${why}`, prerequisite }
  }
}

async function checkAccelerator({ settings }: Cluster, os: System): Promise<Finding> {
  const [name, wanted] = ['accelerator', os === 'darwin' ? 'hvf' : 'kvm']
  try {
    const { accel, warning } = await detectAccelerator(settings.QEMU_ACCEL, os)
    if (!warning) return { name, found: accel, wanted, state: 'ok' }
    return { name, found: accel, wanted, state: 'warning', advice: warning }
  } catch (error) {
    return problem(name, '-', wanted, error)
  }
}

function isOlder(version: string, than: string): boolean {
  const [parts, least] = [version, than].map((text) => text.split('.').map(Number))
  const index = least?.findIndex((number, at) => (parts?.[at] ?? 0) !== number) ?? -1
  return index >= 0 && (parts?.[index] ?? 0) < (least?.[index] ?? 0)
}

/** 36 of "1.36.3". */
function minor(version: string): number {
  return Number(version.split('.')[1])
}
