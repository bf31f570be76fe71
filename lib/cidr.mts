// IPv4 addresses and ranges, as numbers.

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
