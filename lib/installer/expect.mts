// A dialogue with a program in a terminal: send what a person would type, wait for what a person
// would see. After Don Libes's expect; nothing in here knows of this project but the error's form.
import { type IPty, spawn as spawnPty } from 'node-pty'
import { type Explanation, StepError } from '../errors.mts'
import { formatDuration } from '../format.mts'
import { PlainTextStream } from './terminal-text.mts'
import { Transcript } from './transcript.mts'

export interface SpawnOptions {
  /** What the program is called in errors. Its file name unless said. */
  name?: string
  cwd?: string
  env?: Record<string, string | undefined>
  columns?: number
  /** File to which all that the program writes is added as plain text. */
  transcript?: string
  /** Lines that errors leave out, such as markers of one's own. */
  unshown?: RegExp
  /** Text after which nothing good can come, and what it means: it ends every wait at once. */
  alarms?: readonly { pattern: RegExp; reason: string }[]
}

export interface WaitOptions {
  /** Milliseconds. */
  timeout: number
  /** What a person would say is awaited: "the root shell's prompt". The patterns unless said. */
  what?: string
  /** Aborting it rejects the wait with its reason. The program runs on: that is for `close`. */
  signal?: AbortSignal | undefined
}

export interface Match {
  /** Which pattern of the list it was. */
  index: number
  /** The matching text, then what the pattern's groups caught. */
  texts: readonly [string, ...(string | undefined)[]]
  /** All that came since the last match. */
  before: string
}

export interface Exit {
  /** 0 also where a signal ended it. */
  exitCode: number
  signal: number
}

/** A wait that came to nothing, for a reason other than an abort. */
export class ExpectError extends StepError {
  readonly kind: 'timeout' | 'exit' | 'alarm'
  /** How the program ended, if it did. */
  readonly exit: Exit | undefined

  constructor(kind: ExpectError['kind'], reason: string, explanation: Explanation, exit?: Exit) {
    super(reason, explanation)
    this.kind = kind
    this.exit = exit
  }
}

// More than any command's output. What nobody waited for is forgotten beyond it.
const unreadLimit = 1024 * 1024
const sendLimit = 4000
const graceToEnd = 5000

/** Starts a program in a terminal of its own. */
export function spawn(file: string, args: readonly string[], options: SpawnOptions = {}): Dialogue {
  return new Dialogue(file, args, options)
}

export class Dialogue {
  /** What errors call the program. It may change with what it is doing. */
  name: string
  readonly pid: number
  /** All that the program wrote, as plain text. */
  readonly transcript: Transcript
  /** Resolves when the program has ended and its last 4 KB have been read. */
  readonly exit: Promise<Exit>

  private readonly pty: IPty
  private readonly options: SpawnOptions
  private readonly plain = new PlainTextStream()
  private unread = ''
  private ended: Exit | undefined
  /** Looks whether the present wait is over. */
  private look: (() => void) | undefined

  constructor(file: string, args: readonly string[], options: SpawnOptions) {
    this.options = options
    this.name = options.name ?? file
    this.transcript = new Transcript(options.transcript, options.unshown)
    this.pty = spawnPty(file, [...args], {
      cols: options.columns ?? 200,
      rows: 50,
      ...(options.cwd ? { cwd: options.cwd } : {}),
      ...(options.env ? { env: options.env } : {}),
    })
    this.pid = this.pty.pid
    this.pty.onData((data) => this.receive(data))
    this.exit = new Promise((resolve) => {
      this.pty.onExit(({ exitCode, signal = 0 }) => {
        this.ended = { exitCode, signal }
        this.transcript.close()
        this.look?.()
        resolve(this.ended)
      })
    })
  }

  /**
   * Types `text`; "\n" is the Enter key. It never goes to the transcript by itself.
   *
   * @param text no more than 4000 bytes, and no more at all before the program has read them: a
   *   terminal holds little, and writing to a full one would hold up this whole process
   */
  send(text: string): void {
    if (Buffer.byteLength(text) > sendLimit) throw new RangeError(`over ${sendLimit} bytes to send`)
    if (!this.ended) this.pty.write(text)
  }

