// The variables of cluster.env: a table of name, kind and default, and the reader that checks them.
import { existsSync, readFileSync } from 'node:fs'
import { isIPv4 } from 'node:net'
import { isAbsolute, join } from 'node:path'
import type { Assignment } from './env-file.mts'

/** How a value is checked and typed. `parse` gives undefined for what it does not take. */
interface Kind<T> {
  parse(text: string): T | undefined
  expects: string
}

function whole(unit: string, least: number, most: number): Kind<number> {
  return {
    expects: `${unit} from ${least} to ${most}`,
    parse(text) {
      const number = /^\d{1,9}$/.test(text) ? Number(text) : Number.NaN
      return number >= least && number <= most ? number : undefined
    },
  }
}

function matching(expects: string, pattern: RegExp): Kind<string> {
  return { expects, parse: (text) => (pattern.test(text) ? text : undefined) }
}

function oneOf<const T extends string>(...choices: T[]): Kind<T> {
  return {
    expects: `one of ${choices.join(', ')}`,
    parse: (text) => choices.find((choice) => choice === text),
  }
}

// RFC 1123: what may be a host name, and so a node's name in Kubernetes.
const label = /^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$/

export const kinds = {
  label: matching('an RFC 1123 label (a-z, 0-9 and dashes inside, at most 63)', label),
  labels: {
    expects: 'RFC 1123 labels (a-z, 0-9 and dashes inside, at most 63) with spaces between',
    parse(text: string): string[] | undefined {
      const names = text.split(/\s+/).filter(Boolean)
      return names.every((name) => label.test(name)) ? names : undefined
    },
  },
  domain: matching('a domain name such as cluster.local', /^[a-z0-9-]+(\.[a-z0-9-]+)*$/),
  port: whole('a port', 1024, 65535),
  megabytes: whole('a number of megabytes', 256, 4_194_304),
  gigabytes: whole('a number of gigabytes', 2, 65_536),
  count: whole('a number', 1, 256),
  // X.509's UTCTime ends in 2049; some 20 years stay below it.
  days: whole('a number of days', 1, 7300),
  seconds: whole('a number of seconds', 1, 604_800),
  level: whole('a number', 0, 10),
  address: {
    expects: 'an IPv4 address',
    parse: (text: string) => (isIPv4(text) ? text : undefined),
  },
  cidr: {
    expects: 'an IPv4 range such as 10.32.0.0/24, without bits behind the mask',
    parse: (text: string) => (parseCidr(text) ? text : undefined),
  },
  mac: matching(
    'a unicast MAC address such as 52:54:00:12:34:56',
    /^[0-9a-f][02468ace](:[0-9a-f]{2}){5}$/i,
  ),
  version: matching('a version such as 1.36.3', /^\d+(\.\d+)+([-.][0-9A-Za-z.-]+)?$/),
  text: matching('text on one line', /^[^\r\n]*$/),
  proxy: matching(
    'a proxy address such as http://proxy.example:3128 (http or https, without blanks)',
    /^$|^(https?:\/\/)?[^\s/@]*(:[^\s/@]*)?@?[^\s/@:]+(:\d+)?\/?$/i,
  ),
} satisfies Record<string, Kind<unknown>>

interface Variable<T> {
  kind: Kind<T>
  /** Used when neither file nor environment sets it. Without: the variable is required. */
  otherwise?: T
}

