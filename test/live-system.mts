// A machine for tests that starts into something like the NixOS installer, without emulation.
import { execFile } from 'node:child_process'
import { copyFile, mkdir, mkdtemp, readFile, rm, symlink } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { detectArchitecture, detectSystem } from '../lib/host.mts'

const programs = [
  'sudo',
  'dmesg',
  'nixos-version',
  'nixos-install',
  'parted',
  'udevadm',
  'mkfs.fat',
  'mkfs.ext4',
  'mount',
  'umount',
  'findmnt',
  'poweroff',
]

const userNamespace = process.getuid?.() === 0 ? [] : ['--user', '--map-root-user']

/** Why there can be none here; false if there can. */
export const noLiveSystem = await promisify(execFile)('unshare', [
  ...['--mount', '--pid', '--fork', '--kill-child'],
  ...userNamespace,
  'true',
]).then(
  () => false as const,
  () => 'no namespaces here (unshare --mount --pid)',
)

export interface LiveSystem {
  /** The QEMU to start. */
  qemu: string
  /** The folder it is in, for PATH. */
  folder: string
  /** What its environment has to have. @param faults words that live-system.sh knows */
  env(faults?: string): Record<string, string>
  /** The commands that were called in it, and "machine PID" for each start. */
  calls(): Promise<string[]>
  /** The environment of nixos-install. */
  environment(): Promise<string>
  /** Path of a file as it was on /mnt when that machine was switched off. */
  installed(name: string, ...path: string[]): string
  remove(): Promise<void>
}

export async function makeLiveSystem(): Promise<LiveSystem> {
  const folder = await mkdtemp(join(tmpdir(), 'live-system-'))
  const state = join(folder, 'state')
  await mkdir(join(state, 'bin'), { recursive: true })
  const qemu = join(folder, `qemu-system-${await detectArchitecture(detectSystem())}`)
  await copyFile(join(import.meta.dirname, 'live-system.sh'), qemu)
  await copyFile(qemu, join(state, 'bin', 'live-system.sh'))
  for (const name of programs) await symlink('live-system.sh', join(state, 'bin', name))
  return {
    qemu,
    folder,
    env: (faults = '') => ({ LIVE_SYSTEM: state, LIVE_FAULTS: faults }),
    calls: async () => (await readFile(join(state, 'calls'), 'utf8')).trim().split('\n'),
    environment: () => readFile(join(state, 'environment'), 'utf8'),
    installed: (...names) => join(state, 'installed', ...names),
    remove: () => rm(folder, { recursive: true, force: true }),
  }
}
