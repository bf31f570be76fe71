// A client of the QEMU Machine Protocol: one JSON object a line, a greeting, commands whose answers
// carry their ids, events in between (QEMU's docs/interop/qmp-spec).
import { connect, type Socket } from 'node:net'
import { basename, dirname } from 'node:path'
import { $ } from 'zx/core'
import { StepError } from './errors.mts'
import { quote } from './format.mts'

type Answer = (message: { return?: unknown; error?: { desc: string } }) => void

/** Seconds. */
const defaultTimeout = 10
/** The longest path of a unix socket in bytes, on macOS; Linux has 107. */
const longestPath = 103

export class Qmp {
  private readonly socket: Socket
  private readonly path: string
  private readonly waiting = new Map<number | 'greeting', Answer>()
  private lastId = 0
  private rest = ''
  /** Resolves when either side has closed the connection. */
  readonly closed: Promise<void>

  private constructor(path: string) {
    const socket = connectUnixSocket(path)
    this.socket = socket
    this.path = path
    socket.setEncoding('utf8')
    socket.on('data', (text: string) => this.receive(text))
    // An error of the connection closes it.
    socket.on('error', () => {})
    this.closed = new Promise((resolve) => socket.on('close', () => resolve()))
  }

  /**
   * Connects to a machine's QEMU, through the negotiation of capabilities.
   *
   * @param path of the unix socket, of any length
   * @param options.timeout seconds
   * @throws StepError if QEMU does not answer; it serves one client at a time
   */
  static async connect(path: string, { timeout = defaultTimeout } = {}): Promise<Qmp> {
    const qmp = new Qmp(path)
    try {
      await qmp.answer('greeting', 'QEMU sent no greeting', timeout)
      await qmp.execute('qmp_capabilities', undefined, { timeout })
      return qmp
    } catch (cause) {
      qmp.close()
      throw new StepError(`QEMU does not answer on ${path}`, {
        hint: 'it serves one client at a time: is another script working on this machine?',
        cause,
      })
    }
  }

  /**
   * Sends a command and waits for its answer.
   *
   * @param args as in the command's definition in QEMU's QMP reference
   * @param options.timeout seconds
   * @returns what QEMU returned; `{}` for most commands
   * @throws StepError with QEMU's reason, or if the connection is closed first
   */
  async execute(
    command: string,
    args?: Record<string, unknown>,
    { timeout = defaultTimeout } = {},
  ): Promise<unknown> {
    this.lastId += 1
    const id = this.lastId
    this.socket.write(`${JSON.stringify({ execute: command, arguments: args, id })}\n`)
    if ($.verbose && !/^q(mp_|uery-)/.test(command)) {
      const text = JSON.stringify({ execute: command, arguments: args })
      const both = quote(`{"execute":"qmp_capabilities"} ${text}`)
      console.error(`$ echo ${both} | nc -U run/${basename(this.path)}`)
    }
    const { error, return: value } = await this.answer(
      id,
      `QEMU did not answer ${command}`,
      timeout,
    )
    if (error) throw new StepError(`QEMU refused ${command}: ${error.desc}`)
    return value
  }

  close(): void {
    this.socket.destroy()
  }

  private async answer(key: number | 'greeting', failure: string, seconds: number) {
    let timer: NodeJS.Timeout | undefined
    const expired = new Promise<never>((_, reject) => {
      const error = new StepError(`${failure} within ${seconds} s`)
      timer = setTimeout(() => reject(error), seconds * 1000)
    })
    const closed = this.closed.then(() => {
      throw new StepError('QEMU closed its control connection')
    })
    const answered = new Promise<Parameters<Answer>[0]>((resolve) => this.waiting.set(key, resolve))
    try {
      return await Promise.race([answered, closed, expired])
    } finally {
      clearTimeout(timer)
      this.waiting.delete(key)
    }
  }

  private receive(text: string): void {
    const lines = (this.rest + text).split('\n')
    this.rest = lines.pop() ?? ''
    for (const line of lines.filter((candidate) => candidate.trim() !== '')) {
      const message = JSON.parse(line)
      this.waiting.get('QMP' in message ? 'greeting' : message.id)?.(message)
    }
  }
}

/**
 * Begins to connect to a unix socket. Where its path is too long for the system's address structure
 * (a checkout may be that deep), the call is made from inside its folder, by its name alone;
 * connect(2) happens before this returns, so nothing else notices.
 */
export function connectUnixSocket(path: string): Socket {
  if (Buffer.byteLength(path) <= longestPath) return connect({ path })
  const before = process.cwd()
  process.chdir(dirname(path))
  try {
    return connect({ path: basename(path) })
  } finally {
    process.chdir(before)
  }
}
