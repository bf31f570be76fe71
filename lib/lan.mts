// Starts, asks and stops a cluster's LAN switch, a background process which outlives these scripts.
import { createSocket } from 'node:dgram'
import { once } from 'node:events'
import { mkdir, readFile } from 'node:fs/promises'
import { $ } from 'zx/core'
import type { Cluster } from './cluster.mts'
import { lastLines, StepError } from './errors.mts'
import { withLock } from './lock.mts'
import { assertFree, isGone, isPortFree, pidFrom } from './processes.mts'
import { becomes } from './wait.mts'

/** What the switch answers to `statusQuery`. */
export interface SwitchStatus {
  pid: number
  /** The project's folder: tells one cluster's switch from another's. */
  root: string
  /** UDP port of the switch, and those of the machines it accepts frames from. */
  port: number
  ports: number[]
  /** Frames: `refused` came from a port that is not a machine's; `dropped` had nowhere to go. */
  counters: Record<'received' | 'forwarded' | 'flooded' | 'refused' | 'dropped', number>
  /** How many addresses it knows. */
  addresses: number
}

/** A datagram with this text is answered with the status; as a frame it would be too short. */
export const statusQuery = Buffer.from('lan-status?')

const [startTimeout, stopTimeout] = [30, 10] // seconds

type Place = Pick<Cluster, 'path'>
export const pidFileOf = ({ path }: Place) => path('run', 'lan-switch.pid')
/** Its absolute path tells our switch from another checkout's. */
const programOf = ({ path }: Place) => path('lib', 'lan-switch.mts')
const runningPid = (cluster: Place) => pidFrom(pidFileOf(cluster), [programOf(cluster)])

/**
 * Makes sure that the switch runs, on the port and with the machines of cluster.env; a running one
 * reads them again. Throws a StepError if its port is taken, or it ends at once.
 */
export async function ensureLanSwitch(cluster: Cluster) {
  const ensure = async () => {
    const pid = await runningPid(cluster)
    // A switch on another port, or one that hangs, is restarted; machines do not notice.
    if (pid !== undefined && !(await isPortFree('udp', cluster.settings.LAN_SWITCH_PORT))) {
      process.kill(pid, 'SIGHUP')
      if (await becomes(() => isUpToDate(cluster, pid), 3)) return { pid, alreadyRunning: true }
    }
    await stopLanSwitch(cluster)
    return { pid: await startSwitch(cluster), alreadyRunning: false }
  }
  const lock = cluster.path('run', 'lan-switch.lock')
  return withLock(lock, 'starting the LAN switch', ensure, { wait: startTimeout })
}

async function startSwitch(cluster: Cluster): Promise<number> {
  const port = cluster.settings.LAN_SWITCH_PORT
  await assertFree([{ transport: 'udp', port, variable: 'LAN_SWITCH_PORT' }])
  await mkdir(cluster.path('logs'), { recursive: true })
  const log = cluster.path('logs', 'lan-switch.log')
  const command = [process.execPath, 'lib/launch.mjs', programOf(cluster)]
  // In a process group of its own, so that no Ctrl-C reaches it.
  const $$ = $({ cwd: cluster.root, detached: true })
  const started = await $$`${command} </dev/null >>logs/lan-switch.log 2>&1 & echo $!`
  const pid = Number(started.stdout)
  // It answers a moment before its pid file exists, without which nothing could stop it.
  const isUp = async () => (await runningPid(cluster)) === pid && isUpToDate(cluster, pid)
  await becomes(async () => (await isGone(pid)) || (await isUp()), startTimeout)
  if (await isUp()) return pid
  const ended = await isGone(pid)
  if (!ended) process.kill(pid, 'SIGKILL')
  throw new StepError(`the LAN switch ${ended ? 'ended at once' : 'does not answer'}`, {
    output: lastLines(await readFile(log, 'utf8'), 5),
    log,
  })
}

/** Stops the switch; started again, it connects the machines again. @returns whether it ran */
export async function stopLanSwitch(cluster: Place): Promise<boolean> {
  const pid = await runningPid(cluster)
  if (pid === undefined) return false
  process.kill(pid, 'SIGTERM')
  if (await becomes(() => isGone(pid), stopTimeout)) return true
  if ((await runningPid(cluster)) === pid) process.kill(pid, 'SIGKILL')
  await becomes(() => isGone(pid), stopTimeout)
  return true
}

/** Asks the switch for its status; undefined if none of this cluster answers in time (seconds). */
export async function lanSwitchStatus(cluster: Cluster, timeout = 2) {
  const socket = createSocket('udp4')
  try {
    const answer = once(socket, 'message', { signal: AbortSignal.timeout(timeout * 1000) })
    // A connected socket gets an error at once if nothing listens there.
    socket.connect(cluster.settings.LAN_SWITCH_PORT, '127.0.0.1', () => socket.send(statusQuery))
    const status: SwitchStatus = JSON.parse(String((await answer)[0]))
    return status.root === cluster.root ? status : undefined
  } catch {
    return undefined
  } finally {
    socket.on('error', () => {}).close()
  }
}

async function isUpToDate(cluster: Cluster, pid: number): Promise<boolean> {
  const status = await lanSwitchStatus(cluster, 1)
  return status?.pid === pid && cluster.nodes.every((node) => status.ports.includes(node.lanPort))
}
