// A new configuration on a running machine: pushed as a whole, switched to, and taken back if the
// machine is not well with it.

import { describeError, StepError } from '../errors.mts'
import { isReady, waitForReady } from '../kubernetes/wait-for-node.mts'
import { runLong } from '../machine/long-command.mts'
import type { Machine } from '../machine/machine.mts'
import { waitForServices } from '../machine/wait-for-services.mts'
import type { Row } from '../steps.mts'
import { confirmPush, push, pushFolder, putFormerBack } from './push.mts'

interface Options {
  /** Seconds for services and node; the switch has INSTALL_TIMEOUT, as it may have to download. */
  timeout: number
  row: Row
  /** When aborted, the machine is left to go on by itself. */
  signal: AbortSignal
}

/**
 * Makes a machine run its staged configuration, and waits until its services are well and, if it
 * was before, the node is Ready. If it does not get there, it is given its former configuration.
 *
 * @returns the units that were restarted or started
 * @throws StepError that says what the machine is left with
 */
export async function reconfigure(machine: Machine, options: Options): Promise<string[]> {
  const { cluster, node } = machine
  const { row, signal } = options
  const wasReady = node.role === 'worker' && (await isReady(cluster, node))
  row.step('pushing')
  await push(machine)
  try {
    const units = await switchTo(machine, options)
    if (wasReady) {
      row.step('waiting for Ready')
      await waitForReady(cluster, node, { ...options, detail: (text) => row.detail(text) })
    }
    await confirmPush(machine)
    return units
  } catch (error) {
    if (signal.aborted) throw leftAlone(machine, error)
    row.step('taking the former configuration back')
    throw await takeBack(machine, error, options)
  }
}

/**
 * Switches to what /etc/nixos on the machine says, and waits until the services are well.
 *
 * @returns the units that were restarted or started, as NixOS says
 * @throws StepError with what nixos-rebuild said, or what is not well
 */
export async function switchTo(machine: Machine, options: Options): Promise<string[]> {
  const { cluster, node } = machine
  const { timeout, row, signal } = options
  row.step('nixos-rebuild switch')
  const { status, lines } = await runLong(machine, 'nixos-rebuild switch', {
    folder: pushFolder,
    timeout: cluster.settings.INSTALL_TIMEOUT,
    row,
    signal,
  })
  const failure = (reason: string) =>
    new StepError(reason, { command: 'nixos-rebuild switch', output: lines.slice(-15).join('\n') })
  // 4: some unit was not well at that moment; it may be between two attempts, as the scheduler is
  // when the API server has just been restarted.
  if (status !== 0 && status !== 4) {
    throw failure(`nixos-rebuild switch failed on ${node.name} (status ${status})`)
  }
  row.step('waiting for services')
  await waitForServices(machine, { timeout, detail: (text) => row.detail(text), signal })
  const { failedUnits } = await machine.systemState()
  if (status === 4 && failedUnits.length > 0) {
    throw failure(`failed on ${node.name}: ${failedUnits.join(', ')}`)
  }
  return unitsIn(lines)
}

/** @returns the error to throw: what failed, and whether the machine has its former configuration */
async function takeBack(machine: Machine, error: unknown, options: Options): Promise<StepError> {
  const { node } = machine
  try {
    await putFormerBack(machine)
    await switchTo(machine, options)
    await confirmPush(machine)
    return new StepError(`${node.name} was not well, and has its former configuration again`, {
      output: describeError(error),
      cause: error,
    })
  } catch (second) {
    return new StepError(`${node.name} is not well, nor with its former configuration`, {
      output: [error, second].map((reason) => describeError(reason)).join('\n'),
      hint: `the former files are kept on it in ${pushFolder}/former; make reconfig pushes again`,
      cause: second,
    })
  }
}

function leftAlone({ node }: Machine, error: unknown): StepError {
  return new StepError(`interrupted: ${node.name} goes on with its change by itself`, {
    ...(error instanceof StepError ? error.explanation : {}),
    hint: 'make reconfig again looks how it ended, and finishes it',
  })
}

/** The units that NixOS says it (re)started. */
function unitsIn(lines: readonly string[]): string[] {
  const units = lines.flatMap((line) => {
    const [, list] = line.match(/^(?:re)?starting the following units: (.*)$/) ?? []
    return list?.split(', ') ?? []
  })
  return [...new Set(units)].map((unit) => unit.replace(/\.service$/, '')).sort()
}
