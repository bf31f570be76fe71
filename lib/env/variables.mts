// The table of cluster.env's variables: name, kind, and what it is when the file has no such line.
import { isIPv4 } from 'node:net'
import { parseCidr } from './cidr.mts'

/** How a value is checked and typed. `parse` gives undefined for what it does not take. */
interface Kind<T> {
  parse(text: string): T | undefined
  expects: string
}

function whole(expects: string, least: number, most = Number.MAX_SAFE_INTEGER): Kind<number> {
  return {
    expects,
    parse(text) {
      const number = /^\d+$/.test(text) ? Number(text) : Number.NaN
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
  port: whole('a port from 1024 to 65535', 1024, 65535),
  megabytes: whole('a number of megabytes, at least 256', 256),
  gigabytes: whole('a number of gigabytes, at least 2', 2),
  count: whole('a number from 1 to 256', 1, 256),
  days: whole('a number of days, at least 1', 1),
  seconds: whole('a number of seconds, at least 1', 1),
  level: whole('a number from 0 to 10', 0, 10),
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
} satisfies Record<string, Kind<unknown>>

interface Variable<T> {
  kind: Kind<T>
  /** Taken when neither file nor environment has it. Without: the variable is needed. */
  otherwise?: T
}

/** Every variable that is not of one node. */
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
  CILIUM_CLI_VERSION: { kind: kinds.version },
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
  PROXY_HTTP: { kind: kinds.text, otherwise: '' },
  PROXY_HTTPS: { kind: kinds.text, otherwise: '' },
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
