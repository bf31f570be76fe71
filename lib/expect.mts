// Types into a program's terminal and waits for what it prints: Don Libes's expect, with node-pty.
import { type IPty, spawn as spawnPty } from 'node-pty'
import { StepError } from './errors.mts'
import { formatDuration } from './format.mts'
import { PlainTextStream, Transcript } from './terminal.mts'
import { awakeTime } from './wait.mts'

export interface SpawnOptions {
  name?: string // of the program in errors; its file by default
  cwd?: string
  env?: Record<string, string | undefined>
  transcript?: string // file to which all output is appended as plain text
  hidden?: RegExp // lines that errors leave out, such as our own markers
  /** A line that matches one of them ends every wait at once; `reason` is what it means. */
  fatalPatterns?: readonly { pattern: RegExp; reason: string }[]
}

export interface WaitOptions {
  timeout: number // seconds
  what?: string // what is awaited, for errors: "the root prompt"; the patterns by default
  /** Ends the wait with its reason. The program keeps running until `close`. */
  signal?: AbortSignal | undefined
}

export interface Match {
  index: number // of the pattern in the list
  texts: [string, ...string[]] // the matching text, then the pattern's groups
  before: string // the output between the last match and this one
}

export interface Exit {
  exitCode: number // 0 also if a signal ended the program
  signal: number
}

/** A wait that failed for any reason but an abort. */
export class ExpectError extends StepError {
  readonly kind: 'timeout' | 'exit' | 'fatal'
  readonly exit: Exit | undefined // how the program ended, if it did

  /** With the last output and the path of the transcript. */
  constructor(kind: ExpectError['kind'], reason: string, { name, transcript, ended }: Session) {
    super(`${name}: ${reason}`, { output: transcript.lastLines(), log: transcript.path })
    this.kind = kind
    this.exit = ended
  }
}

/**
 * Bytes that may be sent before the program has answered. macOS's terminals hold 1024, and writing
 * to a full one blocks all of Node: no timer fires any more, no Ctrl-C arrives.
 */
export const sendLimit = 900
// More than the output of any command. Output that nothing waited for is dropped beyond it.
const unreadLimit = 1024 * 1024

/** Starts a program in a terminal of its own. */
export const spawn = (...program: ConstructorParameters<typeof Session>) => new Session(...program)

export class Session {
  name: string // the beginning of error messages; may change with the current step
  readonly pid: number
  readonly transcript: Transcript
  readonly exit: Promise<Exit> // resolves when the program's last output has been read, too
  ended: Exit | undefined

  private readonly pty: IPty
  private readonly fatalPatterns: SpawnOptions['fatalPatterns']
  private readonly plain = new PlainTextStream()
  private unread = ''
  private sent = 0
  private check: (() => void) | undefined // whether the current wait is over

  constructor(file: string, args: readonly string[], options: SpawnOptions = {}) {
    this.name = options.name ?? file
    this.fatalPatterns = options.fatalPatterns
    this.transcript = new Transcript(options.transcript, options.hidden)
    const { cwd = process.cwd(), env = process.env } = options
    this.pty = spawnPty(file, [...args], { cols: 200, rows: 50, cwd, env })
    this.pid = this.pty.pid
    this.pty.onData((data) => {
      const text = this.plain.push(data)
      this.unread += text
      // Not for every piece: slicing copies.
      if (this.unread.length > 2 * unreadLimit) this.unread = this.unread.slice(-unreadLimit)
      this.transcript.add(text)
      this.check?.()
    })
    this.exit = new Promise((resolve) => {
      this.pty.onExit(({ exitCode, signal = 0 }) => {
        this.ended = { exitCode, signal }
        this.check?.()
        resolve(this.ended)
      })
    })
  }

  /** Bytes that may still be sent before the next match. */
  get room(): number {
    return sendLimit - this.sent
  }

  /** Types `text`, which has at most `room` bytes; "\n" is Enter. The transcript does not get it. */
  send(text: string): void {
    const bytes = Buffer.byteLength(text)
    if (bytes > this.room) throw new RangeError(`${bytes} bytes to send, ${this.room} are free`)
    this.sent += bytes
    if (!this.ended) this.pty.write(text)
  }

  /**
   * Waits until a pattern matches the output since the last match. If several match, the first one
   * of the list counts, wherever in the output it is.
   * @throws ExpectError on timeout, at the program's end, and for fatal output; the signal's reason
   */
  expect(wanted: string | RegExp | (string | RegExp)[], options: WaitOptions): Promise<Match> {
    const list = [wanted].flat()
    const literal = (text: string) => text.replaceAll(/[\\^$.*+?()[\]{}|]/g, '\\$&')
    const patterns = list.map((one) => (typeof one === 'string' ? new RegExp(literal(one)) : one))
    return this.wait({ what: list.join(' or '), ...options }, () => {
      const index = patterns.findIndex((pattern) => pattern.test(this.unread))
      const found = patterns[index]?.exec(this.unread)
      if (!found) return undefined
      const before = this.unread.slice(0, found.index)
      this.unread = this.unread.slice(found.index + found[0].length)
      this.sent = 0
      return { index, texts: [...found] as [string, ...string[]], before }
    })
  }

  /** Waits for the program's end. @throws as `expect`, except for the end */
  expectExit(options: WaitOptions): Promise<Exit> {
    return this.wait({ what: 'its end', ...options }, () => this.ended)
  }

  /** Ends the program with SIGHUP, after 5 s with SIGKILL; resolves when it has ended. */
  async close(): Promise<Exit> {
    if (this.ended) return this.ended
    this.pty.kill('SIGHUP')
    const force = setTimeout(() => this.pty.kill('SIGKILL'), 5000)
    return this.exit.finally(() => clearTimeout(force))
  }

  /** Waits for one of: result, fatal output, end, abort, timeout; leaves no timer or listener. */
  private wait<T>(options: WaitOptions & { what: string }, poll: () => T | undefined): Promise<T> {
    if (this.check) throw new Error('a session waits for one thing at a time')
    const { what, timeout, signal } = options
    return new Promise((resolve, reject) => {
      const settle = (end: () => void) => {
        clearInterval(timer)
        signal?.removeEventListener('abort', check)
        this.check = undefined
        end()
      }
      const fail = (kind: ExpectError['kind'], reason: string) =>
        settle(() => reject(new ExpectError(kind, reason, this)))
      const check = () => {
        if (signal?.aborted) return settle(() => reject(signal.reason))
        const lines = this.unread.slice(0, this.unread.lastIndexOf('\n') + 1)
        const fatal = this.fatalPatterns?.find(({ pattern }) => pattern.test(lines))
        if (fatal) return fail('fatal', `${fatal.reason} while waiting for ${what}`)
        const value = poll()
        if (value !== undefined) return settle(() => resolve(value))
        if (this.ended) fail('exit', `ended ${endOf(this.ended)} while waiting for ${what}`)
      }
      const late = `timed out after ${formatDuration(timeout * 1000)} waiting for ${what}`
      const end = awakeTime() + timeout * 1000
      const watch = () => awakeTime() >= end && fail('timeout', late)
      const timer = setInterval(watch, Math.min(timeout * 100, 500))
      this.check = check
      signal?.addEventListener('abort', check)
      check()
    })
  }
}

/** An end in words: "with status 1", "by signal 9". */
export function endOf({ exitCode, signal }: Exit): string {
  return signal ? `by signal ${signal}` : `with status ${exitCode}`
}
