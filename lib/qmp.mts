// A client of the QEMU Machine Protocol: one JSON object a line, a greeting, commands whose answers
// carry their ids, events in between (QEMU's docs/interop/qmp-spec).
import { EventEmitter, once } from 'node:events'
import { connect, type Socket } from 'node:net'
import { basename, dirname } from 'node:path'
import { createInterface } from 'node:readline'
import { setTimeout as sleep } from 'node:timers/promises'
import { $ } from 'zx/core'
import { StepError } from './errors.mts'
import { quote } from './format.mts'
import { awakeTime } from './wait.mts'

const defaultTimeout = 10 // seconds
/** The longest path of a unix socket in bytes, on macOS; Linux has 107. */
const longestPath = 103

type Arguments = Record<string, unknown>
type Answer = { return?: unknown; error?: { desc: string } }
type Job = { id: string; status: string; error?: string }

export class Qmp {
  private readonly socket: Socket
  private readonly path: string
  /** Emits each message, as "id NUMBER" or "greeting"; an error when the connection is closed. */
  private readonly messages = new EventEmitter().on('error', () => {})
  private readonly closed = new StepError('QEMU closed its control connection')
  private lastId = 0

  private constructor(path: string) {
    this.path = path
    // An error of the connection closes it.
    this.socket = connectUnixSocket(path).on('error', () => {})
    this.socket.on('close', () => this.messages.emit('error', this.closed))
    const lines = createInterface(this.socket).on('error', () => {})
    lines.on('line', (line) => {
      try {
        const message = Object(JSON.parse(line.trim() || '{}'))
        this.messages.emit('QMP' in message ? 'greeting' : `id ${message.id}`, message)
      } catch {
        this.socket.destroy() // It is no QEMU.
      }
    })
  }

  /** Connects to QEMU by its unix socket, through the negotiation of capabilities. */
  static async connect(path: string, { timeout = defaultTimeout } = {}): Promise<Qmp> {
    const qmp = new Qmp(path)
    try {
      await qmp.message('greeting', 'QEMU sent no greeting', timeout)
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
   * Sends a command of QEMU's QMP reference. @returns its answer; `{}` for most commands
   * @throws StepError with QEMU's reason, or if the connection is closed first
   */
  async execute(command: string, args?: Arguments, { timeout = defaultTimeout } = {}) {
    if (this.socket.destroyed) throw this.closed
    this.lastId += 1
    const id = this.lastId
    this.socket.write(`${JSON.stringify({ execute: command, arguments: args, id })}\n`)
    if ($.verbose && !/^q(mp_|uery-)/.test(command)) {
      const text = JSON.stringify({ execute: command, arguments: args })
      const both = quote(`{"execute":"qmp_capabilities"} ${text}`)
      console.error(`$ echo ${both} | nc -U run/${basename(this.path)}`)
    }
    const answer = await this.message(`id ${id}`, `QEMU did not answer ${command}`, timeout)
    if (answer.error) throw new StepError(`QEMU refused ${command}: ${answer.error.desc}`)
    return answer.return
  }

  /** Runs a job such as "snapshot-save" to its end. @throws StepError with QEMU's reason */
  async job(command: string, args: Arguments, { timeout = 600 } = {}): Promise<void> {
    const id = `${command}-${Date.now()}`
    // While it saves or loads memory, QEMU answers nothing else.
    const ask = (what: string, about = {}) => this.execute(what, about, { timeout })
    const query = async () => ((await ask('query-jobs')) as Job[]).find((each) => each.id === id)
    const deadline = awakeTime() + timeout * 1000
    await ask(command, { 'job-id': id, ...args })
    let job = await query()
    for (; job && job.status !== 'concluded'; job = await query()) {
      await sleep(20)
      if (awakeTime() < deadline) continue
      await ask('job-cancel', { id }).catch(() => {})
      throw new StepError(`QEMU did not finish ${command} within ${timeout} s`)
    }
    await ask('job-dismiss', { id })
    if (job?.error) throw new StepError(`QEMU failed at ${command}: ${job.error}`)
  }

  close(): void {
    this.socket.destroy()
  }

  private async message(key: string, failure: string, seconds: number): Promise<Answer> {
    const signal = AbortSignal.timeout(seconds * 1000)
    try {
      return (await once(this.messages, key, { signal }))[0]
    } catch (error) {
      throw signal.aborted ? new StepError(`${failure} within ${seconds} s`) : error
    }
  }
}

/**
 * Begins to connect to a unix socket. Where its path is too long for the system (a checkout may be
 * that deep), from inside its folder; connect(2) happens before this returns, so nothing notices.
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
