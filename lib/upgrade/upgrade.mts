// Another release of NixOS, and the Kubernetes in it, on one machine: built beside the system that
// runs, looked at, then switched to.

import { describeError, StepError } from '../errors.mts'
import { waitForReady } from '../kubernetes/wait-for-node.mts'
import { runLong } from '../machine/long-command.mts'
import { Machine } from '../machine/machine.mts'
import { onMachine } from '../machine/on-machine.mts'
import { NoAnswer } from '../machine/ssh.mts'
import { waitForServices } from '../machine/wait-for-services.mts'
import { confirmPush, push, pushFolder, putFormerBack } from '../reconfigure/push.mts'
import { switchTo } from '../reconfigure/reconfigure.mts'
import type { Row } from '../steps.mts'

/** What a system holds. */
export interface Release {
  /** Store path; of the system that runs, the one that the machine was started with. */
  kernel: string
  /** "26.05.1234.abcdef0" */
  nixos: string
  /** "v1.36.3" */
  kubernetes: string
}

interface Options {
  /** Seconds for services and node; what may have to download has INSTALL_TIMEOUT. */
  timeout: number
  row: Row
  signal: AbortSignal
}

const home = { HOME_FOLDER: pushFolder }

/**
 * Pushes the staged configuration, and has the machine build it with NIXOS_VERSION. What runs on
 * it is not touched; `undoPreparation` takes it back.
 *
 * @returns what runs, and what was built
 * @throws StepError with what Nix said; the machine is then as it was
 */
export async function prepareUpgrade(
  machine: Machine,
  { row, signal }: Options,
): Promise<{ now: Release; built: Release }> {
  const { cluster, node } = machine
  const { NIXOS_VERSION, INSTALL_TIMEOUT } = cluster.settings
  row.step('pushing')
  await assertFinished(machine)
  await push(machine)
  try {
    row.step(`building NixOS ${NIXOS_VERSION}`)
    const channel = `https://channels.nixos.org/nixos-${NIXOS_VERSION}`
    const build = onMachine('upgrade-build', { ...home, CHANNEL: channel })
    const limits = { folder: pushFolder, timeout: INSTALL_TIMEOUT, row, signal }
    const { status, lines } = await runLong(machine, build, limits)
    if (status !== 0) {
      throw new StepError(`${node.name} could not build NixOS ${NIXOS_VERSION}`, {
        output: lines.slice(-15).join('\n'),
        hint: `nothing was changed; ${channel} has to be there, and to be reached from ${node.name}`,
      })
    }
    const unit = node.role === 'worker' ? 'kubelet' : 'kube-apiserver'
    const [now, built] = (
      await machine.succeed(onMachine('upgrade-look', { ...home, UNIT: unit }))
    ).split('\n')
    return { now: releaseOf(now), built: releaseOf(built) }
  } catch (error) {
    // Interrupted, it may still be building; the next upgrade goes on from there.
    throw signal.aborted ? error : await undoPreparation(machine, error)
  }
}

/** What an upgrade would go back to has to be what the machine is well with. */
async function assertFinished(machine: Machine): Promise<void> {
  const { status } = await machine.execute(
    `[ ! -e ${pushFolder}/unfinished ] || [ -e ${pushFolder}/former-channel ]`,
  )
  if (status === 0) return
  throw new StepError(`the last change of ${machine.node.name} has not come to its end`, {
    hint: `./bin/reconfig.mts --node ${machine.node.name} finishes it`,
  })
}

/**
 * Puts channel and configuration of before back; nothing was switched to yet.
 *
 * @param error why
 * @returns the error to throw: that one, or both if this fails as well
 */
export async function undoPreparation(machine: Machine, error: unknown): Promise<unknown> {
  try {
    await machine.succeed(onMachine('upgrade-undo', home), { timeout: 300 })
    await putFormerBack(machine)
    await confirmPush(machine)
    return error
  } catch (second) {
    const { name } = machine.node
    return new StepError(`${name} was not upgraded, and its configuration could not be put back`, {
      output: [error, second].map((reason) => describeError(reason)).join('\n'),
      hint: `nothing was switched to: make upgrade NAME=${name} goes on from there`,
      cause: error,
    })
  }
}

/**
 * Switches to what was built, starts the machine anew if that has another kernel, and waits until
 * services and node are well.
 *
 * @throws StepError with what is not well; the machine is left with the new system
 */
export async function finishUpgrade(
  machine: Machine,
  { now, built }: { now: Release; built: Release },
  options: Options,
): Promise<void> {
  const { cluster, node } = machine
  const { timeout, row, signal } = options
  const detail = (text: string) => row.detail(text)
  await switchTo(machine, options)
  if (now.kernel !== built.kernel) {
    row.step('starting anew, with another kernel')
    await restart(new Machine(cluster, node, signal), detail)
    row.step('waiting for services')
    await waitForServices(machine, { timeout, detail, signal })
  }
  if (node.role === 'worker') {
    row.step('waiting for Ready')
    await waitForReady(cluster, node, { timeout, detail, signal })
  }
  await confirmPush(machine)
  await machine.succeed(`rm -f ${pushFolder}/former-channel ${pushFolder}/result`)
}

async function restart(machine: Machine, detail: (text: string) => void): Promise<void> {
  const bootId = 'cat /proc/sys/kernel/random/boot_id'
  const before = (await machine.succeed(bootId)).trim()
  // It may be gone before it has answered.
  await machine.succeed('systemctl reboot --no-block').catch((error) => {
    if (!(error instanceof NoAnswer)) throw error
  })
  await machine.waitUntilSucceeds(`[ "$(${bootId})" != ${before} ]`, { detail })
}

function releaseOf(line = ''): Release {
  const [kernel = '', nixos = '', kubernetes = ''] = line.trim().split(' ')
  return { kernel, nixos, kubernetes }
}
