// How far a transfer is: a bar with rate and time left on a terminal, a line now and then elsewhere.
import { formatBytes } from '../format.mts'
import type { Progress } from './download.mts'

const width = 10
/** The rate is that of the last seconds: it follows a network that slows down. */
const window = 5000

/** The rate of a growing amount, over the last five seconds. */
export class RateMeter {
  private samples: { time: number; bytes: number }[] = []

  /** @param time milliseconds of any clock */
  add(bytes: number, time: number): void {
    // A restart from the beginning is not a negative rate.
    if (bytes < (this.samples.at(-1)?.bytes ?? 0)) this.samples = []
    this.samples.push({ time, bytes })
    while ((this.samples[1]?.time ?? time) < time - window) this.samples.shift()
  }

  /** Bytes a second; undefined until there is something to tell it from. */
  rate(): number | undefined {
    const [first, last] = [this.samples[0], this.samples.at(-1)]
    // Two samples close together tell of buffers, not of the network.
    if (!first || !last || last.time - first.time < 200) return undefined
    return ((last.bytes - first.bytes) * 1000) / (last.time - first.time)
  }
}

/** "████░░░░░░ 43 % of 1.5 GB, 23 MB/s, 37s left": as much of it as is known. */
export function progressText({ received, total, verifying }: Progress, rate?: number): string {
  if (verifying) return `${formatBytes(received)}, verifying`
  const parts: string[] = []
  if (total) {
    const share = Math.min(received / total, 1)
    const bar = '█'.repeat(Math.floor(share * width)).padEnd(width, '░')
    parts.push(`${bar} ${Math.floor(share * 100)} % of ${formatBytes(total)}`)
  } else {
    parts.push(formatBytes(received))
  }
  if (rate) parts.push(`${formatBytes(rate)}/s`)
  if (rate && total) parts.push(`${timeLeft((total - received) / rate)} left`)
  return parts.join(', ')
}

/**
 * A listener for a download's progress.
 *
 * @param detail takes each text on a terminal
 * @param line takes a text at every tenth (or every 100 MB) elsewhere; undefined: a terminal
 */
export function progressListener(
  detail: (text: string) => void,
  line?: (text: string) => void,
): (progress: Progress) => void {
  const meter = new RateMeter()
  let told: number | undefined
  return (progress) => {
    meter.add(progress.received, performance.now())
    const text = progressText(progress, meter.rate())
    if (!line) return detail(text)
    const stage = progress.verifying
      ? Number.POSITIVE_INFINITY
      : Math.floor(progress.received / (progress.total ? progress.total / 10 : 100e6))
    if (stage === told) return
    // The first piece only says where it begins.
    if (told !== undefined || progress.verifying) line(text)
    told = stage
  }
}

function timeLeft(seconds: number): string {
  if (seconds < 60) return `${Math.ceil(seconds)}s`
  const minutes = Math.floor(seconds / 60)
  if (minutes < 60) return `${minutes}m ${String(Math.floor(seconds % 60)).padStart(2, '0')}s`
  return `${Math.floor(minutes / 60)}h ${String(minutes % 60).padStart(2, '0')}m`
}
