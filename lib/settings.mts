// The variables of cluster.env: a table of name, kind and default, and the reader that checks them.
import { isIPv4 } from 'node:net'
import type { Assignment } from './env-file.mts'

/** How a value is checked and typed. `parse` gives undefined for what it does not take. */
export type Kind<T> = { parse(text: string): T | undefined; expects: string }

function whole(unit: string, least: number, most: number): Kind<number> {
  return {
    expects: `${unit} from ${least} to ${most}`,
    parse(text) {
      const number = /^\d{1,9}$/.test(text) ? Number(text) : Number.NaN
      return number >= least && number <= most ? number : undefined
    },
  }
}

/** @param fits a pattern, or another check */
function textThat(expects: string, fits: RegExp | ((text: string) => unknown)): Kind<string> {
  const check = typeof fits === 'function' ? fits : (text: string) => fits.test(text)
  return { expects, parse: (text) => (check(text) ? text : undefined) }
}

function oneOf<const T extends string>(...choices: T[]): Kind<T> {
  const expects = `one of ${choices.join(', ')}`
  return { expects, parse: (text) => choices.find((choice) => choice === text) }
}

// RFC 1123: what may be a host name, and so a node's name in Kubernetes.
const label = /^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$/
const ofLabel = '(a-z, 0-9 and dashes inside, at most 63)'

export const kinds = {
  label: textThat(`an RFC 1123 label ${ofLabel}`, label),
  labels: {
    expects: `RFC 1123 labels ${ofLabel} with spaces between`,
    parse(text: string): string[] | undefined {
      const names = text.split(/\s+/).filter(Boolean)
      return names.every((name) => label.test(name)) ? names : undefined
    },
  },
  domain: textThat('a domain name such as cluster.local', /^[a-z0-9-]+(\.[a-z0-9-]+)*$/),
  port: whole('a port', 1024, 65535),
  megabytes: whole('a number of megabytes', 256, 4_194_304),
  gigabytes: whole('a number of gigabytes', 2, 65_536),
  count: whole('a number', 1, 256),
  // X.509's UTCTime ends in 2049; some 20 years stay below it.
  days: whole('a number of days', 1, 7300),
  seconds: whole('a number of seconds', 1, 604_800),
  level: whole('a number', 0, 10),
  address: textThat('an IPv4 address', isIPv4),
  cidr: textThat('a CIDR such as 10.32.0.0/24, with no host bits set', parseCidr),
  mac: textThat(
    'a unicast MAC address such as 52:54:00:12:34:56',
    /^[0-9a-f][02468ace](:[0-9a-f]{2}){5}$/i,
  ),
  version: textThat('a version such as 1.36.3', /^\d+(\.\d+)+([-.][0-9A-Za-z.-]+)?$/),
  release: textThat('a NixOS release such as 26.05', /^\d\d\.\d\d$/),
  chart: textThat('a chart, with no credentials in its address', /^(?![\w+.-]+:\/\/[^/]*@).*$/),
  text: textThat('text on one line', /^[^\r\n]*$/),
  proxy: textThat(
    'a proxy address such as http://proxy.example:3128 (http or https, without blanks)',
    /^$|^(https?:\/\/)?[^\s/@]*(:[^\s/@]*)?@?[^\s/@:]+(:\d+)?\/?$/i,
  ),
} satisfies Record<string, Kind<unknown>>

/** A variable's kind, and its value where neither file nor environment sets it; none: required. */
type Variable = readonly [kind: Kind<unknown>, otherwise?: string | number]

/** Every variable that does not belong to one node. */
export const variables = {
  CLUSTER_NAME: [kinds.label, 'kubernetes-the-hardest-way'],
  CONTROL_PLANE_NODE: [kinds.label],
  WORKER_NODES: [kinds.labels],
  CONTROL_PLANE_MEM: [kinds.megabytes],
  CONTROL_PLANE_CPUS: [kinds.count, 2],
  WORKER_MEM: [kinds.megabytes],
  WORKER_CPUS: [kinds.count, 2],
  DISK_SIZE: [kinds.gigabytes, 20],
  API_PORT: [kinds.port, 6443],
  K8S_SERVICE_CIDR: [kinds.cidr],
  K8S_API_SERVICE_IP: [kinds.address],
  K8S_CLUSTER_DNS: [kinds.address],
  K8S_CLUSTER_DOMAIN: [kinds.domain, 'cluster.local'],
  K8S_POD_CIDR: [kinds.cidr],
  LAN_CIDR: [kinds.cidr],
  LAN_SWITCH_PORT: [kinds.port],
  KUBE_PROXY_MODE: [oneOf('cilium', 'iptables', 'nftables'), 'cilium'],
  NIXOS_VERSION: [kinds.release],
  KUBERNETES_VERSION: [kinds.version],
  CILIUM_VERSION: [kinds.version],
  CILIUM_CHART: [kinds.chart, 'https://helm.cilium.io/'],
  HELM_VERSION: [kinds.version, '4.3.1'],
  COREDNS_VERSION: [kinds.version],
  METRICS_SERVER_VERSION: [kinds.version],
  LOCAL_PATH_VERSION: [kinds.version],
  SMOKE_IMAGE: [kinds.text],
  NIXOS_ISO_URL: [kinds.text, ''],
  CA_DAYS: [kinds.days, 3650],
  CERT_DAYS: [kinds.days, 365],
  CERT_RENEW_DAYS: [kinds.days, 30],
  QEMU_ACCEL: [oneOf('auto', 'hvf', 'kvm', 'tcg'), 'auto'],
  QEMU_DISK_CACHE: [oneOf('writeback', 'none', 'unsafe'), 'writeback'],
  QEMU_FIRMWARE_CODE: [kinds.text, ''],
  QEMU_FIRMWARE_VARS: [kinds.text, ''],
  INSTALL_TIMEOUT: [kinds.seconds, 3600],
  BOOT_TIMEOUT: [kinds.seconds, 300],
  STOP_TIMEOUT: [kinds.seconds, 120],
  WAIT_TIMEOUT: [kinds.seconds, 900],
  KUBE_LOG_LEVEL: [kinds.level, 2],
  PROXY_HTTP: [kinds.proxy, ''],
  PROXY_HTTPS: [kinds.proxy, ''],
  PROXY_NO: [kinds.text, ''],
  PROXY_CA_FILE: [kinds.text, ''],
} as const satisfies Record<string, Variable>

