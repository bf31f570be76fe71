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
 * @param options.system what it would run on ("aarch64-linux"); unless said, this computer's kind
 * @param options.file with `attribute`, a further module: the file of modules, and its name there
 * @throws the error of nix-instantiate, with what it says about the configuration
 */
export async function evaluate(
  configuration: string,
  options: { system?: string; file?: string; attribute?: string } = {},
): Promise<Machine> {
  const args = Object.entries({ configuration, ...options })
  return (await instantiate([
    join(import.meta.dirname, 'system.nix'),
    ...args.flatMap(([name, value]) => ['--argstr', name, value]),
  ])) as Machine
}

/**
 * The value of a Nix expression.
 *
 * @param args of nix-instantiate, after those that make it evaluate and print JSON
 */
export async function instantiate(args: string[]): Promise<unknown> {
  const { stdout } = await promisify(execFile)(
    'nix-instantiate',
    // A store needs rights, or a daemon; nothing is put into one.
    ['--store', 'dummy://', '--eval', '--strict', '--json', ...args],
    { maxBuffer: 64 * 2 ** 20 },
  )
  return JSON.parse(stdout)
}
