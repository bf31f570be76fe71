// A cluster for the add-ons' scripts: a real control plane, workers without machines, and a PATH
// with the real kubectl and, in place of what containers would run, programs of the test.
import { writeFile } from 'node:fs/promises'
import type { Cluster } from '../../lib/cluster.mts'
import { becomes } from '../../lib/wait.mts'
import { type Checkout, type Outcome, run } from '../checkout.mts'
import { FakePrograms } from '../fake-programs.mts'
import type { ControlPlane } from './control-plane.mts'
import { defaultFate, HollowNodes } from './hollow-nodes.mts'
import { prepareControlPlane, type Tools } from './prepared.mts'

export class HollowCluster {
  readonly checkout: Checkout
  readonly cluster: Cluster
  readonly controlPlane: ControlPlane
  /** They are first on the PATH. */
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
    hollow.runsInPods('echo "nothing runs in this pod" >&2; exit 1')
    try {
      await hollow.controlPlane.start()
      // Pods need it, and the controller manager creates it a moment later.
      const look = ['get', 'serviceaccount', 'default']
      const hasAccount = async () =>
        (await hollow.controlPlane.kubectl('admin', look)).exitCode === 0
      if (!(await becomes(hasAccount, 60))) throw new Error('there is no default service account')
      return hollow
    } catch (error) {
      await hollow.stop()
      throw error
    }
  }

  async stop(): Promise<void> {
    await this.nodes?.stop()
    await this.controlPlane.stop()
    this.programs.remove()
    await this.checkout.remove()
  }

  /** Adds all workers; they are Ready at once by default. */
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
    return run(this.checkout, `bin/${name}.mts`, args, { env: this.env(), timeout: 400_000 })
  }

  /** Runs shell text with the same PATH. */
  shell(text: string): Promise<Outcome> {
    return run(this.checkout, 'sh', ['-c', text], { env: this.env() })
  }

  private env(): Record<string, string> {
    return { PATH: `${this.programs.path}:${process.env.PATH}` }
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

  /** @param fate what becomes of pods from now on; all run by default */
  setFate(fate: HollowNodes['fate'] = defaultFate): void {
    if (this.nodes) this.nodes.fate = fate
  }

  /**
   * Replaces the pods by ones that wait for a reason, and returns when each of them does: what a
   * script then sees does not depend on its timeout.
   */
  async letPodsWait(namespace: string, reason: string, message: string): Promise<void> {
    this.setFate(() => ({ reason, message }))
    const inNamespace = `--namespace=${namespace}`
    await this.kubectl(['delete', 'pods', '--all', inNamespace])
    const waiting = 'jsonpath={.items[*].status.containerStatuses[*].state.waiting.reason}'
    const all = async () => {
      const { items } = await this.get<{ items: object[] }>('pods', inNamespace)
      const reasons = await this.kubectl(['get', 'pods', inNamespace, `--output=${waiting}`])
      return items.length > 0 && reasons === items.map(() => reason).join(' ')
    }
    if (!(await becomes(all, 120))) throw new Error(`not all pods of ${namespace} wait`)
  }

  /** Writes a kubeconfig with which a program has the rights of a service account. */
  async kubeconfigOf(account: string, namespace: string): Promise<string> {
    const token = await this.kubectl(['create', 'token', account, `--namespace=${namespace}`])
    const path = this.checkout.path(`${account}.kubeconfig`)
    const cluster = {
      server: `https://127.0.0.1:${this.cluster.settings.API_PORT}`,
      'certificate-authority': this.checkout.path('tls', 'ca.pem'),
    }
    const config = {
      apiVersion: 'v1',
      kind: 'Config',
      clusters: [{ name: 'here', cluster }],
      users: [{ name: account, user: { token: token.trim() } }],
      contexts: [{ name: 'here', context: { cluster: 'here', user: account } }],
      'current-context': 'here',
    }
    await writeFile(path, JSON.stringify(config), { mode: 0o600 })
    return path
  }
}
