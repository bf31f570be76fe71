// The control plane machine as scripts see it: an sshd in its place, with the real programs of etcd,
// and the services as processes of this computer. Only systemctl is simulated.
import { join } from 'node:path'
import type { Cluster } from '../../lib/cluster.mts'
import type { Checkout } from '../checkout.mts'
import { type IdleQemu, startIdleQemu } from '../idle-qemu.mts'
import { type Sshd, startSshd } from '../sshd.mts'
import { fakeSystemctl, type Systemctl } from '../systemctl.mts'
import type { ControlPlane } from './control-plane.mts'
import { commandHere, services } from './mapping.mts'
import { prepareControlPlane, type Tools } from './prepared.mts'

export class AlphaOverSsh {
  readonly checkout: Checkout
  readonly cluster: Cluster
  readonly controlPlane: ControlPlane
  /** PATH of scripts: with the real kubectl. */
  readonly path: string
  /** Folder of etcd's data. */
  readonly data: string
  private readonly tools: Tools
  private running: { qemu: IdleQemu; sshd: Sshd; systemctl: Systemctl } | undefined
  /** Why the services did not start. */
  private trouble: string | undefined
  private rounds = 0
  private starts = 0

  private constructor(tools: Tools, prepared: Awaited<ReturnType<typeof prepareControlPlane>>) {
    this.tools = tools
    this.checkout = prepared.checkout
    this.cluster = prepared.cluster
    this.controlPlane = prepared.controlPlane
    this.path = `${tools.kubernetes}:${process.env.PATH}`
    this.data = join(prepared.controlPlane.place.root, 'var/lib/etcd')
  }

  static async start(tools: Tools): Promise<AlphaOverSsh> {
    const alpha = new AlphaOverSsh(tools, await prepareControlPlane(tools))
    try {
      await alpha.controlPlane.start()
      const qemu = await startIdleQemu(alpha.checkout, 'alpha')
      const sshd = await startSshd(alpha.checkout, 'alpha')
      const systemctl = await fakeSystemctl(sshd, (args) => alpha.answer(args))
      alpha.running = { qemu, sshd, systemctl }
      for (const name of ['etcdctl', 'etcdutl'] as const) await alpha.useReal(name)
      // The health endpoints have other ports here.
      const { etcdMetrics, controllerManager, scheduler } = alpha.controlPlane.ports
      const ports = { 2381: etcdMetrics, 10257: controllerManager, 10259: scheduler }
      const connections = Object.entries(ports).map(
        ([there, here]) => `--connect-to 127.0.0.1:${there}:127.0.0.1:${here}`,
      )
      await sshd.program('curl', `#!/bin/sh\nexec /usr/bin/curl ${connections.join(' ')} "$@"\n`)
      await sshd.program('journalctl', '#!/bin/sh\necho "the end of the journal"\n')
      return alpha
    } catch (error) {
      await alpha.stop()
      throw error
    }
  }

  async stop(): Promise<void> {
    await this.controlPlane.stop()
    await this.running?.systemctl.stop()
    await this.running?.sshd.stop()
    await this.running?.qemu.stop()
    await this.checkout.remove()
  }

  get sshd(): Sshd {
    if (!this.running) throw new Error('alpha is not running')
    return this.running.sshd
  }

  /** Calls of systemctl that change something. */
  changes(): string[] {
    return this.running?.systemctl.calls.filter((call) => !call.startsWith('show')) ?? []
  }

  /** Puts a program of etcd in its place, after a test had another there. */
  async useReal(name: 'etcdctl' | 'etcdutl'): Promise<void> {
    await this.sshd.program(name, `#!/bin/sh\nexec ${this.tools.etcd}/${name} "$@"\n`)
  }

  /** Lets the machine run, or not, as seen from this computer; its services are not affected. */
  async setRunning(runs: boolean): Promise<void> {
    if (!this.running) return
    await this.running.qemu.stop()
    if (runs) this.running.qemu = await startIdleQemu(this.checkout, 'alpha')
  }

  private async answer(args: string): Promise<string> {
    const { controlPlane } = this
    const [verb] = args.split(' ')
    if (verb === 'stop') {
      this.starts += 1
      await controlPlane.stop()
    }
    if (verb === 'start') {
      this.trouble = undefined
      this.starts += 1
      const mine = this.starts
      controlPlane.start().catch((error) => {
        // One that was stopped in the middle does not concern the next.
        if (mine === this.starts) this.trouble = String(error)
      })
    }
    if (args === 'show --property=ExecStart --value etcd') {
      const { machine, place, ports } = controlPlane
      const words = commandHere(machine, 'etcd', place, ports)
      return `{ path=${words[0]} ; argv[]=${words.join(' ')} ; ignore_errors=no ; pid=0 }\n`
    }
    if (!args.startsWith('show')) return ''
    const states = services.map(async (service) => {
      const path = service === 'kube-controller-manager' ? '/healthz' : '/readyz'
      const healthy = (await controlPlane.trouble(service, path)) === undefined
      const state = healthy ? 'active' : 'activating'
      // systemd would have started it again meanwhile.
      const restarts = healthy || !this.trouble ? 0 : 5 * this.rounds++
      return `LoadState=loaded\nActiveState=${state}\nSubState=x\nResult=success\nNRestarts=${restarts}\n`
    })
    return (await Promise.all(states)).join('\n')
  }
}
