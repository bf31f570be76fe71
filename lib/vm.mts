// A machine as a process, which continues when the script has ended, and its disk and UEFI variables.
import { existsSync } from 'node:fs'
import { mkdir, readFile, rename, rm, stat, statfs } from 'node:fs/promises'
import { basename, dirname, relative } from 'node:path'
import { $ } from 'zx/core'
import type { Cluster, Node } from './cluster.mts'
import { knownProblem, lastLines, StepError } from './errors.mts'
import { privateFolder, readIfThere } from './files.mts'
import { formatBytes } from './format.mts'
import type { Host } from './host.mts'
import { ensureLanSwitch } from './lan.mts'
import { withLock } from './lock.mts'
import { assertFree, commandLine, isGone, type Port, pidFrom } from './processes.mts'
import { filesOf, qemuArguments } from './qemu.mts'
import { Qmp } from './qmp.mts'
import { inspect, restoring, suspended } from './snapshots.mts'
import { becomes } from './wait.mts'

export { filesOf }

export type MachineState = { state: 'running' | 'installing'; pid: number } | { state: 'stopped' }

/** Seconds. QEMU answers after 0.1 s; on a busy computer with three machines starting, later. */
const answerTimeout = 60
/** What an installed machine with its container images takes, in GB. */
const installedSize = 6

/**
 * Whether the machine runs: whether its pid file names the QEMU that was started with that file.
 * @throws StepError if the process may be it: its disk must not be taken for idle
 */
export async function machineState(cluster: Cluster, node: Node): Promise<MachineState> {
  const { pid: file, partialDisk } = filesOf(cluster, node)
  const pid = await pidFrom(file, ['qemu-system-', ' -pidfile '])
  const line = pid && (await commandLine(pid))
  if (!pid || !line) return { state: 'stopped' }
  const shown = line.match(/ -pidfile (.*?\.pid)(?= -|$)/s)?.[1] ?? ''
  if (shown !== file) {
    // Another spelling of our path (a link, capitals on macOS) or another checkout's machine.
    const [theirs, ours] = await Promise.all(
      [shown, file].map((path) => stat(path).catch(() => undefined)),
    )
    if (!theirs && basename(shown) === basename(file)) {
      const reason = `process ${pid} may be ${node.name}: it is a QEMU with a pid file ${shown}`
      throw new StepError(reason, {
        command: `ps -ww -p ${pid}`,
        hint: `if it is not, remove ${file}`,
      })
    }
    if (theirs?.ino !== ours?.ino || theirs?.dev !== ours?.dev) return { state: 'stopped' }
  }
  return { state: line.includes(basename(partialDisk)) ? 'installing' : 'running', pid }
}

export async function isRunning(cluster: Cluster, node: Node): Promise<boolean> {
  return (await machineState(cluster, node)).state !== 'stopped'
}

/** The ports that a machine opens on this computer. */
export function portsOf(cluster: Cluster, node: Node): Port[] {
  const ssh = `SSH_PORT_${node.name.replaceAll('-', '_')}`
  const api = { transport: 'tcp', port: cluster.settings.API_PORT, variable: 'API_PORT' } as const
  return [
    { transport: 'tcp', port: node.sshPort, variable: ssh },
    { transport: 'udp', port: node.lanPort, variable: 'LAN_SWITCH_PORT' },
    ...(node === cluster.controlPlane ? [api] : []),
  ]
}

/** Throws a StepError that names each port that machines need and another program has. */
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
 * @param load loads the machine's memory, instead of a boot; it stays paused, also on an error
 * @throws StepError if there is no disk, a port is taken, or QEMU ends; it is then not left running
 */
export async function startMachine(
  cluster: Cluster,
  node: Node,
  host: Host,
  load?: () => Promise<void>,
): Promise<{ pid: number; alreadyRunning: boolean }> {
  const files = filesOf(cluster, node)
  const start = async () => {
    const found = await machineState(cluster, node)
    if (found.state === 'installing') {
      const hint = 'wait until the installation has ended'
      const reason = `${node.name} is being installed (pid ${found.pid})`
      throw new StepError(reason, { hint, log: files.installLog })
    }
    if (found.state === 'running') {
      if (load) throw new StepError(`${node.name} was started meanwhile`)
      await ensureLanSwitch(cluster)
      // Later, if it is saving its memory for a script that was killed.
      await becomes(() => answers(files.qmp), answerTimeout)
      return { pid: found.pid, alreadyRunning: true }
    }
    if (!hasDisk(cluster, node)) {
      throw new StepError(`${node.name} has no disk: images/${node.name}.qcow2 is missing`, {
        hint: `install it first: make install-${node.name}`,
      })
    }
    if (!load && existsSync(cluster.path('snapshots', suspended))) {
      throw new StepError('the machines were suspended meanwhile', { hint: 'make up' })
    }
    // The disks, keys and settings may be of different moments.
    const former = await readIfThere(cluster.path('snapshots', restoring))
    if (former !== undefined) {
      const hint = `make restore NAME=${former.trim()}\nif all disks are new: rm snapshots/${restoring}`
      throw new StepError('a restore was interrupted halfway', { hint })
    }
    await assertFree(portsOf(cluster, node))
    await prepareEfiVars(cluster, node, host)
    await ensureLanSwitch(cluster)
    const pid = await launch(cluster, node, host, load !== undefined)
    await load?.()
    return { pid, alreadyRunning: false }
  }
  await prepareFolders(cluster)
  return withLock(files.lock, `starting ${node.name}`, start, { wait: answerTimeout })
}

