// Waiting: one polling loop, with what is still missing shown and named when it gives up.
import { setTimeout as sleep } from 'node:timers/promises'
import { busyApiServer, type Explanation, explain, StepError } from './errors.mts'

export interface WaitLimits {
  timeout: number // seconds
  /** Gets the first line of what is missing, after each attempt. */
  detail?: ((text: string) => void) | undefined
  /** Ends the wait with its reason. */
  signal?: AbortSignal | undefined
}

interface Wait extends WaitLimits, Pick<Explanation, 'command' | 'hint' | 'log'> {
  /** The beginning of the error: "no metrics" gives "no metrics after 300 s". */
  failure: string
  /** Milliseconds between two attempts, at least; 1000 by default. */
  every?: number
}

let [awake, last] = [0, performance.now()]
setInterval(awakeTime, 1000).unref()

/** Milliseconds for which this computer was awake. (On macOS, clocks and timers go on in its sleep.) */
export function awakeTime(): number {
  const now = performance.now()
  awake += Math.min(now - last, 2000)
  last = now
  return awake
}

/**
 * Polls until nothing is missing any more.
 * @param look returns what is missing, undefined when nothing is; an exception ends the wait, unless
 *   it says that the API server is busy
 * @throws StepError with what was missing last; the signal's reason
 */
export async function waitFor(
  { failure, timeout, detail, signal, every = 1000, ...explanation }: Wait,
  look: () => Promise<string | undefined>,
): Promise<void> {
  const deadline = awakeTime() + timeout * 1000
  for (;;) {
    signal?.throwIfAborted()
    const began = awakeTime()
    const missing = await look().catch((error) => {
      if (explain(error).reason === busyApiServer) return busyApiServer
      throw error
    })
    if (missing === undefined) return
    const now = awakeTime()
    if (now > deadline) {
      throw new StepError(`${failure} after ${timeout} s`, { output: missing, ...explanation })
    }
    detail?.(missing.split('\n')[0] ?? '')
    // If a look takes long, the pause is as long: looking must not keep the computer busy.
    const pause = Math.max(every, Math.min(now - began, 5000))
    await sleep(pause, undefined, signal ? { signal } : {}).catch(() => {})
  }
}

/** Polls every 100 ms until a condition holds: whether it did in time. Throws the signal's reason. */
export async function becomes(
  condition: () => boolean | Promise<boolean>,
  seconds: number,
  signal?: AbortSignal,
): Promise<boolean> {
  const deadline = awakeTime() + seconds * 1000
  for (;;) {
    signal?.throwIfAborted()
    if (await condition()) return true
    if (awakeTime() > deadline) return false
    await sleep(100)
  }
}
