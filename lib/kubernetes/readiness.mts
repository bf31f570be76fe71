// When the cluster counts as up: one row for the API server, etcd, scheduler, controller-manager
// and every worker, each with its state, since when, and why it is not there yet.
import { setTimeout as sleep } from 'node:timers/promises'
import type { Cluster, Node } from '../cluster.mts'
import { StepError } from '../errors.mts'
import { clockProbe, clockTrouble } from '../machine/clock.mts'
import { Machine } from '../machine/machine.mts'
import { runProbes } from '../machine/probe.mts'
import {
  type ApiState,
  probeApiServer,
  type ServiceState,
  serviceProbe,
} from '../machine/probes.mts'
import { NoAnswer } from '../machine/ssh.mts'
import { findBootFailure, lastConsoleLines } from '../qemu/console-log.mts'
import { filesOf } from '../qemu/machine-files.mts'
import { isRunning } from '../qemu/vm.mts'

/** The reason of a row before its first measurement. */
export const notAskedYet = 'not asked yet'

/** A machine's services and how far its clock is ahead, in seconds; or why it cannot be asked. */
export type MachineState = { services: ServiceState[]; clock: number } | { unreachable: string }

/** What was measured last; undefined: not yet. */
export interface Measured {
  api?: ApiState
  machines: Map<string, MachineState>
}

export interface Row {
  name: string
  /** The machine it runs on. */
  node: Node
  active: boolean
  /** Since when it is in this state: milliseconds of the epoch. */
  since: number
  reason: string
  /** Its machine does not answer, so nothing is known of it. */
  unreachable: boolean
}

/** One row of the table: what has to be so for it to be active. */
interface Component {
  name: string
  node: Node
  /** Why it is not active; empty if it is. */
  missing(measured: Measured): string
}

/**
 * The components of a cluster.
 *
 * @param nodesReady a worker must be Ready for pods, for which it needs the pod network; without
 *   it is enough that its kubelet works and has registered
 */
export function componentsOf(cluster: Cluster, nodesReady = false): Component[] {
  const { controlPlane } = cluster
  const service = (name: string, unit: string): Component => ({
    name,
    node: controlPlane,
    missing: (measured) => missingService(measured, controlPlane, unit),
  })
  return [
    {
      name: 'API server',
      node: controlPlane,
      missing: (measured) => missingApiServer(measured, controlPlane),
    },
    service('etcd', 'etcd'),
    service('controller-manager', 'kube-controller-manager'),
    service('scheduler', 'kube-scheduler'),
    ...cluster.workers.map((node) => ({
      name: node.name,
      node,
      missing: (measured: Measured) => missingWorker(measured, node, nodesReady),
    })),
  ]
}

function missingService({ machines }: Measured, node: Node, unit: string): string {
  const machine = machines.get(node.name)
  if (!machine) return notAskedYet
  if ('unreachable' in machine) return machine.unreachable
  return machine.services.find((service) => service.unit === unit)?.reason ?? `no unit ${unit}`
}

function missingApiServer(measured: Measured, node: Node): string {
  if (measured.api?.ready) return ''
  // A unit that does not run is the better reason than a port where nobody listens.
  return missingService(measured, node, 'kube-apiserver') || measured.api?.reason || notAskedYet
}

function missingWorker(measured: Measured, node: Node, nodesReady: boolean): string {
  const kubelet = missingService(measured, node, 'kubelet')
  if (kubelet) return kubelet
  if (!measured.api?.nodes) return 'kubelet runs; the API server cannot be asked about it'
  const registered = measured.api.nodes.get(node.name)
  if (!registered) return 'kubelet runs, but has not registered with the API server'
  return nodesReady && !registered.ready ? `not Ready: ${registered.reason}` : ''
}

/** A clock that is wrong is why certificates are refused, and so why much else is not there. */
function withClock(reason: string, { machines }: Measured, { name }: Node): string {
  const machine = machines.get(name)
  const clock = machine && 'clock' in machine ? clockTrouble(name, machine.clock) : ''
  return reason && clock ? `${reason}; ${clock}` : reason
}

/** Rows as measured now; a row keeps its time while its state stays the same. */
export function assess(
  components: readonly Component[],
  measured: Measured,
  before: readonly Row[],
  now: number,
): Row[] {
  return components.map(({ name, node, missing }) => {
    const reason = withClock(missing(measured), measured, node)
    const former = before.find((row) => row.name === name)
    const active = reason === ''
    const machine = measured.machines.get(node.name)
    return {
      name,
      node,
      active,
      since: former?.active === active ? former.since : now,
      reason,
      unreachable: machine !== undefined && 'unreachable' in machine,
    }
  })
}

/**
 * Measures again and again, each machine and the API server by themselves so that none holds up
 * the others, until every row is active.
 *
 * @param options.changed gets the rows after each measurement
 * @param options.signal ends the watch; its reason is thrown
 * @throws StepError at once if a machine does not run or its boot has failed
 */
export async function watchReadiness(
  cluster: Cluster,
  components: readonly Component[],
  options: { changed: (rows: Row[]) => void; signal: AbortSignal },
): Promise<Row[]> {
  const ended = new AbortController()
  const signal = AbortSignal.any([options.signal, ended.signal])
  const measured: Measured = { machines: new Map() }
  let rows = assess(components, measured, [], Date.now())

  const again = async (measure: () => Promise<void>): Promise<void> => {
    while (!rows.every(({ active }) => active)) {
      await measure()
      rows = assess(components, measured, rows, Date.now())
      options.changed(rows)
      await sleep(1000, undefined, { signal })
    }
  }
  const loops = [
    again(async () => {
      measured.api = await probeApiServer(cluster, { signal })
    }),
    ...[...new Set(components.map(({ node }) => node))].map((node) => {
      const machine = new Machine(cluster, node, signal)
      return again(async () => {
        measured.machines.set(node.name, await look(machine))
      })
    }),
  ]
  try {
    await Promise.race(loops)
    return rows
  } catch (error) {
    options.signal.throwIfAborted()
    throw error
  } finally {
    ended.abort()
    await Promise.allSettled(loops)
  }
}

async function look(machine: Machine): Promise<MachineState> {
  const { cluster, node } = machine
  try {
    return await runProbes(
      machine,
      { services: serviceProbe(cluster, node), clock: clockProbe },
      20,
    )
  } catch (error) {
    if (!(error instanceof NoAnswer)) throw error
    const log = filesOf(cluster, node).consoleLog
    const failure = await findBootFailure(log)
    if (failure || !(await isRunning(cluster, node))) {
      throw new StepError(`${node.name} will not come: ${failure ?? 'its QEMU is not running'}`, {
        output: (await lastConsoleLines(log)).join('\n'),
        hint: `make boot-${node.name}`,
        log,
      })
    }
    return { unreachable: error.message }
  }
}
