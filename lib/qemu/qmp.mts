// A client of the QEMU Machine Protocol: one JSON object a line, a greeting, commands with their
// answers in order of ids, events in between (QEMU's docs/interop/qmp-spec).
import type { Socket } from 'node:net'
import { StepError } from '../errors.mts'
import { connectUnixSocket } from './unix-socket.mts'

export interface QmpEvent {
  event: string
  data?: Record<string, unknown>
}

type Message =
  | { QMP: object }
  | { return: unknown; id: number }
  | { error: { class: string; desc: string }; id: number }
  | QmpEvent

interface Waiting {
  resolve(value: unknown): void
  reject(error: Error): void
}

const patience = 10

export class Qmp {
  private readonly socket: Socket
  private readonly commands = new Map<number, Waiting>()
  private readonly listeners = new Set<(event: QmpEvent) => void>()
  private lastId = 0
  private rest = ''
  private greeted: (() => void) | undefined
  /** Fulfilled when the connection has ended, by whichever side. */
  readonly closed: Promise<void>

  private constructor(socket: Socket) {
    this.socket = socket
    socket.setEncoding('utf8')
    socket.on('data', (text: string) => this.receive(text))
    // An error of the connection ends it; 'close' follows.
    socket.on('error', () => {})
    this.closed = new Promise((resolve) => {
      socket.on('close', () => {
        for (const { reject } of this.commands.values()) reject(new QmpClosed())
        this.commands.clear()
        resolve()
      })
    })
  }

  /**
   * Connects and leaves the negotiation of capabilities behind.
   *
   * @param path of the unix socket, of any length
   * @param options.timeout seconds
   * @throws StepError if nobody answers, or QEMU talks to another client: it has one at a time
   */
  static async connect(path: string, options: { timeout?: number } = {}): Promise<Qmp> {
    const { timeout = patience } = options
    const qmp = new Qmp(connectUnixSocket(path))
    const greeting = new Promise<void>((resolve) => {
      qmp.greeted = resolve
    })
    try {
      await withTimeout(Promise.race([greeting, qmp.closed]), timeout, 'QEMU sent no greeting')
      await qmp.execute('qmp_capabilities', undefined, { timeout })
      return qmp
    } catch (cause) {
      qmp.close()
      throw new StepError(`QEMU does not answer on ${path}`, {
        hint: 'it talks to one program at a time: is another script at work on this machine?',
        cause,
      })
    }
  }

  /**
   * Sends a command and waits for its answer.
   *
   * @param args as the command's definition in QEMU's QMP reference has them
   * @param options.timeout seconds
   * @returns what QEMU returned; `{}` of most commands
   * @throws StepError with QEMU's own words; QmpClosed if the connection ends first
   */
  execute(
    command: string,
    args?: Record<string, unknown>,
    options: { timeout?: number } = {},
  ): Promise<unknown> {
    const { timeout = patience } = options
    this.lastId += 1
    const id = this.lastId
    const answer = new Promise((resolve, reject) => {
      if (this.socket.destroyed) return reject(new QmpClosed())
      this.commands.set(id, {
        resolve,
        reject: (error) =>
          reject(error instanceof QmpClosed ? error : failure(command, error.message)),
      })
    })
    this.socket.write(`${JSON.stringify({ execute: command, arguments: args, id })}\n`)
    return withTimeout(answer, timeout, `QEMU did not answer ${command}`).finally(() =>
      this.commands.delete(id),
    )
  }

  /**
   * Waits for the next event of a name, such as STOP or RESUME.
   *
   * @param options.timeout seconds
   */
  waitForEvent(name: string, options: { timeout?: number } = {}): Promise<QmpEvent> {
    const { timeout = patience } = options
    let listener: ((event: QmpEvent) => void) | undefined
    const found = new Promise<QmpEvent>((resolve, reject) => {
      listener = (event) => {
        if (event.event === name) resolve(event)
      }
      this.listeners.add(listener)
      this.closed.then(() => reject(new QmpClosed()))
    })
    return withTimeout(found, timeout, `QEMU sent no event ${name}`).finally(() => {
      if (listener) this.listeners.delete(listener)
    })
  }

  close(): void {
    this.socket.destroy()
  }

  private receive(text: string): void {
    const lines = (this.rest + text).split('\n')
    this.rest = lines.pop() ?? ''
    for (const line of lines.filter((candidate) => candidate.trim() !== '')) {
      this.handle(JSON.parse(line) as Message)
    }
  }

  private handle(message: Message): void {
    if ('QMP' in message) this.greeted?.()
    if ('event' in message) for (const listener of this.listeners) listener(message)
    if ('return' in message) this.commands.get(message.id)?.resolve(message.return)
    if ('error' in message) {
      this.commands.get(message.id)?.reject(new Error(message.error.desc))
    }
  }
}

/** The connection ended: QEMU has, or we have, closed it. */
export class QmpClosed extends StepError {
  constructor() {
    super('QEMU closed its control connection')
  }
}

function failure(command: string, reason: string): StepError {
  return new StepError(`QEMU refused ${command}: ${reason}`)
}

async function withTimeout<T>(work: Promise<T>, seconds: number, reason: string): Promise<T> {
  let timer: NodeJS.Timeout | undefined
  const expiry = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new StepError(`${reason} within ${seconds} s`)), seconds * 1000)
  })
  try {
    return await Promise.race([work, expiry])
  } finally {
    clearTimeout(timer)
  }
}
