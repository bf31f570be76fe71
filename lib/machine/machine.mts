// A running machine, over ssh. Its methods are named as in the NixOS test driver. Every wait says
// what it waits for, and gives up at once when QEMU has ended or the boot has failed.
import { readFile } from 'node:fs/promises'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Cluster, Node } from '../cluster.mts'
import { StepError } from '../errors.mts'
import { findBootFailure, lastConsoleLines } from '../qemu/console-log.mts'
import { filesOf } from '../qemu/machine-files.mts'
import { isRunning } from '../qemu/vm.mts'
import { type Answer, NoAnswer, quoteForShell, runOverSsh } from './ssh.mts'
import { type SystemState, systemStateProbe } from './system-state.mts'

interface Limits {
  /** Seconds. */
  timeout?: number
  /** Is told, while waiting, why it is not yet so, or what a silent machine's console says. */
  detail?: (text: string) => void
}

type Look<T> = { found: T } | { reason: string }

const pause = 1000

export class Machine {
  readonly cluster: Cluster
  readonly node: Node
  private readonly signal: AbortSignal | undefined

  /** @param signal ends commands and waits */
  constructor(cluster: Cluster, node: Node, signal?: AbortSignal) {
    this.cluster = cluster
    this.node = node
    this.signal = signal
  }

  /**
   * Runs shell text as root, in bash with `set -euo pipefail`; its status is for the caller.
   *
   * @param options.timeout seconds
   * @throws NoAnswer if the machine does not answer
   */
  execute(
    command: string,
    options: { timeout?: number; input?: string | Buffer } = {},
  ): Promise<Answer> {
    const { timeout = 60 } = options
    return runOverSsh(this.cluster, this.node, command, {
      ...options,
      timeout,
      signal: this.signal,
    })
  }

  /** What a command prints on its standard output. @throws StepError if its status is not 0 */
  async succeed(
    command: string,
    options: { timeout?: number; input?: string | Buffer } = {},
  ): Promise<string> {
    const { status, stdout, stderr } = await this.execute(command, options)
    if (status === 0) return stdout
    throw new StepError(`a command on ${this.node.name} ended with status ${status}`, {
      // A text of many lines would bury what it said.
      ...(command.includes('\n') ? {} : { command }),
      output: lastLines(stderr || stdout),
    })
  }

  /** Puts a file there, whole or not at all. @param mode permission bits; the owner is root */
  async upload(from: string, to: string, mode = 0o600): Promise<void> {
    const target = quoteForShell(to)
    const beside = quoteForShell(`${to}.partial`)
    await this.succeed(
      `umask 077; cat >${beside}; chmod ${mode.toString(8)} ${beside}; mv -f ${beside} ${target}`,
      { input: await readFile(from) },
    )
  }

  /** What systemd says of the machine now. */
  async systemState(): Promise<SystemState> {
    return systemStateProbe.read(await this.succeed(systemStateProbe.command))
  }

  /** Waits until the machine lets us in. */
  async waitForSsh(limits: Limits = {}): Promise<void> {
    await this.waitFor('answer ssh', limits, async () => {
      await this.execute('true', { timeout: 30 })
      return { found: true }
    })
  }

  /** Waits until systemd has started all there is to start: the state is running or degraded. */
  waitForSystem(limits: Limits = {}): Promise<SystemState> {
    return this.waitFor<SystemState>('finish its start', limits, async () => {
      const system = await this.systemState()
      if (/^(running|degraded)$/.test(system.state)) return { found: system }
      const jobs = await this.succeed('systemctl list-jobs --no-legend')
      const units = jobs.split('\n').flatMap((line) => line.trim().split(/\s+/)[1] ?? [])
      return { reason: `systemd is ${system.state}: ${units.slice(0, 3).join(', ')}` }
    })
  }

