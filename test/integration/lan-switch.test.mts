import assert from 'node:assert/strict'
import { createSocket, type Socket } from 'node:dgram'
import { once } from 'node:events'
import { readFile } from 'node:fs/promises'
import { after, afterEach, before, beforeEach, describe, it } from 'node:test'
import { type Cluster, loadCluster, type Node } from '../../lib/cluster.mts'
import { ensureLanSwitch, lanSwitchStatus, pidFileOf, stopLanSwitch } from '../../lib/lan.mts'
import { commandLine, isGone } from '../../lib/processes.mts'
import { becomes } from '../../lib/wait.mts'
import { type Checkout, makeCheckout } from '../checkout.mts'
import { freePorts } from '../ports.mts'
import { type Machines, makeMachines, noMachines, UefiShell } from '../uefi-machine.mts'

const address = '127.0.0.1'

/** A machine's QEMU as the LAN switch sees it: the same datagrams from the same port. */
class Card {
  readonly received: Buffer[] = []
  private readonly socket: Socket
  private readonly mac: string
  private readonly switchPort: number

  private constructor(socket: Socket, mac: string, switchPort: number) {
    this.socket = socket
    this.mac = mac
    this.switchPort = switchPort
    socket.on('message', (frame) => this.received.push(frame))
  }

  static async of(cluster: Cluster, { lanPort, lanMac }: Pick<Node, 'lanPort' | 'lanMac'>) {
    const socket = createSocket('udp4')
    socket.bind(lanPort, address)
    await once(socket, 'listening')
    return new Card(socket, lanMac, cluster.settings.LAN_SWITCH_PORT)
  }

  send(to: string, payload: string | Buffer): void {
    const addresses = Buffer.from((to + this.mac).replaceAll(':', ''), 'hex')
    const frame = Buffer.concat([addresses, Buffer.from('88b5', 'hex'), Buffer.from(payload)])
    this.socket.send(frame, this.switchPort, address)
  }

  async hears(payload: string | Buffer, seconds = 10): Promise<boolean> {
    const wanted = Buffer.from(payload)
    return becomes(() => this.received.some((frame) => frame.subarray(14).equals(wanted)), seconds)
  }

  close(): void {
    this.socket.close()
  }
}

const broadcast = 'ff:ff:ff:ff:ff:ff'