  /**
   * Waits until a pattern matches what has come since the last match. Of several patterns the
   * first of the list that matches counts, wherever in the text it does.
   *
   * @throws ExpectError when time is up, when the program ends, when an alarm is raised; the
   *   signal's reason when it is aborted
   */
  expect(
    wanted: string | RegExp | readonly (string | RegExp)[],
    options: WaitOptions,
  ): Promise<Match> {
    const patterns = typeof wanted === 'string' || wanted instanceof RegExp ? [wanted] : wanted
    return this.wait({ what: patterns.join(' or '), ...options }, () => this.take(patterns))
  }

  /** Waits for the program's end. @throws as `expect` does, but for the end */
  expectExit(options: WaitOptions): Promise<Exit> {
    return this.wait({ what: 'its end', ...options }, () => this.ended)
  }

  /** Ends the program as closing its window would, by force if it will not; resolves when it has. */
  async close(): Promise<Exit> {
    if (this.ended) return this.ended
    this.pty.kill('SIGHUP')
    const force = setTimeout(() => this.pty.kill('SIGKILL'), graceToEnd)
    try {
      return await this.exit
    } finally {
      clearTimeout(force)
    }
  }

  private receive(data: string): void {
    const text = this.plain.push(data)
    this.unread += text
    // Not at every piece: cutting copies.
    if (this.unread.length > 2 * unreadLimit) this.unread = this.unread.slice(-unreadLimit)
    this.transcript.add(text)
    this.look?.()
  }

  private take(patterns: readonly (string | RegExp)[]): Match | undefined {
    for (const [index, pattern] of patterns.entries()) {
      const found = find(pattern, this.unread)
      if (!found) continue
      const before = this.unread.slice(0, found.start)
      this.unread = this.unread.slice(found.start + found.texts[0].length)
      return { index, texts: found.texts, before }
    }
    return undefined
  }

  /** Races what is awaited against alarm, end, abort and time; leaves no timer and no listener. */
  private wait<T>(options: WaitOptions & { what: string }, poll: () => T | undefined): Promise<T> {
    if (this.look) throw new Error('a dialogue waits for one thing at a time')
    const { what, timeout, signal } = options
    return new Promise((resolve, reject) => {
      const settle = (result: { value: T } | { error: unknown }) => {
        clearTimeout(timer)
        signal?.removeEventListener('abort', look)
        this.look = undefined
        if ('value' in result) resolve(result.value)
        else reject(result.error)
      }
      const fail = (kind: ExpectError['kind'], reason: string) =>
        settle({ error: this.error(kind, reason) })
      const look = () => {
        if (signal?.aborted) return settle({ error: signal.reason })
        const alarm = this.options.alarms?.find(({ pattern }) => pattern.test(this.unread))
        if (alarm) return fail('alarm', `${alarm.reason} while waiting for ${what}`)
        const value = poll()
        if (value !== undefined) return settle({ value })
        if (this.ended) fail('exit', `ended ${endOf(this.ended)} while waiting for ${what}`)
      }
      const timer = setTimeout(() => {
        fail('timeout', `waited ${formatDuration(timeout)} in vain for ${what}`)
      }, timeout)
      this.look = look
      signal?.addEventListener('abort', look)
      look()
    })
  }

  private error(kind: ExpectError['kind'], reason: string): ExpectError {
    const log = this.transcript.path === undefined ? {} : { log: this.transcript.path }
    const explanation = { output: this.transcript.lastLines(), ...log }
    return new ExpectError(kind, `${this.name}: ${reason}`, explanation, this.ended)
  }
}

function find(pattern: string | RegExp, text: string) {
  if (typeof pattern === 'string') {
    const start = text.indexOf(pattern)
    return start < 0 ? undefined : { start, texts: [pattern] as const }
  }
  const match = pattern.exec(text)
  return match && { start: match.index, texts: [...match] as [string, ...(string | undefined)[]] }
}

/** An end in words: "with status 1", "by signal 9". */
export function endOf({ exitCode, signal }: Exit): string {
  return signal ? `by signal ${signal}` : `with status ${exitCode}`
}