/**
 * Whether QEMU answers on its QMP socket; not while it serves another client. A machine that is
 * paused, by a script that was killed or a disk that was full, continues unless `paused` is wanted.
 */
export async function answers(socket: string, paused = false): Promise<boolean> {
  const qmp = await Qmp.connect(socket, { timeout: 5 }).catch(() => undefined)
  if (!qmp) return false
  try {
    const { status } = (await qmp.execute('query-status')) as { status: string }
    if (!paused && /^(paused|prelaunch|io-error)$/.test(status)) await qmp.execute('cont')
    return true
  } finally {
    qmp.close()
  }
}

async function launch(cluster: Cluster, node: Node, host: Host, paused: boolean) {
  const { consoleLog, qemuLog, qmp } = filesOf(cluster, node)
  // The console output of the previous run is often what explains why it ended.
  await rename(consoleLog, `${consoleLog}.1`).catch(() => {})
  const args = qemuArguments({ cluster, node, host, mode: { kind: 'boot' } })
  if (paused) args.push('-S')
  const log = relative(cluster.root, qemuLog)
  // In a process group of its own, so that no Ctrl-C reaches it.
  const $$ = $({ cwd: cluster.root, detached: true })
  const started =
    await $$`(umask 077; cd run && exec ${host.qemu.path} ${args}) </dev/null >${log} 2>&1 & echo $!`
  const pid = Number(started.stdout)

  const settled = async () => (await isGone(pid)) || (await answers(qmp, paused).catch(() => false))
  const inTime = await becomes(settled, answerTimeout)
  const ended = await isGone(pid)
  if (inTime && !ended) return pid
  if (!ended) process.kill(pid, 'SIGKILL')
  const output = lastLines(await readFile(qemuLog, 'utf8'), 10)
  const known = knownProblem(host.qemu.path, output)
  const reason = ended ? 'ended at once' : `did not answer in ${answerTimeout} s`
  const slow = `if ${host.accel} does not work here: QEMU_ACCEL=tcg (slow)`
  const hint = known?.hint ?? (host.accel === 'tcg' ? '' : slow)
  throw new StepError(`QEMU of ${node.name} ${reason}${known ? `: ${known.reason}` : ''}`, {
    ...{ output, hint, log: qemuLog },
  })
}

/** Whether the machine has a disk with an installed system. */
export function hasDisk(cluster: Cluster, node: Node): boolean {
  return existsSync(filesOf(cluster, node).disk)
}

/**
 * Checks that there is room for new disks, which grow to what an installed machine takes.
 * @returns a warning instead of the error on macOS, which does not count space that it can purge
 */
export async function assertRoomForDisks(cluster: Cluster, nodes: readonly Node[]) {
  const each = Math.min(cluster.settings.DISK_SIZE, installedSize) * 2 ** 30
  const names = nodes.map(({ name }) => name).join(', ')
  return assertDiskSpace(cluster.path('images'), nodes.length * each, { what: ` for ${names}` })
}

/** The same check for a number of bytes. @param what " for …" */
export async function assertDiskSpace(
  folder: string,
  needed: number,
  { what = '', hint = `free space on the file system of ${folder}`, os = process.platform } = {},
): Promise<string | undefined> {
  const free = await freeBytes(folder)
  if (free >= needed) return undefined
  const amounts = `${formatBytes(needed)} are needed, ${formatBytes(free)} are free`
  const reason = `not enough disk space${what}: ${amounts}`
  if (os === 'darwin') return `${reason}; macOS may free more by itself`
  throw new StepError(reason, { hint })
}

/** Free bytes of the file system of a folder, which need not exist yet. */
export async function freeBytes(folder: string): Promise<number> {
  const { bavail, bsize } = await statfs(existsSync(folder) ? folder : dirname(folder))
  return bavail * bsize
}

/**
 * Creates the machine's UEFI variables from the firmware's template. Existing ones are kept, but not
 * for an installation (`fresh`) or if a firmware of another size could not use them. (The machine
 * needs nothing in them: it boots from the path for removable media.)
 */
export async function prepareEfiVars(
  cluster: Cluster,
  node: Node,
  { firmware: { vars } }: Host,
  { fresh = false } = {},
): Promise<void> {
  const { efiVars } = filesOf(cluster, node)
  const { size } = await inspect(vars.path)
  if (fresh) await rm(efiVars, { force: true })
  else if (existsSync(efiVars) && (await inspect(efiVars)).size !== size) {
    await rename(efiVars, `${efiVars}.old`)
  }
  if (existsSync(efiVars)) return
  const temporary = `${efiVars}.tmp`
  await $`(umask 077 && qemu-img convert -f ${vars.format} -O qcow2 ${vars.path} ${temporary})`
  await rename(temporary, efiVars)
}
