// Ctrl-C, SIGTERM and SIGHUP: an AbortSignal for a step with something to undo, else the end.
import { spawn } from 'node:child_process'
import { constants } from 'node:os'
import { StepError } from './errors.mts'

const signals = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const
const isMac = process.platform === 'darwin'
const gracePeriod = 30_000
let controller: AbortController | undefined
let endCommands = () => {}
let undoing = 0

/** Without `interruption`, a signal ends the script and, by `end`, the commands that it is running. */
export function handleSignals(end: () => void): void {
  endCommands = end
  for (const signal of signals) process.off(signal, stop).on(signal, stop)
}

/** Nobody reads the output any more (`| head`): no error. A short change is completed (`busy`). */
export function outputClosed(busy: boolean): void {
  if (controller) return void stop('SIGHUP')
  if (busy) return
  endCommands()
  process.exit(0)
}

/**
 * The signal that Ctrl-C, SIGTERM and SIGHUP abort. The caller must then stop soon, clean up and let
 * the error pass; the process ends with the shell's status for that signal (130, 143, 129). A second
 * Ctrl-C, or 30 seconds outside of `takingTime`, end it without waiting.
 * @param awake keep this computer awake until this process ends
 */
export function interruption(awake = true): AbortSignal {
  if (!controller) {
    controller = new AbortController()
    handleSignals(endCommands)
    // Such scripts run for long. One that another script runs leaves it to that.
    if (awake && process.env.CLUSTER_LOCKS === undefined) stayAwake()
  }
  return controller.signal
}

/** Keeps this computer awake until this process ends, where the system has a program for it. */
function stayAwake(): void {
  const wait = ['tail', '-f', '/dev/null', `--pid=${process.pid}`]
  const args = isMac ? ['-i', '-w', `${process.pid}`] : ['--what=idle:sleep', ...wait]
  const program = isMac ? 'caffeinate' : 'systemd-inhibit'
  spawn(program, args, { detached: true, stdio: 'ignore' })
    .on('error', () => {})
    .unref()
}

/** The reason of an interruption; undefined if there was none. */
export function interrupted(): Error | undefined {
  return controller?.signal.aborted ? (controller.signal.reason as Error) : undefined
}

/** Runs work that undoes something: after Ctrl-C it may take as long as it needs. */
export async function takingTime<T>(work: () => Promise<T>): Promise<T> {
  undoing += 1
  try {
    return await work()
  } finally {
    undoing -= 1
  }
}

function stop(signal: (typeof signals)[number]): void {
  // Only Ctrl-C is repeated on purpose; the other two may arrive several times for one reason.
  if (signal !== 'SIGINT' && controller?.signal.aborted) return
  const exitCode = 128 + constants.signals[signal]
  if (!controller || controller.signal.aborted) {
    endCommands()
    process.exit(exitCode)
  }
  controller.abort(new StepError(`interrupted by ${signal}`, { exitCode }))
  setInterval(() => undoing === 0 && process.exit(exitCode), gracePeriod).unref()
}
