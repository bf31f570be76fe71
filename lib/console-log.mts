// The serial console that QEMU writes to images/NODE-console.log: what a machine printed last, and
// whether its boot has failed.
import { open } from 'node:fs/promises'
import { plainText } from './terminal.mts'

/** Lines of a machine that will never answer, however long one waits. */
const bootFailures = [
  /Kernel panic - not syncing.*/,
  /An error occurred in stage 1 of the boot process.*/, // the initrd of NixOS before 26.05
  /Timed out waiting for device.*/,
  /Cannot open access to console, the root account is locked.*/,
  /You are in (emergency|rescue) mode.*/,
  /Entering emergency mode.*/,
]
/** The firmware's first line: a machine that restarts after a panic begins again. */
const bootStart = /BdsDxe: (loading|starting) Boot/

// Far more than follows a panic: with panic=5 and -no-reboot QEMU ends soon after it.
const tailBytes = 128 * 1024

/**
 * The last lines of a console log that are not blank, as text without control sequences.
 *
 * @returns oldest first; none if there is no log yet
 */
export async function lastConsoleLines(path: string, count = 15): Promise<string[]> {
  return (await tailOf(path)).slice(-count)
}

/** The line with which the present boot failed; undefined if none did so far. */
export async function findBootFailure(path: string): Promise<string | undefined> {
  const lines = await tailOf(path)
  const boot = lines.slice(lines.findLastIndex((line) => bootStart.test(line)) + 1)
  const failed = boot.flatMap((line) =>
    bootFailures.flatMap((pattern) => line.match(pattern)?.[0] ?? []),
  )
  return failed[0]
}

async function tailOf(path: string): Promise<string[]> {
  const file = await open(path).catch((error: NodeJS.ErrnoException) => {
    if (error.code !== 'ENOENT') throw error
  })
  if (!file) return []
  const { size } = await file.stat()
  const start = Math.max(0, size - tailBytes)
  const { buffer, bytesRead } = await file.read({
    buffer: Buffer.alloc(tailBytes),
    position: start,
  })
  await file.close()
  // Of a line that was overwritten, only the text that came last could still be read.
  const raw = buffer.toString('utf8', 0, bytesRead).replace(/\r+\n/g, '\n').replace(/^.*\r/gm, '')
  // The first line of a part is half a line.
  const lines = plainText(raw)
    .split('\n')
    .slice(start > 0 ? 1 : 0)
  return lines.filter((line) => line.trim() !== '')
}
