// A machine: where its files are, and the arguments of its QEMU. Pure, so that it can be read and
// tested without one.
import type { Cluster, Node } from './cluster.mts'
import { type Host, platformArguments } from './host.mts'

export interface MachineFiles {
  /** The disk, qcow2, once a system is installed on it; the name it has until then. */
  disk: string
  partialDisk: string
  /** The machine's own UEFI variables. */
  efiVars: string
  /** Output of the serial console since the last start; dialogue of the installation. */
  consoleLog: string
  installLog: string
  /** QEMU's own messages. */
  qemuLog: string
  /** QEMU's process id. */
  pid: string
  /** Unix sockets: QEMU's control protocol, and the serial console. */
  qmp: string
  console: string
  /** Held while a script starts or stops the machine. */
  lock: string
}

/** The absolute paths of a machine's files: images/ is kept, run/ is there while the machine runs. */
export function filesOf(
  { path }: Pick<Cluster, 'path'>,
  { name }: Pick<Node, 'name'>,
): MachineFiles {
  return {
    disk: path('images', `${name}.qcow2`),
    partialDisk: path('images', `${name}.qcow2.partial`),
    efiVars: path('images', `${name}-efivars.fd`),
    consoleLog: path('images', `${name}-console.log`),
    installLog: path('images', `${name}-install.log`),
    qemuLog: path('logs', `${name}-qemu.log`),
    pid: path('run', `${name}.pid`),
    qmp: path('run', `${name}.qmp`),
    console: path('run', `${name}.console`),
    lock: path('run', `${name}.lock`),
  }
}

export type Mode =
  /** The installed disk, in the background, with its console in a log and on a socket. */
  | { kind: 'boot' }
  /**
   * The installer ISO with an empty disk, in the foreground, with its console on stdin and stdout.
   * `kernel` starts the ISO's kernel directly: on x86 its boot menu has no serial console.
   */
  | { kind: 'install'; iso: string; kernel?: { kernel: string; initrd: string; append: string } }

/**
 * QEMU's arguments, without the program. It has to be started in run/: its unix sockets have
 * relative names, because a socket's path is limited to some 104 bytes and a folder's is not.
 */
export function qemuArguments(machine: {
  cluster: Cluster
  node: Node
  host: Host
  mode: Mode
}): string[] {
  const { cluster, node, host, mode } = machine
  const { settings, controlPlane } = cluster
  const files = filesOf(cluster, node)
  const { code, vars } = host.firmware
  const common = [
    ...['-name', node.name],
    // Every device is named below: none that QEMU would add by default, such as a graphics card or
    // a floppy drive, and nothing from a configuration file of this computer.
    ...['-nodefaults', '-no-user-config'],
    ...platformArguments(host),
    ...['-smp', `${node.cpus}`, '-m', `${node.memory}`],
    ...['-display', 'none', '-rtc', 'base=utc'],
    // Without it a machine waits for entropy when it generates its first keys.
    ...['-device', 'virtio-rng-pci'],
    // UEFI: its code, which no machine can change, and the machine's own variables.
    ...drive('if=pflash,unit=0', code.format, code.path, 'readonly=on'),
    ...drive('if=pflash,unit=1', vars.format, files.efiVars),
    ...['-pidfile', files.pid],
    ...['-chardev', `socket,id=qmp,path=${node.name}.qmp,server=on,wait=off`],
    ...['-mon', 'chardev=qmp,mode=control'],
  ]
  if (mode.kind === 'install') {
    return [
      ...common,
      // A disk that is deleted if the installation fails needs no care while it runs.
      ...disk(files.partialDisk, 'unsafe'),
      ...drive('if=none,id=iso,media=cdrom', 'raw', mode.iso, 'readonly=on'),
      // Boots after the disk, which is empty; index 0 belongs to -kernel.
      ...(host.arch === 'x86_64'
        ? ['-device', 'ide-cd,drive=iso,bootindex=2']
        : ['-device', 'virtio-scsi-pci', '-device', 'scsi-cd,drive=iso,bootindex=2']),
      ...(mode.kernel ? ['-kernel', mode.kernel.kernel, '-initrd', mode.kernel.initrd] : []),
      ...(mode.kernel ? ['-append', mode.kernel.append] : []),
      ...networkCard('outside', node.mac, outside()),
      // signal=off: Ctrl-C reaches the installer's shell as a character and does not end QEMU.
      ...['-chardev', 'stdio,id=console,signal=off', '-serial', 'chardev:console'],
      '-no-reboot',
    ]
  }
  const forwards = [`${node.sshPort}-:22`]
  if (node === controlPlane) forwards.push(`${settings.API_PORT}-:${settings.API_PORT}`)
  const local = `local.type=inet,local.host=127.0.0.1,local.port=${node.lanPort}`
  const lanSwitch = `remote.type=inet,remote.host=127.0.0.1,remote.port=${settings.LAN_SWITCH_PORT}`
  return [
    ...common,
    ...disk(files.disk, settings.QEMU_DISK_CACHE),
    // The network card to the internet; the forwards are open to this computer only.
    ...networkCard('outside', node.mac, outside(forwards)),
    // The network card to the LAN: its frames are UDP datagrams to and from the LAN switch.
    ...networkCard('lan', node.lanMac, `dgram,id=lan,${local},${lanSwitch}`),
    '-chardev',
    `socket,id=console,path=${node.name}.console,server=on,wait=off,logfile=${escaped(files.consoleLog)},logappend=off`,
    ...['-serial', 'chardev:console'],
    // No -no-reboot: a running machine may reboot itself, for a new kernel.
  ]
}

function drive(kind: string, format: string, path: string, ...options: string[]): string[] {
  return ['-drive', [kind, `format=${format}`, ...options, `file=${escaped(path)}`].join(',')]
}

function disk(path: string, cache: string): string[] {
  // discard: what the machine trims, the file gives back.
  return [
    ...drive('if=none,id=disk', 'qcow2', path, 'discard=unmap', `cache=${cache}`),
    ...['-device', 'virtio-blk-pci,drive=disk,bootindex=1'],
  ]
}

/** The cluster is IPv4 throughout, and QEMU would offer IPv6 where this computer has none. */
function outside(forwards: readonly string[] = []): string {
  return [
    'user,id=outside,ipv6=off',
    ...forwards.map((ports) => `hostfwd=tcp:127.0.0.1:${ports}`),
  ].join(',')
}

/** QEMU's default MAC addresses are the same on every machine. No boot ROM: nothing boots from it. */
function networkCard(id: string, mac: string, netdev: string): string[] {
  return ['-netdev', netdev, '-device', `virtio-net-pci,netdev=${id},mac=${mac},romfile=`]
}

/** A comma in a file's name, as QEMU's option lists write it. */
function escaped(path: string): string {
  return path.replaceAll(',', ',,')
}
