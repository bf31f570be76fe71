// Ctrl-C and SIGTERM as an AbortSignal, so that a step in the middle of something can undo it.
import { constants } from 'node:os'
import { StepError } from './step-error.mts'

const patience = 30_000
let controller: AbortController | undefined

/**
 * The signal that Ctrl-C and SIGTERM abort. Whoever takes it promises to stop soon, clean up and
 * let the error pass; the process then ends with the shell's status for that signal (130, 143).
 * A second Ctrl-C, or 30 seconds, end it without waiting.
 */
export function interruption(): AbortSignal {
  if (!controller) {
    controller = new AbortController()
    process.on('SIGINT', stop)
    process.on('SIGTERM', stop)
  }
  return controller.signal
}

function stop(signal: 'SIGINT' | 'SIGTERM'): void {
  const exitCode = 128 + constants.signals[signal]
  if (controller?.signal.aborted) process.exit(exitCode)
  controller?.abort(new StepError(`interrupted by ${signal}`, { exitCode }))
  setTimeout(() => process.exit(exitCode), patience).unref()
}
