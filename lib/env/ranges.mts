// Whether the addresses and ports of cluster.env fit together.

import type { Node } from '../cluster.mts'
import { contains, overlap, parseAddress, parseCidr } from './cidr.mts'
import type { SettingsReader } from './settings.mts'
import type { Settings } from './variables.mts'

/** The network that QEMU's user-mode card gives every machine; 10.0.2.2 is this computer. */
export const outsideCidr = '10.0.2.0/24'
/** This computer as the machines see it through that card. */
export const outsideGateway = '10.0.2.2'

/** Notes ranges that overlap, addresses outside their range and ports that collide. */
export function checkRanges(
  settings: Settings,
  nodes: readonly Node[],
  reader: SettingsReader,
): void {
  const ranges = [
    ['K8S_SERVICE_CIDR', settings.K8S_SERVICE_CIDR],
    ['K8S_POD_CIDR', settings.K8S_POD_CIDR],
    ['LAN_CIDR', settings.LAN_CIDR],
    ["QEMU's own network", outsideCidr],
  ] as const
  for (const [index, [name, text]] of ranges.entries()) {
    for (const [other, otherText] of ranges.slice(index + 1)) {
      const [a, b] = [parseCidr(text ?? ''), parseCidr(otherText ?? '')]
      if (a && b && overlap(a, b))
        reader.problem(name, `(${text}) overlaps ${other} (${otherText})`)
    }
  }

  within(reader, 'K8S_CLUSTER_DNS', settings.K8S_CLUSTER_DNS, 'K8S_SERVICE_CIDR', settings)
  within(reader, 'K8S_API_SERVICE_IP', settings.K8S_API_SERVICE_IP, 'K8S_SERVICE_CIDR', settings)
  checkFirstAddress(settings, reader)
  for (const node of nodes) {
    const suffix = node.name.replaceAll('-', '_')
    within(reader, `NODE_IP_${suffix}`, node.ip, 'LAN_CIDR', settings)
    checkHostAddress(`NODE_IP_${suffix}`, node.ip, settings.LAN_CIDR, reader)
    if (node.podCidr) within(reader, `POD_CIDR_${suffix}`, node.podCidr, 'K8S_POD_CIDR', settings)
    if (node.lanPort > 65535) reader.problem(`NODE_IP_${suffix}`, 'gives a lan port above 65535')
  }
  checkPodCidrs(nodes, reader)
  checkPorts(settings, nodes, reader)
}

function within(
  reader: SettingsReader,
  name: string,
  text: string | undefined,
  rangeName: 'K8S_SERVICE_CIDR' | 'K8S_POD_CIDR' | 'LAN_CIDR',
  settings: Settings,
): void {
  const range = parseCidr(settings[rangeName] ?? '')
  const inner = parseAddress(text ?? '') ?? parseCidr(text ?? '')
  if (range && inner !== undefined && !contains(range, inner)) {
    reader.problem(name, `(${text}) is outside ${rangeName} (${range.text})`)
  }
}

/** The first and the last address mean the network and everyone on it. */
function checkHostAddress(name: string, ip: string, lan: string, reader: SettingsReader): void {
  const [address, range] = [parseAddress(ip), parseCidr(lan ?? '')]
  if (range && (address === range.first || address === range.last)) {
    reader.problem(name, `(${ip}) is no machine's address in ${range.text}`)
  }
}

/** kube-apiserver gives the service "kubernetes" the first address, whatever this file says. */
function checkFirstAddress(settings: Settings, reader: SettingsReader): void {
  const range = parseCidr(settings.K8S_SERVICE_CIDR ?? '')
  const address = parseAddress(settings.K8S_API_SERVICE_IP ?? '')
  if (!range || address === undefined || !contains(range, address)) return
  if (address !== range.first + 1) {
    reader.problem('K8S_API_SERVICE_IP', `is not the first address of ${range.text}`)
  }
  if (settings.K8S_CLUSTER_DNS === settings.K8S_API_SERVICE_IP) {
    reader.problem('K8S_CLUSTER_DNS', 'is the address of the service "kubernetes"')
  }
}

function checkPodCidrs(nodes: readonly Node[], reader: SettingsReader): void {
  for (const [index, node] of nodes.entries()) {
    const range = parseCidr(node.podCidr ?? '')
    if (!range) continue
    for (const other of nodes.slice(0, index)) {
      const otherRange = parseCidr(other.podCidr ?? '')
      // Equal ones are told as duplicates already.
      if (!otherRange || otherRange.text === range.text || !overlap(range, otherRange)) continue
      const name = `POD_CIDR_${node.name.replaceAll('-', '_')}`
      reader.problem(name, `(${range.text}) overlaps that of ${other.name} (${otherRange.text})`)
    }
  }
}

function checkPorts(settings: Settings, nodes: readonly Node[], reader: SettingsReader): void {
  for (const node of nodes) {
    if (node.sshPort && node.sshPort === settings.API_PORT) {
      reader.problem(`SSH_PORT_${node.name.replaceAll('-', '_')}`, 'is API_PORT too')
    }
  }
}
