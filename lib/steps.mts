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

/** @returns draws lines, as far as they fit, in the place of those that it drew before */
export function redrawer(): (lines: readonly string[]) => void {
  let drawn = 0
  return (lines) => {
    const { columns, rows } = process.stderr
    const fitting = lines.slice(0, (rows || 24) - 1)
    const text = fitting.map((line) => `\x1b[2K${line.slice(0, (columns || 80) - 1)}\n`).join('')
    process.stderr.write(`${drawn > 0 ? `\x1b[${drawn}A` : ''}${text}\x1b[J`)
    drawn = fitting.length
  }
}

/** One line of a board. */
export interface Row {
  /** Names what is being done now. A plain line where there is no terminal. */
  step(text: string): void
  /** Short-lived progress (a percentage, the last line of a log): shown on terminals only. */
  detail(text: string): void
}

/**
 * Runs one step and shows it as one line: running, then done or failed, with the time it took.
 * `work` gets a function that changes the text behind the title while it runs.
 */
export function step<T>(title: string, work: (detail: Row['detail']) => Promise<T> | T) {
  return new Board().run(title, (row) => {
    row.step('')
    return work(row.detail)
  })
}

/**
 * Runs the same work for several names at once, a line each, and waits for all of them.
 * @returns the results in the order of `names`
 * @throws the error itself if one failed, or all for one reason; else a StepError that names each
 */
export async function inParallel<T>(
  names: readonly string[],
  work: (name: string, row: Row) => Promise<T>,
): Promise<T[]> {
  const board = new Board()
  const outcomes = await Promise.allSettled(
    names.map((name) => board.run(name, (row) => work(name, row), messageOf)),
  )
  const failures = outcomes.flatMap((outcome, index) =>
    outcome.status === 'rejected' ? [{ name: names[index] ?? '', reason: outcome.reason }] : [],
  )
  const [one] = failures
  // An interruption is one reason for all.
  if (one && failures.every(({ reason }) => reason === one.reason)) throw one.reason
  if (one) {
    const first = failures.find(({ reason }) => reason instanceof StepError)?.reason
    throw new StepError(`${failures.map(({ name }) => name).join(' and ')} failed`, {
      ...first?.explanation,
      output: failures.map(({ name, reason }) => `${name}: ${messageOf(reason)}`).join('\n'),
    })
  }
  return outcomes.flatMap((outcome) => (outcome.status === 'fulfilled' ? [outcome.value] : []))
}

const messageOf = (error: unknown) => (error instanceof Error ? error.message : String(error))

/** Lines that are drawn again and again at the bottom of the terminal. */
class Board {
  private readonly lines: (() => string)[] = []
  private running = 0
  private readonly redraw = redrawer()
  private frame = 0
  private readonly timer = isLive() ? setInterval(() => this.draw(), 100).unref() : undefined

  /** Adds a line, does the work of it, and marks how it ended, with `reasonOf` an error. */
  async run<T>(
    name: string,
    work: (row: Row) => Promise<T> | T,
    reasonOf: (error: unknown) => string = () => '',
  ): Promise<T> {
    const began = performance.now()
    let [state, text, progress]: [keyof typeof marks, string, string] = ['running', '', '']
    let ended: number | undefined
    const line = () => {
      const texts = [name, text, progress].filter(Boolean).join(' · ')
      if (state === 'running' && !isLive()) return `${marks.running} ${texts} …`
      const mark = state === 'running' ? frames[this.frame % frames.length] : marks[state]
      return `${mark} ${texts} (${formatDuration((ended ?? performance.now()) - began)})`
    }
    const step = (next: string) => {
      text = next
      progress = ''
      if (this.timer) this.draw()
      else process.stderr.write(`${line()}\n`)
    }
    const end = (how: 'done' | 'failed', reason = '') => {
      state = how
      ended = performance.now()
      this.running -= 1
      step(reason)
      if (this.running === 0) clearInterval(this.timer)
    }
    const detail = (next: string) => {
      progress = next.trim()
    }
    this.lines.push(line)
    this.running += 1
    try {
      const result = await work({ step, detail })
      end('done')
      return result
    } catch (error) {
      end('failed', reasonOf(error))
      throw error
    }
  }

  private draw(): void {
    this.frame += 1
    this.redraw(this.lines.map((line) => line()))
  }
}
