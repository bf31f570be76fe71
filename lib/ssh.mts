// The machines over ssh: `ssh -F tls/ssh_config NODE …` from the project's folder, for the scripts as
// for everybody. generate-certs writes that file, with pinned host keys.
import { spawn } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { access } from 'node:fs/promises'
import { $ } from 'zx/core'
import type { Cluster, Node } from './cluster.mts'
import { findBootFailure, lastConsoleLines } from './console-log.mts'
import { knownProblem, lastLines, StepError } from './errors.mts'
import { privateFolder } from './files.mts'
import { quote } from './format.mts'
import { filesOf, isRunning } from './vm.mts'
import { type WaitLimits, waitFor } from './wait.mts'

/** The machine gave no answer, which may be different a moment later. */
export class NoAnswer extends StepError {}

/**
 * Opens the connection that all further ssh calls to the machine share, to save their handshakes.
 * @throws NoAnswer if the machine cannot be reached; StepError if it is another machine or refuses
 *   the key; the signal's reason
 */
export async function connect(cluster: Cluster, node: Node, limits: Limits = {}): Promise<void> {
  const { timeout = 20, signal } = limits
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
      ...{ cwd: cluster.root, env: $.env, detached: true, timeout: timeout * 1000, signal },
      stdio: ['ignore', 'ignore', 'pipe'],
    })
    let said = ''
    child.stderr.setEncoding('utf8').on('data', (text: string) => {
      said += text
    })
    const [status = null]: (number | null)[] = await once(child, 'exit')
    // After a success the shared connection keeps the pipe open.
    if (status !== 0 && !child.stderr.readableEnded) await once(child.stderr, 'end')
    child.stderr.destroy()
    child.unref()
    return { status, said }
  }
  try {
    if ((await call(['-O', 'check', node.name])).status === 0) return
    // It goes to the background by itself, and ends a minute after the last call.
    const { status, said } = await call(['-M', '-o', 'ControlPersist=60', node.name, 'true'])
    if (status !== 0) throw failed(node.name, 'ssh', status, said, timeout)
  } finally {
    signal?.throwIfAborted()
  }
}

/**
 * Runs shell text on a machine as root, with `set -euo pipefail`. @returns its standard output
 * @throws NoAnswer if the machine does not answer (the command may then still run there);
 *   StepError if the command fails; the signal's reason
 */
export async function remote(
  node: Node,
  command: string,
  options: Limits & { input?: string | Buffer } = {},
): Promise<string> {
  const { timeout = 60, input, signal } = options
  signal?.throwIfAborted()
  const $$ = $({ nothrow: true, timeout: timeout * 1000, input, signal })
  const output = await $$`ssh -F tls/ssh_config ${node.name} ${`set -euo pipefail; ${command}`}`
  signal?.throwIfAborted()
  if (output.exitCode === 0) return output.stdout
  const status = output.duration < timeout * 1000 ? output.exitCode : null
  throw failed(node.name, command, status, output.stderr || output.stdout, timeout)
}

/** Why an ssh call failed; its status is null if it took more than `limit` seconds. */
function failed(name: string, command: string, status: number | null, said: string, limit: number) {
  const output = lastLines(said)
  if (status === null) return new NoAnswer(`${name} did not answer within ${limit} s`)
  if (status !== 255) {
    const line = `ssh -F tls/ssh_config ${name} ${quote(command)}`
    const shown = command.includes('\n') ? {} : { command: line }
    const reason = `a command on ${name} failed (exit status ${status})`
    return new StepError(reason, { output, ...shown })
  }
  const known = knownProblem('ssh', said)
  if (known) return new StepError(`${name}: ${known.reason}`, { output, hint: known.hint })
  return new NoAnswer(`${name} does not answer ssh: ${lastLines(said, 1) || 'no reason given'}`)
}

export type Limits = Pick<Partial<WaitLimits>, 'timeout' | 'signal'>
/** The timeout is BOOT_TIMEOUT by default; `detail` gets the last console line of a silent machine. */
type Wait = Partial<WaitLimits>

/** Waits until ssh works. @throws StepError at once if QEMU has ended or the boot has failed */
export async function waitForSsh(cluster: Cluster, node: Node, wait: Wait = {}): Promise<void> {
  await waitForMachine(cluster, node, 'ssh', wait, async () => {
    await connect(cluster, node, { timeout: 30, signal: wait.signal })
    return undefined
  })
}

