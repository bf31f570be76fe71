// Whether a machine's clock is right. Every certificate and token has a time; on a machine that has
// another one, none is valid, and what fails says everything but that.
import type { Probe } from './probe.mts'

/** How many seconds a machine's clock is ahead of this computer's; below 0: behind. */
export const clockProbe: Probe<number> = {
  command: 'date +%s',
  read: (output) => Number(output) - Math.round(Date.now() / 1000),
}

/** A slow machine answers late; certificates take less notice than this. In seconds. */
const tolerance = 300

/** "the clock of alpha is 730 days ahead of this computer's"; empty if it is near enough. */
export function clockTrouble(name: string, ahead: number): string {
  const off = Math.abs(ahead)
  if (off <= tolerance) return ''
  const time =
    off < 2 * 86_400 ? `${Math.round(off / 60)} minutes` : `${Math.round(off / 86_400)} days`
  return `the clock of ${name} is ${time} ${ahead > 0 ? 'ahead of' : 'behind'} this computer's`
}
