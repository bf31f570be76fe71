// Everything there is to know of a cluster at a glance: asked all at once, so that what does not
// answer holds up nothing else.

import type { Cluster, Node, Role } from '../cluster.mts'
import { StepError } from '../errors.mts'
import { lanSwitchStatus, type SwitchStatus } from '../lan/lan-switch.mts'
import { clockProbe } from '../machine/clock.mts'
import { certificateProbe, type InstalledCertificate } from '../machine/installed-certificates.mts'
import { Machine } from '../machine/machine.mts'
import { type Probe, runProbes } from '../machine/probe.mts'
import {
  type ApiState,
  type NodeState,
  probeApiServer,
  type ServiceState,
  serviceProbe,
} from '../machine/probes.mts'
import { type SystemState, systemStateProbe } from '../machine/system-state.mts'
import { inspectTls } from '../pki/tls-report.mts'
import { machineState } from '../qemu/vm.mts'
import { askApiServer } from './api-server.mts'
import { type PodList, type PodReport, podReport } from './pod-report.mts'

/** What was learned of something, or why nothing was. */
export type Learned<T> = ({ known: true } & T) | { known: false; reason: string }

/** What the system inside a machine says of itself. */
export interface SystemFacts extends SystemState {
  /** "NixOS 26.05 (Yarara)". */
  name: string
  kernel: string
  /** Seconds since it started. */
  uptime: number
  /** Seconds that its clock is ahead of this computer's. */
  clock: number
}

export interface MachineReport {
  name: string
  role: Role
  process: { state: 'running' | 'installing'; pid: number } | { state: 'stopped' }
  system: Learned<SystemFacts>
  services: Learned<{ list: ServiceState[] }>
  certificates: Learned<{ list: InstalledCertificate[] }>
}

export interface ClusterReport {
  machines: MachineReport[]
  api: Omit<ApiState, 'nodes'> & { version: string }
  nodes: Learned<{ list: (NodeState & { name: string })[] }>
  pods: Learned<{ list: PodReport[] }>
  /** The certificates in tls/ on this computer. */
  local: { name: string; daysLeft: number | null; problems: string[] }[]
  lanSwitch: Learned<{ status: SwitchStatus }>
}

/** Asks for all of it. @param timeout seconds that anything may take; what takes longer is unknown */
export async function reportOn(cluster: Cluster, timeout: number): Promise<ClusterReport> {
  const [machines, { nodes, ...api }, version, pods, tls, lanSwitch] = await Promise.all([
    Promise.all(cluster.nodes.map((node) => reportOnMachine(cluster, node, timeout))),
    probeApiServer(cluster, { timeout }),
    ask<{ gitVersion: string }>(cluster, '/version', timeout),
    ask<PodList>(cluster, '/api/v1/pods', timeout),
    inspectTls(cluster),
    lanSwitchStatus(cluster, timeout),
  ])
  return {
    machines,
    api: { ...api, version: version.known ? version.gitVersion : '' },
    nodes: nodes
      ? { known: true, list: [...nodes].map(([name, state]) => ({ name, ...state })) }
      : { known: false, reason: api.reason },
    pods: pods.known ? { known: true, list: pods.items.map(podReport) } : pods,
    local: tls.certificates.map(({ name, daysLeft, problems }) => ({ name, daysLeft, problems })),
    lanSwitch: lanSwitch
      ? { known: true, status: lanSwitch }
      : { known: false, reason: 'the lan switch does not answer' },
  }
}

async function reportOnMachine(
  cluster: Cluster,
  node: Node,
  timeout: number,
): Promise<MachineReport> {
  const found = await machineState(cluster, node)
  const { name, role } = node
  if (found.state === 'stopped' || found.mode === 'install') {
    const stopped = found.state === 'stopped'
    const unknown = {
      known: false as const,
      reason: stopped ? 'it is switched off' : 'it is being installed',
    }
    const process = stopped
      ? { state: 'stopped' as const }
      : { state: 'installing' as const, pid: found.pid }
    return { name, role, process, system: unknown, services: unknown, certificates: unknown }
  }
  const process = { state: 'running' as const, pid: found.pid }
  const probes = {
    system: systemProbe,
    clock: clockProbe,
    services: serviceProbe(cluster, node),
    certificates: certificateProbe,
  }
  const answer = await learn(() => runProbes(new Machine(cluster, node), probes, timeout))
  if (!answer.known) {
    return { name, role, process, system: answer, services: answer, certificates: answer }
  }
  const { system, clock, services, certificates } = answer
  return {
    ...{ name, role, process, system: { known: true, ...system, clock } },
    services: { known: true, list: services },
    certificates: { known: true, list: certificates },
  }
}

const systemProbe: Probe<Omit<SystemFacts, 'clock'>> = {
  command: `
    . /etc/os-release
    echo "$PRETTY_NAME"
    echo "$(</proc/sys/kernel/osrelease)"
    read -r uptime _ </proc/uptime
    echo "$uptime"
    ${systemStateProbe.command}`,
  read(output) {
    const [name = '', kernel = '', uptime = '', ...state] = output.split('\n')
    return { ...systemStateProbe.read(state.join('\n')), name, kernel, uptime: Number(uptime) }
  },
}

/** The answer of the API server to a GET, or why there is none. @param timeout seconds */
export async function ask<T extends object>(
  cluster: Cluster,
  path: string,
  timeout: number,
): Promise<Learned<T>> {
  return learn(async () => {
    const { status, body } = await askApiServer(cluster, path, { timeout })
    if (status !== 200) throw new StepError(`the API server answers HTTP ${status}`)
    return JSON.parse(body) as T
  })
}

async function learn<T extends object>(work: () => Promise<T>): Promise<Learned<T>> {
  try {
    return { known: true, ...(await work()) }
  } catch (error) {
    if (!(error instanceof StepError)) throw error
    return { known: false, reason: error.message }
  }
}
