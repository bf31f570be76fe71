// What listens on this computer for the rehearsed machines, observed from before the first start to
// after the last shutdown: only ports of cluster.env, on loopback alone, and in the end none.
import { readFile, readlink } from 'node:fs/promises'
import { setTimeout } from 'node:timers/promises'
import { $ } from 'zx'
import { type Cluster, loadCluster, type Node } from '../../lib/cluster.mts'
import { StepError } from '../../lib/errors.mts'
import { CheckList } from './check-list.mts'
import type { Rehearsal } from './rehearsal.mts'

/** An open port of the rehearsal's processes: "tcp 127.0.0.1:2222" and the program's name. */
interface Listener {
  transport: string
  address: string
  port: number
  program: string
}

export class PortWatch {
  private readonly root: string
  private readonly seen = new Map<string, Listener>()
  /** "tcp 2222" of all nodes that the cluster has had meanwhile. */
  private readonly allowed = new Set<string>()
  private readonly ending = new AbortController()
  private observing: Promise<void> = Promise.resolve()
  private failure: unknown

  private constructor(root: string) {
    this.root = root
  }

  /** @throws StepError if something of this cluster listens already */
  static async start({ root }: Cluster): Promise<PortWatch> {
    const watch = new PortWatch(root)
    await watch.assertNone()
    watch.observing = watch.observe().catch((error) => {
      watch.failure = error
    })
    return watch
  }

  private async observe(): Promise<void> {
    const { signal } = this.ending
    while (!signal.aborted) {
      const cluster = loadCluster({ root: this.root, env: {} })
      for (const port of portsOf(cluster, cluster.nodes)) this.allowed.add(port)
      for (const each of await this.listeners()) this.seen.set(text(each), each)
      await setTimeout(2000, undefined, { signal }).catch(() => {})
    }
  }

  /** @throws StepError with the ports that should not have been open, or were never open */
  async check({ cluster, nodes, signal }: Rehearsal): Promise<void> {
    if (this.failure) throw this.failure
    const seen = [...this.seen.values()]
    const list = new CheckList(signal)
    await list.check('all ports listen on 127.0.0.1', async () => {
      const open = seen.filter((each) => each.address !== '127.0.0.1' && !isOutgoing(each))
      if (open.length > 0) throw new StepError(open.map(text).join(', '))
      return `${seen.length} ports`
    })
    await list.check('all are ports of cluster.env', async () => {
      const own = seen.filter((each) => !isOutgoing(each))
      const strange = own.filter((each) => !this.allowed.has(`${each.transport} ${each.port}`))
      if (strange.length > 0) throw new StepError(strange.map(text).join(', '))
      return undefined
    })
    await list.check('each port of the machines was open', async () => {
      const open = seen.map(({ transport, port }) => `${transport} ${port}`)
      const missing = portsOf(cluster, nodes).filter((port) => !open.includes(port))
      if (missing.length > 0) throw new StepError(missing.join(', '))
      return undefined
    })
    list.assertPassed()
  }

  /** @throws StepError with what listens, if anything does */
  async assertNone(): Promise<void> {
    const open = await this.listeners()
    if (open.length > 0) throw new StepError(`still open: ${open.map(text).join(', ')}`)
  }

  async end(): Promise<void> {
    this.ending.abort()
    await this.observing
  }

  /** Those of processes that work in the cluster's folder or have its path in their command line. */
  private async listeners(): Promise<Listener[]> {
    const { stdout } = await $({ quiet: true })`ss -Hlntup`
    const found: Listener[] = []
    for (const line of stdout.split('\n')) {
      const [transport = '', , , , local = ''] = line.split(/\s+/)
      const [, program = '', pid] = line.match(/\(\("([^"]+)",pid=(\d+)/) ?? []
      // Of this process, and for a moment of a child that has not yet executed its program.
      if (line.includes(`pid=${process.pid},`)) continue
      if (!pid || !(await this.isOwn(pid))) continue
      const colon = local.lastIndexOf(':')
      const [address, port] = [local.slice(0, colon), Number(local.slice(colon + 1))]
      found.push({ transport, address, port, program })
    }
    return found
  }

  private async isOwn(pid: string): Promise<boolean> {
    // It may have ended meanwhile.
    const folder = await readlink(`/proc/${pid}/cwd`).catch(() => '')
    const line = await readFile(`/proc/${pid}/cmdline`, 'utf8').catch(() => '')
    return `${folder}/`.startsWith(`${this.root}/`) || line.includes(`${this.root}/`)
  }
}

/** Those of some nodes and of the LAN switch, as "tcp 2222". */
function portsOf({ settings }: Cluster, nodes: readonly Node[]): string[] {
  const own = nodes.flatMap(({ role, sshPort, lanPort }) => [
    ...[`tcp ${sshPort}`, `udp ${lanPort}`],
    ...(role === 'worker' ? [] : [`tcp ${settings.API_PORT}`]),
  ])
  return [`udp ${settings.LAN_SWITCH_PORT}`, ...own]
}

/** From such a port QEMU sends what a machine sends to the outside, such as a DNS request. */
function isOutgoing({ transport, program, address }: Listener): boolean {
  return transport === 'udp' && program.startsWith('qemu') && address !== '127.0.0.1'
}

function text({ transport, address, port, program }: Listener): string {
  return `${transport} ${address}:${port} (${program})`
}
