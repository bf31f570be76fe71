// A cluster for the add-ons' scripts: a real control plane, workers without machines, and a PATH
// with the real kubectl and, in place of what containers would run, programs of the test.
import type { Cluster } from '../../lib/cluster.mts'
import { type Checkout, type Outcome, run } from '../checkout.mts'
import { FakePrograms } from '../fake-programs.mts'
import type { ControlPlane } from './control-plane.mts'
import { HollowNodes } from './hollow-nodes.mts'
import { prepareControlPlane, type Tools } from './prepared.mts'

export class HollowCluster {
  readonly checkout: Checkout
  readonly cluster: Cluster
  readonly controlPlane: ControlPlane
  /** Come first on the PATH. */
  readonly programs = new FakePrograms()
  nodes: HollowNodes | undefined

  private constructor(prepared: Awaited<ReturnType<typeof prepareControlPlane>>) {
    this.checkout = prepared.checkout
    this.cluster = prepared.cluster
    this.controlPlane = prepared.controlPlane
  }

  /** Starts a control plane, without any node. */
  static async start(tools: Tools): Promise<HollowCluster> {
    const hollow = new HollowCluster(await prepareControlPlane(tools))
    await hollow.controlPlane.start()
    hollow.runsInPods('echo "nothing runs in this pod" >&2; exit 1')
    return hollow
  }

  async stop(): Promise<void> {
    await this.nodes?.stop()
    await this.controlPlane.stop()
    this.programs.remove()
    await this.checkout.remove()
  }

  /** Adds all workers; they are Ready at once unless it is said otherwise. */
  async addNodes(options: { ready?: boolean } = {}): Promise<HollowNodes> {
    this.nodes = await HollowNodes.register(this.cluster)
    if (options.ready !== false) await this.nodes.start()
    return this.nodes
  }

  /** @param shell what `kubectl exec POD -- …` does; `$@` is the command, `$POD` the pod */
  runsInPods(shell: string): void {
    const kubectl = `${this.controlPlane.place.kubernetes}/kubectl`
    this.programs.add(
      'kubectl',
      `if [ "$1" = exec ]; then POD=$3; shift 4; ${shell}; else exec ${kubectl} "$@"; fi`,
    )
  }

  /** Runs a script of bin/. */
  script(name: string, ...args: string[]): Promise<Outcome> {
    const PATH = `${this.programs.path}:${process.env.PATH}`
    return run(this.checkout, `bin/${name}.mts`, args, { env: { PATH } })
  }

  /** kubectl as admin. @returns its standard output @throws Error with its standard error */
  async kubectl(args: readonly string[], input = ''): Promise<string> {
    const { stdout, stderr, exitCode } = await this.controlPlane.kubectl('admin', args, input)
    if (exitCode !== 0) throw new Error(`kubectl ${args.join(' ')}: ${stderr}`)
    return stdout
  }

  /** The answer of `kubectl get ARGS`. */
  async get<T>(...args: string[]): Promise<T> {
    return JSON.parse(await this.kubectl(['get', ...args, '--output=json'])) as T
  }
}
