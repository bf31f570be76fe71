// The table of machines, from the variables that each of them has.

import type { Node } from '../cluster.mts'
import { parseAddress, parseCidr } from './cidr.mts'
import type { SettingsReader } from './settings.mts'
import { kinds, type Settings } from './variables.mts'

/** The nodes of cluster.env, control plane first; mistakes are noted in the reader. */
export function nodesFrom(settings: Settings, reader: SettingsReader): Node[] {
  const controlPlane = settings.CONTROL_PLANE_NODE
  const workers = settings.WORKER_NODES ?? []
  const names = [...(controlPlane ? [controlPlane] : []), ...workers]
  for (const name of names.filter((candidate, index) => names.indexOf(candidate) !== index)) {
    reader.problem('WORKER_NODES', `names the node "${name}" twice`)
  }
  const nodes = [...new Set(names)].map((name) =>
    nodeOf(name, name !== controlPlane, settings, reader),
  )
  checkDuplicates(nodes, reader)
  return nodes
}

function nodeOf(name: string, worker: boolean, settings: Settings, reader: SettingsReader): Node {
  const suffix = name.replaceAll('-', '_')
  const ip = reader.read(`NODE_IP_${suffix}`, kinds.address) ?? ''
  const mac = (reader.read(`MAC_${suffix}`, kinds.mac) ?? '').toLowerCase()
  return {
    name,
    role: worker ? 'worker' : 'control-plane',
    ip,
    mac,
    lanMac: lanMacOf(mac),
    sshPort: reader.read(`SSH_PORT_${suffix}`, kinds.port) ?? 0,
    lanPort: lanPortOf(ip, settings),
    ...(worker ? { podCidr: reader.read(`POD_CIDR_${suffix}`, kinds.cidr) ?? '' } : {}),
    memory: worker ? settings.WORKER_MEM : settings.CONTROL_PLANE_MEM,
    cpus: worker ? settings.WORKER_CPUS : settings.CONTROL_PLANE_CPUS,
  }
}

/** The outside card's MAC with the third byte raised by one: 52:54:00:… becomes 52:54:01:…. */
function lanMacOf(mac: string): string {
  const bytes = mac.split(':')
  const third = (Number.parseInt(bytes[2] ?? '0', 16) + 1) % 256
  return [...bytes.slice(0, 2), third.toString(16).padStart(2, '0'), ...bytes.slice(3)].join(':')
}

/** Each machine's lan port follows from its address, so a new machine changes nothing on others. */
function lanPortOf(ip: string, settings: Settings): number {
  const address = parseAddress(ip)
  const lan = parseCidr(settings.LAN_CIDR ?? '')
  if (address === undefined || !lan) return 0
  return settings.LAN_SWITCH_PORT + (address - lan.first)
}

const unique = [
  { variable: 'SSH_PORT', of: (node: Node) => node.sshPort },
  { variable: 'NODE_IP', of: (node: Node) => node.ip },
  { variable: 'MAC', of: (node: Node) => node.mac },
  { variable: 'POD_CIDR', of: (node: Node) => node.podCidr },
] as const

function checkDuplicates(nodes: readonly Node[], reader: SettingsReader): void {
  for (const { variable, of } of unique) {
    for (const [index, node] of nodes.entries()) {
      const value = of(node)
      const earlier = value && nodes.slice(0, index).find((other) => of(other) === value)
      if (!earlier) continue
      const name = `${variable}_${node.name.replaceAll('-', '_')}`
      reader.problem(name, `is "${value}", which ${earlier.name} has already`)
    }
  }
}
