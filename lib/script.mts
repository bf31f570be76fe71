// The front of every script in bin/: what it does, its flags and arguments, --help, the environment
// of its commands, and how an error that nobody caught is printed.
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { basename, delimiter, join } from 'node:path'
import minimist from 'minimist'
import { $, ProcessOutput, useBash, which } from 'zx/core'
import { describeError, explain, noteFailure, StepError } from './errors.mts'
import { quote } from './format.mts'
import { handleSignals, interrupted, interruption, outputClosed, takingTime } from './interrupt.mts'
import { isHolding, locksForChildren } from './lock.mts'

/** A flag is a switch (`--force`) unless `value` names what follows it (`--timeout SECONDS`). */
export interface Flag {
  help: string
  value?: string
  /** The value is a number of at least zero. */
  number?: boolean
  /** The only values it takes. */
  choices?: readonly string[]
}

interface Declaration<Flags extends Record<string, Flag>> {
  /** One or two sentences: what the step does. */
  does: string
  /** Files and folders it reads and writes, relative to the project; "the cluster: …", its objects. */
  reads: readonly string[]
  writes: readonly string[]
  flags?: Flags
  /** Positional arguments, as they stand in the usage line: "NODE", "[NODE...]". */
  args?: string
  examples: readonly string[]
}

type FlagValue<F extends Flag> = F extends { value: string }
  ? F extends { number: true }
    ? number | undefined
    : string | undefined
  : boolean
type FlagValues<Flags extends Record<string, Flag>> = {
  [Name in keyof Flags]: FlagValue<Flags[Name]>
}

const common = {
  help: { help: 'show this text' },
  verbose: { help: 'print every command as it runs, and the stack traces of errors' },
} satisfies Record<string, Flag>

const root = join(import.meta.dirname, '..')

/**
 * Declares a script, reads its command line and prepares zx's `$` for it. With --help it prints the
 * declaration and exits 0; an unknown flag or argument exits 2 before anything has happened. From
 * then on an error that reaches the top is printed by `describeError` and ends the script with
 * status 1, or the one the error carries.
 * @returns the flags by name, and the positional arguments
 */
export function script<const Flags extends Record<string, Flag>>(
  declaration: Declaration<Flags>,
): { flags: FlagValues<Flags> & { verbose: boolean }; args: string[] } {
  const [, path = 'script', ...argv] = process.argv
  const name = basename(path, '.mts')
  process.on('uncaughtException', (error) => {
    // After Ctrl-C a command fails because it was ended.
    const reason = interrupted()
    const shown = reason && error instanceof ProcessOutput ? reason : error
    console.error(`${name}: ${describeError(shown, argv.includes('--verbose'))}`)
    process.exit(explain(shown instanceof StepError ? shown : reason).explanation.exitCode ?? 1)
  })
  for (const stream of [process.stdout, process.stderr]) {
    stream.on('error', (error: NodeJS.ErrnoException) => {
      if (error.code !== 'EPIPE' && error.code !== 'EIO') throw error
      outputClosed(isHolding())
    })
  }
  const known: Record<string, Flag> = { ...declaration.flags, ...common }
  const parsed = parse(known, argv, name)
  if (parsed.help) {
    console.log(usage(name, declaration, known))
    process.exit(0)
  }
  const args = parsed._.map(String)
  const words = declaration.args?.split(' ') ?? []
  const most = declaration.args?.includes('...') ? Infinity : words.length
  const least = words.filter((word) => /^[A-Z]/.test(word)).length
  if (args.length > most) refuse(name, `unexpected argument "${args[most]}"`)
  if (args.length < least) refuse(name, `missing argument: ${declaration.args}`)
  prepareCommands(Boolean(parsed.verbose))
  return { flags: parsed as unknown as FlagValues<Flags> & { verbose: boolean }, args }
}

/** Variables of the caller that would change what our commands do or print. */
const unwanted =
  /^(BASH_ENV|ENV|BASH_FUNC_.*|SHELLOPTS|BASHOPTS|CDPATH|GLOBIGNORE|PS4|LANG|LANGUAGE|LC_.*|KUBECONFIG|KUBERC|KUBECTL_.*|HELM_.*|ETCDCTL_.*|SSH_AUTH_SOCK|SSH_ASKPASS.*|TAR_OPTIONS|GREP_OPTIONS|GREP_COLORS?|PAGER|LESS|CLICOLOR.*|FORCE_COLOR|POSIXLY_CORRECT|GZIP|XZ_OPT|TAPE|COPYFILE_DISABLE)$/

/** The environment of our commands: the caller's, without what would change their output. */
function cleanEnvironment(): NodeJS.ProcessEnv {
  const { env } = process
  return {
    ...Object.fromEntries(Object.entries(env).filter(([name]) => !unwanted.test(name))),
    PATH: [env.PATH, join(root, 'tools'), '/usr/sbin', '/sbin'].filter(Boolean).join(delimiter),
    LC_ALL: 'C',
    CLUSTER_LOCKS: env.CLUSTER_LOCKS ?? '', // marks scripts that are run as commands
    KUBERC: 'off',
    KUBECACHEDIR: join(root, 'run', 'kube-cache'),
    COPYFILE_DISABLE: '1', // no files with attributes from macOS's tar
  }
}

/**
 * zx's `$` for our commands: run in the project's folder by bash, with standard input closed, in a
 * process group of their own, so that a Ctrl-C in the terminal cannot cut a change in half.
 */
