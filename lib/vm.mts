// A machine as a process: QEMU in the background, which continues when the script has ended; and
// its disk and UEFI variables as files.
import { constants, existsSync } from 'node:fs'
import { chmod, copyFile, mkdir, readFile, rename, rm, stat, statfs } from 'node:fs/promises'
import { basename, dirname, join, relative } from 'node:path'
import { $ } from 'zx/core'
import type { Cluster, Node } from './cluster.mts'
import { lastLines, StepError } from './errors.mts'
import { privateFolder } from './files.mts'
import type { Host } from './host.mts'
import { ensureLanSwitch } from './lan.mts'
import { withLock } from './lock.mts'
import { knownProblem } from './problems.mts'
import { assertFree, commandLine, isGone, type Port, pidFrom } from './processes.mts'
import { filesOf, type MachineFiles, qemuArguments } from './qemu.mts'
import { Qmp } from './qmp.mts'
import { becomes } from './wait.mts'

export { filesOf, type MachineFiles }

export type MachineState =
  | { state: 'running'; pid: number; mode: 'boot' | 'install' }
  | { state: 'stopped' }

/** Seconds. QEMU answers after 0.1 s; on a busy computer with three machines starting, later. */
const answerTimeout = 60
/** What an installed machine with its container images takes, in GB. */
const installedSize = 6

/**
 * Whether the machine runs. The pid file alone proves nothing: the process has to be the QEMU that
 * was started with this very pid file.
 *
 * @throws StepError if the process may be it: its disk must not be taken for idle
 */
export async function machineState(cluster: Cluster, node: Node): Promise<MachineState> {
  const files = filesOf(cluster, node)
  const pid = await pidFrom(files.pid, ['qemu-system-', ' -pidfile '])
  const line = pid === undefined ? undefined : await commandLine(pid)
  if (pid === undefined || line === undefined) return { state: 'stopped' }
  const shown = line.match(/ -pidfile (.*?\.pid)(?= -|$)/s)?.[1] ?? ''
  if (shown !== files.pid) {
    // Another spelling of our path (a link, capitals on macOS) or another checkout's machine.
    const [theirs, ours] = await Promise.all(
      [shown, files.pid].map((path) => stat(path).catch(() => undefined)),
    )
    if (!theirs && basename(shown) === basename(files.pid)) {
      throw new StepError(
        `process ${pid} may be ${node.name}: it is a QEMU with a pid file ${shown}`,
        {
          command: `ps -ww -p ${pid}`,
          hint: `if it is not, remove ${files.pid}`,
        },
      )
    }
    if (theirs?.ino !== ours?.ino || theirs?.dev !== ours?.dev) return { state: 'stopped' }
  }
  const installing = line.includes(basename(files.partialDisk))
  return { state: 'running', pid, mode: installing ? 'install' : 'boot' }
}

export async function isRunning(cluster: Cluster, node: Node): Promise<boolean> {
  return (await machineState(cluster, node)).state === 'running'
}

/** The ports that a machine opens on this computer. */
export function portsOf(cluster: Cluster, node: Node): Port[] {
  const suffix = node.name.replaceAll('-', '_')
  const ports: Port[] = [
    { transport: 'tcp', port: node.sshPort, variable: `SSH_PORT_${suffix}` },
    { transport: 'udp', port: node.lanPort, variable: 'LAN_SWITCH_PORT' },
  ]
  if (node === cluster.controlPlane) {
    ports.push({ transport: 'tcp', port: cluster.settings.API_PORT, variable: 'API_PORT' })
  }
  return ports
}

/**
 * Checks that machines can open their ports. Those of running machines are not checked.
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

/** Creates the folders that QEMU writes to. run/ is private: QMP controls a machine. */
export async function prepareFolders(cluster: Cluster): Promise<void> {
  for (const name of ['images', 'logs']) await mkdir(cluster.path(name), { recursive: true })
  await privateFolder(cluster.path('run'))
}

/**
 * Starts a machine from its installed disk, and the LAN switch if it does not run. A machine that
 * runs is left alone; one that is paused continues. Returns when QEMU answers, before the boot.
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
  const files = filesOf(cluster, node)
  const found = await machineState(cluster, node)
  if (found.state === 'running') {
    if (found.mode === 'install') {
      const hint = 'wait until the installation has ended'
      const reason = `${node.name} is being installed (pid ${found.pid})`
      throw new StepError(reason, { hint, log: files.installLog })
    }
    await ensureLanSwitch(cluster)
    await resumeIfPaused(files.qmp)
    return { pid: found.pid, alreadyRunning: true }
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

/** Continues a machine that is paused, by a snapshot that was killed or a disk that was full. */
async function resumeIfPaused(socket: string): Promise<void> {
  // A QEMU that serves another client at the moment is that client's to resume.
  const qmp = await Qmp.connect(socket, { timeout: 5 }).catch(() => undefined)
  if (!qmp) return
  const { status } = (await qmp.execute('query-status')) as { status: string }
  if (status === 'paused' || status === 'io-error') await qmp.execute('cont')
  qmp.close()
}

