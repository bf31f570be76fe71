// An Ethernet switch, as IEEE 802.1D describes one: it learns behind which port an address is from
// the frames that come from there, and sends a frame for an unknown address to every other port.

/** Destination (6 bytes), source (6), type (2). */
const headerLength = 14
const addressLength = 6
/** Seconds after which an address that was not heard of is forgotten: 802.1D's own default. */
const ageing = 300
/** Far more than there are machines and pods; a limit, should a machine send made-up addresses. */
const mostAddresses = 4096

export interface SwitchCounters {
  /** Frames that came in, and that went out by one port, or by all others. */
  received: number
  forwarded: number
  flooded: number
  /** From a port that is no machine's. */
  refused: number
  /** No frame at all, or one whose way out is the port it came from. */
  dropped: number
}

/** A switch whose ports are numbers. It decides; sending is for the caller. */
export class LearningSwitch {
  readonly counters: SwitchCounters = {
    received: 0,
    forwarded: 0,
    flooded: 0,
    refused: 0,
    dropped: 0,
  }
  private ports: ReadonlySet<number>
  /** By MAC address in hexadecimal. */
  private readonly table = new Map<string, { port: number; seen: number }>()

  constructor(ports: Iterable<number>) {
    this.ports = new Set(ports)
  }

  /** Changes the ports there are; what was learned of the others is forgotten. */
  setPorts(ports: Iterable<number>): void {
    this.ports = new Set(ports)
    for (const [address, { port }] of this.table) {
      if (!this.ports.has(port)) this.table.delete(address)
    }
  }

  /**
   * Takes a frame in.
   *
   * @param from the port it came from
   * @param now in seconds, by any clock that does not go back
   * @returns the ports it has to go to; none for a frame that is to be dropped
   */
  forward(frame: Buffer, from: number, now: number): number[] {
    if (!this.ports.has(from)) {
      this.counters.refused += 1
      return []
    }
    this.counters.received += 1
    if (frame.length < headerLength || isGroup(frame, addressLength)) return this.drop()
    this.learn(frame.toString('hex', addressLength, 2 * addressLength), from, now)
    const known = isGroup(frame, 0)
      ? undefined
      : this.table.get(frame.toString('hex', 0, addressLength))
    if (!known || now - known.seen > ageing) {
      this.counters.flooded += 1
      return [...this.ports].filter((port) => port !== from)
    }
    if (known.port === from) return this.drop()
    this.counters.forwarded += 1
    return [known.port]
  }

  /** The addresses it knows, with their ports and the seconds since they were last heard of. */
  addresses(now: number): { mac: string; port: number; age: number }[] {
    return [...this.table]
      .filter(([, { seen }]) => now - seen <= ageing)
      .map(([address, { port, seen }]) => ({
        mac: address.replace(/(..)(?=.)/g, '$1:'),
        port,
        age: now - seen,
      }))
  }

  private learn(address: string, port: number, now: number): void {
    if (this.table.size >= mostAddresses && !this.table.has(address)) {
      for (const [old, { seen }] of this.table) if (now - seen > ageing) this.table.delete(old)
      if (this.table.size >= mostAddresses) return
    }
    this.table.set(address, { port, seen: now })
  }

  private drop(): number[] {
    this.counters.dropped += 1
    return []
  }
}

/** Whether the address at this offset means several: broadcast or multicast. */
function isGroup(frame: Buffer, offset: number): boolean {
  return ((frame[offset] ?? 0) & 1) === 1
}