/** Every variable that does not belong to one node. */
export const variables = {
  CLUSTER_NAME: { kind: kinds.label, otherwise: 'kubernetes-the-hardest-way' },
  CONTROL_PLANE_NODE: { kind: kinds.label },
  WORKER_NODES: { kind: kinds.labels },
  CONTROL_PLANE_MEM: { kind: kinds.megabytes },
  CONTROL_PLANE_CPUS: { kind: kinds.count, otherwise: 2 },
  WORKER_MEM: { kind: kinds.megabytes },
  WORKER_CPUS: { kind: kinds.count, otherwise: 2 },
  DISK_SIZE: { kind: kinds.gigabytes, otherwise: 20 },
  API_PORT: { kind: kinds.port, otherwise: 6443 },
  K8S_SERVICE_CIDR: { kind: kinds.cidr },
  K8S_API_SERVICE_IP: { kind: kinds.address },
  K8S_CLUSTER_DNS: { kind: kinds.address },
  K8S_CLUSTER_DOMAIN: { kind: kinds.domain, otherwise: 'cluster.local' },
  K8S_POD_CIDR: { kind: kinds.cidr },
  LAN_CIDR: { kind: kinds.cidr },
  LAN_SWITCH_PORT: { kind: kinds.port },
  KUBE_PROXY_MODE: { kind: oneOf('cilium', 'iptables', 'nftables'), otherwise: 'cilium' },
  NIXOS_VERSION: { kind: matching('a NixOS release such as 26.05', /^\d\d\.\d\d$/) },
  KUBERNETES_VERSION: { kind: kinds.version },
  CILIUM_VERSION: { kind: kinds.version },
  CILIUM_CHART: { kind: kinds.text, otherwise: 'https://helm.cilium.io/' },
  HELM_VERSION: { kind: kinds.version, otherwise: '4.3.1' },
  COREDNS_VERSION: { kind: kinds.version },
  METRICS_SERVER_VERSION: { kind: kinds.version },
  LOCAL_PATH_VERSION: { kind: kinds.version },
  SMOKE_IMAGE: { kind: kinds.text },
  NIXOS_ISO_URL: { kind: kinds.text, otherwise: '' },
  CA_DAYS: { kind: kinds.days, otherwise: 3650 },
  CERT_DAYS: { kind: kinds.days, otherwise: 365 },
  CERT_RENEW_DAYS: { kind: kinds.days, otherwise: 30 },
  QEMU_ACCEL: { kind: oneOf('auto', 'hvf', 'kvm', 'tcg'), otherwise: 'auto' },
  QEMU_DISK_CACHE: { kind: oneOf('writeback', 'none', 'unsafe'), otherwise: 'writeback' },
  QEMU_FIRMWARE_CODE: { kind: kinds.text, otherwise: '' },
  QEMU_FIRMWARE_VARS: { kind: kinds.text, otherwise: '' },
  INSTALL_TIMEOUT: { kind: kinds.seconds, otherwise: 3600 },
  BOOT_TIMEOUT: { kind: kinds.seconds, otherwise: 300 },
  STOP_TIMEOUT: { kind: kinds.seconds, otherwise: 120 },
  WAIT_TIMEOUT: { kind: kinds.seconds, otherwise: 900 },
  KUBE_LOG_LEVEL: { kind: kinds.level, otherwise: 2 },
  PROXY_HTTP: { kind: kinds.proxy, otherwise: '' },
  PROXY_HTTPS: { kind: kinds.proxy, otherwise: '' },
  PROXY_NO: { kind: kinds.text, otherwise: '' },
  PROXY_CA_FILE: { kind: kinds.text, otherwise: '' },
} satisfies Record<string, Variable<unknown>>

/** Beginnings of the variables that each node has: SSH_PORT_alpha. */
export const perNodeVariables = ['SSH_PORT', 'NODE_IP', 'MAC', 'POD_CIDR'] as const

/** The checked values, by variable. */
export type Settings = {
  [Name in keyof typeof variables]: (typeof variables)[Name]['kind'] extends Kind<infer T>
    ? T
    : never
}

/** Reads and checks values; what is wrong is collected in `problems`, not thrown. */
export class SettingsReader {
  readonly problems: string[] = []
  /** Variables that the environment sets to something else than the file. */
  readonly overridden: string[] = []
  private readonly assignments: Map<string, Assignment>
  private readonly env: Readonly<Record<string, string | undefined>>

  constructor(
    assignments: readonly Assignment[],
    env: Readonly<Record<string, string | undefined>>,
  ) {
    this.assignments = new Map(assignments.map((assignment) => [assignment.name, assignment]))
    this.env = env
  }

  /** Notes a problem of a variable, with the place its value comes from. */
  problem(name: string, reason: string): void {
    const line = this.assignments.get(name)?.line
    const file = line ? `cluster.env:${line}` : 'cluster.env'
    this.problems.push(`${this.env[name] !== undefined ? 'environment' : file}: ${name} ${reason}`)
  }

