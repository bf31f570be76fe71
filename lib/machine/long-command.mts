// A command of minutes on a machine: it goes on when the connection does not, and its lines are
// shown as they come.
import { setTimeout as sleep } from 'node:timers/promises'
import { StepError } from '../errors.mts'
import { isRunning } from '../qemu/vm.mts'
import type { Row } from '../steps.mts'
import type { Machine } from './machine.mts'
import { onMachine } from './on-machine.mts'
import { NoAnswer } from './ssh.mts'

/** How a long command ended. */
export interface Ended {
  status: number
  /** The last lines, up to 200, that it wrote to both outputs. */
  lines: string[]
}

/**
 * Runs shell text on a machine to its end, as root, in bash with `set -euo pipefail`.
 *
 * @param options.folder on the machine, for lock, log and status: one command at a time in each
 * @param options.timeout seconds
 * @param options.signal ends the wait; the command goes on
 * @throws StepError if it does not come to its end: the machine is switched off, or starts anew, or
 *   the time is over
 */
export async function runLong(
  machine: Machine,
  command: string,
  options: { folder: string; timeout: number; row: Pick<Row, 'detail'>; signal: AbortSignal },
): Promise<Ended> {
  const { cluster, node } = machine
  const { folder, timeout, row, signal } = options
  const start = onMachine('long-start', { FOLDER: folder, COMMAND: command })
  const look = onMachine('long-status', { FOLDER: folder })
  const boot = (await machine.succeed(start)).trim()
  for (const began = performance.now(); ; await sleep(1000)) {
    signal.throwIfAborted()
    const failure = (reason: string, lines: string[] = []) =>
      new StepError(reason, { output: lines.slice(-15).join('\n') })
    if (!(await isRunning(cluster, node))) {
      throw failure(`${node.name} was switched off in the middle of a change`)
    }
    if (performance.now() - began > timeout * 1000) {
      throw failure(`a command on ${node.name} took longer than ${timeout} s`)
    }
    const answer = await machine.succeed(look).catch((error) => {
      // Its network, or sshd, may be starting anew.
      if (error instanceof NoAnswer) return undefined
      throw error
    })
    if (answer === undefined) continue
    const [bootNow, state = '', ...lines] = answer.trimEnd().split('\n')
    if (bootNow !== boot)
      throw failure(`${node.name} started anew in the middle of a change`, lines)
    if (/^\d+$/.test(state)) return { status: Number(state), lines }
    if (state !== 'running') throw failure(`a command on ${node.name} was ${state}`, lines)
    row.detail(lines.at(-1) ?? '')
  }
}
