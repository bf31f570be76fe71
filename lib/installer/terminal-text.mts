// What a person would read of what a terminal gets: text without colours, titles, cursor movement.

// biome-ignore-start lint/suspicious/noControlCharactersInRegex: control characters are the matter here
/**
 * The sequences of ECMA-48 and xterm, most special first: titles and systemd's context marks
 * (OSC, ended by BEL or ESC \, and never across a line, should the end be lost), queries (DCS and
 * its kin), CSI with any parameter bytes (colours, `[?2004h`), two-byte escapes; then \r, NUL, BEL.
 */
const sequences =
  /\x1b\][^\x07\x1b\n]{0,4096}(?:\x07|\x1b\\)|\x1b[PX^_][^\x1b\n]{0,4096}\x1b\\|\x1b\[[0-?]*[ -/]*[@-~]|\x1b[ -/]*[0-OQ-WYZ\\`-~]|[\r\0\x07]/g

/** The beginning of a sequence whose end may be yet to come. */
const unfinished =
  /\x1b(?:\][^\x07\x1b\n]{0,4096}\x1b?|[PX^_][^\x1b\n]{0,4096}\x1b?|\[[0-?]*[ -/]*|[ -/]*)$/
// biome-ignore-end lint/suspicious/noControlCharactersInRegex: -

/** Text without terminal sequences and without carriage returns; lines end in \n alone. */
export function plainText(raw: string): string {
  return raw.replace(sequences, '')
}

/** Plain text out of a stream, whose pieces may end in the middle of a sequence. */
export class PlainTextStream {
  private rest = ''

  /** The plain text that has become certain with this piece. */
  push(piece: string): string {
    const raw = this.rest + piece
    const end = raw.match(unfinished)?.index ?? raw.length
    this.rest = raw.slice(end)
    return plainText(raw.slice(0, end))
  }
}
