// Starting, asking and stopping the switch that carries the machines' own network. It is one
// process a cluster, in the background, and outlives the script that starts it.
import { spawn } from 'node:child_process'
import { createSocket } from 'node:dgram'
import { mkdir, open, readFile } from 'node:fs/promises'
import type { Cluster } from '../cluster.mts'
import { StepError } from '../errors.mts'
import { withLock } from '../lock.mts'
import { assertFree } from '../qemu/ports.mts'
import { isGone, pidFrom } from '../qemu/processes.mts'
import { becomes } from '../wait.mts'
import type { SwitchCounters } from './learning-switch.mts'

/** What the switch answers to `statusQuery`. */
export interface SwitchStatus {
  pid: number
  /** The project's folder, to tell one cluster's switch from another's. */
  root: string
  /** UDP port of the switch, and those of the machines it accepts frames from. */
  port: number
  ports: number[]
  counters: SwitchCounters
  addresses: { mac: string; port: number; age: number }[]
}

/** A datagram with this text is answered with the status; as a frame it would be too short. */
export const statusQuery = Buffer.from('lan-status?')

const startTimeout = 30
/** To read cluster.env anew. Who is not done by then is restarted, which no machine minds. */
const rereadTimeout = 3
const stopTimeout = 10

/** Of a cluster, where its files are. */
type Place = Pick<Cluster, 'path'>

export function pidFileOf(cluster: Place): string {
  return cluster.path('run', 'lan-switch.pid')
}

/**
 * Makes sure that the switch runs, on the port and with the machines of cluster.env. One that runs
 * already reads them anew.
 *
 * @throws StepError if its port is taken, or it ends at once
 */
export async function ensureLanSwitch(
  cluster: Cluster,
): Promise<{ pid: number; alreadyRunning: boolean }> {
  const lock = cluster.path('run', 'lan-switch.lock')
  return withLock(lock, 'starting the lan switch', () => ensureOnce(cluster), {
    wait: startTimeout,
  })
}

async function ensureOnce(cluster: Cluster): Promise<{ pid: number; alreadyRunning: boolean }> {
  const running = await runningPid(cluster)
  if (running !== undefined) {
    process.kill(running, 'SIGHUP')
    if (await becomes(() => isUpToDate(cluster, running), rereadTimeout)) {
      return { pid: running, alreadyRunning: true }
    }
    // It listens on a port that cluster.env no longer names, or is stuck.
    await endSwitch(cluster, running)
  }
  return { pid: await startSwitch(cluster), alreadyRunning: false }
}

async function startSwitch(cluster: Cluster): Promise<number> {
  const port = cluster.settings.LAN_SWITCH_PORT
  await assertFree([{ transport: 'udp', port, variable: 'LAN_SWITCH_PORT' }])
  await mkdir(cluster.path('logs'), { recursive: true })
  const logFile = cluster.path('logs', 'lan-switch.log')
  const log = await open(logFile, 'a')
  const child = spawn(process.execPath, switchCommand(cluster), {
    cwd: cluster.root,
    detached: true,
    stdio: ['ignore', log.fd, log.fd],
  })
  await log.close()
  let ended = false
  child.once('error', () => {
    ended = true
  })
  child.once('exit', () => {
    ended = true
  })
  child.unref()
  const { pid } = child
  // It answers a moment before its pid file is there, without which nobody could stop it.
  const isUp = async () =>
    ended ||
    (pid !== undefined && (await runningPid(cluster)) === pid && (await isUpToDate(cluster, pid)))
  if ((await becomes(isUp, startTimeout)) && !ended && pid !== undefined) return pid
  if (!ended) child.kill('SIGKILL')
  throw new StepError(`the lan switch ${ended ? 'ended at once' : 'does not answer'}`, {
    output: (await readFile(logFile, 'utf8')).trim().split('\n').slice(-5).join('\n'),
    log: logFile,
  })
}

/**
 * Stops the switch. The machines do not mind: once it runs again their frames get through again.
 *
 * @returns whether it was running
 */
export async function stopLanSwitch(cluster: Place): Promise<boolean> {
  const pid = await runningPid(cluster)
  if (pid === undefined) return false
  await endSwitch(cluster, pid)
  return true
}

async function endSwitch(cluster: Place, pid: number): Promise<void> {
  const hasEnded = () => isGone(pid)
  process.kill(pid, 'SIGTERM')
  if (await becomes(hasEnded, stopTimeout)) return
  if ((await runningPid(cluster)) === pid) process.kill(pid, 'SIGKILL')
  await becomes(hasEnded, stopTimeout)
}

/**
 * Asks the switch how it is.
 *
 * @param timeout seconds to wait for the answer
 * @returns undefined if none of this cluster answers
 */
export function lanSwitchStatus(cluster: Cluster, timeout = 2): Promise<SwitchStatus | undefined> {
  return new Promise((resolve) => {
    const socket = createSocket('udp4')
    const give = (status?: SwitchStatus) => {
      clearTimeout(timer)
      socket.removeAllListeners().on('error', () => {})
      socket.close()
      resolve(status)
    }
    const timer = setTimeout(give, timeout * 1000)
    socket.once('error', () => give())
    socket.once('message', (text) => give(statusIn(text, cluster)))
    // Connected, it is told at once if nobody listens there.
    socket.connect(cluster.settings.LAN_SWITCH_PORT, '127.0.0.1', () => socket.send(statusQuery))
  })
}

function statusIn(text: Buffer, cluster: Cluster): SwitchStatus | undefined {
  try {
    const status = JSON.parse(text.toString()) as SwitchStatus
    return status.root === cluster.root ? status : undefined
  } catch {
    return undefined
  }
}

async function isUpToDate(cluster: Cluster, pid: number): Promise<boolean> {
  const status = await lanSwitchStatus(cluster, 1)
  const wanted = cluster.nodes.map(({ lanPort }) => lanPort)
  return status?.pid === pid && wanted.every((port) => status.ports.includes(port))
}

function runningPid(cluster: Place): Promise<number | undefined> {
  return pidFrom(pidFileOf(cluster), [programOf(cluster)])
}

function programOf(cluster: Place): string {
  return cluster.path('lib', 'lan', 'lan-switch-process.mts')
}

function switchCommand(cluster: Cluster): string[] {
  const launcher = cluster.path('lib', 'launch.mjs')
  return [launcher, programOf(cluster)]
}