describe('the LAN switch', () => {
  let checkout: Checkout
  let cluster: Cluster
  let cards: Card[]
  let [alpha, sigma, gamma]: [Card?, Card?, Card?] = []
  beforeEach(async () => {
    checkout = await makeCheckout({ long: true })
    cluster = loadCluster({ root: checkout.root })
    cards = await Promise.all(cluster.nodes.map((node) => Card.of(cluster, node)))
    ;[alpha, sigma, gamma] = cards
  })
  afterEach(async () => {
    for (const card of cards) card.close()
    await stopLanSwitch(cluster)
    await checkout.remove()
  })

  it('carries frames to all machines, then only to the one whose address it has learned', async () => {
    await ensureLanSwitch(cluster)
    sigma?.send(broadcast, 'who is alpha?')
    assert.ok(await alpha?.hears('who is alpha?'))
    assert.ok(await gamma?.hears('who is alpha?'))

    alpha?.send(cluster.workers[0]?.lanMac ?? '', 'I am')
    assert.ok(await sigma?.hears('I am'))
    alpha?.send(broadcast, 'the end')
    assert.ok(await gamma?.hears('the end'))
    assert.equal(gamma?.received.length, 2, 'gamma did not get what was for sigma')
  })

  it('carries full frames, also many at once', async () => {
    await ensureLanSwitch(cluster)
    const full = Buffer.alloc(1500, 0xa5)
    for (let count = 0; count < 50; count += 1) alpha?.send(broadcast, full)
    assert.ok(await becomes(() => sigma?.received.length === 50, 10), `${sigma?.received.length}`)
    assert.ok(sigma?.received.every((frame) => frame.length === 1514))
  })

  it('refuses frames from a port that is not a machine’s', async () => {
    await ensureLanSwitch(cluster)
    const stranger = await Card.of(cluster, { lanPort: 0, lanMac: '52:54:01:00:00:99' })
    cards.push(stranger)
    stranger.send(broadcast, 'let me in')
    const isRefused = async () => (await lanSwitchStatus(cluster))?.counters.refused === 1
    assert.ok(await becomes(isRefused, 10))
    alpha?.send(broadcast, 'hello')
    assert.ok(await sigma?.hears('hello'))
    assert.equal(sigma?.received.length, 1)
    assert.equal(stranger.received.length, 0)
  })

  it('runs once, and reads the machines again when it is started again', async () => {
    const first = await ensureLanSwitch(cluster)
    assert.equal(first.alreadyRunning, false)
    assert.deepEqual(await ensureLanSwitch(cluster), { ...first, alreadyRunning: true })

    const [port = 0] = await freePorts(1)
    await checkout.set({
      WORKER_NODES: 'sigma gamma delta',
      SSH_PORT_delta: port,
      NODE_IP_delta: '192.168.100.13',
      MAC_delta: '52:54:00:12:34:59',
      POD_CIDR_delta: '10.200.3.0/24',
    })
    const larger = loadCluster({ root: checkout.root })
    assert.deepEqual(await ensureLanSwitch(larger), { ...first, alreadyRunning: true })
    const delta = await Card.of(larger, larger.node('delta'))
    cards.push(delta)
    delta.send(broadcast, 'I am new')
    assert.ok(await alpha?.hears('I am new'))
  })

  it('keeps the machines it had when cluster.env is broken', async () => {
    const { pid } = await ensureLanSwitch(cluster)
    const log = checkout.path('logs', 'lan-switch.log')
    await checkout.set({ LAN_CIDR: 'nonsense' })
    process.kill(pid, 'SIGHUP')
    const isLogged = async () => /keeps the machines it had/.test(await readFile(log, 'utf8'))
    assert.ok(await becomes(isLogged, 10))
    alpha?.send(broadcast, 'still here?')
    assert.ok(await sigma?.hears('still here?'))
  })

  it('is restarted on another port when cluster.env changes', async () => {
    const first = await ensureLanSwitch(cluster)
    await checkout.set({ LAN_SWITCH_PORT: cluster.settings.LAN_SWITCH_PORT + 100 })
    const moved = loadCluster({ root: checkout.root })
    const second = await ensureLanSwitch(moved)
    assert.equal(second.alreadyRunning, false)
    assert.equal((await lanSwitchStatus(moved))?.pid, second.pid)
    assert.equal(await commandLine(first.pid), undefined, 'the previous one has ended')
  })

  it('carries frames again after it was killed and started again', async () => {
    const { pid } = await ensureLanSwitch(cluster)
    process.kill(pid, 'SIGKILL')
    assert.ok(await becomes(() => isGone(pid), 10))
    const again = await ensureLanSwitch(cluster)
    assert.equal(again.alreadyRunning, false)
    alpha?.send(broadcast, 'hello again')
    assert.ok(await gamma?.hears('hello again'))
  })

  it('is not started on a port that another program has, which is named', async () => {
    const other = createSocket({ type: 'udp4', reuseAddr: true })
    other.bind(cluster.settings.LAN_SWITCH_PORT, address)
    await once(other, 'listening')
    const reason = new RegExp(`LAN_SWITCH_PORT\\) is taken by .*\\(pid ${process.pid}\\)`)
    await assert.rejects(ensureLanSwitch(cluster), reason)
    other.close()
  })

  it('stops once, and removes its pid file', async () => {
    const { pid } = await ensureLanSwitch(cluster)
    assert.equal(await stopLanSwitch(cluster), true)
    assert.equal(await commandLine(pid), undefined)
    assert.equal(await stopLanSwitch(cluster), false)
    assert.equal(await lanSwitchStatus(cluster, 0.2), undefined)
    await assert.rejects(readFile(pidFileOf(cluster)), /ENOENT/)
  })
})

describe('two machines on the LAN', { skip: noMachines }, () => {
  let machines: Machines
  before(async () => {
    machines = await makeMachines()
  })
  after(() => machines.remove())

  it('reach each other with full frames, also after the switch was restarted', async () => {
    const { cluster } = machines
    const [alpha, sigma] = cluster.nodes as [Node, Node]
    const shells = await Promise.all(
      [alpha, sigma].map(async (node) => {
        await machines.start(node)
        const shell = await UefiShell.of(cluster, node)
        await shell.run('connect -r')
        await shell.run(`ifconfig -s eth1 static ${node.ip} 255.255.255.0 ${node.ip}`)
        const hasAddress = async () => (await shell.run('ifconfig -l eth1')).includes(node.ip)
        assert.ok(await becomes(hasAddress, 30))
        return shell
      }),
    )
    // 1472 bytes, with the headers of ICMP and IPv4, fill the 1500 of a frame.
    const ping = async () => shells[0]?.run(`ping -n 2 -l 1472 ${sigma.ip}`)
    assert.match((await ping()) ?? '', /2 packets transmitted, 2 received/)
    await stopLanSwitch(cluster)
    await ensureLanSwitch(cluster)
    assert.match((await ping()) ?? '', /2 packets transmitted, 2 received/)
    assert.equal((await lanSwitchStatus(cluster))?.addresses, 2)
    for (const shell of shells) shell.close()
  })
})
