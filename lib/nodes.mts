// The machines of cluster.env, and whether their names, addresses and ports fit together.
import {
  contains,
  kinds,
  outsideCidr,
  overlap,
  parseAddress,
  parseCidr,
  type Settings,
  type SettingsReader,
} from './settings.mts'

export type Role = 'control-plane' | 'worker'

/** One virtual machine. */
export interface Node {
  name: string
  role: Role
  /** Address in the LAN, the machines' own network. */
  ip: string
  /** MAC address of the interface to the outside, and of the one to the LAN. */
  mac: string
  lanMac: string
  /** Port on 127.0.0.1 that is forwarded to the machine's sshd. */
  sshPort: number
  /** UDP port on 127.0.0.1 from which its QEMU sends the LAN's frames. */
  lanPort: number
  /** The range of the pods on a worker; the control plane runs no pods. */
  podCidr?: string
  /** MB. */
  memory: number
  cpus: number
}

/** Names that a node cannot have, because its files would be another's, and whose. */
const reserved: readonly [pattern: RegExp, of: string][] = [
  [/^(bootstrap|pki|lan-switch|download-iso|kube-cache)$/, 'a file of the scripts in run/'],
  [/-install$/, 'the installation of a machine'],
  [/-key$/, 'the key of a certificate'],
  [/^localhost$/, 'this computer'],
  [/^all$/, 'all nodes (make upgrade NAME=all)'],
  [
    /^(ca|admin|kube-controller-manager|kube-scheduler|kube-proxy|kubernetes|service-account|front-proxy-client|metrics-server)$/,
    'another certificate in tls/',
  ],
]

/** What a name is reserved for; undefined if a node can have it. */
export function reservedFor(name: string): string | undefined {
  return reserved.find(([pattern]) => pattern.test(name))?.[1]
}

/** The variable of a node: `nodeVariable('SSH_PORT', 'my-node')` is SSH_PORT_my_node. */
export function nodeVariable(prefix: string, name: string): string {
  return `${prefix}_${name.replaceAll('-', '_')}`
}

/** The nodes of cluster.env, control plane first; mistakes are noted in the reader. */
export function nodesFrom(settings: Settings, reader: SettingsReader): Node[] {
  const controlPlane = settings.CONTROL_PLANE_NODE
  const names = [...(controlPlane ? [controlPlane] : []), ...(settings.WORKER_NODES ?? [])]
  for (const [index, name] of names.entries()) {
    const variable = name === controlPlane ? 'CONTROL_PLANE_NODE' : 'WORKER_NODES'
    if (names.indexOf(name) !== index) {
      reader.problem('WORKER_NODES', `names the node "${name}" twice`)
    }
    const of = reservedFor(name)
    if (of) reader.problem(variable, `names a node "${name}", which is the name of ${of}`)
  }
  const nodes = [...new Set(names)].map((name) =>
    nodeOf(name, name !== controlPlane, settings, reader),
  )
  checkDuplicates(nodes, reader)
  checkRanges(settings, nodes, reader)
  return nodes
}

function nodeOf(name: string, worker: boolean, settings: Settings, reader: SettingsReader): Node {
  const read = <T,>(prefix: string, kind: Parameters<typeof reader.read<T>>[1]) =>
    reader.read<T>(nodeVariable(prefix, name), kind)
  const ip = read('NODE_IP', kinds.address) ?? ''
  const mac = (read('MAC', kinds.mac) ?? '').toLowerCase()
  return {
    name,
    role: worker ? 'worker' : 'control-plane',
    ip,
    mac,
    lanMac: lanMacOf(mac),
    sshPort: read('SSH_PORT', kinds.port) ?? 0,
    lanPort: lanPortOf(ip, settings),
    ...(worker ? { podCidr: read('POD_CIDR', kinds.cidr) ?? '' } : {}),
    memory: worker ? settings.WORKER_MEM : settings.CONTROL_PLANE_MEM,
    cpus: worker ? settings.WORKER_CPUS : settings.CONTROL_PLANE_CPUS,
  }
}

/** The outside MAC with the third byte raised by one: 52:54:00:… gives 52:54:01:…. */
function lanMacOf(mac: string): string {
  const bytes = mac.split(':')
  const third = (Number.parseInt(bytes[2] ?? '0', 16) + 1) % 256
  return [...bytes.slice(0, 2), third.toString(16).padStart(2, '0'), ...bytes.slice(3)].join(':')
}

