// The staged configuration on its way to a machine: as a whole or not at all, and back.
import { createHash } from 'node:crypto'
import { describeError, StepError } from '../errors.mts'
import type { Machine } from '../machine/machine.mts'
import { onMachine } from '../machine/on-machine.mts'
import { stagedArchive } from '../staging/staging.mts'

/** Where a machine keeps what belongs to a push. */
export const pushFolder = '/var/lib/reconfig'

const home = { HOME_FOLDER: pushFolder }
// Seconds. Some 40 kB, but a machine that is emulated may have a busy disk to write them to.
const patience = 300

/**
 * Sends the staged configuration. The new files are then in their places, the former ones kept;
 * nothing is switched to yet.
 *
 * @throws StepError that says what the machine has: an archive that broke off on the way changes
 *   nothing, a push that broke off later is taken back
 */
export async function push(machine: Machine): Promise<void> {
  try {
    const archive = await stagedArchive(machine.cluster, machine.node)
    const digest = createHash('sha256').update(archive).digest('hex')
    const receive = onMachine('push', { ...home, DIGEST: digest })
    const swap = onMachine('push-swap', { ...home, FOLDER: 'new' })
    await machine.succeed(`${receive}\n${swap}`, { input: archive, timeout: patience })
  } catch (error) {
    if (isAtWork(error)) {
      throw new StepError(`${machine.node.name} is still at work on its last change`, {
        hint: 'let it come to its end, then try again',
        cause: error,
      })
    }
    // It may have come to its end over there, and only the answer was lost.
    const outcome = await putFormerBack(machine).then(
      () => 'nothing was changed there',
      () => 'nor could it be asked what has arrived: make reconfig again',
    )
    const reason = `the configuration did not get to ${machine.node.name}; ${outcome}`
    throw new StepError(reason, { output: describeError(error), cause: error })
  }
}

/** Whether push.sh says that an earlier push or switch has not ended: it has touched nothing then. */
function isAtWork(error: unknown): boolean {
  return error instanceof StepError && /still at work/.test(error.explanation.output ?? '')
}

/** Puts the files of before the last push in their places again, unless they are there already. */
export async function putFormerBack(machine: Machine): Promise<void> {
  await machine.waitForSsh()
  const prepare = onMachine('push-put-back', home)
  const swap = onMachine('push-swap', { ...home, FOLDER: 'back' })
  await machine.succeed(`${prepare}\n${swap}`, { timeout: 3 * patience })
}

/** The machine is well with what was pushed: there is no way back, and none is needed. */
export async function confirmPush(machine: Machine): Promise<void> {
  await machine.succeed(`rm -f ${pushFolder}/unfinished`)
}
