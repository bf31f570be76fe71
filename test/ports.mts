// Ports for tests that run at the same time. They come in blocks of 256 below the range from which
// the system hands out its own; a process owns a block as long as it listens on the block's last
// TCP port, and so nobody else's test can be given a port of it.
import { createSocket } from 'node:dgram'
import { createServer } from 'node:net'

const first = 12000
const blocks = 70
const size = 256

/** The first port of a block of 256 (TCP and UDP) that belongs to this process until it ends. */
export async function ownBlock(): Promise<number> {
  for (;;) {
    const block = first + Math.floor(Math.random() * blocks) * size
    const owner = createServer().unref()
    const mine = await new Promise<boolean>((resolve) => {
      owner.once('error', () => resolve(false))
      owner.listen(block + size - 1, '127.0.0.1', () => resolve(true))
    })
    // A LAN switch of a cluster that is kept may outlive the process that made it.
    if (mine && (await isFreeUdp(block))) return block
    owner.close()
  }
}

let current: Promise<{ next: number; end: number }> | undefined

/** TCP ports on loopback that nobody listens on just now, all different. */
export async function freePorts(count: number): Promise<number[]> {
  const ports: number[] = []
  while (ports.length < count) {
    current ??= ownBlock().then((block) => ({ next: block, end: block + size - 1 }))
    const block = await current
    const port = block.next++
    if (port >= block.end) current = undefined
    else if (await isFreeTcp(port)) ports.push(port)
  }
  return ports
}

function isFreeTcp(port: number): Promise<boolean> {
  return new Promise((resolve) => {
    const server = createServer()
    server.once('error', () => resolve(false))
    server.listen(port, '127.0.0.1', () => server.close(() => resolve(true)))
  })
}

function isFreeUdp(port: number): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = createSocket('udp4')
    socket.once('error', () => {
      socket.close()
      resolve(false)
    })
    socket.bind({ port, address: '127.0.0.1', exclusive: true }, () => {
      socket.close(() => resolve(true))
    })
  })
}