/** Waits until systemd has finished the boot. @returns running or degraded, and the failed units */
export async function waitForSystem(cluster: Cluster, node: Node, wait: Wait = {}) {
  const { signal } = wait
  const column = (text: string, index: number) =>
    text.split('\n').flatMap((line) => line.trim().split(/\s+/)[index] || [])
  let state = ''
  await waitForMachine(cluster, node, 'the end of its boot', wait, async () => {
    state = (await remote(node, 'systemctl is-system-running || true', { signal })).trim()
    if (/^(running|degraded)$/.test(state)) return undefined
    const jobs = await remote(node, 'systemctl list-jobs --no-legend | head -n 3', { signal })
    return `systemd is ${state}: ${column(jobs, 1).join(', ')}`
  })
  const failed = await remote(node, 'systemctl list-units --state=failed --plain --no-legend')
  return { state, failedUnits: column(failed, 0) }
}

async function waitForMachine(
  cluster: Cluster,
  node: Node,
  what: string,
  { timeout = cluster.settings.BOOT_TIMEOUT, ...wait }: Wait,
  look: () => Promise<string | undefined>,
): Promise<void> {
  const log = filesOf(cluster, node).consoleLog
  const failure = `${node.name}: timed out waiting for ${what}`
  await waitFor({ failure, timeout, log, ...wait }, async () => {
    const missing = await look().catch((error) => {
      if (error instanceof NoAnswer) return error.message
      throw error
    })
    if (missing === undefined) return undefined
    await assertStarting(cluster, node, `${node.name}: no ${what}`)
    const lines = await lastConsoleLines(log)
    // The first line is shown while waiting, all of them when time is up.
    return [lines.at(-1) ?? missing, missing, ...lines].join('\n')
  })
}

/** @throws StepError if the machine will not answer, however long one waits */
export async function assertStarting(cluster: Cluster, node: Node, reason: string, hint?: string) {
  const log = filesOf(cluster, node).consoleLog
  const stopped = (await isRunning(cluster, node)) ? undefined : 'its QEMU is not running'
  const end = (await findBootFailure(log)) ?? stopped
  if (!end) return
  const output = (await lastConsoleLines(log)).join('\n') || 'nothing on the console'
  throw new StepError(`${reason}: ${end}`, { output, log, hint })
}

/** One question to a machine: what to run (shell text), and what its output means. */
export type Probe<T> = { command: string; read(output: string): T }

/**
 * Runs several probes one after the other, in one ssh call of at most `timeout` seconds.
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
  const output = await remote(node, commands.join('\n'), { timeout, signal })
  const parts = output.split(`${separator}\n`)
  const found = entries.map(([name, { read }], index) => [name, read(parts[index] ?? '')])
  return Object.fromEntries(found)
}

/** Lets the running machines write out what their kernels hold. A silent one is left out. */
export async function syncGuests(cluster: Cluster, signal?: AbortSignal): Promise<void> {
  await askAll(cluster, () => 'sync', signal)
}

/** Sets the clocks of the running machines that are more than two seconds off (ssh takes its time). */
export async function setClocks(cluster: Cluster, signal?: AbortSignal): Promise<void> {
  const set = (now: number) => `off=$(($(date +%s%3N) - ${now}))
    [ "\${off#-}" -lt 2000 ] || date --utc --set=@${now / 1000} >/dev/null`
  await askAll(cluster, set, signal, 'its clock was not set')
}

/** @param command gets the time, milliseconds since 1970 @param warning is printed for each failure */
async function askAll(
  cluster: Cluster,
  command: (now: number) => string,
  signal?: AbortSignal,
  warning?: string,
) {
  const ask = async (node: Node) => {
    try {
      if (!(await isRunning(cluster, node))) return
      await connect(cluster, node, { signal })
      await remote(node, command(Date.now()), { timeout: 20, signal })
    } catch (error) {
      signal?.throwIfAborted()
      if (!(error instanceof StepError)) throw error
      if (warning) console.error(`! ${node.name}: ${warning}: ${error.message}`)
    }
  }
  await Promise.all(cluster.nodes.map(ask))
}
