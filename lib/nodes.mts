// The machines of cluster.env, and whether names, addresses, ports and the proxy fit together.
import { X509Certificate } from 'node:crypto'
import { readFileSync, statSync } from 'node:fs'
import { resolve } from 'node:path'
import type { Kind, Settings, SettingsReader } from './settings.mts'
import { contains, kinds, outsideCidr, overlap, parseAddress, parseCidr } from './settings.mts'

/** One virtual machine. */
export interface Node {
  name: string
  role: 'control-plane' | 'worker'
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

/** Names that a node cannot have, and what has them already. */
const reserved: readonly [pattern: RegExp, of: string][] = [
  [/^(bootstrap|pki|lan-switch|download-iso|kube-cache|helm|encryption-config)$/, 'files in run/'],
  [/-install$/, 'the installation of a machine'],
  [/-key$/, 'the key of a certificate'],
  [/^localhost$/, 'this computer'],
  [/^default$/, 'the claim of the default StorageClass'],
  [/^(\d[\dex]*|0x[\da-f]+|true|false|null|yes|no|on|off|y|n)$/, 'a number or boolean of YAML'],
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

/** One node with its variables; missing and wrong ones are noted in the reader. */
export function readNode(name: string, settings: Settings, reader: SettingsReader): Node {
  const isWorker = name !== settings.CONTROL_PLANE_NODE
  const read = <T,>(prefix: string, kind: Kind<T>) => reader.read(nodeVariable(prefix, name), kind)
  const ip = read('NODE_IP', kinds.address) ?? ''
  const mac = (read('MAC', kinds.mac) ?? '').toLowerCase()
  // In the LAN: the third byte raised by one, 52:54:01:… instead of 52:54:00:….
  const lanMac = mac.replace(/(?<=^.{6})../, (byte) =>
    ((Number.parseInt(byte, 16) + 1) % 256).toString(16).padStart(2, '0'),
  )
  // The LAN port follows from the address, so a new machine changes nothing on the others.
  const hostPart = (parseAddress(ip) ?? 0) - (parseCidr(settings.LAN_CIDR)?.first ?? 0)
  return {
    ...{ name, role: isWorker ? 'worker' : 'control-plane', ip, mac, lanMac },
    sshPort: read('SSH_PORT', kinds.port) ?? 0,
    lanPort: settings.LAN_SWITCH_PORT + hostPart,
    ...(isWorker ? { podCidr: read('POD_CIDR', kinds.cidr) ?? '' } : {}),
    memory: isWorker ? settings.WORKER_MEM : settings.CONTROL_PLANE_MEM,
    cpus: isWorker ? settings.WORKER_CPUS : settings.CONTROL_PLANE_CPUS,
  }
}

/**
 * Checks that values which are valid each by itself fit together. Invalid ones are undefined here,
 * whatever their type says, and have been reported already.
 * @param names of the nodes as they are listed, with those that are listed twice
 */
export function checkTogether(
  root: string,
  names: readonly string[],
  nodes: readonly Node[],
  settings: Settings,
  reader: SettingsReader,
): void {
  const { K8S_SERVICE_CIDR, K8S_POD_CIDR, LAN_CIDR, K8S_API_SERVICE_IP, K8S_CLUSTER_DNS } = settings
  const check = (isWrong: unknown, variable: string, reason: string) => {
    if (isWrong) reader.problem(variable, reason)
  }
  for (const [index, name] of names.entries()) {
    const list = name === settings.CONTROL_PLANE_NODE ? 'CONTROL_PLANE_NODE' : 'WORKER_NODES'
    const of = reservedFor(name)
    check(names.indexOf(name) < index, 'WORKER_NODES', `names the node "${name}" twice`)
    check(of, list, `names a node "${name}", which is the name of ${of}`)
  }
  const own = { SSH_PORT: 'sshPort', NODE_IP: 'ip', MAC: 'mac', POD_CIDR: 'podCidr' } as const
  for (const [prefix, key] of Object.entries(own)) {
    for (const [index, { name, [key]: value }] of nodes.entries()) {
      const earlier = nodes.slice(0, index).find((other) => other[key] === value)
      const reason = `is "${value}", which ${earlier?.name} has already`
      check(value && earlier, nodeVariable(prefix, name), reason)
    }
  }

  const checkApart = (ranges: [variable: string, range?: string, called?: string][]) => {
    for (const [index, [variable, text]] of ranges.entries()) {
      for (const [other, otherText, called = other] of ranges.slice(0, index)) {
        const [a, b] = [parseCidr(text), parseCidr(otherText)]
        check(a && b && overlap(a, b), variable, `(${text}) overlaps ${called} (${otherText})`)
      }
    }
  }
  checkApart([
    ["QEMU's own network", outsideCidr],
    ...Object.entries({ LAN_CIDR, K8S_POD_CIDR, K8S_SERVICE_CIDR }),
  ])
  // Equal ranges of pods have been reported already.
  const podRanges = new Map(nodes.map(({ podCidr, name }) => [podCidr, name]))
  checkApart(
    [...podRanges].map(([text, name]) => [nodeVariable('POD_CIDR', name), text, `that of ${name}`]),
  )

  type Range = 'K8S_SERVICE_CIDR' | 'K8S_POD_CIDR' | 'LAN_CIDR'
  const checkInside = (variable: string, text: string | undefined, outer: Range) => {
    const range = parseCidr(settings[outer])
    const inner = parseAddress(text) ?? parseCidr(text)
    const isOutside = range && inner !== undefined && !contains(range, inner)
    check(isOutside, variable, `(${text}) is outside ${outer} (${range?.text})`)
    return !isOutside
  }
  checkInside('K8S_CLUSTER_DNS', K8S_CLUSTER_DNS, 'K8S_SERVICE_CIDR')
  if (checkInside('K8S_API_SERVICE_IP', K8S_API_SERVICE_IP, 'K8S_SERVICE_CIDR')) {
    // kube-apiserver gives the service "kubernetes" the first address, whatever cluster.env says.
    const [services, api] = [parseCidr(K8S_SERVICE_CIDR), parseAddress(K8S_API_SERVICE_IP)]
    const isOther = services && api !== undefined && api !== services.first + 1
    check(isOther, 'K8S_API_SERVICE_IP', `is not the first address of ${services?.text}`)
    const isShared = api !== undefined && K8S_CLUSTER_DNS === K8S_API_SERVICE_IP
    check(isShared, 'K8S_CLUSTER_DNS', 'is the address of the service "kubernetes"')
  }

  const lan = parseCidr(LAN_CIDR)
  for (const { name, ip, lanPort, sshPort, podCidr } of nodes) {
    const variable = nodeVariable('NODE_IP', name)
    checkInside(variable, ip, 'LAN_CIDR')
    checkInside(nodeVariable('POD_CIDR', name), podCidr, 'K8S_POD_CIDR')
    // The first and the last address of a range are the network's and the broadcast address.
    const isNobodys = lan && [lan.first, lan.last].includes(parseAddress(ip) ?? -1)
    check(isNobodys, variable, `(${ip}) cannot be a machine's address in ${lan?.text}`)
    check(lan && lanPort > 65535, variable, 'gives a LAN port above 65535')
    check(sshPort === settings.API_PORT, nodeVariable('SSH_PORT', name), 'is also API_PORT')
  }

  const itself = /^(https?:\/\/)?([^@]*@)?(localhost|127\.[\d.]+|0\.0\.0\.0)(:|\/|$)/i
  const advice = 'a proxy on this computer has the address 10.0.2.2 there'
  for (const name of ['PROXY_HTTP', 'PROXY_HTTPS'] as const) {
    check(itself.test(settings[name] ?? ''), name, `leads to the machine itself: ${advice}`)
  }
  const problem = settings.PROXY_CA_FILE && caFileProblem(root, settings.PROXY_CA_FILE)
  check(problem, 'PROXY_CA_FILE', `${problem}`)
}

/** What is wrong with PROXY_CA_FILE, in words; undefined if it holds PEM certificates. */
function caFileProblem(root: string, file: string): string | undefined {
  const path = resolve(root, file)
  const isFile = statSync(path, { throwIfNoEntry: false })?.isFile()
  if (!isFile) return `names a file that does not exist: ${file}`
  const text = readFileSync(path, 'latin1')
  if (/-----BEGIN (RSA |EC )?PRIVATE KEY-----/.test(text)) return 'holds a private key'
  const found = text.match(/^-----BEGIN CERTIFICATE-----$[^-]*-----END CERTIFICATE-----$/gm) ?? []
  try {
    for (const pem of found) new X509Certificate(pem)
  } catch {
    return 'holds a damaged certificate'
  }
  if (found.length > 0) return undefined
  if (!text.startsWith('\x30')) return 'holds no PEM certificate'
  return 'is not PEM. DER: openssl x509 -inform DER -in FILE -out FILE.pem. PKCS#12: openssl pkcs12 -nokeys -in FILE -out FILE.pem'
}
