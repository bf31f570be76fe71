// A machine's installation from outside: disk, QEMU and dialogue, and nothing left of them if it
// fails.
import { mkdir, rm } from 'node:fs/promises'
import type { Cluster, Node } from '../cluster.mts'
import { StepError } from '../errors.mts'
import { withLock } from '../lock.mts'
import { createDisk, discardDisk, finishDisk, prepareEfiVars } from '../qemu/disk.mts'
import type { Host } from '../qemu/host.mts'
import { filesOf } from '../qemu/machine-files.mts'
import { qemuArguments } from '../qemu/qemu.mts'
import { machineState, prepareFolders } from '../qemu/vm.mts'
import { stagedArchive } from '../staging/staging.mts'
import type { Row } from '../steps.mts'
import { ExpectError, spawn } from './expect.mts'
import { install } from './installer.mts'
import { CommandError, markers } from './installer-shell.mts'
import { extractKernel } from './iso-boot.mts'

export interface InstallOptions {
  /** The installer ISO. */
  iso: string
  host: Host
  /** Shows what is being done. */
  row: Row
  /** Stops the installation and undoes it. */
  signal?: AbortSignal | undefined
  /** A disk that is there is replaced, when the new one is ready. */
  replace?: boolean
}

const attempts = 2

const alarms = [
  { pattern: /Kernel panic - not syncing.*\n/, reason: 'the kernel panicked' },
  { pattern: /An error occurred in stage 1 of the boot process.*\n/, reason: 'the boot failed' },
  { pattern: /Dependency failed for .*Serial Getty.*\n/, reason: 'the console got no login' },
]

/** What Nix says when the network, which may be back in a minute, is at fault. */
const networkTrouble =
  /unable to download|could ?n[o']t resolve|timeout was reached|timed out|connection (refused|reset)|HTTP error 5\d\d|SSL connect error/i

/**
 * Installs NixOS on a node's new disk. What is said on its console is in images/NODE-install.log.
 * A second attempt is made where it may help: not after an error in the configuration.
 *
 * @throws StepError naming node, step, command, last lines and log; the signal's reason. QEMU has
 *   then ended, and the unfinished disk is gone
 */
export async function installNode(
  cluster: Cluster,
  node: Node,
  options: InstallOptions,
): Promise<void> {
  const { row, signal } = options
  await prepareFolders(cluster)
  const lock = cluster.path('run', `${node.name}-install.lock`)
  await withLock(lock, `installing ${node.name}`, async () => {
    const found = await machineState(cluster, node)
    if (found.state === 'running') {
      throw new StepError(`${node.name} is running (pid ${found.pid})`, {
        hint: `shut it down first: ./bin/shutdown.mts ${node.name}`,
      })
    }
    const archive = await stagedArchive(cluster, node)
    await rm(filesOf(cluster, node).installLog, { force: true })
    for (let attempt = 1; ; attempt += 1) {
      try {
        await installOnce(cluster, node, archive, options)
        return
      } catch (error) {
        if (attempt === attempts || signal?.aborted || !mayHelp(error)) throw error
        row.step(`once more, as ${(error as Error).message}`)
      }
    }
  })
}

async function installOnce(
  cluster: Cluster,
  node: Node,
  archive: Uint8Array,
  options: InstallOptions,
): Promise<void> {
  const { iso, host, row, signal, replace = false } = options
  // One place, so that what a killed attempt left is the next one's to remove.
  const folder = cluster.path('run', `${node.name}-install`)
  await rm(folder, { recursive: true, force: true })
  await mkdir(folder)
  try {
    const kernel = host.arch === 'x86_64' ? await extractKernel(iso, folder) : undefined
    await createDisk(cluster, node, { replace })
    await prepareEfiVars(cluster, node, host, { fresh: true })
    const mode = { kind: 'install' as const, iso, ...(kernel ? { kernel } : {}) }
    const machine = spawn(host.qemu.path, qemuArguments({ cluster, node, host, mode }), {
      name: node.name,
      cwd: cluster.path('run'),
      transcript: filesOf(cluster, node).installLog,
      alarms,
      unshown: markers,
    })
    try {
      await install(machine, { cluster, node, archive, row, signal })
    } finally {
      await machine.close()
    }
    await finishDisk(cluster, node)
  } catch (error) {
    await discardDisk(cluster, node)
    throw error
  } finally {
    await rm(folder, { recursive: true, force: true })
  }
}

/** Whether a second attempt may end better. */
function mayHelp(error: unknown): boolean {
  if (error instanceof CommandError) return networkTrouble.test(error.output)
  if (!(error instanceof ExpectError)) return false
  // With status 1 QEMU says that it cannot run at all, and it says so when it was told to end.
  return error.exit?.exitCode !== 1 && !/terminating on signal/.test(error.explanation.output ?? '')
}
