// The serial console, images/NODE-console.log: what a machine printed last, and a failed boot.
import { createReadStream } from 'node:fs'
import { stat } from 'node:fs/promises'
import { text } from 'node:stream/consumers'
import { plainText } from './terminal.mts'

/** Lines of a machine that will never answer, however long one waits. */
export const bootFailures = [
  { pattern: /Kernel panic - not syncing.*/, reason: 'the kernel panicked' },
  // The initrd of NixOS before 26.05.
  { pattern: /An error occurred in stage 1 of the boot.*/, reason: 'the boot failed' },
  { pattern: /Timed out waiting for device.*/, reason: 'the boot failed' },
  { pattern: /Cannot open access to console.*/, reason: 'the boot failed' },
  { pattern: /(You are in|Entering) (emergency|rescue) mode.*/, reason: 'the boot failed' },
]
/** The firmware's first line: a machine that restarts after a panic begins again. */
const bootStart = /BdsDxe: (loading|starting) Boot/

// Far more than follows a panic: with panic=5 and -no-reboot QEMU ends soon after it.
const tailBytes = 128 * 1024

/** The last lines of a console log that are not blank, without control sequences, oldest first. */
export async function lastConsoleLines(path: string, count = 15): Promise<string[]> {
  const { size } = await stat(path).catch(() => ({ size: 0 }))
  if (size === 0) return []
  const start = Math.max(0, size - tailBytes)
  const raw = await text(createReadStream(path, { start }))
  // Of a line that was overwritten, only the text that came last could still be read.
  const lines = plainText(raw.replace(/\r+\n/g, '\n').replace(/^.*\r/gm, '')).split('\n')
  // The first line of a part is half a line.
  const whole = lines.slice(start > 0 ? 1 : 0)
  return whole.filter((line) => line.trim() !== '').slice(-count)
}

/** The line with which the present boot failed; undefined if none did so far. */
export async function findBootFailure(path: string): Promise<string | undefined> {
  const lines = await lastConsoleLines(path, tailBytes)
  const boot = lines.slice(lines.findLastIndex((line) => bootStart.test(line)) + 1)
  return boot.flatMap((line) =>
    bootFailures.flatMap(({ pattern }) => line.match(pattern)?.[0] ?? []),
  )[0]
}
