// The snapshots inside a machine's disk: qcow2 keeps them in the image itself, and what did not
// change since is there once. While a machine runs its disk is QEMU's, which is asked by QMP; else
// qemu-img works on the file. Never both.
import { open } from 'node:fs/promises'
import { $ } from 'zx/core'
import type { Cluster, Node } from '../cluster.mts'
import { StepError } from '../errors.mts'
import { hasDisk } from '../qemu/disk.mts'
import { filesOf } from '../qemu/machine-files.mts'
import { Qmp } from '../qemu/qmp.mts'
import { isRunning, machineState } from '../qemu/vm.mts'

/** A snapshot as the image lists it. Name, id and time together are its alone. */
export interface DiskSnapshot {
  id: string
  name: string
  /** Seconds since 1970, with fractions. */
  time: number
}

export interface DiskContent {
  snapshots: DiskSnapshot[]
  /** What the image takes on this computer. */
  bytes: number
}

/**
 * The disk of one machine. Whoever uses it holds the machine's lock, so that it is neither started
 * nor stopped meanwhile. Methods throw StepError when QEMU or qemu-img refuses.
 */
interface SnapshotDisk {
  readonly node: Node
  content(): Promise<DiskContent>
  create(name: string): Promise<void>
  delete(name: string): Promise<void>
  close(): void
}

/** One whose machine runs, and can be made to stand still. */
export interface LiveDisk extends SnapshotDisk {
  readonly running: true
  /** Has this computer write out what it holds of the image, so that a pause need not wait. */
  flush(): Promise<void>
  /** Stops the machine's processors; QEMU writes out what it holds. */
  pause(): Promise<void>
  resume(): Promise<void>
}

export interface IdleDisk extends SnapshotDisk {
  readonly running: false
  /** Makes the disk what it was when the snapshot was taken; what it is now is lost. */
  apply(name: string): Promise<void>
}

export type Disk = LiveDisk | IdleDisk

/** Seconds. A snapshot touches every cluster's reference count, on a disk that may be busy. */
const patience = 60

/** How QMP and `qemu-img info` describe an image (ImageInfo in QEMU's block-core.json). */
interface ImageInfo {
  'actual-size'?: number
  snapshots?: { id: string; name: string; 'date-sec': number; 'date-nsec': number }[]
}

/**
 * The disk of a machine, running or not.
 *
 * @throws StepError if there is none, or a system is being installed on it
 */
export async function openDisk(cluster: Cluster, node: Node): Promise<Disk> {
  const found = await machineState(cluster, node)
  if (found.state === 'running' && found.mode === 'install') {
    throw new StepError(`${node.name} is being installed`, { hint: 'let it finish, or Ctrl-C it' })
  }
  if (!hasDisk(cluster, node)) {
    throw new StepError(`${node.name} has no disk: images/${node.name}.qcow2 is missing`, {
      hint: `install it first: make install-${node.name}`,
    })
  }
  return found.state === 'running' ? QmpDisk.of(cluster, node) : new FileDisk(cluster, node)
}

/** The disks of these machines. They are to be closed. @throws StepError as openDisk does */
export async function openDisks(cluster: Cluster, nodes: readonly Node[]): Promise<Disk[]> {
  const opened = await Promise.allSettled(nodes.map((node) => openDisk(cluster, node)))
  const disks = opened.flatMap((outcome) => (outcome.status === 'fulfilled' ? [outcome.value] : []))
  const failure = opened.find((outcome) => outcome.status === 'rejected')
  if (!failure) return disks
  for (const disk of disks) disk.close()
  throw failure.reason
}

/** A disk that QEMU has open. */
class QmpDisk implements LiveDisk {
  readonly node: Node
  readonly running = true as const
  private readonly qmp: Qmp
  private readonly path: string

  private constructor(node: Node, qmp: Qmp, path: string) {
    this.node = node
    this.qmp = qmp
    this.path = path
  }

  static async of(cluster: Cluster, node: Node): Promise<QmpDisk> {
    const { qmp, disk } = filesOf(cluster, node)
    return new QmpDisk(node, await Qmp.connect(qmp), disk)
  }

  async pause(): Promise<void> {
    await this.qmp.execute('stop', undefined, { timeout: patience })
  }

  async resume(): Promise<void> {
    await this.qmp.execute('cont', undefined, { timeout: patience })
  }

  async flush(): Promise<void> {
    const file = await open(this.path, 'r')
    await file.sync().finally(() => file.close())
  }

  async content(): Promise<DiskContent> {
    const blocks = (await this.qmp.execute('query-block')) as {
      device: string
      inserted?: { image: ImageInfo }
    }[]
    return contentOf(blocks.find(({ device }) => device === 'disk')?.inserted?.image ?? {})
  }

  async create(name: string): Promise<void> {
    const data = { device: 'disk', name }
    const actions = [{ type: 'blockdev-snapshot-internal-sync', data }]
    await this.qmp.execute('transaction', { actions }, { timeout: patience })
  }

  async delete(name: string): Promise<void> {
    const command = 'blockdev-snapshot-delete-internal-sync'
    await this.qmp.execute(command, { device: 'disk', name }, { timeout: patience })
  }

  close(): void {
    this.qmp.close()
  }
}

/** A disk that nobody has open. */
class FileDisk implements IdleDisk {
  readonly node: Node
  readonly running = false as const
  private readonly cluster: Cluster
  private readonly path: string

  constructor(cluster: Cluster, node: Node) {
    this.cluster = cluster
    this.node = node
    this.path = filesOf(cluster, node).disk
  }

  async content(): Promise<DiskContent> {
    return contentOf(JSON.parse(await this.qemuImg('info', '--output=json')) as ImageInfo)
  }

  async create(name: string): Promise<void> {
    await this.qemuImg('snapshot', '-q', '-c', name)
  }

  async delete(name: string): Promise<void> {
    await this.qemuImg('snapshot', '-q', '-d', name)
  }

  async apply(name: string): Promise<void> {
    await this.qemuImg('snapshot', '-q', '-a', name)
  }

  close(): void {}

  private async qemuImg(...args: string[]): Promise<string> {
    const { name } = this.node
    if (await isRunning(this.cluster, this.node)) {
      throw new StepError(`${name} runs, so its disk is not touched`, { hint: 'make down' })
    }
    const done = await $({ quiet: true, nothrow: true })`qemu-img ${args} ${this.path}`
    if (done.exitCode === 0) return done.stdout
    const output = done.stderr.trim()
    throw new StepError(`qemu-img failed on the disk of ${name}`, {
      output,
      command: `qemu-img ${args.join(' ')} images/${name}.qcow2`,
      ...(/lock/.test(output) ? { hint: 'another program has this disk open' } : {}),
    })
  }
}

function contentOf(image: ImageInfo): DiskContent {
  return {
    bytes: image['actual-size'] ?? 0,
    snapshots: (image.snapshots ?? []).map((snapshot) => ({
      id: snapshot.id,
      name: snapshot.name,
      time: snapshot['date-sec'] + snapshot['date-nsec'] / 1e9,
    })),
  }
}
