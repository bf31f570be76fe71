// A machine as a process: QEMU in the background, which runs on when the script has ended.
import { spawn } from 'node:child_process'
import { chmod, mkdir, open, readFile, rename } from 'node:fs/promises'
import { basename } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Cluster, Node } from '../cluster.mts'
import { StepError } from '../errors.mts'
import { ensureLanSwitch } from '../lan/lan-switch.mts'
import { withLock } from '../lock.mts'
import { becomes } from '../wait.mts'
import { hasDisk, prepareEfiVars } from './disk.mts'
import type { Host } from './host.mts'
import { filesOf } from './machine-files.mts'
import { assertFree, type Port, portsOf } from './ports.mts'
import { commandLine, pidFrom } from './processes.mts'
import { qemuArguments } from './qemu.mts'
import { Qmp } from './qmp.mts'

export type MachineState =
  | { state: 'running'; pid: number; mode: 'boot' | 'install' }
  | { state: 'stopped' }

/** QEMU takes some 100 ms to answer; a computer with three machines starting, longer. */
const answerTimeout = 60

/**
 * Whether the machine runs. The pid file alone is not believed: the process has to be the QEMU
 * that was started with that very pid file.
 */
export async function machineState(cluster: Cluster, node: Node): Promise<MachineState> {
  const files = filesOf(cluster, node)
  const pid = await pidFrom(files.pid, ['qemu-system-', `-pidfile ${files.pid}`])
  const line = pid === undefined ? undefined : await commandLine(pid)
  if (pid === undefined || line === undefined) return { state: 'stopped' }
  const installing = line.includes(basename(files.partialDisk))
  return { state: 'running', pid, mode: installing ? 'install' : 'boot' }
}

export async function isRunning(cluster: Cluster, node: Node): Promise<boolean> {
  return (await machineState(cluster, node)).state === 'running'
}

/**
 * Makes sure that machines can open their ports. Those of machines that run are not looked at.
 *
 * @throws StepError with every port that is taken, its variable and its holder
 */
export async function assertPortsFree(cluster: Cluster, nodes: readonly Node[]): Promise<void> {
  const ports: Port[] = []
  for (const node of nodes) {
    if (!(await isRunning(cluster, node))) ports.push(...portsOf(cluster, node))
  }
  await assertFree(ports)
}

/** Makes the folders that QEMU writes to. run/ is closed to others: QMP commands a machine. */
export async function prepareFolders(cluster: Cluster): Promise<void> {
  for (const folder of ['images', 'logs', 'run']) {
    await mkdir(cluster.path(folder), { recursive: true })
  }
  await chmod(cluster.path('run'), 0o700)
}

/**
 * Starts a machine from its installed disk, and the lan switch if that does not run yet. A machine
 * that runs already is left alone, or goes on if it stands still. Ends when QEMU answers; its
 * system has the boot still before it.
 *
 * @throws StepError if there is no disk, a port is taken, or QEMU ends; it is then not left running
 */
export async function startMachine(
  cluster: Cluster,
  node: Node,
  host: Host,
): Promise<{ pid: number; alreadyRunning: boolean }> {
  await prepareFolders(cluster)
  const purpose = `starting ${node.name}`
  return withLock(filesOf(cluster, node).lock, purpose, () => startOnce(cluster, node, host), {
    wait: answerTimeout,
  })
}

async function startOnce(cluster: Cluster, node: Node, host: Host) {
  const found = await machineState(cluster, node)
  if (found.state === 'running') {
    if (found.mode === 'boot') {
      await ensureLanSwitch(cluster)
      await resumeIfPaused(filesOf(cluster, node).qmp)
      return { pid: found.pid, alreadyRunning: true }
    }
    throw new StepError(`${node.name} is being installed (pid ${found.pid})`, {
      hint: 'wait until that has ended',
      log: filesOf(cluster, node).installLog,
    })
  }
  if (!hasDisk(cluster, node)) {
    throw new StepError(`${node.name} has no disk: images/${node.name}.qcow2 is missing`, {
      hint: `install it first: make install-${node.name}`,
    })
  }
  await assertFree(portsOf(cluster, node))
  await prepareEfiVars(cluster, node, host)
  await ensureLanSwitch(cluster)
  return { pid: await launch(cluster, node, host), alreadyRunning: false }
}

/** A machine that stands still, after a snapshot that was killed or on a full disk, goes on. */
async function resumeIfPaused(socket: string): Promise<void> {
  // QEMU that talks to somebody else just now is looked after by that one.
  const qmp = await Qmp.connect(socket, { timeout: 5 }).catch(() => undefined)
  if (!qmp) return
  const { status } = (await qmp.execute('query-status')) as { status: string }
  if (status === 'paused' || status === 'io-error') await qmp.execute('cont')
  qmp.close()
}

async function launch(cluster: Cluster, node: Node, host: Host): Promise<number> {
  const files = filesOf(cluster, node)
  // What the machine said before it went down the last time is often what one wants to know.
  await rename(files.consoleLog, `${files.consoleLog}.1`).catch(() => {})
  const log = await open(files.qemuLog, 'w', 0o600)
  const child = spawn(
    host.qemu.path,
    qemuArguments({ cluster, node, host, mode: { kind: 'boot' } }),
    { cwd: cluster.path('run'), detached: true, stdio: ['ignore', log.fd, log.fd] },
  )
  await log.close()
  let ended: string | undefined
  child.once('error', (error) => {
    ended = `could not be started: ${error.message}`
  })
  child.once('exit', (status, signal) => {
    ended ??= `ended at once, ${signal ? `by ${signal}` : `with status ${status}`}`
  })
  child.unref()

  const answers = await becomes(
    async () => ended !== undefined || (await answering(files.qmp)),
    answerTimeout,
  )
  if (answers && ended === undefined && child.pid !== undefined) return child.pid
  if (ended === undefined) child.kill('SIGKILL')
  const output = (await readFile(files.qemuLog, 'utf8')).trim().split('\n').slice(-10).join('\n')
  throw new StepError(`QEMU of ${node.name} ${ended ?? `did not answer in ${answerTimeout} s`}`, {
    output,
    hint: hintFor(output, host),
    log: files.qemuLog,
  })
}

async function answering(socket: string): Promise<boolean> {
  try {
    const qmp = await Qmp.connect(socket, { timeout: 5 })
    await qmp.execute('query-status')
    qmp.close()
    return true
  } catch {
    await sleep(50)
    return false
  }
}

const hints = [
  {
    pattern: /Failed to get .* lock/,
    hint: 'another process has this disk open: a QEMU that was started by hand, or qemu-img',
  },
  {
    pattern: /allocate memory/i,
    hint: 'this computer has too little memory for it: CONTROL_PLANE_MEM and WORKER_MEM in cluster.env',
  },
  { pattern: /PID file/, hint: 'a QEMU of this machine runs already: try again in a moment' },
]

function hintFor(output: string, host: Host): string {
  const known = hints.find(({ pattern }) => pattern.test(output))?.hint
  if (known) return known
  return host.accel === 'tcg'
    ? 'the QEMU log has its own words'
    : `if ${host.accel} does not work on this computer: QEMU_ACCEL=tcg, which is slow`
}
