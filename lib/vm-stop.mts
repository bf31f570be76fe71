// Stopping a machine, by stronger and stronger means. Only ever our own.
import type { Cluster, Node } from './cluster.mts'
import { StepError } from './errors.mts'
import { withLock } from './lock.mts'
import { isGone } from './processes.mts'
import { Qmp } from './qmp.mts'
import { filesOf, isRunning, machineState } from './vm.mts'
import { becomes } from './wait.mts'

/** How a machine ended, from best to worst. */
export type Ending = 'not running' | 'powered off' | 'quit' | 'killed'

export type Stopped = { ended: Ending; seconds: number }

/** One way to end a machine. */
export interface Attempt {
  /** What is being done, for the status line. */
  text: string
  /** How the machine ended if this works. */
  ended: Exclude<Ending, 'not running'>
  /** Gets the pid of the machine's QEMU. If it fails, the next attempt follows at once. */
  ask(pid: number): unknown
  /** How long the machine may take, and after how long it is asked again (once by default). */
  seconds: number
  askAgain?: number
}

/** The power button: the machine's system powers off, unless it is early in its boot. */
export function powerButton(cluster: Cluster, node: Node, seconds: number): Attempt {
  // A machine whose QEMU does not answer may still be on its way down.
  const ask = () => qmp(cluster, node, 'system_powerdown').catch(() => {})
  return { text: 'power button pressed', ended: 'powered off', ask, seconds, askAgain: 15 }
}

/** QEMU writes out what it holds and ends, as if the plug were pulled; else its process is killed. */
export function unplug(cluster: Cluster, node: Node): Attempt[] {
  const quit = () => qmp(cluster, node, 'quit')
  const kill = (pid: number) => process.kill(pid, 'SIGKILL')
  return [
    { text: 'switched off', ended: 'quit', ask: quit, seconds: 10 },
    { text: 'QEMU does not quit: killed', ended: 'killed', ask: kill, seconds: 10 },
  ]
}

/**
 * Stops a machine: each attempt in turn until one works. A machine that is being installed has
 * nothing to save, so its system is not asked.
 *
 * @param options.attempts by default the power button for STOP_TIMEOUT seconds, then `unplug`
 * @param options.atOnce does not ask its system either: the contents of the disk are of no use
 * @param options.report gets the text of each attempt
 * @throws StepError if even killing does not help; the signal's reason
 */
export async function stopMachine(
  cluster: Cluster,
  node: Node,
  options: {
    attempts?: Attempt[]
    atOnce?: boolean
    report?: (text: string) => void
    signal?: AbortSignal
  } = {},
): Promise<Stopped> {
  const { atOnce = false, report = () => {}, signal } = options
  if (!(await isRunning(cluster, node))) return { ended: 'not running', seconds: 0 }
  const { lock, qemuLog } = filesOf(cluster, node)
  const button = powerButton(cluster, node, cluster.settings.STOP_TIMEOUT)
  const all = options.attempts ?? [button, ...unplug(cluster, node)]
  const started = performance.now()

  const stop = async (): Promise<Ending> => {
    const found = await machineState(cluster, node)
    if (found.state === 'stopped') return 'not running'
    const { pid, mode } = found
    const attempts = all.filter(
      ({ ended }) => ended !== 'powered off' || (mode === 'boot' && !atOnce),
    )
    for (const { text, ended, ask, seconds, askAgain = seconds } of attempts) {
      report(text)
      for (let left = seconds; left > 0; left -= askAgain) {
        // Checked each time: the pid has to be this machine's QEMU still.
        const still = await machineState(cluster, node)
        let failed = false
        if (still.state === 'running' && still.pid === pid) {
          try {
            await ask(pid)
          } catch {
            failed = true
          }
        }
        signal?.throwIfAborted()
        const time = failed ? 0 : Math.min(askAgain, left)
        if (await becomes(() => isGone(pid), time, signal)) return ended
        if (failed) break
      }
    }
    throw new StepError(`${node.name} cannot be stopped: its QEMU does not end`, {
      command: `kill -9 ${pid}`,
      log: qemuLog,
    })
  }
  const wait = Math.min(10, cluster.settings.STOP_TIMEOUT)
  const waiting = { wait, ...(signal ? { signal } : {}) }
  const ended = await withLock(lock, `stopping ${node.name}`, stop, waiting)
  return { ended, seconds: (performance.now() - started) / 1000 }
}

/** @throws StepError if QEMU does not answer; whether it obeys is seen by its end */
async function qmp(cluster: Cluster, node: Node, command: string): Promise<void> {
  const connection = await Qmp.connect(filesOf(cluster, node).qmp, { timeout: 5 })
  try {
    const { status } = (await connection.execute('query-status')) as { status: string }
    // A machine that a killed snapshot has left paused would not notice the power button.
    if (status === 'paused' && command !== 'quit') await connection.execute('cont')
    await connection.execute(command)
  } catch {
    // A QEMU that quits may close the connection before it answers.
  } finally {
    connection.close()
  }
}
