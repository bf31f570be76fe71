// The UEFI firmware of the machines: a read-only code image and a template of the variables, the
// two halves of pflash. They belong together: a 2 MB half does not fit a 4 MB one.
import { createReadStream, existsSync, realpathSync } from 'node:fs'
import { readdir, readFile, stat } from 'node:fs/promises'
import { homedir } from 'node:os'
import { basename, dirname, join } from 'node:path'
import { buffer } from 'node:stream/consumers'
import { StepError } from './errors.mts'

export type Architecture = 'x86_64' | 'aarch64'

type FlashImage = { path: string; format: 'raw' | 'qcow2' }
/** `vars` is the template: each machine gets a copy. */
export type Firmware = { code: FlashImage; vars: FlashImage }

/** Where packages put the pair, for systems that do not describe it in share/qemu/firmware. */
const knownPlaces: Record<Architecture, readonly string[]> = {
  x86_64: [
    '/usr/share/OVMF/OVMF_CODE_4M.fd OVMF_VARS_4M.fd',
    '/usr/share/edk2/x64/OVMF_CODE.4m.fd OVMF_VARS.4m.fd',
    '/usr/share/edk2/ovmf/OVMF_CODE_4M.qcow2 OVMF_VARS_4M.qcow2',
    '/usr/share/qemu/ovmf-x86_64-4m-code.bin ovmf-x86_64-4m-vars.bin',
    '/usr/share/edk2/ovmf/OVMF_CODE.fd OVMF_VARS.fd',
    '/usr/share/OVMF/OVMF_CODE.fd OVMF_VARS.fd',
  ],
  aarch64: [
    '/usr/share/AAVMF/AAVMF_CODE.fd AAVMF_VARS.fd',
    '/usr/share/edk2/aarch64/QEMU_CODE.fd QEMU_VARS.fd',
    '/usr/share/edk2/aarch64/QEMU_EFI-pflash.raw vars-template-pflash.raw',
    '/usr/share/qemu/aavmf-aarch64-code.bin aavmf-aarch64-vars.bin',
  ],
}
/** Names in QEMU's own builds, including Homebrew's and Nix's. The i386 is intended. */
const builtByQemu: Record<Architecture, string> = {
  x86_64: 'edk2-x86_64-code.fd edk2-i386-vars.fd',
  aarch64: 'edk2-aarch64-code.fd edk2-arm-vars.fd',
}
/** Names of images for Secure Boot, which would refuse the boot loader of NixOS: it is not signed. */
const secureNames = /sec(ure|boot)|snakeoil|[-._](ms|smm|suse|opensuse)[-._]/i

/** Paths of the two halves, by a descriptor or by a known place. */
type Pair = { code: string; vars: string; secure: boolean }

type Search = { arch: Architecture; qemu: string; code: string; vars: string; root?: string }

/**
 * Finds the firmware: cluster.env's own (`code` and `vars`, if not empty), else one that a descriptor
 * of QEMU's interop format (docs/interop/firmware.json) describes, else one in a known place, such as
 * the package of the program `qemu`. In tests, `root` is another "/".
 */
export async function findFirmware({ arch, qemu, code, vars, root = '/' }: Search) {
  const at = (path: string) => join(root, path)
  // share/qemu next to the program, both by its name and where symbolic links lead.
  const programs = existsSync(qemu) ? [qemu, realpathSync(qemu)] : [qemu]
  const shares = [...new Set(programs.map((program) => join(dirname(program), '../share/qemu')))]
  const configHome = process.env.XDG_CONFIG_HOME ?? join(homedir(), '.config')
  const folders = [
    ...[`${configHome}/qemu/firmware`, '/etc/qemu/firmware', '/usr/share/qemu/firmware'].map(at),
    ...shares.map((share) => join(share, 'firmware')),
  ]
  const described = (await describedPairs(folders, arch)).map((pair) => {
    return { ...pair, code: at(pair.code), vars: at(pair.vars) }
  })
  if (code || vars) return chosenFirmware(code && at(code), vars && at(vars), described)

  const built = shares.map((share) => join(share, builtByQemu[arch]))
  const known = [...knownPlaces[arch].map(at), ...built].map((place): Pair => {
    const [first = '', second = ''] = place.split(/ (?=\S+$)/)
    return { code: first, vars: join(dirname(first), second), secure: false }
  })
  const pairs = [...described, ...known].filter(({ secure }) => !secure)
  const pair = pairs.find((one) => existsSync(one.code) && existsSync(one.vars))
  if (pair) return { code: await imageAt(pair.code), vars: await imageAt(pair.vars) }
  throw new StepError(`no UEFI firmware for ${arch} was found`, {
    output: ['searched', ...folders, ...pairs.map((one) => one.code)].join('\n'),
    hint: 'install it (./bin/check-prereqs.mts names the package), or set QEMU_FIRMWARE_CODE and QEMU_FIRMWARE_VARS in cluster.env',
  })
}