  /** Waits until a unit is active. @throws StepError at once if it failed or does not exist */
  async waitForUnit(unit: string, limits: Limits = {}): Promise<void> {
    await this.waitFor(`have unit ${unit} active`, limits, async () => {
      const state = await this.unitState(unit)
      if (state.ActiveState === 'active') return { found: true }
      if (state.LoadState === 'not-found') {
        throw new StepError(`${this.node.name} has no unit ${unit}`)
      }
      if (state.ActiveState === 'failed') throw await this.unitFailure(unit, state.Result)
      // A unit that nobody starts stays as it is.
      if (state.ActiveState === 'inactive' && !state.Job) {
        throw new StepError(`unit ${unit} of ${this.node.name} is inactive and nothing starts it`)
      }
      return { reason: `${unit} is ${state.ActiveState} (${state.SubState})` }
    })
  }

  /** Runs a command again and again until its status is 0. @returns what it then printed */
  waitUntilSucceeds(command: string, limits: Limits = {}): Promise<string> {
    return this.waitFor<string>(`do "${command}"`, limits, async () => {
      const { status, stdout, stderr } = await this.execute(command)
      if (status === 0) return { found: stdout }
      return { reason: `status ${status}: ${lastLines(stderr || stdout, 1)}` }
    })
  }

  /**
   * Looks until it finds, with a pause between.
   *
   * @param what completes "alpha did not … within 300 s"
   * @throws StepError with the last reason and the last console lines
   */
  private async waitFor<T>(what: string, limits: Limits, look: () => Promise<Look<T>>): Promise<T> {
    const { timeout = this.cluster.settings.BOOT_TIMEOUT, detail } = limits
    const deadline = performance.now() + timeout * 1000
    for (;;) {
      let silent = false
      const seen = await look().catch((error: unknown): Look<T> => {
        if (!(error instanceof NoAnswer)) throw error
        silent = true
        return { reason: error.message }
      })
      if ('found' in seen) return seen.found
      const end = await this.whyItEnded()
      if (end) throw await this.gaveUp(`${this.node.name} did not ${what}: ${end}`)
      if (performance.now() > deadline) {
        const reason = `${this.node.name} did not ${what} within ${timeout} s`
        throw await this.gaveUp(`${reason}: ${seen.reason}`)
      }
      const [last] = silent ? await lastConsoleLines(this.consoleLog, 1) : []
      detail?.(last ?? seen.reason)
      await sleep(pause, undefined, this.signal ? { signal: this.signal } : {}).catch(() => {})
      this.signal?.throwIfAborted()
    }
  }

  /** Why nothing more will come from this machine; undefined while it may. */
  private async whyItEnded(): Promise<string | undefined> {
    const failure = await findBootFailure(this.consoleLog)
    if (failure) return failure
    return (await isRunning(this.cluster, this.node)) ? undefined : 'its QEMU is not running'
  }

  private async gaveUp(reason: string): Promise<StepError> {
    const log = this.consoleLog
    return new StepError(reason, {
      output: (await lastConsoleLines(log)).join('\n') || 'the console said nothing',
      log,
    })
  }

  private get consoleLog(): string {
    return filesOf(this.cluster, this.node).consoleLog
  }

  private async unitState(unit: string): Promise<Record<string, string>> {
    const names = 'LoadState,ActiveState,SubState,Result,Job'
    const text = await this.succeed(`systemctl show --property=${names} ${quoteForShell(unit)}`)
    return Object.fromEntries(
      text.split('\n').map((line) => {
        const at = line.indexOf('=')
        return [line.slice(0, at), line.slice(at + 1)]
      }),
    )
  }

  private async unitFailure(unit: string, result = ''): Promise<StepError> {
    const command = `journalctl --unit=${quoteForShell(unit)} --lines=15 --no-pager --output=cat`
    const { stdout } = await this.execute(command)
    return new StepError(`unit ${unit} of ${this.node.name} failed: ${result}`, {
      output: lastLines(stdout),
      command: `make ssh-${this.node.name}, then: ${command}`,
    })
  }
}

function lastLines(text: string, count = 15): string {
  return text.trim().split('\n').slice(-count).join('\n')
}
