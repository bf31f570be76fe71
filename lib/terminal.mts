// A terminal's output as plain text, without colors, titles and cursor movement; and as a file.
import { appendFileSync } from 'node:fs'

// biome-ignore-start lint/suspicious/noControlCharactersInRegex: control characters are the subject
/**
 * The sequences of ECMA-48 and xterm, most specific first: titles and systemd's context marks
 * (OSC, ended by BEL or ESC \, never across a line in case the end is lost), queries (DCS and the
 * like), CSI with any parameter bytes (colors, `[?2004h`), two-byte escapes; then \r, NUL, BEL.
 */
const sequences =
  /\x1b\][^\x07\x1b\n]{0,4096}(?:\x07|\x1b\\)|\x1b[PX^_][^\x1b\n]{0,4096}\x1b\\|\x1b\[[0-?]*[ -/]*[@-~]|\x1b[ -/]*[0-OQ-WYZ\\`-~]|[\r\0\x07]/g

/** The beginning of a sequence whose end may not have arrived yet. */
const unfinished =
  /\x1b(?:\][^\x07\x1b\n]{0,4096}\x1b?|[PX^_][^\x1b\n]{0,4096}\x1b?|\[[0-?]*[ -/]*|[ -/]*)$/
// biome-ignore-end lint/suspicious/noControlCharactersInRegex: -

/** Text without terminal sequences and carriage returns; lines end in \n alone. */
export function plainText(raw: string): string {
  return raw.replace(sequences, '')
}

/** Plain text of a stream, whose pieces may end in the middle of a sequence. */
export class PlainTextStream {
  private rest = ''

  /** The plain text that is complete with this piece. */
  push(piece: string): string {
    const raw = this.rest + piece
    const end = raw.match(unfinished)?.index ?? raw.length
    this.rest = raw.slice(end)
    return plainText(raw.slice(0, end))
  }
}

/** What a program wrote: all of it in a file, the end of it in memory for error messages. */
export class Transcript {
  recording = true // false: what is added is neither written nor kept (secrets)
  readonly path: string | undefined
  private readonly hidden: RegExp | undefined
  private end = ''

  /** @param hidden lines that `lastLines` leaves out */
  constructor(path?: string, hidden?: RegExp) {
    this.path = path
    this.hidden = hidden
  }

  /** Adds program output. */
  add(text: string): void {
    if (!this.recording) return
    this.end = (this.end + text).slice(-16 * 1024)
    this.note(text)
  }

  /** Adds a line of our own, which does not count as output. */
  note(text: string): void {
    // At once: it is needed most when this process dies. 0600: a console may show anything.
    if (this.path) appendFileSync(this.path, text, { mode: 0o600 })
  }

  /** The last lines, oldest first, without blank ones. */
  lastLines(count = 10): string {
    const shown = (line: string) => line.trim() !== '' && !this.hidden?.test(line)
    return this.end.split('\n').filter(shown).slice(-count).join('\n')
  }
}
