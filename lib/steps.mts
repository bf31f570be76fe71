// Status lines on stderr: what is being done, and how it ended. A step fails unless it returns.
// On a terminal the lines are live (spinner, running time); elsewhere each event is a plain line.
import { StepError } from './errors.mts'
import { formatDuration } from './format.mts'

const frames = ['⠋', '⠙', '⠹', '⠸', '⠼', '⠴', '⠦', '⠧', '⠇', '⠏']
const marks = { running: '•', done: '✓', failed: '✗' } as const

/** Whether stderr is a terminal that can redraw lines. */
export function isLive(): boolean {
  return Boolean(process.stderr.isTTY) && process.env.TERM !== 'dumb'
}

/** One line of a board. */
export interface Row {
  readonly name: string
  /** Names what is being done now. A plain line where there is no terminal. */
  step(text: string): void
  /** Short-lived progress (a percentage, the last line of a log): shown on terminals only. */
  detail(text: string): void
}

/**
 * Runs one step and shows it as one line: running, then done or failed, with the time it took.
 *
 * @param work gets a function that changes the text behind the title while it runs
 * @throws what `work` throws
 */
export async function step<T>(
  title: string,
  work: (detail: (text: string) => void) => Promise<T> | T,
): Promise<T> {
  const [row] = new Board([title]).rows
  if (!row) throw new Error('a board of one title has one row')
  row.step('')
  try {
    const result = await work((text) => row.detail(text))
    row.end('done')
    return result
  } catch (error) {
    row.end('failed')
    throw error
  }
}

/**
 * Runs the same work for several names at once, a line each, and waits for all of them.
 *
 * @returns the results in the order of `names`
 * @throws the error itself if one failed, or if all have the same reason; else a StepError that
 *   names each
 */
export async function inParallel<T>(
  names: readonly string[],
  work: (name: string, row: Row) => Promise<T>,
): Promise<T[]> {
  const outcomes = await Promise.allSettled(
    new Board(names).rows.map(async (row) => {
      try {
        const result = await work(row.name, row)
        row.end('done')
        return result
      } catch (error) {
        row.end('failed', error instanceof Error ? error.message : String(error))
        throw error
      }
    }),
  )
  const failures = outcomes.flatMap((outcome, index) =>
    outcome.status === 'rejected' ? [{ name: names[index] ?? '', reason: outcome.reason }] : [],
  )
  const [one] = failures
  // An interruption is one reason for all.
  if (one && failures.every(({ reason }) => reason === one.reason)) throw one.reason
  if (failures.length > 0) {
    const reasons = failures.map(({ name, reason }) => `${name}: ${reason?.message ?? reason}`)
    const first = failures.find(({ reason }) => reason instanceof StepError)?.reason
    throw new StepError(`${failures.map(({ name }) => name).join(' and ')} failed`, {
      ...(first instanceof StepError ? first.explanation : {}),
      output: reasons.join('\n'),
    })
  }
  return outcomes.flatMap((outcome) => (outcome.status === 'fulfilled' ? [outcome.value] : []))
}

class BoardRow implements Row {
  readonly name: string
  state: keyof typeof marks = 'running'
  private readonly started = performance.now()
  private seconds: number | undefined
  private text = ''
  private progress = ''
  private readonly changed: (row: BoardRow) => void

  constructor(name: string, changed: (row: BoardRow) => void) {
    this.name = name
    this.changed = changed
  }

  step(text: string): void {
    this.text = text
    this.progress = ''
    this.changed(this)
  }

  detail(text: string): void {
    this.progress = text.trim()
  }

  end(state: 'done' | 'failed', text = ''): void {
    this.state = state
    this.seconds = performance.now() - this.started
    this.step(text)
  }

  line(frame = 0): string {
    const running = this.state === 'running'
    const mark = running && isLive() ? frames[frame % frames.length] : marks[this.state]
    const texts = [this.name, this.text, this.progress].filter(Boolean).join(' · ')
    const time = formatDuration(this.seconds ?? performance.now() - this.started)
    return running && !isLive() ? `${mark} ${texts} …` : `${mark} ${texts} (${time})`
  }
}

/** Lines that are drawn again and again at the bottom of the terminal. */
class Board {
  readonly rows: BoardRow[]
  private drawn = 0
  private frame = 0
  private readonly timer: NodeJS.Timeout | undefined

  constructor(names: readonly string[]) {
    this.rows = names.map((name) => new BoardRow(name, (row) => this.changed(row)))
    if (isLive()) this.timer = setInterval(() => this.draw(), 100).unref()
  }

  private changed(row: BoardRow): void {
    if (!this.timer) return void process.stderr.write(`${row.line()}\n`)
    this.draw()
    if (this.rows.every(({ state }) => state !== 'running')) clearInterval(this.timer)
  }

  private draw(): void {
    this.frame += 1
    const width = process.stderr.columns || 80
    const lines = this.rows.map((row) => `\x1b[2K${row.line(this.frame).slice(0, width - 1)}\n`)
    const up = this.drawn ? `\x1b[${this.drawn}A` : ''
    process.stderr.write(up + lines.join(''))
    this.drawn = lines.length
  }
}

export { formatDuration } from './format.mts'
