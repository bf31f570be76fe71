// The machines over ssh: `ssh -F tls/ssh_config NODE …` from the project's folder, for the scripts as
// for everybody. generate-certs writes that file, with pinned host keys.
import { spawn } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { access } from 'node:fs/promises'
import { $, ProcessOutput } from 'zx/core'
import type { Cluster, Node } from './cluster.mts'
import { findBootFailure, lastConsoleLines } from './console-log.mts'
import { explain, lastLines, StepError } from './errors.mts'
import { privateFolder } from './files.mts'
import { quote } from './format.mts'
import { knownProblem } from './problems.mts'
import { filesOf, isRunning } from './vm.mts'
import { waitFor } from './wait.mts'

/** The machine gave no answer, which may be different a moment later. */
export class NoAnswer extends StepError {}

/** Whether an error means that a machine did not answer: a NoAnswer, or an ssh that was cut off. */
export function noAnswer(error: unknown): boolean {
  if (!(error instanceof ProcessOutput)) return error instanceof NoAnswer
  return error.exitCode === 255 || error.exitCode === null
}

/**
 * Opens the connection that all further ssh calls to the machine share, to save their handshakes.
 *
 * @param options.timeout seconds
 * @throws NoAnswer if the machine cannot be reached; StepError if it is another machine or refuses
 *   the key; the signal's reason
 */
export async function connect(
  cluster: Cluster,
  node: Node,
  { timeout = 20, signal }: { timeout?: number; signal?: AbortSignal | undefined } = {},
): Promise<void> {
  for (const name of ['ssh_config', 'ssh_ed25519', 'known_hosts']) {
    await access(cluster.path('tls', name)).catch((cause) => {
      throw new StepError(`tls/${name} is missing`, { hint: 'make certs', cause })
    })
  }
  await privateFolder(cluster.path('run'))
  signal?.throwIfAborted()
  const call = async (args: readonly string[]) => {
    // Detached, as it outlives the script; and not by zx, which would wait for the end of its pipes.
    const child = spawn('ssh', ['-F', 'tls/ssh_config', ...args], {
      ...{ cwd: cluster.root, env: $.env, detached: true, timeout: timeout * 1000 },
      stdio: ['ignore', 'ignore', 'pipe'],
      ...(signal ? { signal } : {}),
    })
    let said = ''
    child.stderr.setEncoding('utf8').on('data', (text: string) => {
      said += text
    })
    const [status] = await once(child, 'exit')
    // After a success the shared connection keeps the pipe open.
    if (status !== 0 && !child.stderr.readableEnded) await once(child.stderr, 'end')
    child.stderr.destroy()
    child.unref()
    return { status: (status ?? null) as number | null, said }
  }
  try {
    if ((await call(['-O', 'check', node.name])).status === 0) return
    // It goes to the background by itself, and ends a minute after the last call.
    const { status, said } = await call(['-M', '-o', 'ControlPersist=60', node.name, 'true'])
    if (status !== 0) throw failure(node, 'ssh', status, said, timeout)
  } finally {
    signal?.throwIfAborted()
  }
}

/**
 * Runs shell text on a machine as root, with `set -euo pipefail`.
 *
 * @param options.timeout seconds
 * @param options.input its standard input; none by default
 * @returns its standard output
 * @throws NoAnswer if the machine does not answer (the command may then still run there);
 *   StepError if the command fails; the signal's reason
 */
export async function remote(
  node: Node,
  command: string,
  options: { timeout?: number; input?: string | Buffer; signal?: AbortSignal | undefined } = {},
): Promise<string> {
  const { timeout = 60, input, signal } = options
  signal?.throwIfAborted()
  const output = await $({
    nothrow: true,
    timeout: timeout * 1000,
    ...(input === undefined ? {} : { input }),
    ...(signal ? { signal } : {}),
  })`ssh -F tls/ssh_config ${node.name} ${`set -euo pipefail; ${command}`}`
  signal?.throwIfAborted()
  if (output.exitCode === 0) return output.stdout
  const status = output.duration < timeout * 1000 ? output.exitCode : null
  throw failure(node, command, status, output.stderr || output.stdout, timeout)
}

function failure(
  { name }: Node,
  command: string,
  status: number | null,
  said: string,
  timeout: number,
): StepError {
  const output = lastLines(said)
  if (status === null) return new NoAnswer(`${name} did not answer within ${timeout} s`)
  if (status !== 255) {
    const shown = command.includes('\n')
      ? {}
      : { command: `ssh -F tls/ssh_config ${name} ${quote(command)}` }
    return new StepError(`a command on ${name} failed (exit status ${status})`, {
      output,
      ...shown,
    })
  }
  const known = knownProblem('ssh', said)
  if (known) {
    return new StepError(`${name}: ${known.reason}`, {
      output,
      ...(known.hint ? { hint: known.hint } : {}),
    })
  }
  return new NoAnswer(`${name} does not answer ssh: ${lastLines(said, 1) || 'no reason given'}`)
}

