// What a row of the fault table is, and the place in which it happens: a checkout of its own, next to
// things of others that must stay as they are.
import { type ChildProcess, spawn } from 'node:child_process'
import { createHash, randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { cp, readdir, readFile } from 'node:fs/promises'
import { constants } from 'node:os'
import { basename, join } from 'node:path'
import { createInterface } from 'node:readline'
import { setTimeout as sleep } from 'node:timers/promises'
import { loadCluster } from '../../lib/cluster.mts'
import { isPortFree } from '../../lib/processes.mts'
import { machineState, portsOf } from '../../lib/vm.mts'
import { becomes } from '../../lib/wait.mts'
import type { Checkout, Outcome } from '../checkout.mts'
import { makeStagedCheckout } from '../kubernetes/prepared.mts'

/** One row of the table. The runner brings it about and checks all of it. */
export interface Fault {
  /** Names it in one phrase. */
  name: string
  /** What is done. */
  done: string
  /** What must hold afterwards, besides exit status, message, second run and what no row leaves. */
  holds: string
  /** Status of the script that meets the fault; 137: it was killed. */
  exit: number
  /** Parts of what it prints: the reason, the hint. */
  says?: readonly string[]
  /** Files that may be left until the second run, after which none of them is there. */
  leaves?: RegExp
  /** The second run, which finishes the job: with status 0. */
  again?: readonly string[]
  /** Machines that run in the end, which the runner checks and then switches off. */
  runs?: readonly string[]
  /** The integration test that proves more of the same. */
  shortFormOf?: string
  /** Why it cannot be tried here. */
  skip?: string | boolean
  /** Variables of its cluster.env. */
  settings?: Record<string, string | number>
  /** It begins with certificates, kubeconfigs, encryption key and staged machines. */
  keys?: boolean
  /** Brings it about. @returns how the script ended that met it */
  inject(place: Place): Promise<Outcome>
  /** Takes the cause away before the second run. */
  repair?(place: Place): Promise<unknown>
  /** Checks what `holds` says. */
  check?(place: Place): Promise<unknown>
}

/** A script that was started and may be met by a fault on its way. */
export interface Running {
  pid: number
  /** What it has printed so far, on both streams. */
  said(): string
  kill(signal: NodeJS.Signals): void
  outcome: Promise<Outcome>
}

const mark = 'FAULT_PLACE'
let prepared: Promise<{ root: string }> | undefined
const prepare = () => makeStagedCheckout().then(({ checkout }) => checkout)

/** The folder of one row, and all processes that were started in it. */
export class Place {
  readonly checkout: Checkout
  /** In the environment of every process of the row, by which they are found. */
  private readonly id = randomBytes(6).toString('hex')
  private readonly endings: (() => Promise<unknown>)[] = []
  /** Put before each command: it then runs in the mount namespace of this process. */
  private entrance: string[] = []
  /** Where files are seen as they are in that namespace. */
  private view = '/'
  /** For all scripts of the row. */
  readonly env: Record<string, string> = { [mark]: this.id }

  readonly kept: boolean

  /** @param options.kept the checkout belongs to several rows */
  constructor(checkout: Checkout, { kept = false } = {}) {
    this.checkout = checkout
    this.kept = kept
  }

  get cluster() {
    return loadCluster({ root: this.checkout.root, env: {} })
  }

  path(...parts: string[]): string {
    return this.checkout.path(...parts)
  }

  /** Has something done when the row is over, last things first. */
  atEnd(work: () => Promise<unknown>): void {
    this.endings.unshift(work)
  }

  /** @returns which of the endings failed, and why */
  async end(): Promise<string[]> {
    // What a row that failed has left running must not work beside the endings.
    if (this.kept) await this.powerCut()
    const failed: string[] = []
    for (const work of this.endings) await work().catch((error) => failed.push(`${error}`))
    await this.powerCut()
    if (!this.kept) await this.checkout.remove()
    return failed
  }

  /** Runs a script of bin/ to its end. */
  async run(command: readonly string[], env: Record<string, string> = {}): Promise<Outcome> {
    return this.start(command, env).outcome
  }

  /** Starts a script of bin/, in a process group of its own as a shell does, for five minutes at most. */
  start([program = '', ...args]: readonly string[], env: Record<string, string> = {}): Running {
    const file = program.startsWith('bin/') ? this.path(program) : program
    const [first = '', ...words] = [...this.entrance, file, ...args]
    const child = spawn(first, words, {
      cwd: this.checkout.root,
      env: { ...process.env, ...this.env, ...env },
      stdio: ['ignore', 'pipe', 'pipe'],
      detached: true,
    })
    return running(child)
  }

  /**
   * Starts a script and kills its process group when something has come about; commands of it that
   * have groups of their own live on, as they would.
   */
  async killWhen(
    command: readonly string[],
    when: (said: string) => boolean | Promise<boolean>,
    signal: NodeJS.Signals = 'SIGKILL',
  ): Promise<Outcome> {
    const script = this.start(command)
    let ended = false
    const end = () => {
      ended = true
    }
    script.outcome.then(end, end)
    while (!(await when(script.said())) && !ended) await sleep(3)
    if (ended) throw new Error(`${command.join(' ')} ended too soon: ${script.said()}`)
    script.kill(signal)
    return script.outcome
  }

  /** Kills all processes of the row at once, as the end of this computer would. */
  async powerCut(): Promise<void> {
    for (let left = await this.processes(); left.length > 0; left = await this.processes()) {
      for (const { pid } of left) {
        try {
          process.kill(pid, 'SIGKILL')
        } catch {
          // It has just ended.
        }
      }
      await sleep(20)
    }
  }

  /** Mounts a small file system over a folder of the checkout, for all that runs from now on. */
  async mount(folder: string, ...options: string[]): Promise<void> {
    const text = `mkdir -p "$1" && mount ${options.join(' ')} "$1" && echo mounted && read -r _`
    const root = process.getuid?.() === 0
    const user = root ? [] : ['--user', '--map-root-user']
    const command = [...user, '--mount', 'sh', '-c', text, 'sh', this.path(folder)]
    const holder = spawn('unshare', command, { stdio: ['pipe', 'pipe', 'inherit'] })
    const ended = once(holder, 'exit')
    await Promise.race([
      once(createInterface({ input: holder.stdout }), 'line'),
      ended.then(() => Promise.reject(new Error(`nothing could be mounted at ${folder}`))),
    ])
    const enter = root ? [] : ['--user', '--preserve-credentials']
    // nsenter changes to the root folder.
    const back = ['sh', '-c', 'cd "$0" && exec "$@"', this.checkout.root]
    this.entrance = ['nsenter', ...enter, '--mount', `--target=${holder.pid}`, '--', ...back]
    this.view = `/proc/${holder.pid}/root`
    this.atEnd(async () => {
      holder.stdin.end()
      await ended
    })
  }

  /** Mounts the same again with other options: `size=10m`, `rw`. */
  async remount(folder: string, options: string): Promise<void> {
    const outcome = await this.run(['mount', '-o', `remount,${options}`, this.path(folder)])
    if (outcome.exitCode !== 0) throw new Error(outcome.stderr)
  }

  /** A file as the scripts of this row see it. */
  seen(...parts: string[]): string {
    return join(this.view, this.path(...parts))
  }

  /** A checksum of all files in folders, and of their names. */
  async contentOf(...folders: string[]): Promise<string> {
    const hash = createHash('sha256')
    for (const top of folders) {
      const options = { recursive: true, withFileTypes: true } as const
      const entries = await readdir(this.seen(top), options).catch(() => [])
      const files = entries.filter((entry) => entry.isFile())
      for (const file of files.map((entry) => join(entry.parentPath, entry.name)).sort()) {
        hash.update(`${file}\0`).update(await readFile(file))
      }
    }
    return hash.digest('hex')
  }

  /** Puts keys, kubeconfigs and staged machines there; all rows get the same. */
  async makeKeys(): Promise<void> {
    prepared ??= prepare()
    const { root } = await prepared
    for (const name of ['tls', 'cloud-init', 'configs', 'cluster.env']) {
      await cp(join(root, name), this.path(name), { recursive: true, force: true })
    }
  }

  /** Processes that the row has started and that are still there. */
  async processes(): Promise<{ pid: number; line: string }[]> {
    const found: { pid: number; line: string }[] = []
    for (const pid of (await readdir('/proc')).filter((name) => /^\d+$/.test(name)).map(Number)) {
      const environment = await readFile(`/proc/${pid}/environ`, 'utf8').catch(() => '')
      if (!environment.includes(`${mark}=${this.id}`)) continue
      const line = await readFile(`/proc/${pid}/cmdline`, 'utf8').catch(() => '')
      if (line) found.push({ pid, line: line.replaceAll('\0', ' ').trim().slice(0, 200) })
    }
    return found
  }

  /**
   * What is still there of the row and should not be: processes, ports, sockets, locks, files that
   * were not finished. What is just ending gets time.
   *
   * @param allowed.files that may be there
   * @param allowed.machines whether machines may run, and with them the LAN switch
   */
  async leftovers(allowed: { files?: RegExp | undefined; machines?: boolean } = {}) {
    const processes = async () => {
      const found = (await this.processes()).map(({ pid, line }) => `${pid} ${line}`)
      const isMachine = /qemu-system-.* -name |lib\/lan-switch\.mts|esbuild --service/
      return allowed.machines ? found.filter((line) => !isMachine.test(line)) : found
    }
    // (On Node 20, tsx has a process of its own beside the LAN switch.)
    await becomes(async () => (await processes()).length === 0, 10)
    const left = await processes()
    for (const file of await this.unfinished()) if (!allowed.files?.test(file)) left.push(file)
    if (allowed.machines) return left
    const run = await readdir(this.seen('run')).catch(() => [])
    left.push(...run.filter((name) => /\.(qmp|console|ssh)$/.test(name)))
    const { cluster } = this
    for (const node of cluster.nodes) {
      const found = await machineState(cluster, node).catch(() => ({ state: 'unknown' }))
      if (found.state !== 'stopped') left.push(`${node.name} runs`)
      for (const { transport, port } of portsOf(cluster, node)) {
        if (!(await isPortFree(transport, port))) left.push(`${transport} port ${port}`)
      }
    }
    return left
  }

  /** Machines that run, by name. */
  async running(): Promise<string[]> {
    const { cluster } = this
    const states = cluster.nodes.map(async (node) => {
      return (await machineState(cluster, node)).state === 'running' ? [node.name] : []
    })
    return (await Promise.all(states)).flat()
  }

  /** Locks and files that are not finished. */
  private async unfinished(): Promise<string[]> {
    const name = /\.partial$|\.tmp-|\.lock(\.|$)|\.new$|\.former$|\.restoring$|-install$/
    const found: string[] = []
    for (const top of ['tls', 'configs', 'cloud-init', 'images', 'run', 'snapshots', 'backups']) {
      const folder = this.seen(top)
      const entries = await readdir(folder, { recursive: true }).catch(() => [])
      const odd = entries.filter((entry) => name.test(basename(entry)))
      found.push(...odd.map((entry) => join(top, entry)))
    }
    return found
  }
}

function running(child: ChildProcess): Running {
  let [stdout, stderr] = ['', '']
  child.stdout?.on('data', (text) => {
    stdout += text
  })
  child.stderr?.on('data', (text) => {
    stderr += text
  })
  const { pid = 0 } = child
  const kill = (signal: NodeJS.Signals) => {
    try {
      // 0 would be the group of this program.
      if (pid > 0) process.kill(-pid, signal)
    } catch {
      // It has just ended.
    }
  }
  const limit = setTimeout(() => kill('SIGKILL'), 300_000)
  const closed = once(child, 'close')
  // If it cannot be started, `outcome` says so.
  closed.catch(() => {})
  const exit = once(child, 'exit').finally(() => clearTimeout(limit))
  const outcome = exit.then(async ([status, signal]) => {
    // Commands that live on have the same pipes.
    await Promise.race([closed, sleep(signal ? 50 : 2000)])
    const exitCode = status ?? 128 + constants.signals[signal as NodeJS.Signals]
    return { stdout, stderr, exitCode }
  })
  return { pid, said: () => stdout + stderr, kill, outcome }
}
