// A rehearsal in progress: it runs the scripts of its copy of the project, and measures how long
// everything takes.
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { stat } from 'node:fs/promises'
import { join } from 'node:path'
import { text } from 'node:stream/consumers'
import { $ } from 'zx'
import type { Cluster, Node } from '../../lib/cluster.mts'
import { lastLines, StepError } from '../../lib/errors.mts'
import { formatDuration, formatTable } from '../../lib/format.mts'
import { useCluster } from '../../lib/kubectl.mts'
import { filesOf } from '../../lib/qemu.mts'
import { prepareCommands } from '../../lib/script.mts'
import { connect, remote } from '../../lib/ssh.mts'

/** A part of a rehearsal. */
export type Step = readonly [what: string, work: (rehearsal: Rehearsal) => Promise<void>]

export class Rehearsal {
  /** That of the copy. */
  readonly cluster: Cluster
  /** The machines that take part. */
  readonly nodes: readonly Node[]
  readonly signal: AbortSignal
  /** When the first machine was powered on for the first time. */
  private firstOn = Number.POSITIVE_INFINITY
  private readonly times: { what: string; took: number; ended: number }[] = []

  constructor(cluster: Cluster, nodes: readonly Node[], signal: AbortSignal) {
    this.cluster = cluster
    this.nodes = nodes
    this.signal = signal
  }

  /** Lets `$`, as in the scripts, run in the copy; kubectl talks to its cluster. */
  async enter(): Promise<void> {
    prepareCommands(false)
    $.cwd = this.cluster.root
    await useCluster(this.cluster)
  }

  /** Runs shell text on a machine. @returns its output @throws as `remote` */
  async on(node: Node, command: string, timeout = 60): Promise<string> {
    await connect(this.cluster, node, { signal: this.signal })
    return remote(node, command, { timeout, signal: this.signal })
  }

  get names(): string[] {
    return this.nodes.map(({ name }) => name)
  }

  /** Runs a script of the copy in this terminal. @throws StepError if it fails */
  async script(name: string, ...args: string[]): Promise<void> {
    await this.run(name, args, 'inherit')
  }

  /** The same, but what it prints on its standard output is returned. */
  output(name: string, ...args: string[]): Promise<string> {
    return this.run(name, args, 'pipe')
  }

  private async run(name: string, args: string[], output: 'inherit' | 'pipe'): Promise<string> {
    this.signal.throwIfAborted()
    console.error(`\n$ ./bin/${name}.mts ${args.join(' ')}`)
    const program = join(this.cluster.root, 'bin', `${name}.mts`)
    // In a log, the error would stand far above the state that is printed after it.
    const messages = process.stderr.isTTY ? 'inherit' : 'pipe'
    const child = spawn(program, args, { stdio: ['inherit', output, messages] })
    child.stderr?.pipe(process.stderr, { end: false })
    const said = child.stderr ? text(child.stderr) : ''
    // Ctrl-C reaches both processes; a signal to this one alone has to be passed on.
    const forward = () => child.kill('SIGTERM')
    process.once('SIGTERM', forward)
    const printed = child.stdout ? text(child.stdout) : ''
    const [status, killedBy] = await once(child, 'exit')
    process.off('SIGTERM', forward)
    if (status === 0) return printed
    throw new StepError(`${name} ended with ${killedBy ?? `status ${status}`}`, {
      output: lastLines(await said),
      log: join(this.cluster.root, 'images'),
      hint: 'KEEP=1 leaves the machines running',
    })
  }

  /** Runs a part of the rehearsal and records its duration. */
  async timed<T>(what: string, work: () => Promise<T>): Promise<T> {
    this.signal.throwIfAborted()
    const began = performance.now()
    try {
      return await work()
    } finally {
      this.note(what, performance.now() - began)
      const on = await Promise.all(this.nodes.map((node) => this.poweredOn(node)))
      this.firstOn = Math.min(this.firstOn, ...on)
    }
  }

  /** Records the duration of something that has just ended. @param took milliseconds */
  note(what: string, took: number): void {
    this.times.push({ what, took, ended: Date.now() })
  }

  /** When the machine was powered on, in milliseconds of the epoch; Infinity if it was not. */
  async poweredOn(node: Node): Promise<number> {
    return stat(filesOf(this.cluster, node).pid).then(
      ({ mtimeMs }) => mtimeMs,
      () => Number.POSITIVE_INFINITY,
    )
  }

  /** A table of all that was timed. */
  timeTable(): string {
    const on = this.firstOn
    const rows = this.times.map(({ what, took, ended }) => [
      what,
      formatDuration(took),
      ended > on ? formatDuration(ended - on) : '',
    ])
    return formatTable(['step', 'took', 'done after power-on'], rows)
  }
}