async function chosenFirmware(code: string, vars: string, described: Pair[]): Promise<Firmware> {
  const fail = (reason: string, hint = 'unset both variables to let it be found') => {
    throw new StepError(`QEMU_FIRMWARE_${reason}`, { hint })
  }
  for (const [name, path] of Object.entries({ CODE: code, VARS: vars })) {
    if (!path) fail(`${name} is not set`, 'CODE and VARS belong together: set both, or neither')
    const found = await stat(path).catch(() => undefined)
    if (!found) fail(`${name} names a file that is not there: ${path}`)
    if (!found?.isFile()) fail(`${name} is not a file: ${path}`)
    const pairs = described.filter((pair) => pair.code === path || pair.vars === path)
    const bySecureName = [path, realpathSync(path)].some((file) => secureNames.test(basename(file)))
    if (bySecureName || (pairs.length > 0 && pairs.every(({ secure }) => secure))) {
      fail(`${name} is for Secure Boot, with which the machines do not start: ${path}`)
    }
  }
  const image = await imageAt(code)
  const start = await firstBytes(code)
  // A firmware volume has this signature; one of variables has this type (UEFI PI, volume 3).
  const isCode = start.includes('_FVH') && start.toString('hex', 16, 20) !== '8d2bf1ff'
  if (image.format === 'raw' && !isCode) fail(`CODE is not the code of a UEFI firmware: ${code}`)
  return { code: image, vars: await imageAt(vars) }
}

/** By the order of the descriptors' names; one in an earlier folder hides those of its name. */
async function describedPairs(folders: readonly string[], arch: Architecture): Promise<Pair[]> {
  const files = new Map<string, string>()
  for (const folder of folders.toReversed()) {
    for (const name of await readdir(folder).catch(() => [])) files.set(name, join(folder, name))
  }
  const names = [...files.keys()].filter((name) => name.endsWith('.json')).sort()
  return (await Promise.all(names.map((name) => pairIn(files.get(name) ?? '', arch)))).flat()
}

/** None if the descriptor is for others; an empty file hides another's; a broken one is ignored. */
async function pairIn(file: string, arch: Architecture): Promise<Pair[]> {
  try {
    const { mapping, targets, features } = JSON.parse(await readFile(file, 'utf8'))
    if (mapping.device !== 'flash' || (mapping.mode ?? 'split') !== 'split') return []
    const prefix = arch === 'x86_64' ? 'pc-q35-' : 'virt-'
    const fits = targets.some(
      (target: { architecture: string; machines: string[] }) =>
        target.architecture === arch && target.machines.some((type) => type.startsWith(prefix)),
    )
    const secure = /secure-boot|requires-smm|enrolled/.test(features.join())
    const [code, vars] = [mapping.executable.filename, mapping['nvram-template'].filename]
    return fits && code && vars ? [{ code, vars, secure }] : []
  } catch {
    return []
  }
}

/** A flash image with its format, by the four bytes that a qcow2 file begins with (Fedora's do). */
async function imageAt(path: string): Promise<FlashImage> {
  const start = await firstBytes(path)
  return { path, format: start.toString('latin1', 0, 4) === 'QFI\xfb' ? 'qcow2' : 'raw' }
}

function firstBytes(path: string): Promise<Buffer> {
  return buffer(createReadStream(path, { end: 8191 }))
}