/** The LAN port follows from the address, so a new machine changes nothing on the others. */
function lanPortOf(ip: string, settings: Settings): number {
  const address = parseAddress(ip)
  const lan = parseCidr(settings.LAN_CIDR ?? '')
  if (address === undefined || !lan) return 0
  return settings.LAN_SWITCH_PORT + (address - lan.first)
}

const unique = [
  { prefix: 'SSH_PORT', of: (node: Node) => node.sshPort },
  { prefix: 'NODE_IP', of: (node: Node) => node.ip },
  { prefix: 'MAC', of: (node: Node) => node.mac },
  { prefix: 'POD_CIDR', of: (node: Node) => node.podCidr },
] as const

function checkDuplicates(nodes: readonly Node[], reader: SettingsReader): void {
  for (const { prefix, of } of unique) {
    for (const [index, node] of nodes.entries()) {
      const value = of(node)
      const earlier = value && nodes.slice(0, index).find((other) => of(other) === value)
      if (!earlier) continue
      reader.problem(
        nodeVariable(prefix, node.name),
        `is "${value}", which ${earlier.name} has already`,
      )
    }
  }
}

/** Notes ranges that overlap, addresses outside their range and ports that collide. */
function checkRanges(settings: Settings, nodes: readonly Node[], reader: SettingsReader): void {
  const { K8S_SERVICE_CIDR, K8S_POD_CIDR, LAN_CIDR } = settings
  const ranges = Object.entries({
    ...{ K8S_SERVICE_CIDR, K8S_POD_CIDR, LAN_CIDR },
    "QEMU's own network": outsideCidr,
  })
  for (const [index, [name, text]] of ranges.entries()) {
    for (const [other, otherText] of ranges.slice(index + 1)) {
      const [a, b] = [parseCidr(text ?? ''), parseCidr(otherText ?? '')]
      if (a && b && overlap(a, b))
        reader.problem(name, `(${text}) overlaps ${other} (${otherText})`)
    }
  }
  const within = (name: string, text: string | undefined, rangeName: keyof Settings & string) => {
    const range = parseCidr(String(settings[rangeName] ?? ''))
    const inner = parseAddress(text ?? '') ?? parseCidr(text ?? '')
    if (range && inner !== undefined && !contains(range, inner)) {
      reader.problem(name, `(${text}) is outside ${rangeName} (${range.text})`)
    }
  }
  within('K8S_CLUSTER_DNS', settings.K8S_CLUSTER_DNS, 'K8S_SERVICE_CIDR')
  within('K8S_API_SERVICE_IP', settings.K8S_API_SERVICE_IP, 'K8S_SERVICE_CIDR')
  checkFirstAddress(settings, reader)
  for (const { name, ip, podCidr, lanPort, sshPort } of nodes) {
    const address = nodeVariable('NODE_IP', name)
    within(address, ip, 'LAN_CIDR')
    const [number, lan] = [parseAddress(ip), parseCidr(LAN_CIDR ?? '')]
    // The first and the last address of a range mean the network and everyone in it.
    if (lan && (number === lan.first || number === lan.last)) {
      reader.problem(address, `(${ip}) cannot be a machine's address in ${lan.text}`)
    }
    if (lanPort > 65535) reader.problem(address, 'gives a LAN port above 65535')
    if (podCidr) within(nodeVariable('POD_CIDR', name), podCidr, 'K8S_POD_CIDR')
    if (sshPort && sshPort === settings.API_PORT) {
      reader.problem(nodeVariable('SSH_PORT', name), 'is also API_PORT')
    }
  }
  checkPodCidrs(nodes, reader)
}

/** kube-apiserver gives the service "kubernetes" the first address, whatever cluster.env says. */
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
  for (const [index, { name, podCidr }] of nodes.entries()) {
    const range = parseCidr(podCidr ?? '')
    for (const other of nodes.slice(0, index)) {
      const otherRange = parseCidr(other.podCidr ?? '')
      // Equal ranges are reported as duplicates already.
      if (!range || !otherRange || otherRange.text === range.text) continue
      if (!overlap(range, otherRange)) continue
      const variable = nodeVariable('POD_CIDR', name)
      reader.problem(
        variable,
        `(${range.text}) overlaps that of ${other.name} (${otherRange.text})`,
      )
    }
  }
}
