// A cluster whose machines can be given another configuration: each is a real sshd with a file
// system of its own, and for a fake API server their nodes are Ready.
import { mkdir } from 'node:fs/promises'
import { type FakeApiServer, nodeList, startFakeApiServer } from './api-server.mts'
import { type Checkout, run } from './checkout.mts'
import { HollowMachines } from './hollow-machines.mts'
import { makeStagedCheckout } from './kubernetes/prepared.mts'
import { enterNamespace, type MachineNamespace } from './machine-namespace.mts'

/** Simulated machines of a checkout that has its keys in tls/ and its files staged. */
export interface ChangeableMachines {
  machines: HollowMachines
  /** The folder of a machine's file system on this computer. */
  space(name: string): string
  /** Starts a machine, or one that a test has stopped, with an empty file system. */
  start(name: string): Promise<void>
  /**
   * Gives a machine a program that is a shell script. $NAME in its text is the machine's, $CALLS the
   * file in which it notes its calls, $STATE a folder with files that control it.
   */
  program(name: string, program: string, text: string): Promise<void>
  /** Runs shell text on a machine. @returns its standard output @throws Error with its stderr */
  on(name: string, command: string): Promise<string>
  /** Gives machines the staged files of their configuration and nothing else, as after a boot. */
  install(...names: string[]): Promise<void>
  /** Gives machines the files that they were last installed with. */
  reset(...names: string[]): Promise<void>
  /** Stops all that were started. */
  stop(): Promise<void>
}

export function changeableMachines(checkout: Checkout): ChangeableMachines {
  const machines = new HollowMachines(checkout)
  const namespaces: MachineNamespace[] = []
  const spaces = new Map<string, string>()
  const space = (name: string) => spaces.get(name) ?? ''
  const on = async (name: string, command: string) => {
    const args = ['-F', 'tls/ssh_config', name, `set -euo pipefail; ${command}`]
    const { stdout, stderr, exitCode } = await run(checkout, 'ssh', args)
    if (exitCode !== 0) throw new Error(`${command} on ${name}: ${stderr}`)
    return stdout
  }
  // Not the folders above these, which are this computer's: tar changes their modes for a moment,
  // and two at a time would leave / closed to others.
  const files = ['etc/nixos', 'var/lib/kubernetes', 'etc/ssh/ssh_host_ed25519_key{,.pub}']
  const members = files.map((file) => `./${file}`).join(' ')
  const reset = `rm -rf /var/lib/reconfig /var/lib/kubernetes /etc/nixos
    tar -xzpf /var/lib/installed/archive --no-same-owner -C / ${members}`
  return {
    machines,
    space,
    on,
    async reset(...names) {
      await Promise.all(names.map((name) => on(name, reset)))
    },
    async start(name) {
      await machines.start(name)
      await mkdir(checkout.path('state', name), { recursive: true })
      spaces.set(name, checkout.path('spaces', `${name}-${namespaces.length}`))
      namespaces.push(await enterNamespace(machines.sshd(name), space(name)))
    },
    program: (name, program, text) =>
      machines
        .sshd(name)
        .program(
          program,
          text
            .replaceAll('$NAME', name)
            .replaceAll('$CALLS', checkout.path('calls'))
            .replaceAll('$STATE', checkout.path('state', name)),
        ),
    async install(...names) {
      await run(checkout, 'bin/generate-nocloud-iso.mts')
      const unpack = `mkdir -p /var/lib/installed; cat >/var/lib/installed/archive; ${reset}`
      for (const name of names) {
        const pipe = `tar -czf - -C cloud-init/${name}/nixos . | ssh -F tls/ssh_config ${name} "$0"`
        const { exitCode, stderr } = await run(checkout, 'sh', ['-c', pipe, unpack])
        if (exitCode !== 0) throw new Error(`${name}: ${stderr}`)
      }
    },
    async stop() {
      for (const namespace of namespaces) await namespace.stop()
      await machines.stop(...spaces.keys())
    },
  }
}

export interface ChangeableCluster extends ChangeableMachines {
  checkout: Checkout
  api: FakeApiServer
  remove(): Promise<void>
}

/** All machines of a new checkout, running. @param settings for its cluster.env */
export async function startChangeableCluster(
  settings: Parameters<Checkout['set']>[0],
): Promise<ChangeableCluster> {
  const { checkout, cluster } = await makeStagedCheckout()
  await checkout.set(settings)
  const all = changeableMachines(checkout)
  let api: FakeApiServer | undefined
  const remove = async () => {
    await api?.stop()
    await all.stop()
    await checkout.remove()
  }
  try {
    for (const { name } of cluster.nodes) await all.start(name)
    api = await startFakeApiServer(checkout)
    answerReady(
      api,
      cluster.workers.map(({ name }) => name),
    )
  } catch (error) {
    await remove()
    throw error
  }
  return { ...all, checkout, api, remove }
}

function answerReady(api: FakeApiServer, workers: readonly string[]): void {
  api.answers['/readyz'] = { body: 'ok' }
  api.answers['/version'] = { body: JSON.stringify({ gitVersion: 'v1.36.3' }) }
  const ready = workers.map((name) => [name, { ready: true }] as const)
  api.answers['/api/v1/nodes'] = { body: nodeList(Object.fromEntries(ready)) }
  for (const name of workers) {
    const lease = `/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/${name}`
    const renewed = () => ({ body: JSON.stringify({ spec: { renewTime: new Date() } }) })
    Object.defineProperty(api.answers, lease, { get: renewed })
  }
}
