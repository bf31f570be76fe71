// How each system installs packages: which manager it has, and the command lines for a list.
import { readFileSync } from 'node:fs'
import { basename } from 'node:path'
import { which } from 'zx/core'
import type { Prerequisite } from './prerequisites.mts'

export type PackageManagerName = 'brew' | 'apt' | 'dnf' | 'pacman' | 'zypper' | 'nix'

export interface PackageManager {
  name: PackageManagerName
  program: string
  /** ID and ID_LIKE of the distributions whose own it is, in os-release(5). */
  systems: readonly string[]
  /** Whether only root may. */
  root: boolean
  /** The command line without the packages; `refresh` first where lists may be missing or old. */
  refresh?: string
  install: string
  /** What a package is called there. */
  prefix?: string
}

export const packageManagers: readonly PackageManager[] = [
  { name: 'brew', program: 'brew', systems: ['darwin'], root: false, install: 'brew install' },
  {
    name: 'apt',
    program: 'apt-get',
    systems: ['debian', 'ubuntu'],
    root: true,
    refresh: 'apt-get update',
    install: 'apt-get install --yes',
  },
  {
    name: 'dnf',
    program: 'dnf',
    systems: ['fedora', 'rhel'],
    root: true,
    install: 'dnf install --assumeyes',
  },
  {
    name: 'pacman',
    program: 'pacman',
    systems: ['arch'],
    root: true,
    install: 'pacman -S --needed --noconfirm',
  },
  {
    name: 'zypper',
    program: 'zypper',
    systems: ['suse', 'opensuse'],
    root: true,
    install: 'zypper --non-interactive install',
  },
  {
    name: 'nix',
    program: 'nix',
    systems: ['nixos'],
    root: false,
    install: "nix --extra-experimental-features 'nix-command flakes' profile install",
    prefix: 'nixpkgs#',
  },
]

/**
 * The package manager of this system: that of the distribution, else the first on PATH.
 *
 * @param release the text of /etc/os-release; read there unless given
 */
export async function detectPackageManager(
  os: NodeJS.Platform = process.platform,
  release: string = readRelease(),
): Promise<PackageManager | undefined> {
  const ids = [...release.matchAll(/^ID(?:_LIKE)?="?([^"\n]*)"?$/gm)].flatMap(
    ([, value]) => value?.split(' ') ?? [],
  )
  const names = os === 'darwin' ? [os] : ids
  const own = (manager: PackageManager) => manager.systems.some((system) => names.includes(system))
  const ordered = [
    ...packageManagers.filter(own),
    ...packageManagers.filter((manager) => !own(manager)),
  ]
  for (const manager of ordered) {
    if (await which(manager.program, { nothrow: true })) return manager
  }
  return undefined
}

export interface InstallContext {
  manager: PackageManager | undefined
  /** Whether commands run as root already. */
  root: boolean
  /** Whether curl is there, for what has no package. */
  curl: boolean
}

/** This process's surroundings. */
export async function installContext(): Promise<InstallContext> {
  return {
    manager: await detectPackageManager(),
    root: process.getuid?.() === 0,
    curl: (await which('curl', { nothrow: true })) !== null,
  }
}

/**
 * The shell commands that install what is missing, as one would type them.
 *
 * @returns the commands, and the names of what none of them brings
 */
export function installCommands(
  missing: readonly Prerequisite[],
  { manager, root, curl }: InstallContext,
): { commands: string[]; without: string[] } {
  const packages = new Set<string>()
  const downloads: string[] = []
  const without: string[] = []
  for (const { name, packages: names, download } of missing) {
    const packaged = manager && names[manager.name]
    if (packaged) packages.add((manager.prefix ?? '') + packaged)
    else if (download && manager && manager.name !== 'brew') downloads.push(download)
    else without.push(name)
  }
  if (downloads.length > 0 && !curl) packages.add(`${manager?.prefix ?? ''}curl`)

  const commands: string[] = []
  if (manager && packages.size > 0) {
    const sudo = manager.root && !root ? 'sudo ' : ''
    if (manager.refresh) commands.push(sudo + manager.refresh)
    commands.push(`${sudo}${manager.install} ${[...packages].join(' ')}`)
  }
  for (const url of downloads) commands.push(downloadCommand(url, root))
  return { commands, without }
}

/** Downloads a program to a folder of its own, compares its checksum, then puts it on PATH. */
function downloadCommand(url: string, root: boolean): string {
  const name = basename(url)
  const steps = [
    'cd "$(mktemp -d)"',
    `curl -fLO ${url}`,
    `echo "$(curl -fsSL ${url}.sha256)  ${name}" | sha256sum -c -`,
    `${root ? '' : 'sudo '}install -m 755 ${name} /usr/local/bin/${name}`,
  ]
  return `(${steps.join(' && ')})`
}

function readRelease(): string {
  try {
    return readFileSync('/etc/os-release', 'utf8')
  } catch {
    return ''
  }
}
