// Real machines without an operating system: their disks are empty, so their UEFI firmware starts
// its shell within seconds. That answers on the console, can ping, and powers off.
import { readFile } from 'node:fs/promises'
import type { Socket } from 'node:net'
import { $, which } from 'zx/core'
import { type Cluster, loadCluster, type Node } from '../lib/cluster.mts'
import { detectArchitecture, detectHost, detectSystem, type Host } from '../lib/host.mts'
import { stopLanSwitch } from '../lib/lan.mts'
import { isGone } from '../lib/processes.mts'
import { connectUnixSocket, Qmp } from '../lib/qmp.mts'
import { plainText } from '../lib/terminal.mts'
import { filesOf, hasDisk, machineState, prepareFolders, startMachine } from '../lib/vm.mts'
import { becomes } from '../lib/wait.mts'
import { type Checkout, makeCheckout } from './checkout.mts'

const program = `qemu-system-${await detectArchitecture(detectSystem())}`

/** Why there can be none here; false if there can. */
export const noMachines = (await which(program, { nothrow: true }))
  ? false
  : `${program} is missing`

export interface Machines {
  checkout: Checkout
  cluster: Cluster
  host: Host
  /** Gives a node an empty disk, if it has none, and starts it. @returns its pid */
  start(node: Node): Promise<number>
  /** Ends the machines and removes the checkout. */
  remove(): Promise<void>
}

/** A checkout at a path of 150 characters with a space in it, and small machines. */
export async function makeMachines(settings: Record<string, string | number> = {}) {
  const checkout = await makeCheckout({
    long: true,
    settings: {
      CONTROL_PLANE_MEM: 256,
      CONTROL_PLANE_CPUS: 1,
      WORKER_MEM: 256,
      WORKER_CPUS: 1,
      DISK_SIZE: 2,
      QEMU_ACCEL: 'tcg',
      STOP_TIMEOUT: 1,
      ...settings,
    },
  })
  const cluster = loadCluster({ root: checkout.root })
  const host = await detectHost(cluster)
  await prepareFolders(cluster)
  const machines: Machines = {
    checkout,
    cluster,
    host,
    async start(node) {
      await giveDisk(cluster, node)
      return (await startMachine(cluster, node, host)).pid
    },
    async remove() {
      for (const node of cluster.nodes) {
        const found = await machineState(cluster, node)
        if (found.state === 'stopped') continue
        process.kill(found.pid, 'SIGKILL')
        await becomes(() => isGone(found.pid), 10)
      }
      await stopLanSwitch(cluster)
      await checkout.remove()
    },
  }
  return machines
}

/** Gives the node an empty disk, which counts as installed. */
export async function giveDisk(cluster: Cluster, node: Node): Promise<void> {
  if (hasDisk(cluster, node)) return
  await $`qemu-img create -q -f qcow2 ${filesOf(cluster, node).disk} 1G`
}

const prompt = /Shell> $/

/** The firmware's shell, on the console. */
export class UefiShell {
  private readonly socket: Socket
  private text = ''

  private constructor(socket: Socket) {
    this.socket = socket
    socket.setEncoding('utf8')
    socket.on('data', (text: string) => {
      this.text += text
    })
    socket.on('error', () => {})
  }

  /** Attaches to the console of a machine that has just been started, and waits for the prompt. */
  static async of(cluster: Cluster, node: Node): Promise<UefiShell> {
    const shell = new UefiShell(connectUnixSocket(filesOf(cluster, node).console))
    try {
      // It counts down from 5 before it gives its prompt, unless a key is pressed. The console's log
      // also has what was printed before this was attached; Enter then gives another prompt.
      const { consoleLog, qmp } = filesOf(cluster, node)
      const count = async (text: RegExp) =>
        plainText(await readFile(consoleLog, 'utf8')).match(text)?.length ?? 0
      for (let resets = 0; resets <= 3; resets += 1) {
        // On a busy computer, the firmware sometimes cannot start its shell ("Device Error").
        const failed = async () => (await count(/No bootable option/g)) > resets
        const counting = async () => (await count(/startup\.nsh|Shell> /g)) > 0
        await becomes(async () => (await counting()) || (await failed()), 240)
        if ((await counting()) || !(await failed())) break
        const client = await Qmp.connect(qmp, { timeout: 5 })
        await client.execute('system_reset')
        client.close()
      }
      shell.socket.write('\r')
      await shell.waitForPrompt(240)
      return shell
    } catch (error) {
      shell.close()
      throw error
    }
  }

  /** Attaches to the console of a machine whose shell gives its prompt. */
  static at(cluster: Cluster, node: Node): UefiShell {
    return new UefiShell(connectUnixSocket(filesOf(cluster, node).console))
  }

  /** Types a command. @returns what it printed, once the prompt appears again */
  async run(command: string): Promise<string> {
    this.type(command)
    await this.waitForPrompt(180)
    return plainText(this.text)
  }

  /** Types a command that does not return. */
  type(command: string): void {
    this.text = ''
    this.socket.write(`${command}\r`)
  }

  close(): void {
    this.socket.destroy()
  }

  private async waitForPrompt(seconds: number): Promise<void> {
    if (await becomes(() => prompt.test(plainText(this.text)), seconds)) return
    throw new Error(`no prompt of the UEFI shell in ${seconds} s: ${plainText(this.text)}`)
  }
}
