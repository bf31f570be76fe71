// A machine: its files and the arguments of its QEMU. Pure functions, to be tested without one.
import type { Cluster, Node } from './cluster.mts'
import { type Host, platformArguments } from './host.mts'

/** The absolute paths of a machine's files: images/ is kept, run/ is there while the machine runs. */
export function filesOf({ path }: Pick<Cluster, 'path'>, { name }: Pick<Node, 'name'>) {
  return {
    /** The disk, qcow2, once a system is installed on it; the name it has until then. */
    disk: path('images', `${name}.qcow2`),
    partialDisk: path('images', `${name}.qcow2.partial`),
    /** The machine's own UEFI variables, qcow2. */
    efiVars: path('images', `${name}.efivars.qcow2`),
    /** Output of the serial console since the last start; dialogue of the installation. */
    consoleLog: path('images', `${name}-console.log`),
    installLog: path('images', `${name}-install.log`),
    /** QEMU's own messages, and its process id. */
    qemuLog: path('logs', `${name}-qemu.log`),
    pid: path('run', `${name}.pid`),
    /** Unix sockets: QEMU's control protocol, and the serial console. */
    qmp: path('run', `${name}.qmp`),
    console: path('run', `${name}.console`),
    /** Held while a script starts or stops the machine. */
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
  const { QEMU_DISK_CACHE, API_PORT, LAN_SWITCH_PORT } = cluster.settings
  const files = filesOf(cluster, node)
  const { code } = host.firmware
  // A disk that is deleted if the installation fails needs no care while it runs.
  const [disk, cache] =
    mode.kind === 'boot' ? [files.disk, QEMU_DISK_CACHE] : [files.partialDisk, 'unsafe']
  const common = [
    ...['-name', node.name],
    // Every device is named below: QEMU adds none of its own, and reads no configuration file.
    ...['-nodefaults', '-no-user-config'],
    ...platformArguments(host),
    ...['-smp', `${node.cpus}`, '-m', `${node.memory}`],
    ...['-display', 'none', '-rtc', 'base=utc'],
    // Without it a machine waits for entropy when it generates its first keys.
    ...['-device', 'virtio-rng-pci'],
    // UEFI: its code, which no machine can change, and the machine's own variables.
    ...drive(`if=pflash,unit=0,format=${code.format},readonly=on`, code.path),
    // The node names are for snapshots of the machine's memory.
    ...drive('if=pflash,unit=1,format=qcow2,node-name=efivars', files.efiVars),
    ...['-pidfile', files.pid],
    ...['-chardev', `socket,id=qmp,path=${node.name}.qmp,server=on,wait=off`],
    ...['-mon', 'chardev=qmp,mode=control'],
    // discard: what the machine trims, the file gives back.
    ...drive(`if=none,id=disk,node-name=disk0,format=qcow2,discard=unmap,cache=${cache}`, disk),
    ...['-device', 'virtio-blk-pci,drive=disk,bootindex=1'],
  ]
  if (mode.kind === 'install') {
    const { kernel } = mode
    return [
      ...common,
      ...drive('if=none,id=iso,media=cdrom,format=raw,readonly=on', mode.iso),
      // Boots after the disk, which is empty; index 0 belongs to -kernel.
      ...(host.arch === 'x86_64'
        ? ['-device', 'ide-cd,drive=iso,bootindex=2']
        : ['-device', 'virtio-scsi-pci', '-device', 'scsi-cd,drive=iso,bootindex=2']),
      ...(kernel ? ['-kernel', kernel.kernel, '-initrd', kernel.initrd] : []),
      ...(kernel ? ['-append', kernel.append] : []),
      ...networkInterface('outside', node.mac, outside),
      // signal=off: Ctrl-C reaches the installer's shell as a character and does not end QEMU.
      ...['-chardev', 'stdio,id=console,signal=off', '-serial', 'chardev:console'],
      '-no-reboot',
    ]
  }
  const ports = [`${node.sshPort}-:22`]
  if (node === cluster.controlPlane) ports.push(`${API_PORT}-:${API_PORT}`)
  const forwards = ports.map((pair) => `,hostfwd=tcp:127.0.0.1:${pair}`).join('')
  const local = `local.type=inet,local.host=127.0.0.1,local.port=${node.lanPort}`
  const lanSwitch = `remote.type=inet,remote.host=127.0.0.1,remote.port=${LAN_SWITCH_PORT}`
  const consoleSocket = `socket,id=console,path=${node.name}.console,server=on,wait=off`
  const consoleLog = `logfile=${escaped(files.consoleLog)},logappend=off`
  return [
    ...common,
    // The interface to the internet; the forwards are open to this computer only.
    ...networkInterface('outside', node.mac, outside + forwards),
    // The interface to the LAN: its frames are UDP datagrams to and from the LAN switch.
    ...networkInterface('lan', node.lanMac, `dgram,id=lan,${local},${lanSwitch}`),
    ...['-chardev', `${consoleSocket},${consoleLog}`, '-serial', 'chardev:console'],
    // No -no-reboot: a running machine may reboot itself, for a new kernel.
  ]
}

/** The cluster is IPv4 throughout, and QEMU would offer IPv6 where this computer has none. */
const outside = 'user,id=outside,ipv6=off'

function drive(options: string, path: string): string[] {
  return ['-drive', `${options},file=${escaped(path)}`]
}

/** QEMU's default MAC addresses are the same on every machine. No boot ROM: nothing boots from it. */
function networkInterface(id: string, mac: string, netdev: string): string[] {
  return ['-netdev', netdev, '-device', `virtio-net-pci,netdev=${id},mac=${mac},romfile=`]
}

/** A comma in a file's name, as QEMU's option lists write it. */
function escaped(path: string): string {
  return path.replaceAll(',', ',,')
}
