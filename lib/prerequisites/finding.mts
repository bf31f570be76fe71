// What a check of this computer found.

import { StepError } from '../errors.mts'
import type { Prerequisite } from './prerequisites.mts'

export interface Finding {
  name: string
  found: string
  wanted: string
  /** A `warning` works, slowly or perhaps; `missing` can be installed; a `problem` cannot. */
  state: 'ok' | 'warning' | 'missing' | 'problem'
  /** What is wrong and what to do about it; nothing where all is well. */
  advice?: string
  /** What would have to be installed. */
  prerequisite?: Prerequisite
}

/** A finding out of the error that a step would meet. @throws what is no StepError */
export function problem(name: string, found: string, wanted: string, error: unknown): Finding {
  if (!(error instanceof StepError)) throw error
  const { output, hint } = error.explanation
  const advice = [error.message, output, hint].filter(Boolean).join('\n')
  return { name, found, wanted, state: 'problem', advice }
}
