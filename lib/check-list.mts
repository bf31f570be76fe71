// Checks done one after the other, all of them, whatever fails; then a sum.
import { describeError, StepError } from './errors.mts'
import { formatDuration } from './format.mts'
import { step } from './steps.mts'

export interface Result {
  name: string
  result: 'passed' | 'failed' | 'skipped'
  /** Why it failed or was skipped; what a passing check has to say. */
  detail: string
  seconds: number
}

export class CheckList {
  readonly results: Result[] = []
  private readonly signal: AbortSignal | undefined

  /** @param signal ends it all: no failure of the check that it meets */
  constructor(signal?: AbortSignal) {
    this.signal = signal
  }

  /**
   * Does a check and shows it as a line.
   *
   * @param skip why there is nothing to check, if so
   * @param work passes unless it throws; a text that it returns is noted
   * @returns whether it passed
   */
  async check(
    name: string,
    { skip }: { skip?: string | false },
    work: () => Promise<unknown>,
  ): Promise<boolean> {
    const began = performance.now()
    const note = (result: Result['result'], detail: string) => {
      const seconds = Math.round((performance.now() - began) / 100) / 10
      this.results.push({ name, result, detail, seconds })
      return result === 'passed'
    }
    if (skip) {
      console.error(`- ${name}: skipped, ${skip}`)
      return note('skipped', skip)
    }
    try {
      const said = await step(name, work)
      return note('passed', typeof said === 'string' ? said : '')
    } catch (error) {
      this.signal?.throwIfAborted()
      const reason = describeError(error)
      console.error(reason.replace(/^/gm, '    '))
      return note('failed', reason)
    }
  }

  /** "12 passed, 1 failed, 1 skipped (34.5s)". */
  summary(): string {
    const count = (wanted: Result['result']) =>
      this.results.filter(({ result }) => result === wanted).length
    const seconds = this.results.reduce((sum, result) => sum + result.seconds, 0)
    const parts = (['passed', 'failed', 'skipped'] as const).map((r) => `${count(r)} ${r}`)
    return `${parts.join(', ')} (${formatDuration(seconds * 1000)})`
  }

  /** @throws StepError if a check failed */
  assertPassed(): void {
    const failed = this.results.filter(({ result }) => result === 'failed')
    if (failed.length === 0) return
    throw new StepError(`${failed.length} of ${this.results.length} checks failed`, {
      output: failed.map(({ name }) => name).join('\n'),
      hint: 'make status, make logs',
    })
  }
}
