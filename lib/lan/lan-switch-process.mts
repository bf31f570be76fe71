// The machines' Ethernet switch as a process: frames come and go as UDP datagrams on loopback,
// each machine known by the port its QEMU sends from. Started and stopped by lib/lan/lan-switch.mts.
// SIGHUP: the machines are read anew from cluster.env. SIGTERM: the end.
import { createSocket } from 'node:dgram'
import { rm } from 'node:fs/promises'
import { type Cluster, loadCluster } from '../cluster.mts'
import { describeError } from '../errors.mts'
import { writeFileAtomic } from '../files.mts'
import { pidFileOf, type SwitchStatus, statusQuery } from './lan-switch.mts'
import { LearningSwitch } from './learning-switch.mts'

const address = '127.0.0.1'
/** Holds the frames of a moment in which all machines send at once. */
const bufferBytes = 4 * 2 ** 20
/** A datagram has an end. */
const mostShown = 64

let cluster = loadCluster()
const { LAN_SWITCH_PORT } = cluster.settings
const pidFile = pidFileOf(cluster)
const lan = new LearningSwitch(portsOf(cluster))
const seconds = () => performance.now() / 1000

const socket = createSocket({
  type: 'udp4',
  // An address is given to every send; looking it up would cost each frame a turn of the loop.
  lookup: (_host, _options, found) => found(null, address, 4),
})
socket.on('message', (frame, { address: host, port }) => {
  if (host !== address) return
  if (frame.equals(statusQuery)) send(answer(), port)
  else for (const target of lan.forward(frame, port, seconds())) send(frame, target)
})
socket.on('error', (error) => {
  log(error.message)
  process.exit(1)
})

socket.bind({ address, port: LAN_SWITCH_PORT, exclusive: true }, async () => {
  socket.setRecvBufferSize(bufferBytes)
  socket.setSendBufferSize(bufferBytes)
  await writeFileAtomic(pidFile, `${process.pid}\n`, 0o600)
  log(`carries frames on UDP port ${LAN_SWITCH_PORT} for ${described(cluster)}`)
})

process.on('SIGHUP', () => {
  try {
    cluster = loadCluster()
    lan.setPorts(portsOf(cluster))
    log(`read cluster.env anew: ${described(cluster)}`)
  } catch (error) {
    log(`went on with the machines it had: ${describeError(error)}`)
  }
})
for (const signal of ['SIGTERM', 'SIGINT'] as const) {
  process.on(signal, async () => {
    await rm(pidFile, { force: true })
    log(`ended by ${signal}; ${JSON.stringify(lan.counters)}`)
    process.exit(0)
  })
}

/** A frame that cannot be sent is lost, as on any Ethernet: a machine that is down has no port. */
function send(data: Buffer, port: number): void {
  socket.send(data, port, address, () => {})
}

function portsOf({ nodes }: Cluster): number[] {
  return nodes.map(({ lanPort }) => lanPort)
}

function described({ nodes }: Cluster): string {
  return nodes.map(({ name, lanPort }) => `${name} (${lanPort})`).join(', ')
}

function answer(): Buffer {
  const status: SwitchStatus = {
    pid: process.pid,
    root: cluster.root,
    port: LAN_SWITCH_PORT,
    ports: portsOf(cluster),
    counters: lan.counters,
    addresses: lan.addresses(seconds()).slice(0, mostShown),
  }
  return Buffer.from(JSON.stringify(status))
}

function log(text: string): void {
  console.log(`${new Date().toISOString()} ${text}`)
}