interface Limits {
  /** Seconds; BOOT_TIMEOUT by default. */
  timeout?: number
  /** Gets what is missing, or the last console line of a machine that is silent. */
  detail?: ((text: string) => void) | undefined
  signal?: AbortSignal | undefined
}

/** Waits until ssh works. @throws StepError at once if QEMU has ended or the boot has failed */
export async function waitForSsh(cluster: Cluster, node: Node, limits: Limits = {}): Promise<void> {
  await waitForMachine(cluster, node, 'ssh', limits, async () => {
    await connect(cluster, node, { timeout: 30, signal: limits.signal })
    return undefined
  })
}

/**
 * Waits until systemd has finished the boot.
 *
 * @returns its state, running or degraded, and the units that failed
 */
export async function waitForSystem(
  cluster: Cluster,
  node: Node,
  limits: Limits = {},
): Promise<{ state: string; failedUnits: string[] }> {
  let state = ''
  await waitForMachine(cluster, node, 'the end of its boot', limits, async () => {
    state = (
      await remote(node, 'systemctl is-system-running || true', { signal: limits.signal })
    ).trim()
    if (/^(running|degraded)$/.test(state)) return undefined
    const jobs = await remote(node, 'systemctl list-jobs --no-legend | head -n 3', {
      signal: limits.signal,
    })
    const units = jobs.split('\n').flatMap((line) => line.trim().split(/\s+/)[1] ?? [])
    return `systemd is ${state}: ${units.join(', ')}`
  })
  const failed = await remote(node, 'systemctl list-units --state=failed --plain --no-legend')
  return { state, failedUnits: failed.split('\n').flatMap((line) => line.split(' ')[0] || []) }
}

async function waitForMachine(
  cluster: Cluster,
  node: Node,
  what: string,
  { timeout = cluster.settings.BOOT_TIMEOUT, detail, signal }: Limits,
  look: () => Promise<string | undefined>,
): Promise<void> {
  const log = filesOf(cluster, node).consoleLog
  const failure = `${node.name}: timed out waiting for ${what}`
  await waitFor({ failure, timeout, detail, signal, log }, async () => {
    const missing = await look().catch((error) => {
      if (noAnswer(error)) return explain(error).reason
      throw error
    })
    if (missing === undefined) return undefined
    const lines = await lastConsoleLines(log)
    const end =
      (await findBootFailure(log)) ??
      ((await isRunning(cluster, node)) ? '' : 'its QEMU is not running')
    if (end) {
      const output = lines.join('\n') || 'nothing on the console'
      throw new StepError(`${node.name}: no ${what}: ${end}`, { output, log })
    }
    // The first line is shown while waiting, all of them when time is up.
    return [lines.at(-1) ?? missing, missing, ...lines].join('\n')
  })
}

/** One question to a machine: what to run, and what its output means. */
export interface Probe<T> {
  /** Shell text. */
  command: string
  read(output: string): T
}

/**
 * Runs several probes in one ssh call, one after the other.
 *
 * @param timeout seconds for all of them
 * @returns what they found, by their names
 * @throws NoAnswer if the machine cannot be reached; StepError if a command fails
 */
export async function runProbes<Probes extends Record<string, Probe<unknown>>>(
  node: Node,
  probes: Probes,
  timeout: number,
  signal?: AbortSignal,
): Promise<{ [Name in keyof Probes]: ReturnType<Probes[Name]['read']> }> {
  const separator = `== ${randomBytes(8).toString('hex')}`
  const entries = Object.entries(probes)
  const commands = entries.map(([, { command }]) => `(\n${command}\n)\necho '${separator}'`)
  const parts = (await remote(node, commands.join('\n'), { timeout, signal })).split(
    `${separator}\n`,
  )
  const found = entries.map(([name, { read }], index) => [name, read(parts[index] ?? '')])
  return Object.fromEntries(found)
}

/** Lets the running machines write out what their kernels hold. A silent one is left out. */
export async function syncGuests(cluster: Cluster, signal?: AbortSignal): Promise<void> {
  await askAll(cluster, () => 'sync', signal)
}

/** Sets the clocks of the running machines that are more than two seconds off (ssh takes its time). */
export async function setClocks(cluster: Cluster, signal?: AbortSignal): Promise<void> {
  const set = () => {
    const now = Date.now()
    return `off=$(($(date +%s%3N) - ${now}))
      [ "\${off#-}" -lt 2000 ] || date --utc --set=@${now / 1000} >/dev/null`
  }
  await askAll(cluster, set, signal)
}

async function askAll(
  cluster: Cluster,
  command: () => string,
  signal?: AbortSignal,
): Promise<void> {
  const ask = async (node: Node) => {
    if (!(await isRunning(cluster, node))) return
    await connect(cluster, node, { signal })
    await remote(node, command(), { timeout: 20, signal })
  }
  const outcomes = await Promise.allSettled(cluster.nodes.map(ask))
  signal?.throwIfAborted()
  for (const outcome of outcomes) {
    if (outcome.status === 'rejected' && !(outcome.reason instanceof StepError))
      throw outcome.reason
  }
}
