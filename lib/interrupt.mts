// Ctrl-C and SIGTERM as an AbortSignal, so that a step in the middle of something can undo it.
import { constants } from 'node:os'
import { StepError } from './step-error.mts'

const patience = 30_000
let controller: AbortController | undefined
/** How many are at work on what must not be cut off. */
let unhurried = 0

/**
 * The signal that Ctrl-C and SIGTERM abort. Whoever takes it promises to stop soon, clean up and
 * let the error pass; the process then ends with the shell's status for that signal (130, 143).
 * A second Ctrl-C, or 30 seconds without `takingTime`, end it without waiting.
 */
export function interruption(): AbortSignal {
  if (!controller) {
    controller = new AbortController()
    process.on('SIGINT', stop)
    process.on('SIGTERM', stop)
  }
  return controller.signal
}

/** Work that undoes something, and has as long as it takes: half undone would be worse. */
export async function takingTime<T>(work: () => Promise<T>): Promise<T> {
  unhurried += 1
  try {
    return await work()
  } finally {
    unhurried -= 1
  }
}

function stop(signal: 'SIGINT' | 'SIGTERM'): void {
  const exitCode = 128 + constants.signals[signal]
  if (controller?.signal.aborted) process.exit(exitCode)
  controller?.abort(new StepError(`interrupted by ${signal}`, { exitCode }))
  const end = () => {
    if (unhurried === 0) process.exit(exitCode)
    setTimeout(end, patience).unref()
  }
  setTimeout(end, patience).unref()
}
