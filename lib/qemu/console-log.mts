// The serial console that QEMU writes to images/NODE-console.log: what a machine said last, and
// whether it said that its boot has come to an end.
import { open } from 'node:fs/promises'
import { plainText } from '../installer/terminal-text.mts'

/** What stands on the console of a machine that will never answer, however long one waits. */
const deadEnds = [
  /Kernel panic - not syncing.*/,
  /An error occurred in stage 1 of the boot process.*/,
  /You are in (emergency|rescue) mode.*/,
  /Entering emergency mode.*/,
]

// Far more than follows a panic: with panic=5 and -no-reboot QEMU ends soon after it.
const tailBytes = 128 * 1024

/**
 * The last lines of a console log that are not empty, as text without control sequences.
 *
 * @returns oldest first; none if there is no log yet
 */
export async function lastConsoleLines(path: string, count = 15): Promise<string[]> {
  return (await tailOf(path)).slice(-count)
}

/** The line with which the boot came to an end; undefined while all may yet be well. */
export async function findBootFailure(path: string): Promise<string | undefined> {
  for (const line of await tailOf(path)) {
    for (const pattern of deadEnds) {
      const match = line.match(pattern)
      if (match) return match[0]
    }
  }
  return undefined
}

async function tailOf(path: string): Promise<string[]> {
  const file = await open(path).catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT') return undefined
    throw error
  })
  if (!file) return []
  try {
    const { size } = await file.stat()
    const length = Math.min(size, tailBytes)
    const { buffer, bytesRead } = await file.read(Buffer.alloc(length), 0, length, size - length)
    const lines = readable(buffer.toString('utf8', 0, bytesRead)).split('\n')
    // The first line of a part is half a line.
    return lines.slice(size > length ? 1 : 0).filter((line) => line.trim() !== '')
  } finally {
    await file.close()
  }
}

/** What could still be read: of a line that was written over, the text that came last. */
function readable(raw: string): string {
  return plainText(raw.replace(/\r+\n/g, '\n').replace(/^.*\r/gm, ''))
}
