// The tree of the stand-in's own layer: what makes the Debian programs look like NixOS, the
// programs that install and switch, and the evaluator that they use.
import { chmod, cp, mkdir, readdir, symlink, writeFile } from 'node:fs/promises'
import { dirname, join } from 'node:path'

export const machine = join(import.meta.dirname, 'machine')
export const evaluator = join(import.meta.dirname, '..', 'nixos')

/** Where a running system has the layers. */
export const mounted = { debian: '/nix/.layers/debian', own: '/nix/.layers/stand-in' }

/**
 * Lays the tree out in a folder that is made.
 *
 * @param release of NixOS that it stands in for: "26.05"
 */
export async function ownTree(tree: string, release: string): Promise<void> {
  for (const part of ['accounts', 'bin', 'etc', 'nixos', 'stage-2.sh', 'tools', 'units']) {
    await cp(join(machine, part), join(tree, part), {
      recursive: true,
      filter: (path) => !path.endsWith('__pycache__'),
    })
  }
  for (const name of await readdir(evaluator)) {
    if (!name.endsWith('.nix')) continue
    await cp(join(evaluator, name), join(tree, 'evaluator', name))
  }
  await writeFile(join(tree, 'release'), `${release}\n`)
  await writeFile(join(tree, 'releases'), `${release}\n${releaseAfter(release)}\n`)
  await writeFile(join(tree, 'etc', 'os-release'), osRelease(release))
  for (const name of await readdir(join(tree, 'bin'))) await chmod(join(tree, 'bin', name), 0o755)
  await chmod(join(tree, 'stage-2.sh'), 0o755)
  // Not a link but a copy on a machine, as whatever is not everybody's to read.
  await chmod(join(tree, 'etc', 'sudoers'), 0o440)
  // The name by which Debian's bash knows it.
  await symlink('bashrc', join(tree, 'etc', 'bash.bashrc'))
  await linkUnits(join(tree, 'etc', 'systemd', 'system'), always)
  await sessionUsr(join(tree, 'session', 'usr'))
}

/** The release of NixOS that a machine can be upgraded to: 26.11 comes after 26.05. */
export function releaseAfter(release: string): string {
  const [year = 0, month] = release.split('.').map(Number)
  return month === 5 ? `${year}.11` : `${year + 1}.05`
}

function osRelease(release: string): string {
  return [
    'NAME=NixOS',
    'ID=nixos',
    `VERSION="${release} (Stand-in)"`,
    'VERSION_CODENAME=stand-in',
    `VERSION_ID="${release}"`,
    `BUILD_ID="${release}.stand-in"`,
    `PRETTY_NAME="NixOS ${release} (Stand-in)"`,
    '',
  ].join('\n')
}

/** Units that run on the installer's CD and on installed machines, and what pulls them in. */
const always: Record<string, string[]> = {
  'multi-user.target': ['getty.target', 'systemd-networkd.service', 'systemd-resolved.service'],
  'getty.target': ['getty@tty1.service'],
  'sysinit.target': ['systemd-timesyncd.service'],
  'sockets.target': ['dbus.socket', 'systemd-networkd.socket'],
}

async function linkUnits(folder: string, wants: Record<string, string[]>): Promise<void> {
  await symlink('/usr/lib/systemd/system/multi-user.target', join(folder, 'default.target'))
  await symlink('/usr/lib/systemd/system/reboot.target', join(folder, 'ctrl-alt-del.target'))
  for (const [target, units] of Object.entries(wants)) {
    await mkdir(join(folder, `${target}.wants`))
    for (const unit of units) await symlink(`../${unit}`, join(folder, `${target}.wants`, unit))
  }
}

/** What a session has as /usr: the one program that NixOS has there, and what libraries need. */
async function sessionUsr(usr: string): Promise<void> {
  // PAM calls the second by this path; on NixOS by another.
  for (const program of ['bin/env', 'sbin/unix_chkpwd']) {
    await mkdir(join(usr, dirname(program)), { recursive: true })
    await symlink(`${mounted.debian}/usr/${program}`, join(usr, program))
  }
  for (const folder of ['lib', 'lib64', 'libexec', 'share']) {
    await symlink(`${mounted.debian}/usr/${folder}`, join(usr, folder))
  }
}