export function prepareCommands(verbose: boolean): void {
  // Without it check-prereqs has to run nevertheless.
  if (which.sync('bash', { nothrow: true })) useBash()
  const running = new Set<ChildProcess>()
  const commands = new Map<string, { command: string; stderr: string }>()
  Object.assign($, { cwd: root, env: cleanEnvironment(), verbose, quiet: true, detached: true })
  $.spawn = ((...args: Parameters<typeof spawn>) => {
    const child = spawn(...args)
    running.add(child)
    child.once('exit', (status, signal) => {
      running.delete(child)
      // An ssh that was ended leaves its pipes to the shared connection until its command ends.
      const close = () => [child.stdout, child.stderr].map((pipe) => pipe?.destroy())
      if (signal || status === 255) setTimeout(close, 500).unref()
    })
    child.stdin?.on('error', () => {})
    // zx has written its input by then, if there is any.
    setImmediate(() => child.stdin?.end())
    return child
  }) as typeof spawn
  $.log = (entry) => {
    if (entry.kind === 'cmd') {
      commands.set(entry.id, { command: entry.cmd, stderr: '' })
      if (verbose) console.error(`$ ${entry.cmd}`)
      return
    }
    const known = 'id' in entry && commands.get(entry.id)
    if (!known) return
    if (entry.kind === 'stderr') known.stderr += entry.data
    if (entry.kind !== 'end') return
    commands.delete(entry.id)
    if (entry.exitCode !== 0) noteFailure({ ...known, duration: entry.duration })
  }
  handleSignals(() => {
    for (const { pid } of running) {
      try {
        if (pid !== undefined) process.kill(-pid, 'SIGTERM')
      } catch {
        // It has just ended.
      }
    }
  })
}

/**
 * Runs another script of bin/ to its end in this terminal, as a person would type it. It prints its
 * own errors; `failure` completes the one of this script: "generate-certs failed, …".
 * @throws StepError if it fails, with its exit status; the interruption after Ctrl-C
 */
export async function runScript(
  name: string,
  args: readonly string[] = [],
  { failure = '', hint }: { failure?: string; hint?: string } = {},
): Promise<void> {
  const signal = interruption()
  signal.throwIfAborted()
  const command = [`./bin/${name}.mts`, ...args.map(quote)].join(' ')
  console.error(`\n$ ${command}`)
  const verbose = $.verbose ? ['--verbose'] : []
  const child = spawn(join(root, 'bin', `${name}.mts`), [...args, ...verbose], {
    cwd: root,
    env: { ...process.env, ...locksForChildren() },
    stdio: ['ignore', 'inherit', 'inherit'],
  })
  // Ctrl-C reaches both processes; what is sent to this one alone has to be passed on.
  const forward = () => child.kill('SIGTERM')
  process.once('SIGTERM', forward).once('SIGHUP', forward)
  // The child may have something to undo.
  const [status] = await takingTime(() => once(child, 'exit')).finally(() => {
    process.off('SIGTERM', forward).off('SIGHUP', forward)
  })
  signal.throwIfAborted()
  if (status === 0) return
  const reason = `${name} failed${failure && `, ${failure}`}`
  throw new StepError(reason, { command, hint, exitCode: status ?? 1 })
}

/** Refuses a command line that makes no sense as a whole: exits 2 before anything has happened. */
export function refuseIf(isWrong: unknown, reason: string): void {
  if (isWrong) refuse(basename(process.argv[1] ?? '', '.mts'), reason)
}

function parse(known: Record<string, Flag>, argv: readonly string[], name: string) {
  const names = Object.keys(known)
  const parsed = minimist([...argv], {
    boolean: names.filter((flag) => !known[flag]?.value),
    string: [...names.filter((flag) => known[flag]?.value), '_'],
    alias: { h: 'help' },
    unknown: (arg) => !arg.startsWith('-') || arg === '-' || refuse(name, `unknown flag ${arg}`),
  })
  // What follows -- is not for this script.
  const own = argv.slice(0, argv.includes('--') ? argv.indexOf('--') : undefined)
  for (const [flag, { value: what, number, choices }] of Object.entries(known)) {
    const value: unknown = parsed[flag]
    const wrong = (reason: string) => refuse(name, `--${flag} ${reason}`)
    if (!what) {
      if (own.some((arg) => arg.startsWith(`--${flag}=`))) wrong('takes no value')
    } else if (value !== undefined) {
      if (Array.isArray(value)) wrong('is given more than once')
      if (value === '' || value === false) wrong(`needs a value: ${what}`)
      if (choices && !choices.includes(String(value))) {
        wrong(`is one of ${choices.join(', ')}, not "${value}"`)
      }
      if (number && !/^\d+(\.\d+)?$/.test(String(value))) wrong(`needs a number, not "${value}"`)
      if (number) parsed[flag] = Number(value)
    }
  }
  return parsed
}

function usage(
  name: string,
  { does, reads, writes, args, examples }: Declaration<Record<string, Flag>>,
  known: Record<string, Flag>,
): string {
  const flags = Object.entries(known).map(
    ([flag, { value, help }]) => [value ? `--${flag} ${value}` : `--${flag}`, help] as const,
  )
  const width = Math.max(...flags.map(([flag]) => flag.length))
  return `${does}

Usage: ./bin/${name}.mts [flags]${args ? ` ${args}` : ''}

Flags (defaults in parentheses):
${flags.map(([flag, help]) => `  ${flag.padEnd(width)}  ${help}`).join('\n')}

Reads:   ${reads.join(', ') || 'nothing'}
Writes:  ${writes.join(', ') || 'nothing'}

Example${examples.length > 1 ? 's' : ''}:
${examples.map((example) => `  ${example}`).join('\n')}`
}

function refuse(name: string, reason: string): never {
  console.error(`${name}: ${reason}\n  hint:    ./bin/${name}.mts --help`)
  process.exit(2)
}
