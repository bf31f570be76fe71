// The machines' Ethernet switch: frames come and go as UDP datagrams on loopback, each machine known
// by the port its QEMU sends from. lib/lan.mts starts and stops it as a process.
import { createSocket } from 'node:dgram'
import { rm } from 'node:fs/promises'
import { type Cluster, loadCluster } from './cluster.mts'
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
 * from it, and sends a frame for an unknown address to every other port. It decides; the caller
 * sends.
 */
export class LearningSwitch {
  readonly counters = { received: 0, forwarded: 0, flooded: 0, refused: 0, dropped: 0 }
  private ports: ReadonlySet<number>
  /** By MAC address in hexadecimal; `seen` in seconds. */
  private readonly table = new Map<string, { port: number; seen: number }>()

  constructor(ports: Iterable<number>) {
    this.ports = new Set(ports)
  }

  /** Replaces the ports; what was learned about removed ones is forgotten. */
  setPorts(ports: Iterable<number>): void {
    this.ports = new Set(ports)
    for (const [address, { port }] of this.table) {
      if (!this.ports.has(port)) this.table.delete(address)
    }
  }

  /**
   * Takes a frame.
   *
   * @param from the port it came from
   * @param now in seconds, by a clock that never goes back
   * @returns the ports to send it to; none for a frame that is dropped
   */
  forward(frame: Buffer, from: number, now: number): number[] {
    if (!this.ports.has(from)) return this.count('refused')
    this.counters.received += 1
    // The lowest bit of an address's first byte: a group's, broadcast or multicast.
    const [toGroup, fromGroup] = [0, 6].map((offset) => ((frame[offset] ?? 0) & 1) === 1)
    if (frame.length < headerLength || fromGroup) return this.count('dropped')
    this.learn(frame.toString('hex', 6, 12), from, now)
    const known = this.table.get(frame.toString('hex', 0, 6))
    if (toGroup || !known || now - known.seen > ageing) {
      return this.count(
        'flooded',
        [...this.ports].filter((port) => port !== from),
      )
    }
    return known.port === from ? this.count('dropped') : this.count('forwarded', [known.port])
  }

  /** The addresses it knows. */
  addresses(now: number): SwitchStatus['addresses'] {
    const all = [...this.table].map(([address, { port, seen }]) => {
      return { mac: address.replace(/(..)(?=.)/g, '$1:'), port, age: now - seen }
    })
    return all.filter(({ age }) => age <= ageing)
  }

  private learn(address: string, port: number, now: number): void {
    if (this.table.size >= maxAddresses && !this.table.has(address)) {
      for (const [old, { seen }] of this.table) if (now - seen > ageing) this.table.delete(old)
      if (this.table.size >= maxAddresses) return
    }
    this.table.set(address, { port, seen: now })
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
  const { LAN_SWITCH_PORT: port } = cluster.settings
  const pidFile = pidFileOf(cluster)
  const portsOf = ({ nodes }: Cluster) => nodes.map(({ lanPort }) => lanPort)
  const lan = new LearningSwitch(portsOf(cluster))
  const seconds = () => performance.now() / 1000
  const log = (text: string) => console.log(`${new Date().toISOString()} ${text}`)
  const describe = () => cluster.nodes.map(({ name, lanPort }) => `${name} (${lanPort})`).join(', ')
  const status = (): SwitchStatus => ({
    pid: process.pid,
    root: cluster.root,
    port,
    ports: portsOf(cluster),
    counters: lan.counters,
    // As many as fit into a datagram.
    addresses: lan.addresses(seconds()).slice(0, 64),
  })

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
      lan.setPorts(portsOf(cluster))
      log(`read cluster.env again: ${describe()}`)
    } catch (error) {
      log(`keeps the machines it had: ${describeError(error)}`)
    }
  })
  for (const signal of ['SIGTERM', 'SIGINT'] as const) {
    process.on(signal, async () => {
      await rm(pidFile, { force: true })
      log(`ended by ${signal}; ${JSON.stringify(lan.counters)}`)
      process.exit(0)
    })
  }
}

/** Gives a socket room for the frames that all machines send at once. It also works without. */
export function enlargeBuffers(
  socket: { setRecvBufferSize(bytes: number): void; setSendBufferSize(bytes: number): void },
  log: (text: string) => void,
): void {
  try {
    socket.setRecvBufferSize(4 * 2 ** 20)
    socket.setSendBufferSize(4 * 2 ** 20)
  } catch (error) {
    log(`the system allows no larger socket buffers: ${error}`)
  }
}

if (process.argv[1] === import.meta.filename) serve()