  /** The value of one variable; undefined, and a problem noted, if it is wrong or missing. */
  read<T>(name: string, kind: Kind<T>, otherwise?: T): T | undefined {
    const inFile = this.assignments.get(name)?.value
    const text = this.env[name] ?? inFile
    if (this.env[name] !== undefined && this.env[name] !== inFile) this.overridden.push(name)
    if (text === undefined) {
      if (otherwise === undefined) this.problem(name, 'is missing')
      return otherwise
    }
    const value = kind.parse(text)
    if (value === undefined) this.problem(name, `is "${shown(name, text)}", not ${kind.expects}`)
    return value
  }

  /** All values of the table. Wrong ones are missing: use it only once `problems` is empty. */
  readAll(): Settings {
    const values = Object.entries(variables).map(([name, variable]) => {
      const otherwise = 'otherwise' in variable ? variable.otherwise : undefined
      return [name, this.read<unknown>(name, variable.kind as Kind<unknown>, otherwise)]
    })
    return Object.fromEntries(values) as Settings
  }
}

/** A proxy's address may hold a password. */
function shown(name: string, text: string): string {
  return name.startsWith('PROXY_') ? text.replace(/[^/\s]*@/, '…@') : text
}

/** What keeps a proxy of the machines from working, in words; undefined if nothing does. */
export function proxyProblem(address: string): string | undefined {
  const host = address.replace(/^https?:\/\//i, '').replace(/^[^@]*@/, '')
  if (!/^(localhost|127\.[\d.]+|0\.0\.0\.0)(:|\/|$)/i.test(host)) return undefined
  return 'leads to the machine itself: a proxy on this computer has the address 10.0.2.2 there'
}

/** What is wrong with PROXY_CA_FILE, in words; undefined if it holds PEM certificates. */
export function caFileProblem(root: string, file: string): string | undefined {
  const path = isAbsolute(file) ? file : join(root, file)
  if (!existsSync(path)) return `names a file that does not exist: ${file}`
  const text = readFileSync(path, 'latin1')
  if (/-----BEGIN (RSA |EC )?PRIVATE KEY-----/.test(text)) return 'holds a private key'
  if (/^-----BEGIN CERTIFICATE-----$/m.test(text.replaceAll('\r', ''))) return undefined
  const convert = 'openssl x509 -inform DER -in FILE -out FILE.pem'
  return text.startsWith('\x30')
    ? `is not PEM; if it is DER: ${convert}`
    : 'holds no PEM certificate'
}

export interface Cidr {
  /** As written: "10.32.0.0/24". */
  text: string
  first: number
  last: number
}

/** The 32 bits of a dotted IPv4 address; undefined if it is none. */
export function parseAddress(text: string): number | undefined {
  const parts = text.split('.')
  if (parts.length !== 4 || !parts.every((part) => /^(0|[1-9]\d{0,2})$/.test(part)))
    return undefined
  const bytes = parts.map(Number)
  if (bytes.some((byte) => byte > 255)) return undefined
  return bytes.reduce((address, byte) => address * 256 + byte, 0)
}

/** A range such as "10.32.0.0/24"; undefined if it is none, or its address has bits behind the mask. */
export function parseCidr(text: string): Cidr | undefined {
  const [address = '', length = '', ...rest] = text.split('/')
  const first = parseAddress(address)
  if (first === undefined || rest.length > 0 || !/^\d{1,2}$/.test(length)) return undefined
  if (Number(length) > 32) return undefined
  const size = 2 ** (32 - Number(length))
  if (first % size !== 0) return undefined
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

/** Number of bits of the mask: 24 of "10.32.0.0/24". */
export function prefixLength(cidr: Cidr): number {
  return 32 - Math.log2(cidr.last - cidr.first + 1)
}

/** The network that QEMU's user-mode interface gives every machine. */
export const outsideCidr = '10.0.2.0/24'
/** This computer as the machines see it through that interface. */
export const outsideGateway = '10.0.2.2'
