// The error that a user can meet and how it is printed: the reason first, then output, command,
// hint and log.
import { ProcessOutput } from 'zx/core'
import { knownProblem } from './problems.mts'

/** What is printed below the reason. All of it is shown to the user: no secrets in it. */
export interface Explanation {
  /** The command that failed, fit to paste. */
  command?: string
  /** What to do about it. Never something that loses data for a harmless cause. */
  hint?: string
  /** Path of the log with more details. */
  log?: string
  /** Last lines of a console or of a command's output. */
  output?: string
  /** Exit status of the script; 1 by default. */
  exitCode?: number
  cause?: unknown
}

/** A step that failed, explained to the user. */
export class StepError extends Error {
  override readonly name: string = 'StepError'
  readonly explanation: Explanation

  constructor(reason: string, explanation: Explanation = {}) {
    super(reason, { cause: explanation.cause })
    this.explanation = explanation
  }
}

// zx does not keep the command in its error. script() notes those that failed, by their duration.
const failed: { command: string; duration: number }[] = []

/** Notes a command that failed, for the error that may be printed. */
export function noteFailure(command: string, duration: number): void {
  failed.push({ command, duration })
  if (failed.length > 20) failed.shift()
}

/** The command of a zx error, as it could be pasted; empty if it is not known. */
export function commandOf({ duration }: ProcessOutput): string {
  return (failed.findLast((one) => one.duration === duration) ?? failed.at(-1))?.command ?? ''
}

/** The last lines of a text, without blank ones at its end. */
export function lastLines(text: string, count = 15): string {
  return text.trim().split('\n').slice(-count).join('\n')
}

/** System errors by their code, in words. */
const systemErrors: Readonly<Record<string, string>> = {
  EACCES: 'permission denied (was it created by root?)',
  EPERM: 'operation not permitted',
  EROFS: 'the file system is read-only',
  ENOSPC: 'the disk is full',
  EDQUOT: 'the disk quota is used up',
  EMFILE: 'too many open files (ulimit -n)',
  ENOTDIR: 'a part of the path is not a folder',
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

/** Reason and explanation of any error; those of a failed command by the table of known problems. */
export function explain(error: unknown): { reason: string; explanation: Explanation } {
  if (error instanceof StepError) return { reason: error.message, explanation: error.explanation }
  if (error instanceof ProcessOutput) {
    const command = commandOf(error)
    const output = lastLines(error.stderr.trim() || error.stdout)
    const known = knownProblem(command, error.stderr)
    const program = command.match(/^\S+/)?.[0] ?? 'a command'
    const end = error.signal
      ? `was ended by ${error.signal}`
      : `failed (exit status ${error.exitCode})`
    return {
      reason: known?.reason ?? `${program} ${end}`,
      explanation: { output, command, ...(known?.hint ? { hint: known.hint } : {}) },
    }
  }
  if (!(error instanceof Error)) return { reason: String(error), explanation: {} }
  const { code = '', path } = error as NodeJS.ErrnoException
  const words = systemErrors[code]
  return { reason: words && path ? `${path}: ${words}` : error.message, explanation: {} }
}

function indent(text: string, first: string, rest = first): string {
  return text
    .split('\n')
    .map((line, index) => (index === 0 ? first : rest) + line)
    .join('\n')
}
