// Stopping a machine: asked first, then switched off, then ended. Only ever our own.
import type { Cluster, Node } from '../cluster.mts'
import { StepError } from '../errors.mts'
import { withLock } from '../lock.mts'
import { becomes } from '../wait.mts'
import { filesOf } from './machine-files.mts'
import { isGone } from './processes.mts'
import { Qmp } from './qmp.mts'
import { isRunning, machineState } from './vm.mts'

/** How a machine came to its end, from best to worst. */
export type Ending = 'not running' | 'powered off' | 'quit' | 'killed'

export interface Stopped {
  ended: Ending
  seconds: number
}

/** Seconds until the power button is pressed again: early in its boot a machine does not notice. */
const pressAgain = 15
/** Seconds for QEMU to write out what it holds and end. */
const quitTimeout = 10

/**
 * Stops a machine: its system is asked to power off and has STOP_TIMEOUT for it, then QEMU is told
 * to quit, as if the plug were pulled, and at last its process is killed. A machine that is being
 * installed has nothing to save and is told to quit at once.
 *
 * @param options.atOnce its system is not asked: what the disk holds is of no more use
 * @param options.powerOff another way to ask, such as ssh; if it fails, the power button is pressed
 * @param options.report is told what is being done
 * @throws StepError if even the last does not help; the signal's reason if it is aborted
 */
export async function stopMachine(
  cluster: Cluster,
  node: Node,
  options: {
    atOnce?: boolean
    powerOff?: () => Promise<unknown>
    report?: (text: string) => void
    signal?: AbortSignal
  } = {},
): Promise<Stopped> {
  const { signal } = options
  if (!(await isRunning(cluster, node))) return { ended: 'not running', seconds: 0 }
  const started = performance.now()
  const ended = await withLock(
    filesOf(cluster, node).lock,
    `stopping ${node.name}`,
    () => stepDown(cluster, node, options),
    { wait: quitTimeout, ...(signal ? { signal } : {}) },
  )
  return { ended, seconds: (performance.now() - started) / 1000 }
}

async function stepDown(
  cluster: Cluster,
  node: Node,
  options: Parameters<typeof stopMachine>[2] & object,
): Promise<Ending> {
  const { atOnce = false, powerOff, report = () => {}, signal } = options
  const { STOP_TIMEOUT } = cluster.settings
  const found = await machineState(cluster, node)
  if (found.state === 'stopped') return 'not running'
  const hasEnded = () => isGone(found.pid)

  if (found.mode === 'boot' && !atOnce) {
    report('asked to power off')
    const asked = await powerOff?.().then(
      () => true,
      () => false,
    )
    const until = performance.now() + STOP_TIMEOUT * 1000
    for (let press = !asked; performance.now() < until; press = true) {
      if (press) await tell(cluster, node, pressPowerButton)
      const left = (until - performance.now()) / 1000
      if (await becomes(hasEnded, Math.min(pressAgain, left), signal)) return 'powered off'
    }
    report(`still up after ${STOP_TIMEOUT} s: switched off`)
  }

  await tell(cluster, node, (qmp) => qmp.execute('quit'))
  if (await becomes(hasEnded, quitTimeout, signal)) return 'quit'

  report('QEMU does not quit: killed')
  // Looked at again at the last moment: the pid has to be that machine's QEMU still.
  const still = await machineState(cluster, node)
  if (still.state === 'running') process.kill(still.pid, 'SIGKILL')
  if (await becomes(hasEnded, quitTimeout, signal)) return 'killed'
  throw new StepError(`${node.name} cannot be stopped: its QEMU is still there`, {
    ...(still.state === 'running' ? { command: `kill -9 ${still.pid}` } : {}),
    log: filesOf(cluster, node).qemuLog,
  })
}

async function pressPowerButton(qmp: Qmp): Promise<void> {
  const status = (await qmp.execute('query-status')) as { status: string }
  // A paused machine, left by a snapshot that was interrupted, would not notice.
  if (status.status === 'paused') await qmp.execute('cont')
  await qmp.execute('system_powerdown')
}

/** Talks to QEMU if it answers; a machine that does not is what the later steps are for. */
async function tell(
  cluster: Cluster,
  node: Node,
  what: (qmp: Qmp) => Promise<unknown>,
): Promise<void> {
  let qmp: Qmp | undefined
  try {
    qmp = await Qmp.connect(filesOf(cluster, node).qmp, { timeout: 5 })
    await what(qmp)
  } catch {
    // Seen by its still running.
  } finally {
    qmp?.close()
  }
}
