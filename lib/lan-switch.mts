// The machines' Ethernet switch: frames come and go as UDP datagrams on loopback, each machine known
// by the port its QEMU sends from. lib/lan.mts starts and stops it as a process.
import { createSocket, type Socket } from 'node:dgram'
import { rm } from 'node:fs/promises'
import { loadCluster } from './cluster.mts'
import { describeError } from './errors.mts'
import { writeFileAtomic } from './files.mts'
import { pidFileOf, type SwitchStatus, statusQuery } from './lan.mts'

/** An Ethernet header: destination (6 bytes), source (6), type (2). */
const headerLength = 14
/** Seconds after which an address without frames is forgotten: the default of IEEE 802.1D. */
const ageing = 300
/** Far more than there are machines and pods: a limit should a machine send made-up addresses. */
const maxAddresses = 4096

/**
 * A switch as IEEE 802.1D describes it: it learns the port of an address from the frames that come
 * from it, and a frame for an unknown one goes to every other port. It decides; the caller sends.
 */
export class LearningSwitch {
  readonly counters = { received: 0, forwarded: 0, flooded: 0, refused: 0, dropped: 0 }
  private ports: readonly number[]
  /** By MAC address as a number; `seen` in seconds. */
  private readonly table = new Map<number, { port: number; seen: number }>()

  constructor(ports: readonly number[]) {
    this.ports = ports
  }

  /** Replaces the ports; what was learned about removed ones is forgotten. */
  setPorts(ports: readonly number[]): void {
    this.ports = ports
    this.forget(({ port }) => !ports.includes(port))
  }

  /**
   * Takes a frame that came from a port, at a time in seconds by a clock that never goes back.
   * @returns the ports to send it to; none for a frame that is dropped
   */
  forward(frame: Buffer, from: number, now: number): number[] {
    if (!this.ports.includes(from)) return this.count('refused')
    this.counters.received += 1
    // The lowest bit of an address's first byte: a group's, broadcast or multicast.
    const isGroup = (offset: number) => ((frame[offset] ?? 0) & 1) === 1
    if (frame.length < headerLength || isGroup(6)) return this.count('dropped')
    const source = frame.readUIntBE(6, 6)
    const isFull = () => this.table.size >= maxAddresses && !this.table.has(source)
    if (isFull()) this.forget(({ seen }) => now - seen > ageing)
    if (!isFull()) this.table.set(source, { port: from, seen: now })
    const known = this.table.get(frame.readUIntBE(0, 6))
    if (isGroup(0) || !known || now - known.seen > ageing) {
      const others = this.ports.filter((port) => port !== from)
      return this.count('flooded', others)
    }
    return known.port === from ? this.count('dropped') : this.count('forwarded', [known.port])
  }

  /** How many addresses it knows. */
  addresses(now: number): number {
    return [...this.table.values()].filter(({ seen }) => now - seen <= ageing).length
  }

  private forget(which: (entry: { port: number; seen: number }) => boolean): void {
    for (const [address, entry] of this.table) if (which(entry)) this.table.delete(address)
  }

  private count(what: keyof typeof this.counters, ports: number[] = []): number[] {
    this.counters[what] += 1
    return ports
  }
}

/** Runs the switch as a process. SIGHUP: it reads the machines from cluster.env again. */
function serve(): void {
  const address = '127.0.0.1'
  let cluster = loadCluster()
  const { root } = cluster
  const { LAN_SWITCH_PORT: port } = cluster.settings
  const pidFile = pidFileOf(cluster)
  const ports = () => cluster.nodes.map(({ lanPort }) => lanPort)
  const lan = new LearningSwitch(ports())
  const seconds = () => performance.now() / 1000
  const log = (text: string) => console.log(`${new Date().toISOString()} ${text}`)
  const describe = () => cluster.nodes.map(({ name, lanPort }) => `${name} (${lanPort})`).join(', ')
  const status = (): SwitchStatus => {
    const addresses = lan.addresses(seconds())
    return { pid: process.pid, root, port, ports: ports(), counters: lan.counters, addresses }
  }

  const socket = createSocket({
    type: 'udp4',
    // Each send gets an address; looking it up would cost every frame a turn of the event loop.
    lookup: (_host, _options, found) => found(null, address, 4),
  })
  // A frame that cannot be sent is lost, as on any Ethernet: a machine that is down has no port.
  const send = (data: Buffer, target: number) => socket.send(data, target, address, () => {})
  socket.on('message', (frame, sender) => {
    if (sender.address !== address) return
    if (frame.equals(statusQuery)) send(Buffer.from(JSON.stringify(status())), sender.port)
    else for (const target of lan.forward(frame, sender.port, seconds())) send(frame, target)
  })
  socket.on('error', (error) => {
    log(error.message)
    process.exit(1)
  })
  socket.bind({ address, port, exclusive: true }, async () => {
    enlargeBuffers(socket, log)
    await writeFileAtomic(pidFile, `${process.pid}\n`, 0o600)
    log(`carries frames on UDP port ${port} for ${describe()}`)
  })

  process.on('SIGHUP', () => {
    try {
      cluster = loadCluster()
      lan.setPorts(ports())
      log(`read cluster.env again: ${describe()}`)
    } catch (error) {
      log(`keeps the machines it had: ${describeError(error)}`)
    }
  })
  const end = async (signal: NodeJS.Signals) => {
    await rm(pidFile, { force: true })
    log(`ended by ${signal}; ${JSON.stringify(lan.counters)}`)
    process.exit(0)
  }
  process.on('SIGTERM', end).on('SIGINT', end)
}

type Buffers = Pick<Socket, 'setRecvBufferSize' | 'setSendBufferSize'>

/** Gives a socket room for the frames that all machines send at once. It also works without. */
export function enlargeBuffers(socket: Buffers, log: (text: string) => void): void {
  try {
    socket.setRecvBufferSize(4 * 2 ** 20)
    socket.setSendBufferSize(4 * 2 ** 20)
  } catch (error) {
    log(`the system allows no larger socket buffers: ${error}`)
  }
}

if (process.argv[1] === import.meta.filename) serve()
