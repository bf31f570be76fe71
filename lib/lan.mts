// Starting, asking and stopping the LAN switch, which carries the machines' own network. There is
// one process a cluster, in the background, which outlives the script that starts it.
import { createSocket } from 'node:dgram'
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
  /** `age`: seconds since the last frame from the address. */
  addresses: { mac: string; port: number; age: number }[]
}

/** A datagram with this text is answered with the status; as a frame it would be too short. */
export const statusQuery = Buffer.from('lan-status?')

const startTimeout = 30
const stopTimeout = 10

type Place = Pick<Cluster, 'path'>

export function pidFileOf(cluster: Place): string {
  return cluster.path('run', 'lan-switch.pid')
}

/**
 * Makes sure that the switch runs, on the port and with the machines of cluster.env. A running one
 * reads them again.
 *
 * @throws StepError if its port is taken, or it ends at once
 */
export async function ensureLanSwitch(
  cluster: Cluster,
): Promise<{ pid: number; alreadyRunning: boolean }> {
  const lock = cluster.path('run', 'lan-switch.lock')
  const ensure = async () => {
    const running = await runningPid(cluster)
    if (running !== undefined) {
      // A switch on another port, or one that hangs, is restarted; machines do not notice.
      const isOnPort = !(await isPortFree('udp', cluster.settings.LAN_SWITCH_PORT))
      if (isOnPort) process.kill(running, 'SIGHUP')
      if (isOnPort && (await becomes(() => isUpToDate(cluster, running), 3))) {
        return { pid: running, alreadyRunning: true }
      }
      await endSwitch(cluster, running)
    }
    return { pid: await startSwitch(cluster), alreadyRunning: false }
  }
  return withLock(lock, 'starting the LAN switch', ensure, { wait: startTimeout })
}

async function startSwitch(cluster: Cluster): Promise<number> {
  const port = cluster.settings.LAN_SWITCH_PORT
  await assertFree([{ transport: 'udp', port, variable: 'LAN_SWITCH_PORT' }])
  await mkdir(cluster.path('logs'), { recursive: true })
  const log = 'logs/lan-switch.log'
  const command = [process.execPath, 'lib/launch.mjs', programOf(cluster)]
  // In a process group of its own, so that no Ctrl-C reaches it.
  const shell = $({ cwd: cluster.root, detached: true })
  const pid = Number((await shell`${command} </dev/null >>${log} 2>&1 & echo $!`).stdout)
  // It answers a moment before its pid file exists, without which nothing could stop it.
  const isUp = async () => (await runningPid(cluster)) === pid && isUpToDate(cluster, pid)
  await becomes(async () => (await isGone(pid)) || (await isUp()), startTimeout)
  if (await isUp()) return pid
  const ended = await isGone(pid)
  if (!ended) process.kill(pid, 'SIGKILL')
  throw new StepError(`the LAN switch ${ended ? 'ended at once' : 'does not answer'}`, {
    output: lastLines(await readFile(cluster.path(log), 'utf8'), 5),
    log: cluster.path(log),
  })
}

/**
 * Stops the switch. Machines keep running, and are connected again once it is started again.
 *
 * @returns whether it was running
 */
export async function stopLanSwitch(cluster: Place): Promise<boolean> {
  const pid = await runningPid(cluster)
  if (pid !== undefined) await endSwitch(cluster, pid)
  return pid !== undefined
}

async function endSwitch(cluster: Place, pid: number): Promise<void> {
  process.kill(pid, 'SIGTERM')
  if (await becomes(() => isGone(pid), stopTimeout)) return
  if ((await runningPid(cluster)) === pid) process.kill(pid, 'SIGKILL')
  await becomes(() => isGone(pid), stopTimeout)
}

/**
 * Asks the switch for its status.
 *
 * @param timeout seconds to wait for the answer
 * @returns undefined if none of this cluster answers
 */
export function lanSwitchStatus(cluster: Cluster, timeout = 2): Promise<SwitchStatus | undefined> {
  return new Promise((resolve) => {
    const socket = createSocket('udp4')
    const finish = (status?: SwitchStatus) => {
      clearTimeout(timer)
      socket.removeAllListeners().on('error', () => {})
      socket.close()
      resolve(status?.root === cluster.root ? status : undefined)
    }
    const timer = setTimeout(finish, timeout * 1000)
    socket.once('error', () => finish())
    socket.once('message', (text) => {
      try {
        finish(JSON.parse(text.toString()))
      } catch {
        finish()
      }
    })
    // A connected socket gets an error at once if nothing listens there.
    socket.connect(cluster.settings.LAN_SWITCH_PORT, '127.0.0.1', () => socket.send(statusQuery))
  })
}

async function isUpToDate(cluster: Cluster, pid: number): Promise<boolean> {
  const status = await lanSwitchStatus(cluster, 1)
  const wanted = cluster.nodes.map(({ lanPort }) => lanPort)
  return status?.pid === pid && wanted.every((port) => status.ports.includes(port))
}

/** Our switch: the absolute path of its program tells it from another checkout's. */
function runningPid(cluster: Place): Promise<number | undefined> {
  return pidFrom(pidFileOf(cluster), [programOf(cluster)])
}

function programOf(cluster: Place): string {
  return cluster.path('lib', 'lan-switch.mts')
}
