// The error that a user can meet, and how it is told: reason first, then command, hint and log.
import { $, log, ProcessOutput } from 'zx/core'

/** What stands below the reason. All of it is shown to the user, so no secrets in it. */
export interface Explanation {
  /** The command that failed, as one would type it. */
  command?: string
  /** What to do about it. */
  hint?: string
  /** Where more stands. */
  log?: string
  /** Last lines of a console or of a command's output. */
  output?: string
  /** Exit status of the script; 1 unless said. */
  exitCode?: number
  cause?: unknown
}

/** A step that could not be done, told in words that help. */
export class StepError extends Error {
  override readonly name = 'StepError'
  readonly explanation: Explanation

  constructor(reason: string, explanation: Explanation = {}) {
    super(reason, { cause: explanation.cause })
    this.explanation = explanation
  }
}

// zx does not say in its error which command it was; its log does.
const running = new Map<string, string>()
let lastFailedCommand: string | undefined
$.log = (entry) => {
  if (entry.kind === 'cmd') running.set(entry.id, entry.cmd)
  if (entry.kind === 'end') {
    if (entry.exitCode !== 0) lastFailedCommand = running.get(entry.id)
    running.delete(entry.id)
  }
  log(entry)
}

/**
 * An error as lines for a person.
 *
 * @param verbose with the stack, and those of its causes
 */
export function describeError(error: unknown, verbose = false): string {
  const { reason, explanation } = explain(error)
  const lines = [reason]
  if (explanation.output) lines.push(indent(explanation.output, '  | '))
  if (explanation.command) lines.push(`  command: ${explanation.command}`)
  if (explanation.hint) lines.push(indent(explanation.hint, '  hint:    ', '           '))
  if (explanation.log) lines.push(`  log:     ${explanation.log}`)
  for (let cause = error; verbose && cause instanceof Error; cause = cause.cause) {
    lines.push(cause.stack ?? String(cause))
  }
  return lines.join('\n')
}

function explain(error: unknown): { reason: string; explanation: Explanation } {
  if (error instanceof StepError) {
    return { reason: error.message, explanation: error.explanation }
  }
  if (error instanceof ProcessOutput) {
    const output = (error.stderr.trim() || error.stdout.trim()).split('\n').slice(-15).join('\n')
    const end = error.signal
      ? `was ended by ${error.signal}`
      : `ended with status ${error.exitCode}`
    return { reason: `a command ${end}`, explanation: { output, command: lastFailedCommand } }
  }
  if (error instanceof Error) return { reason: error.message, explanation: {} }
  return { reason: String(error), explanation: {} }
}

function indent(text: string, first: string, rest = first): string {
  return text
    .split('\n')
    .map((line, index) => (index === 0 ? first : rest) + line)
    .join('\n')
}
