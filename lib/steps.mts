// Status lines on stderr: what is being done, and how it ended. A step fails unless it ends well.
// On a terminal lines live (spinner, running time); elsewhere each event is a plain line.
import { StepError } from './step-error.mts'

const frames = ['⠋', '⠙', '⠹', '⠸', '⠼', '⠴', '⠦', '⠧', '⠇', '⠏']
const marks = { running: '•', done: '✓', failed: '✗' } as const
const live = () => Boolean(process.stderr.isTTY) && process.env.TERM !== 'dumb'

/** A duration for people: "3.2s", "2m 05s". */
export function formatDuration(milliseconds: number): string {
  const seconds = Math.round(milliseconds / 100) / 10
  if (seconds < 60) return `${seconds.toFixed(1)}s`
  const rest = String(Math.floor(seconds % 60)).padStart(2, '0')
  return `${Math.floor(seconds / 60)}m ${rest}s`
}

/**
 * Does one step and shows it as one line: running, then done or failed, with the time it took.
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
    row.done()
    return result
  } catch (error) {
    row.failed()
    throw error
  }
}

/**
 * Does the same work for several names at once, a line each, and waits for all of them.
 *
 * @returns the results in the order of `names`
 * @throws the error itself if one failed, or all that failed did for the same one; else a
 *   StepError that names each
 */
export async function inParallel<T>(
  names: readonly string[],
  work: (name: string, row: Row) => Promise<T>,
): Promise<T[]> {
  const board = new Board(names)
  const outcomes = await Promise.allSettled(
    board.rows.map(async (row) => {
      try {
        const result = await work(row.name, row)
        row.done()
        return result
      } catch (error) {
        row.failed(error instanceof Error ? error.message : String(error))
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
  if (failures.length > 1) {
    const reasons = failures.map(({ name, reason }) => `${name}: ${reason?.message ?? reason}`)
    const first = failures.find(({ reason }) => reason instanceof StepError)?.reason
    throw new StepError(`${failures.map(({ name }) => name).join(' and ')} failed`, {
      ...(first instanceof StepError ? first.explanation : {}),
      output: reasons.join('\n'),
    })
  }
  return outcomes.flatMap((outcome) => (outcome.status === 'fulfilled' ? [outcome.value] : []))
}

/** One line of a board. */
export interface Row {
  readonly name: string
  /** Names what is being done now. A plain line where there is no terminal. */
  step(text: string): void
  /** Passing progress (a percentage, the last line of a log): shown on terminals only. */
  detail(text: string): void
}

class BoardRow implements Row {
  readonly name: string
  state: keyof typeof marks = 'running'
  readonly started = performance.now()
  ended: number | undefined
  text = ''
  passing = ''
  private readonly board: Board

  constructor(name: string, board: Board) {
    this.name = name
    this.board = board
  }

  step(text: string): void {
    this.text = text
    this.passing = ''
    this.board.changed(this)
  }

  detail(text: string): void {
    this.passing = text.trim()
  }

  done(): void {
    this.end('done', '')
  }

  failed(reason = ''): void {
    this.end('failed', reason)
  }

  private end(state: 'done' | 'failed', text: string): void {
    this.state = state
    this.text = text
    this.passing = ''
    this.ended = performance.now()
    this.board.changed(this)
  }

  line(frame = 0): string {
    const mark =
      this.state === 'running' && live() ? frames[frame % frames.length] : marks[this.state]
    const texts = [this.name, this.text, this.passing].filter(Boolean).join(' · ')
    const time = formatDuration((this.ended ?? performance.now()) - this.started)
    const running = this.state === 'running' && !live()
    return running ? `${mark} ${texts} …` : `${mark} ${texts} (${time})`
  }
}

class Board {
  readonly rows: BoardRow[]
  private readonly live = live()
  private drawn = 0
  private frame = 0
  private readonly timer: NodeJS.Timeout | undefined

  constructor(names: readonly string[]) {
    this.rows = names.map((name) => new BoardRow(name, this))
    if (this.live) this.timer = setInterval(() => this.draw(), 100).unref()
  }

  changed(row: BoardRow): void {
    if (!this.live) {
      process.stderr.write(`${row.line()}\n`)
      return
    }
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
