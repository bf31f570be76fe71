// Waiting for a machine's services after they were changed, without waiting for those that will
// never come: systemd starts them again and again, which is counted.
import { StepError } from '../errors.mts'
import { waitFor } from '../wait.mts'
import type { Machine } from './machine.mts'
import { probeApiServer, probeServices, type ServiceState } from './probes.mts'
import { NoAnswer, quoteForShell } from './ssh.mts'

/** Starts after which nothing is hoped for any more. Some fail while what they need comes up. */
const hopeless = 5

/**
 * Waits until the cluster's services on a machine are well, and on the control plane until the API
 * server is ready.
 *
 * @param options.timeout seconds
 * @param options.check says what else is missing, or throws what there is no hope after
 * @throws StepError with the end of the journal as soon as a service was restarted five times
 */
export async function waitForServices(
  machine: Machine,
  options: {
    timeout: number
    detail?: (text: string) => void
    check?: () => Promise<string | undefined>
    signal?: AbortSignal
  },
): Promise<void> {
  const { node } = machine
  const { signal, check, ...wait } = options
  let first: ServiceState[] | undefined

  await waitFor({ failure: `${node.name} is not well`, ...wait }, async () => {
    signal?.throwIfAborted()
    const found = await probeServices(machine).catch((error) => {
      // It may be restarting its network.
      if (error instanceof NoAnswer) return error.message
      throw error
    })
    if (typeof found === 'string') return found
    first ??= found
    for (const { unit, healthy, restarts } of found) {
      const before = first.find((service) => service.unit === unit)?.restarts ?? 0
      if (!healthy && restarts - before >= hopeless) throw await failing(machine, unit)
    }
    const missing =
      found.find(({ healthy }) => !healthy)?.reason ?? (await apiServerMissing(machine, signal))
    // Even if something is missing: it may be for good. And last, so that it saw all the others well.
    const unmet = await check?.()
    return missing ?? unmet
  })
}

async function apiServerMissing(
  { cluster, node }: Machine,
  signal: AbortSignal | undefined,
): Promise<string | undefined> {
  if (node.role !== 'control-plane') return undefined
  const { ready, reason } = await probeApiServer(cluster, { signal })
  return ready ? undefined : `the API server is not ready: ${reason}`
}

async function failing(machine: Machine, unit: string): Promise<StepError> {
  const command = `journalctl --unit=${quoteForShell(unit)} --lines=15 --no-pager --output=cat`
  const { stdout } = await machine.execute(command)
  return new StepError(`${unit} of ${machine.node.name} ends again and again`, {
    output: stdout.trim(),
    command: `./bin/logs.mts --unit ${unit} ${machine.node.name}`,
  })
}
