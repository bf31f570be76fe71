// Waiting for something that the cluster does by itself, with what is still missing shown.
import { setTimeout as sleep } from 'node:timers/promises'
import { type Explanation, StepError } from './step-error.mts'

interface Wait extends Pick<Explanation, 'command' | 'hint'> {
  /** Begins the error: "no numbers" becomes "no numbers after 300 s". */
  failure: string
  /** Seconds. */
  timeout: number
  /** Is told the first line of what is missing, each time. */
  detail?: (text: string) => void
}

/**
 * Looks every second until nothing is missing any more.
 *
 * @param look says what is missing, undefined when nothing is; what it throws ends the wait
 * @throws StepError with what was missing last
 */
export async function waitFor(
  { failure, timeout, detail, ...explanation }: Wait,
  look: () => Promise<string | undefined>,
): Promise<void> {
  const deadline = performance.now() + timeout * 1000
  for (;;) {
    const missing = await look()
    if (missing === undefined) return
    if (performance.now() > deadline) {
      throw new StepError(`${failure} after ${timeout} s`, { output: missing, ...explanation })
    }
    detail?.(missing.split('\n')[0] ?? '')
    await sleep(1000)
  }
}
