// A cluster whose machines can be given another configuration: each is a real sshd with a file
// system of its own, and a fake API server has their nodes Ready.
import { mkdir } from 'node:fs/promises'
import type { Cluster } from '../lib/cluster.mts'
import { type FakeApiServer, nodeList, startFakeApiServer } from './api-server.mts'
import type { Checkout } from './checkout.mts'
import { HollowMachines } from './hollow-machines.mts'
import { makeStagedCheckout } from './kubernetes/prepared.mts'
import { enterNamespace, type MachineNamespace } from './machine-namespace.mts'

export interface ChangeableCluster {
  checkout: Checkout
  cluster: Cluster
  machines: HollowMachines
  api: FakeApiServer
  /** The folder of a machine's file system on this computer. */
  space(name: string): string
  /** Starts a machine that a test has stopped, with an empty file system. */
  startAnew(name: string): Promise<void>
  /**
   * Gives a machine a program that is a shell script. $NAME in its text is the machine's, $CALLS the
   * file that tests read its calls from, $STATE a folder in which they tell it what to do.
   */
  program(name: string, program: string, text: string): Promise<void>
  remove(): Promise<void>
}

/** @param settings for its cluster.env */
export async function startChangeableCluster(
  settings: Parameters<Checkout['set']>[0],
): Promise<ChangeableCluster> {
  const { checkout, cluster } = await makeStagedCheckout()
  await checkout.set(settings)
  const machines = new HollowMachines(checkout)
  const names = cluster.nodes.map(({ name }) => name)
  const namespaces: MachineNamespace[] = []
  const spaces = new Map<string, string>()
  const space = (name: string) => spaces.get(name) ?? ''
  const startAnew = async (name: string) => {
    await machines.start(name)
    await mkdir(checkout.path('state', name), { recursive: true })
    spaces.set(name, checkout.path('spaces', `${name}-${namespaces.length}`))
    namespaces.push(await enterNamespace(machines.sshd(name), space(name)))
  }
  let api: FakeApiServer | undefined
  const remove = async () => {
    await api?.stop()
    for (const namespace of namespaces) await namespace.stop()
    await machines.stop(...names)
    await checkout.remove()
  }
  try {
    for (const name of names) await startAnew(name)
    api = await startFakeApiServer(checkout)
    answerReady(
      api,
      cluster.workers.map(({ name }) => name),
    )
  } catch (error) {
    await remove()
    throw error
  }
  const program = (name: string, program: string, text: string) =>
    machines
      .sshd(name)
      .program(
        program,
        text
          .replaceAll('$NAME', name)
          .replaceAll('$CALLS', checkout.path('calls'))
          .replaceAll('$STATE', checkout.path('state', name)),
      )
  return { checkout, cluster, machines, api, space, startAnew, program, remove }
}

function answerReady(api: FakeApiServer, workers: readonly string[]): void {
  api.answers['/readyz'] = { body: 'ok' }
  const ready = workers.map((name) => [name, { ready: true }] as const)
  api.answers['/api/v1/nodes'] = { body: nodeList(Object.fromEntries(ready)) }
  for (const name of workers) {
    const lease = `/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/${name}`
    const renewed = () => ({ body: JSON.stringify({ spec: { renewTime: new Date() } }) })
    Object.defineProperty(api.answers, lease, { get: renewed })
  }
}
