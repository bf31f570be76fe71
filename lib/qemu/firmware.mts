// The UEFI firmware of the machines: a read-only code image and a template of the variables, the
// two halves of pflash. They are a pair: a 2 MB half does not go with a 4 MB one.
import { existsSync, realpathSync } from 'node:fs'
import { open, readdir, readFile } from 'node:fs/promises'
import { homedir } from 'node:os'
import { dirname, join } from 'node:path'
import { StepError } from '../errors.mts'

export type Architecture = 'x86_64' | 'aarch64'

export interface FlashImage {
  path: string
  format: 'raw' | 'qcow2'
}

export interface Firmware {
  code: FlashImage
  /** Template: every machine gets a copy. */
  vars: FlashImage
}

interface Search {
  arch: Architecture
  /** Path of the QEMU program, which often brings firmware along. */
  qemu: string
  /** QEMU_FIRMWARE_CODE and QEMU_FIRMWARE_VARS; empty: look for them. */
  code: string
  vars: string
  /** The folder that stands for "/"; another in tests. */
  root?: string
}

type Pair = readonly [code: string, vars: string]

/** Where packages put the pair, for systems that do not describe it in share/qemu/firmware. */
const usualPlaces: Record<Architecture, readonly Pair[]> = {
  x86_64: [
    ['/usr/share/OVMF/OVMF_CODE_4M.fd', '/usr/share/OVMF/OVMF_VARS_4M.fd'],
    ['/usr/share/edk2/x64/OVMF_CODE.4m.fd', '/usr/share/edk2/x64/OVMF_VARS.4m.fd'],
    ['/usr/share/edk2/ovmf/OVMF_CODE_4M.qcow2', '/usr/share/edk2/ovmf/OVMF_VARS_4M.qcow2'],
    ['/usr/share/qemu/ovmf-x86_64-4m-code.bin', '/usr/share/qemu/ovmf-x86_64-4m-vars.bin'],
    ['/usr/share/edk2/ovmf/OVMF_CODE.fd', '/usr/share/edk2/ovmf/OVMF_VARS.fd'],
    ['/usr/share/OVMF/OVMF_CODE.fd', '/usr/share/OVMF/OVMF_VARS.fd'],
  ],
  aarch64: [
    ['/usr/share/AAVMF/AAVMF_CODE.fd', '/usr/share/AAVMF/AAVMF_VARS.fd'],
    ['/usr/share/edk2/aarch64/QEMU_CODE.fd', '/usr/share/edk2/aarch64/QEMU_VARS.fd'],
    [
      '/usr/share/edk2/aarch64/QEMU_EFI-pflash.raw',
      '/usr/share/edk2/aarch64/vars-template-pflash.raw',
    ],
    ['/usr/share/qemu/aavmf-aarch64-code.bin', '/usr/share/qemu/aavmf-aarch64-vars.bin'],
  ],
}

/** What QEMU's own builds, Homebrew's and Nix's among them, call it. The i386 is no mistake. */
const besideQemu: Record<Architecture, Pair> = {
  x86_64: ['edk2-x86_64-code.fd', 'edk2-i386-vars.fd'],
  aarch64: ['edk2-aarch64-code.fd', 'edk2-arm-vars.fd'],
}

const machineTypes: Record<Architecture, string> = { x86_64: 'pc-q35-', aarch64: 'virt-' }

/**
 * Finds the firmware: what cluster.env names, else what a descriptor of QEMU's interop format
 * (docs/interop/firmware.json) describes, else what lies in a usual place.
 *
 * @throws StepError with the places looked at
 */
