// A machine as a list of QEMU arguments: pure, so that it can be read and tested without one.
import type { Cluster, Node } from '../cluster.mts'
import type { Host } from './host.mts'
import { filesOf, type MachineFiles } from './machine-files.mts'

export type Mode =
  /** The installed disk, in the background, with its console in a log and on a socket. */
  | { kind: 'boot' }
  /**
   * The installer ISO on an empty disk, in the foreground, with its console on stdin and stdout.
   * `kernel` starts the ISO's kernel directly: on x86 its own boot menu knows no serial console.
   */
  | { kind: 'install'; iso: string; kernel?: { kernel: string; initrd: string; append: string } }

/**
 * QEMU's arguments, without the program. It has to be started in run/: its unix sockets have
 * relative names, since a socket's path is limited to some 104 bytes and a folder's is not.
 */
export function qemuArguments(machine: {
  cluster: Cluster
  node: Node
  host: Host
  mode: Mode
}): string[] {
  const { cluster, node, host, mode } = machine
  const files = filesOf(cluster, node)
  return [
    ...['-name', node.name],
    // Every device is named below: no graphics card, floppy or network that QEMU would add by
    // itself, and nothing from a configuration file of this computer.
    ...['-nodefaults', '-no-user-config'],
    ...['-machine', host.arch === 'x86_64' ? 'q35' : 'virt'],
    ...['-accel', host.accel],
    ...['-cpu', host.cpu],
    ...['-smp', `${node.cpus}`],
    ...['-m', `${node.memory}`],
    ...['-display', 'none'],
    ...['-rtc', 'base=utc'],
    // Without it a machine waits for entropy when it makes its first keys.
    ...['-device', 'virtio-rng-pci'],
    ...flash(host, files),
    ...(mode.kind === 'boot' ? bootDisk(cluster, files) : installDisks(host, files, mode)),
    ...outsideCard(cluster, node, mode),
    ...(mode.kind === 'boot' ? lanCard(cluster, node) : []),
    ...(mode.kind === 'boot' ? consoleOnSocket(node, files) : consoleOnStdio),
    ...['-pidfile', files.pid],
    ...['-chardev', `socket,id=qmp,path=${node.name}.qmp,server=on,wait=off`],
    ...['-mon', 'chardev=qmp,mode=control'],
    // A running machine may reboot itself, for a new kernel, so this is for the installer alone.
    // After a kernel panic a machine stays as it is, with the panic last on its console.
    ...(mode.kind === 'install' ? ['-no-reboot'] : []),
  ]
}

/** UEFI: its code, which no machine can change, and the machine's own variables. */
function flash({ firmware }: Host, files: MachineFiles): string[] {
  const { code, vars } = firmware
  const codeImage = `format=${code.format},readonly=on,file=${escaped(code.path)}`
  const varsImage = `format=${vars.format},file=${escaped(files.efiVars)}`
  return [
    ...['-drive', `if=pflash,unit=0,${codeImage}`],
    ...['-drive', `if=pflash,unit=1,${varsImage}`],
  ]
}

function disk(path: string, options: string): string[] {
  // discard: what the machine trims, the file gives back.
  const image = `format=qcow2,file=${escaped(path)},discard=unmap,${options}`
  return [
    ...['-drive', `if=none,id=disk,${image}`],
    ...['-device', 'virtio-blk-pci,drive=disk,bootindex=1'],
  ]
}

function bootDisk({ settings }: Cluster, files: MachineFiles): string[] {
  return disk(files.disk, `cache=${settings.QEMU_DISK_CACHE}`)
}

/** A disk that is thrown away if the installation fails needs no care while it runs. */
function installDisks(
  host: Host,
  files: MachineFiles,
  { iso, kernel }: Extract<Mode, { kind: 'install' }>,
): string[] {
  // Behind the disk, which is empty, so the firmware goes on to it; 0 is taken by -kernel.
  const cdrom =
    host.arch === 'x86_64'
      ? ['-device', 'ide-cd,drive=iso,bootindex=2']
      : ['-device', 'virtio-scsi-pci', '-device', 'scsi-cd,drive=iso,bootindex=2']
  return [
    ...disk(files.partialDisk, 'cache=unsafe'),
    ...['-drive', `if=none,id=iso,media=cdrom,readonly=on,format=raw,file=${escaped(iso)}`],
    ...cdrom,
    ...(kernel
      ? ['-kernel', kernel.kernel, '-initrd', kernel.initrd, '-append', kernel.append]
      : []),
  ]
}

/** The card to the internet; forwards lead to a running machine, from this computer alone. */
function outsideCard({ settings, controlPlane }: Cluster, node: Node, mode: Mode): string[] {
  const ports: { outside: number; inside: number }[] = []
  if (mode.kind === 'boot') ports.push({ outside: node.sshPort, inside: 22 })
  if (mode.kind === 'boot' && node === controlPlane) {
    ports.push({ outside: settings.API_PORT, inside: settings.API_PORT })
  }
  const forwards = ports.map(
    ({ outside, inside }) => `,hostfwd=tcp:127.0.0.1:${outside}-:${inside}`,
  )
  return [
    // The cluster is IPv4 throughout, and QEMU would offer IPv6 where this computer has none.
    ...['-netdev', `user,id=outside,ipv6=off${forwards.join('')}`],
    ...['-device', card('outside', node.mac)],
  ]
}

/** The card to the machines' own Ethernet: its frames are UDP datagrams to and from the switch. */
function lanCard({ settings }: Cluster, node: Node): string[] {
  const local = `local.type=inet,local.host=127.0.0.1,local.port=${node.lanPort}`
  const remote = `remote.type=inet,remote.host=127.0.0.1,remote.port=${settings.LAN_SWITCH_PORT}`
  return [
    ...['-netdev', `dgram,id=lan,${local},${remote}`],
    ...['-device', card('lan', node.lanMac)],
  ]
}

/** MACs are always given: QEMU's own are the same on every machine. No ROM: nothing boots here. */
function card(netdev: string, mac: string): string {
  return `virtio-net-pci,netdev=${netdev},mac=${mac},romfile=`
}

function consoleOnSocket(node: Node, { consoleLog }: MachineFiles): string[] {
  const socket = `socket,id=console,path=${node.name}.console,server=on,wait=off`
  const log = `logfile=${escaped(consoleLog)},logappend=off`
  return ['-chardev', `${socket},${log}`, '-serial', 'chardev:console']
}

/** signal=off: Ctrl-C goes to the installer's shell as a character, and does not end QEMU. */
const consoleOnStdio = ['-chardev', 'stdio,id=console,signal=off', '-serial', 'chardev:console']

/** A comma in a file's name, as QEMU's option lists want it. */
function escaped(path: string): string {
  return path.replaceAll(',', ',,')
}