async function launch(cluster: Cluster, node: Node, host: Host): Promise<number> {
  const files = filesOf(cluster, node)
  // The console output of the previous run is often what explains why it ended.
  await rename(files.consoleLog, `${files.consoleLog}.1`).catch(() => {})
  const args = qemuArguments({ cluster, node, host, mode: { kind: 'boot' } })
  const log = relative(cluster.root, files.qemuLog)
  // In a process group of its own, so that no Ctrl-C reaches it.
  const shell = $({ cwd: cluster.root, detached: true })
  const started =
    await shell`(umask 077; cd run && exec ${host.qemu.path} ${args}) </dev/null >${log} 2>&1 & echo $!`
  const pid = Number(started.stdout)

  const settled = async () => (await isGone(pid)) || (await answers(files.qmp))
  const inTime = await becomes(settled, answerTimeout)
  const ended = await isGone(pid)
  if (inTime && !ended) return pid
  if (!ended) process.kill(pid, 'SIGKILL')
  const output = lastLines(await readFile(files.qemuLog, 'utf8'), 10)
  const known = knownProblem(host.qemu.path, output)
  const reason = ended ? 'ended at once' : `did not answer in ${answerTimeout} s`
  const hint =
    host.accel === 'tcg'
      ? {}
      : { hint: `if ${host.accel} does not work here: QEMU_ACCEL=tcg (slow)` }
  throw new StepError(`QEMU of ${node.name} ${reason}${known ? `: ${known.reason}` : ''}`, {
    output,
    log: files.qemuLog,
    ...(known?.hint ? { hint: known.hint } : hint),
  })
}

async function answers(socket: string): Promise<boolean> {
  const qmp = await Qmp.connect(socket, { timeout: 5 }).catch(() => undefined)
  qmp?.close()
  return qmp !== undefined
}

/** Whether the machine has a disk with an installed system. */
export function hasDisk(cluster: Cluster, node: Node): boolean {
  return existsSync(filesOf(cluster, node).disk)
}

/**
 * Checks that there is room for new disks. They grow as they fill: what counts is the size of an
 * installed machine, not the one that it sees.
 *
 * @param free returns the free bytes of a folder
 * @returns a warning instead of the error on macOS, which does not count space that it can purge
 * @throws StepError with the needed and the free amount
 */
export async function assertDiskSpace(
  cluster: Cluster,
  nodes: readonly Node[],
  free: (folder: string) => Promise<number> = freeBytes,
  os: NodeJS.Platform = process.platform,
): Promise<string | undefined> {
  const folder = cluster.path('images')
  const needed = nodes.length * Math.min(cluster.settings.DISK_SIZE, installedSize)
  const available = (await free(folder)) / 2 ** 30
  if (available >= needed) return undefined
  const names = nodes.map(({ name }) => name).join(', ')
  const amounts = `${needed} GB, ${available.toFixed(1)} GB are free`
  const reason = `not enough disk space: ${names} ${nodes.length > 1 ? 'need' : 'needs'} ${amounts}`
  if (os === 'darwin') return `${reason}; macOS may free more by itself`
  throw new StepError(reason, { hint: `free space on the file system of ${folder}` })
}

/** Free bytes of the file system of a folder, which need not exist yet. */
export async function freeBytes(folder: string): Promise<number> {
  const { bavail, bsize } = await statfs(existsSync(folder) ? folder : dirname(folder))
  return bavail * bsize
}

/**
 * Creates the machine's UEFI variables from the firmware's template. Existing ones are kept, unless
 * their size differs: a firmware of another size could not use them. (They contain nothing that the
 * machine needs: it boots from the path for removable media.)
 *
 * @param options.fresh never keep: for an installation
 */
export async function prepareEfiVars(
  cluster: Cluster,
  node: Node,
  host: Host,
  options: { fresh?: boolean } = {},
): Promise<void> {
  const { efiVars } = filesOf(cluster, node)
  const template = host.firmware.vars
  const existing = options.fresh ? undefined : await stat(efiVars).catch(() => undefined)
  if (existing) {
    // A qcow2 file grows, so its size means nothing.
    if (template.format === 'qcow2' || existing.size === (await stat(template.path)).size) return
    await rename(efiVars, `${efiVars}.old`)
  }
  await mkdir(dirname(efiVars), { recursive: true })
  const temporary = join(dirname(efiVars), `.${basename(efiVars)}.tmp-${process.pid}`)
  try {
    await copyFile(template.path, temporary, constants.COPYFILE_FICLONE)
    // The template is read-only in some packages.
    await chmod(temporary, 0o600)
    await rename(temporary, efiVars)
  } finally {
    await rm(temporary, { force: true })
  }
}
