// Where a machine's files are. images/ keeps what outlives it, run/ is there while it runs.
import type { Cluster, Node } from '../cluster.mts'

export interface MachineFiles {
  /** The disk, qcow2, once a system is installed on it; and until then. */
  disk: string
  partialDisk: string
  /** The machine's own UEFI variables. */
  efiVars: string
  /** What the serial console said since the last start, and the installer's dialogue. */
  consoleLog: string
  installLog: string
  /** What QEMU itself said. */
  qemuLog: string
  /** QEMU's process id; the file is locked by QEMU while it runs. */
  pid: string
  /** Unix sockets: QEMU's control protocol, and the serial console. */
  qmp: string
  console: string
  /** Held while a script starts or stops the machine. */
  lock: string
}

/** The absolute paths of a machine's files. */
export function filesOf(cluster: Cluster, node: Node): MachineFiles {
  const { name } = node
  return {
    disk: cluster.path('images', `${name}.qcow2`),
    partialDisk: cluster.path('images', `${name}.qcow2.partial`),
    efiVars: cluster.path('images', `${name}-efivars.fd`),
    consoleLog: cluster.path('images', `${name}-console.log`),
    installLog: cluster.path('images', `${name}-install.log`),
    qemuLog: cluster.path('logs', `${name}-qemu.log`),
    pid: cluster.path('run', `${name}.pid`),
    qmp: cluster.path('run', `${name}.qmp`),
    console: cluster.path('run', `${name}.console`),
    lock: cluster.path('run', `${name}.lock`),
  }
}
