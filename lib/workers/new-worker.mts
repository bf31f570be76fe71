// What another worker is called, and the next free port and addresses for it.

import { type Cidr, overlap, parseAddress, parseCidr } from '../cidr.mts'
import type { Cluster } from '../cluster.mts'
import { StepError } from '../errors.mts'
import { kinds, perNodeVariables } from '../settings.mts'
import type { WorkerSettings } from './worker-settings.mts'

/** Names whose files in run/ would be those of something else, and what that is. */
const taken: readonly [pattern: RegExp, of: string][] = [
  [/^(bootstrap|pki|lan-switch)$/, 'a lock of the scripts'],
  [/-install$/, "a machine's installation"],
  [/-key$/, "a certificate's key"],
  [/^localhost$/, 'this computer'],
]

/**
 * Makes sure that a node can have this name. (Those of certificates are refused where the table of
 * certificates is made.)
 *
 * @param env variables that win over cluster.env, where the worker is to be written
 * @throws StepError that says what a name may be
 */
export function checkWorkerName(
  cluster: Cluster,
  name: string,
  env: Readonly<Record<string, string | undefined>> = {},
): void {
  const refuse = (reason: string, hint: string) => {
    throw new StepError(reason, { hint, exitCode: 2 })
  }
  if (kinds.label.parse(name) === undefined) {
    refuse(`a node cannot be named "${name}"`, `it takes ${kinds.label.expects}`)
  }
  const there = cluster.nodes.find((node) => node.name === name)
  if (there) refuse(`there is a node "${name}" already: a ${there.role}`, 'take another name')
  const [, of] = taken.find(([pattern]) => pattern.test(name)) ?? []
  if (of) refuse(`a node cannot be named "${name}": that is the name of ${of}`, 'take another name')
  const own = perNodeVariables.map((prefix) => `${prefix}_${name.replaceAll('-', '_')}`)
  const set = ['WORKER_NODES', ...own].find((variable) => env[variable] !== undefined)
  if (set) refuse(`${set} is set in the environment, and wins over cluster.env`, `unset ${set}`)
}

/** Whether a port of this computer can be opened now. */
type IsFree = (transport: 'tcp' | 'udp', port: number) => Promise<boolean>

/**
 * Chooses for a new worker, each time what comes after the highest that a node has: the ssh port
 * and lan address (both with a free port on this computer), the MAC, and a range for pods of the
 * size that the last worker's has.
 *
 * @throws StepError if a range is used up
 */
export async function chooseAddresses(
  cluster: Cluster,
  name: string,
  isFree: IsFree,
): Promise<WorkerSettings> {
  return {
    name,
    sshPort: await nextSshPort(cluster, isFree),
    ip: await nextLanAddress(cluster, isFree),
    mac: nextMac(cluster),
    podCidr: nextPodCidr(cluster),
  }
}

async function nextSshPort(cluster: Cluster, isFree: IsFree): Promise<number> {
  const { nodes, settings } = cluster
  const highest = Math.max(...nodes.map(({ sshPort }) => sshPort))
  for (let port = highest + 1; port <= 65535; port += 1) {
    if (port !== settings.API_PORT && (await isFree('tcp', port))) return port
  }
  throw new StepError(`no port above ${highest} is free for ssh`, {
    hint: 'lower SSH_PORT_… in cluster.env',
  })
}

async function nextLanAddress(cluster: Cluster, isFree: IsFree): Promise<string> {
  const { nodes, settings } = cluster
  const lan = rangeOf(settings.LAN_CIDR)
  const used = nodes.map(({ ip }) => parseAddress(ip) ?? 0)
  // The first and the last address mean the network and everyone on it.
  for (const address of fromHighest(used, lan.first + 1, lan.last - 1, 1)) {
    const port = settings.LAN_SWITCH_PORT + (address - lan.first)
    if (used.includes(address) || port > 65535) continue
    if (await isFree('udp', port)) return formatAddress(address)
  }
  throw new StepError(`LAN_CIDR (${lan.text}) has no address left with a free UDP port`, {
    hint: 'each machine uses LAN_SWITCH_PORT plus the last number of its address',
  })
}

/** Counts on from the highest that a machine has; its lan card has the same, one up in byte 3. */
function nextMac({ nodes }: Cluster): string {
  const used = nodes.flatMap(({ mac, lanMac }) => [mac, lanMac])
  const numbers = nodes.map(({ mac }) => Number.parseInt(mac.replaceAll(':', ''), 16))
  const highest = Math.max(...numbers)
  const vendor = Math.floor(highest / 2 ** 24) * 2 ** 24
  for (const last of fromHighest([highest % 2 ** 24], 0, 2 ** 24 - 1, 1)) {
    const digits = (vendor + last).toString(16).padStart(12, '0')
    const mac = digits.replace(/..(?!$)/g, '$&:')
    if (!used.includes(mac)) return mac
  }
  throw new StepError('no MAC address is left')
}

function nextPodCidr({ workers, settings }: Cluster): string {
  const all = rangeOf(settings.K8S_POD_CIDR)
  const used = workers.map(({ podCidr = '' }) => rangeOf(podCidr))
  const last = used.at(-1)
  const size = last ? last.last - last.first + 1 : Math.min(256, all.last - all.first + 1)
  const length = 32 - Math.log2(size)
  // Beside ranges of other sizes a range still starts where its size divides.
  const starts = used.map(({ last }) => all.first + Math.floor((last - all.first) / size) * size)
  for (const start of fromHighest(starts, all.first, all.last - size + 1, size)) {
    const range = rangeOf(`${formatAddress(start)}/${length}`)
    if (!used.some((other) => overlap(range, other))) return range.text
  }
  throw new StepError(`K8S_POD_CIDR (${all.text}) has no room for another /${length}`, {
    hint: 'each worker has its own range of it: POD_CIDR_… in cluster.env',
  })
}

/** From the one after the highest to the end, then from the beginning to the highest. */
function* fromHighest(
  used: readonly number[],
  first: number,
  last: number,
  step: number,
): Generator<number> {
  const next = used.length > 0 ? Math.max(...used) + step : first
  for (let each = next; each <= last; each += step) yield each
  for (let each = first; each <= last && each < next; each += step) yield each
}

/** Ranges and addresses of a cluster were checked when it was loaded. */
function rangeOf(text: string): Cidr {
  const range = parseCidr(text)
  if (!range) throw new StepError(`"${text}" is no range of addresses`)
  return range
}

function formatAddress(address: number): string {
  return [24, 16, 8, 0].map((shift) => Math.floor(address / 2 ** shift) % 256).join('.')
}
