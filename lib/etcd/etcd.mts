// etcd on the control plane machine: a snapshot of its data is fetched, or put in its place. Paths,
// addresses and names are those of its unit, where they stand anyway.

import { describeError, StepError } from '../errors.mts'
import { timestamp } from '../format.mts'
import { takingTime } from '../interrupt.mts'
import type { Machine } from '../machine/machine.mts'
import { onMachine } from '../machine/on-machine.mts'
import { servicesOf } from '../machine/probes.mts'
import { stream } from '../machine/ssh-stream.mts'
import { waitForServices } from '../machine/wait-for-services.mts'
import type { Row } from '../steps.mts'

/** What etcdutl tells of a snapshot. */
export interface SnapshotStatus {
  revision: number
  totalKey: number
  /** Bytes. */
  totalSize: number
}

// Flags of the unit, and the variables of the shell texts that they become.
const flags = {
  'data-dir': 'DATA_DIR',
  'advertise-client-urls': 'ENDPOINT',
  'trusted-ca-file': 'CA',
  'cert-file': 'CERT',
  'key-file': 'KEY',
  name: 'NAME',
  'initial-cluster': 'INITIAL_CLUSTER',
  'initial-cluster-token': 'INITIAL_CLUSTER_TOKEN',
  'initial-advertise-peer-urls': 'INITIAL_ADVERTISE_PEER_URLS',
} as const

type FlagVariable = (typeof flags)[keyof typeof flags]
/** UNITS are in the order in which they start; LAST_FIRST is the other way round. */
type Variables = Record<FlagVariable | 'WORK' | 'FORMER' | 'UNITS' | 'LAST_FIRST', string>

/**
 * Saves a snapshot of the running etcd.
 *
 * @param machine the control plane, over ssh
 * @param path a file on this computer that is not there yet
 * @throws StepError; what is then in the file is of no use
 */
export async function saveSnapshot(
  machine: Machine,
  path: string,
  signal?: AbortSignal,
): Promise<SnapshotStatus> {
  const variables = await variablesOf(machine)
  const files = { to: path, ...(signal ? { signal } : {}) }
  const said = await stream(machine, onMachine('etcd-save', variables), files)
  const status = said.match(/^status: (\{.*\})$/m)?.[1]
  if (!status) throw new StepError('etcdutl did not tell of the snapshot', { output: said })
  return JSON.parse(status) as SnapshotStatus
}

/**
 * Makes etcd what it was when the snapshot was saved. First the new data are made beside the old
 * ones, with the control plane at work; then it stops, they change places, it starts. If it is not
 * well then, or we are interrupted, the old data are put back.
 *
 * @param path of a snapshot on this computer
 * @param options.timeout seconds for the control plane to be well again
 * @param options.check says what the control plane lacks beside its health, or throws what there is
 *   no hope after
 * @returns where the former data are kept on the machine
 * @throws StepError that says whether the old data are in place
 */
export async function restoreSnapshot(
  machine: Machine,
  path: string,
  options: {
    timeout: number
    check: () => Promise<string | undefined>
    row: Pick<Row, 'step' | 'detail'>
    signal: AbortSignal
  },
): Promise<string> {
  const { timeout, check, row, signal } = options
  const wait = { timeout, detail: (text: string) => row.detail(text) }
  const variables = await variablesOf(machine)
  row.step('making the data directory')
  await stream(machine, onMachine('etcd-prepare', variables), { from: path, signal })

  row.step('changing the data')
  try {
    await machine.succeed(onMachine('etcd-swap', variables), { timeout })
    row.step('waiting for the control plane')
    await waitForServices(machine, { ...wait, check, signal })
  } catch (error) {
    row.step('putting the former data back')
    const undone = takingTime(async () => {
      await machine.succeed(onMachine('etcd-put-back', variables), { timeout })
      await waitForServices(machine, wait)
    })
    throw await undone.then(
      () => failure(`${machine.node.name} has its former data again`, error),
      (second) =>
        failure(`the former data are not in place again`, error, second, variables.FORMER),
    )
  }
  await machine.succeed(onMachine('etcd-forget', variables))
  return variables.FORMER
}

/** The restore failed; what became of the data; why; and why they could not be put back. */
function failure(outcome: string, error: unknown, second?: unknown, former?: string): StepError {
  const reasons = [error, second].filter(Boolean).map((reason) => describeError(reason))
  return new StepError(`etcd was not restored: ${outcome}`, {
    output: reasons.join('\n'),
    ...(former ? { hint: `they are kept on the machine: ${former}` } : {}),
    ...(error instanceof StepError ? { exitCode: error.explanation.exitCode ?? 1 } : {}),
    cause: error,
  })
}

async function variablesOf(machine: Machine): Promise<Variables> {
  const text = await machine.succeed('systemctl show --property=ExecStart --value etcd')
  const words = text.split(/\s+/)
  const values = Object.entries(flags).map(([flag, variable]) => {
    const word = words.find((candidate) => candidate.startsWith(`--${flag}=`))
    if (!word) {
      throw new StepError(`the unit etcd of ${machine.node.name} has no flag --${flag}`, {
        hint: 'is its configuration that of this project? make reconfig pushes it',
      })
    }
    return [variable, word.slice(flag.length + 3)]
  })
  const known = Object.fromEntries(values) as Record<FlagVariable, string>
  const units = servicesOf(machine.cluster, machine.node).map(({ unit }) => unit)
  return {
    ...known,
    WORK: `${known.DATA_DIR}.new`,
    FORMER: `${known.DATA_DIR}.former-${timestamp()}`,
    UNITS: units.join(' '),
    LAST_FIRST: units.toReversed().join(' '),
  }
}
