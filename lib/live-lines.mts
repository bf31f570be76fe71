// Lines at the bottom of a terminal that are drawn over and over while something goes on.

const period = 200

/** Draws lines to stderr, from the beginning until `end`. Only for terminals. */
export class LiveLines {
  private readonly lines: () => readonly string[]
  private readonly timer: NodeJS.Timeout
  private drawn = 0

  /** @param lines what to show now */
  constructor(lines: () => readonly string[]) {
    this.lines = lines
    this.timer = setInterval(() => this.draw(), period).unref()
  }

  /** Draws a last time; what was drawn stays. */
  end(): void {
    clearInterval(this.timer)
    this.draw()
  }

  private draw(): void {
    const width = process.stderr.columns || 80
    // A line that wraps would make the next drawing start too low; there must be none.
    const fitting = this.lines().slice(0, (process.stderr.rows || 24) - 1)
    const text = fitting.map((line) => `\x1b[2K${line.slice(0, width - 1)}\n`).join('')
    // \x1b[J: should there be fewer lines than before.
    process.stderr.write(`${this.drawn > 0 ? `\x1b[${this.drawn}A` : ''}${text}\x1b[J`)
    this.drawn = fitting.length
  }
}