/** Beginnings of the variables that each node has: SSH_PORT_alpha. */
export const perNodeVariables = ['SSH_PORT', 'NODE_IP', 'MAC', 'POD_CIDR'] as const

/** The checked values, by variable. */
export type Settings = {
  [Name in keyof typeof variables]: (typeof variables)[Name][0] extends Kind<infer T> ? T : never
}

/** Reads and checks values; what is wrong is collected in `problems`, not thrown. */
export class SettingsReader {
  readonly problems: string[] = []
  /** Variables that the environment sets to something else than the file. */
  readonly overridden: string[] = []
  private readonly inFile: Map<string, Assignment>
  private readonly env: NodeJS.ProcessEnv

  constructor(assignments: readonly Assignment[], env: NodeJS.ProcessEnv) {
    this.inFile = new Map(assignments.map((assignment) => [assignment.name, assignment]))
    this.env = env
  }

  /** Notes a problem of a variable, with the place its value comes from. */
  problem(name: string, reason: string): void {
    const line = this.inFile.get(name)?.line
    const file = line ? `cluster.env:${line}` : 'cluster.env'
    this.problems.push(`${this.env[name] !== undefined ? 'environment' : file}: ${name} ${reason}`)
  }

  /** The value of one variable; undefined, and a problem noted, if it is wrong or missing. */
  read<T>(name: string, kind: Kind<T>, otherwise?: T): T | undefined {
    const inFile = this.inFile.get(name)?.value
    const text = this.env[name] ?? inFile
    if (text !== inFile) this.overridden.push(name)
    if (text === undefined) {
      if (otherwise === undefined) this.problem(name, 'is missing')
      return otherwise
    }
    const value = kind.parse(text)
    if (value !== undefined) return value
    // An address may hold a password.
    const shown = /^(PROXY_|CILIUM_CHART)/.test(name) ? text.replace(/[^/\s]*@/, '…@') : text
    this.problem(name, `is "${shown}", not ${kind.expects}`)
    return undefined
  }

  /** All values of the table. Wrong ones are missing: use it only once `problems` is empty. */
  readAll(): Settings {
    const rows: [string, Variable][] = Object.entries(variables)
    const values = rows.map(([name, [kind, otherwise]]) => [name, this.read(name, kind, otherwise)])
    return Object.fromEntries(values) as Settings
  }
}

/** `text` is the range as it was written: "10.32.0.0/24". */
export type Cidr = { text: string; first: number; last: number }

/** The 32 bits of a dotted IPv4 address; undefined if it is none. */
export function parseAddress(text = ''): number | undefined {
  if (!isIPv4(text)) return undefined
  return text.split('.').reduce((address, byte) => address * 256 + Number(byte), 0)
}

/** A range such as "10.32.0.0/24"; undefined if it is none, or its address has bits behind the mask. */
export function parseCidr(text = ''): Cidr | undefined {
  const [, address, length] = text.match(/^([\d.]+)\/(\d|[12]\d|3[0-2])$/) ?? []
  const first = parseAddress(address)
  const size = 2 ** (32 - Number(length))
  if (first === undefined || first % size !== 0) return undefined
  return { text, first, last: first + size - 1 }
}

/** Whether the ranges share an address. */
export function overlap(a: Cidr, b: Cidr): boolean {
  return a.first <= b.last && b.first <= a.last
}

/** Whether `outer` holds all of `inner`, a range or one address. */
export function contains(outer: Cidr, inner: Cidr | number): boolean {
  const { first, last } = typeof inner === 'number' ? { first: inner, last: inner } : inner
  return outer.first <= first && last <= outer.last
}

/** The network that QEMU's user-mode interface gives every machine. */
export const outsideCidr = '10.0.2.0/24'
/** This computer as the machines see it through that interface. */
export const outsideGateway = '10.0.2.2'
