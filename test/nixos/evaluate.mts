// A machine's configuration as data: what test/nixos/system.nix answers.
import { execFile } from 'node:child_process'
import { join } from 'node:path'
import { promisify } from 'node:util'

/** The parts of the answer that tests read; system.nix has all of it. */
export interface Machine {
  hostName: string
  kernelParams: string[]
  kernelModules: string[]
  /** Path on the machine to its content or to what it links to. */
  files: Record<string, { text: string; mode: string } | { link: string }>
  units: Record<string, Unit>
  /** Target to the units that it pulls in. */
  wants: Record<string, string[]>
  users: { name: string; hashedPassword: string | null; authorizedKeys: string[] }[]
  /** Attributes of packages. */
  systemPackages: string[]
  /** Environment of shells and of the Nix daemon. */
  sessionVariables: Record<string, string>
  certificateFiles: string[]
  /** Store path to the package there and the programs in its bin/. */
  store: Record<string, { package: string; bin: string[] }>
}

export interface Unit {
  /** ExecStart, word by word. */
  command: string[]
  user: string
  group: string
  after: string[]
  environment: Record<string, string>
  /** What a change of restarts the unit. */
  restartTriggers: string[]
  serviceConfig: Record<string, string | number | boolean | (string | number | boolean)[]>
}

/**
 * Evaluates a staged configuration with nix-instantiate.
 *
 * @param configuration path of its configuration.nix
 * @param system what it would run on, such as "aarch64-linux"; unless said, this computer's kind
 * @throws the error of nix-instantiate, with what it says about the configuration
 */
export async function evaluate(configuration: string, system?: string): Promise<Machine> {
  const { stdout } = await promisify(execFile)(
    'nix-instantiate',
    [
      // A store needs rights, or a daemon; nothing is put into one.
      ...['--store', 'dummy://', '--eval', '--strict', '--json'],
      join(import.meta.dirname, 'system.nix'),
      ...['--argstr', 'configuration', configuration],
      ...(system ? ['--argstr', 'system', system] : []),
    ],
    { maxBuffer: 64 * 2 ** 20 },
  )
  return JSON.parse(stdout) as Machine
}
