// Ports of this computer's loopback: whether they are free, and who holds them. QEMU itself would
// not say: of a UDP port that is taken it takes a share of the traffic without a word.
import { createSocket } from 'node:dgram'
import { readdir, readFile, readlink } from 'node:fs/promises'
import { createConnection, createServer } from 'node:net'
import { $ } from 'zx/core'
import type { Cluster, Node } from '../cluster.mts'
import { StepError } from '../errors.mts'

export type Transport = 'tcp' | 'udp'

export interface Port {
  transport: Transport
  port: number
  /** The variable of cluster.env that it comes from. */
  variable: string
}

const address = '127.0.0.1'

/** The ports that a machine opens on this computer. */
export function portsOf(cluster: Cluster, node: Node): Port[] {
  const suffix = node.name.replaceAll('-', '_')
  const ports: Port[] = [
    { transport: 'tcp', port: node.sshPort, variable: `SSH_PORT_${suffix}` },
    { transport: 'udp', port: node.lanPort, variable: 'LAN_SWITCH_PORT' },
  ]
  if (node === cluster.controlPlane) {
    ports.push({ transport: 'tcp', port: cluster.settings.API_PORT, variable: 'API_PORT' })
  }
  return ports
}

/**
 * Makes sure that ports can be opened.
 *
 * @throws StepError with every port that is taken, its variable and its holder
 */
export async function assertFree(ports: readonly Port[]): Promise<void> {
  const taken: Port[] = []
  for (const candidate of ports) {
    if (!(await isPortFree(candidate.transport, candidate.port))) taken.push(candidate)
  }
  if (taken.length === 0) return
  const reasons = await Promise.all(
    taken.map(async ({ transport, port, variable }) => {
      const holder = (await portHolder(transport, port)) ?? 'a process that cannot be seen'
      return `${transport.toUpperCase()} port ${port} (${variable}) is taken by ${holder}`
    }),
  )
  const variables = [...new Set(taken.map(({ variable }) => variable))].join(', ')
  const [only, ...others] = reasons
  throw new StepError(others.length === 0 && only ? only : `${taken.length} ports are taken`, {
    ...(others.length > 0 ? { output: reasons.join('\n') } : {}),
    hint: `end that process, or set other values in cluster.env: ${variables}`,
  })
}

/** Whether a port of 127.0.0.1 could be opened now. */
export async function isPortFree(transport: Transport, port: number): Promise<boolean> {
  if (transport === 'udp') return udpBinds(port)
  // macOS lets one listen on 127.0.0.1 beside a listener on all addresses, and take its visitors.
  return (await tcpListens(port)) && !(await tcpAnswers(port))
}

function udpBinds(port: number): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = createSocket('udp4')
    socket.once('error', () => resolve(false))
    socket.bind({ address, port, exclusive: true }, () => socket.close(() => resolve(true)))
  })
}

function tcpListens(port: number): Promise<boolean> {
  return new Promise((resolve) => {
    const server = createServer()
    server.once('error', () => resolve(false))
    server.listen({ host: address, port, exclusive: true }, () => server.close(() => resolve(true)))
  })
}

function tcpAnswers(port: number): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = createConnection({ host: address, port })
    socket.once('connect', () => {
      socket.destroy()
      resolve(true)
    })
    socket.once('error', () => resolve(false))
  })
}

/** Who holds a port: "sshd (pid 812)"; undefined if that cannot be known. */
export async function portHolder(transport: Transport, port: number): Promise<string | undefined> {
  return process.platform === 'linux'
    ? holderFromProc(transport, port)
    : holderFromLsof(transport, port)
}

/** 127.0.0.1 and "any", of IPv4 and of IPv6, as the kernel prints them on a little-endian CPU. */
const covering = new Set([
  '0100007F',
  '00000000',
  '00000000000000000000000000000000',
  '0000000000000000FFFF00000100007F',
])
const listening = '0A'

/** Linux: the socket's line in /proc/net (see proc(5)), then the process that has it open. */
async function holderFromProc(transport: Transport, port: number): Promise<string | undefined> {
  for (const table of [transport, `${transport}6`]) {
    const text = await readFile(`/proc/net/${table}`, 'utf8').catch(() => '')
    for (const line of text.split('\n').slice(1)) {
      const [, local = '', , state, , , , uid, , inode] = line.trim().split(/\s+/)
      const [host = '', hexPort = ''] = local.split(':')
      if (Number.parseInt(hexPort, 16) !== port || !covering.has(host)) continue
      if (transport === 'tcp' && state !== listening) continue
      return (await processWithSocket(inode ?? '')) ?? `a process of user id ${uid}`
    }
  }
  return undefined
}

async function processWithSocket(inode: string): Promise<string | undefined> {
  for (const pid of (await readdir('/proc')).filter((name) => /^\d+$/.test(name))) {
    // Other users' processes do not show what they have open.
    const descriptors = await readdir(`/proc/${pid}/fd`).catch(() => [])
    for (const descriptor of descriptors) {
      const target = await readlink(`/proc/${pid}/fd/${descriptor}`).catch(() => '')
      if (target !== `socket:[${inode}]`) continue
      const name = await readFile(`/proc/${pid}/comm`, 'utf8').catch(() => 'a process')
      return `${name.trim()} (pid ${pid})`
    }
  }
  return undefined
}

async function holderFromLsof(transport: Transport, port: number): Promise<string | undefined> {
  const state = transport === 'tcp' ? ['-sTCP:LISTEN'] : []
  const where = `-i${transport.toUpperCase()}:${port}`
  const { stdout } = await $({ quiet: true, nothrow: true })`lsof -nP ${where} ${state} -Fpc`
  const pid = stdout.match(/^p(\d+)$/m)?.[1]
  const name = stdout.match(/^c(.+)$/m)?.[1]
  return pid ? `${name ?? 'a process'} (pid ${pid})` : undefined
}
