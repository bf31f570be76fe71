// Checks that run one after the other, all of them, whatever fails; then their sum.
import { describeError, StepError } from '../../lib/errors.mts'
import { step } from '../../lib/steps.mts'

export class CheckList {
  private readonly failed: string[] = []
  private passed = 0
  private readonly signal: AbortSignal

  /** @param signal ends all of it: it is not the failure of the check that it interrupts */
  constructor(signal: AbortSignal) {
    this.signal = signal
  }

  /** Runs a check and shows it as a line. @param work passes unless it throws; may return a detail */
  async check(name: string, work: () => Promise<string | undefined>): Promise<void> {
    try {
      await step(name, async (detail) => detail((await work()) ?? ''))
      this.passed += 1
    } catch (error) {
      this.signal.throwIfAborted()
      console.error(describeError(error).replace(/^/gm, '    '))
      this.failed.push(name)
    }
  }

  /** Prints the sum. @throws StepError with the checks that failed */
  assertPassed(): void {
    console.error(`${this.passed} passed, ${this.failed.length} failed`)
    if (this.failed.length === 0) return
    const output = this.failed.join('\n')
    throw new StepError(`${this.failed.length} checks failed`, { output })
  }
}