export async function findFirmware(search: Search): Promise<Firmware> {
  const { arch, code, vars, qemu, root = '/' } = search
  if (code || vars) return chosenFirmware(search)
  const at = (path: string) => join(root, path)
  const shares = sharesOf(qemu)
  const configHome = process.env.XDG_CONFIG_HOME ?? join(homedir(), '.config')
  const folders = [
    ...[`${configHome}/qemu/firmware`, '/etc/qemu/firmware', '/usr/share/qemu/firmware'].map(at),
    ...shares.map((share) => join(share, 'firmware')),
  ]
  const packaged = [...(await describedPairs(folders, arch)), ...usualPlaces[arch]]
  const pairs = [
    ...packaged.map(([codePath, varsPath]): Pair => [at(codePath), at(varsPath)]),
    ...shares.map((share): Pair => {
      const [codeName, varsName] = besideQemu[arch]
      return [join(share, codeName), join(share, varsName)]
    }),
  ]
  for (const [codePath, varsPath] of pairs) {
    if (existsSync(codePath) && existsSync(varsPath)) {
      return { code: await imageAt(codePath), vars: await imageAt(varsPath) }
    }
  }
  throw new StepError(`no UEFI firmware for ${search.arch} was found`, {
    output: ['looked at', ...folders, ...pairs.map(([path]) => path)].join('\n'),
    hint: 'install it (./bin/check-prereqs.mts names the package), or set QEMU_FIRMWARE_CODE and QEMU_FIRMWARE_VARS in cluster.env',
  })
}

async function chosenFirmware({ code, vars, root = '/' }: Search): Promise<Firmware> {
  if (!code || !vars) {
    const [set, missing] = code ? ['CODE', 'VARS'] : ['VARS', 'CODE']
    throw new StepError(`QEMU_FIRMWARE_${set} is set and QEMU_FIRMWARE_${missing} is not`, {
      hint: 'the two are a pair: set both in cluster.env, or none',
    })
  }
  for (const [name, path] of [
    ['QEMU_FIRMWARE_CODE', code],
    ['QEMU_FIRMWARE_VARS', vars],
  ]) {
    if (!existsSync(join(root, path ?? ''))) {
      throw new StepError(`${name} names a file that is not there: ${path}`)
    }
  }
  return { code: await imageAt(join(root, code)), vars: await imageAt(join(root, vars)) }
}

/** share/qemu beside the program, both as it is called and where symbolic links lead. */
function sharesOf(qemu: string): string[] {
  const programs = existsSync(qemu) ? [qemu, realpathSync(qemu)] : [qemu]
  return [...new Set(programs.map((program) => join(dirname(program), '../share/qemu')))]
}

/** The part of a descriptor that is read here. */
interface Descriptor {
  mapping?: {
    device?: string
    mode?: string
    executable?: { filename?: string }
    'nvram-template'?: { filename?: string }
  }
  targets?: { architecture?: string; machines?: string[] }[]
  features?: string[]
}

/** Descriptors in order of their names; one in an earlier folder hides its namesakes. */
async function describedPairs(folders: readonly string[], arch: Architecture): Promise<Pair[]> {
  const files = new Map<string, string>()
  for (const folder of folders) {
    const names = await readdir(folder).catch(() => [])
    for (const name of names) {
      if (name.endsWith('.json') && !files.has(name)) {
        files.set(name, join(folder, name))
      }
    }
  }
  const pairs: Pair[] = []
  for (const [, file] of [...files].sort(([a], [b]) => (a < b ? -1 : 1))) {
    const pair = pairOf(await readDescriptor(file), arch)
    if (pair) pairs.push(pair)
  }
  return pairs
}

/** An empty file is the way to hide another's descriptor; a broken one is no reason to stop. */
async function readDescriptor(file: string): Promise<Descriptor> {
  try {
    return JSON.parse(await readFile(file, 'utf8')) as Descriptor
  } catch {
    return {}
  }
}

function pairOf({ mapping, targets, features }: Descriptor, arch: Architecture): Pair | undefined {
  const code = mapping?.executable?.filename
  const vars = mapping?.['nvram-template']?.filename
  if (mapping?.device !== 'flash' || (mapping.mode ?? 'split') !== 'split') return undefined
  const fits = targets?.some(
    ({ architecture, machines }) =>
      architecture === arch && machines?.some((type) => type.startsWith(machineTypes[arch])),
  )
  // Secure boot would refuse systemd-boot as nixos-install leaves it: unsigned.
  const unwanted = features?.some((feature) => /secure-boot|requires-smm|enrolled/.test(feature))
  return code && vars && fits && !unwanted ? [code, vars] : undefined
}

/** A flash image with its format, by the four bytes a qcow2 file begins with (Fedora's are). */
async function imageAt(path: string): Promise<FlashImage> {
  const file = await open(path)
  try {
    const { buffer } = await file.read(Buffer.alloc(4), 0, 4, 0)
    return { path, format: buffer.toString('latin1') === 'QFI\xfb' ? 'qcow2' : 'raw' }
  } finally {
    await file.close()
  }
}
