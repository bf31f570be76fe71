#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// From nothing to a cluster. Read it as a table of contents: each step is a script of its own, or a
// few lines below.
import { existsSync } from 'node:fs'
import { chooseNodes, loadCluster, type Node } from '../lib/cluster.mts'
import { verifiedIso } from '../lib/download/iso.mts'
import { StepError } from '../lib/errors.mts'
import { installNode } from '../lib/installer/install-node.mts'
import { interruption } from '../lib/interrupt.mts'
import { withLock } from '../lib/lock.mts'
import { Machine } from '../lib/machine/machine.mts'
import { assertDiskSpace, hasDisk } from '../lib/qemu/disk.mts'
import { detectHost, type Host } from '../lib/qemu/host.mts'
import { assertPortsFree, startMachine } from '../lib/qemu/vm.mts'
import { runScript } from '../lib/run-script.mts'
import { script } from '../lib/script.mts'
import { inParallel } from '../lib/steps.mts'

const { flags, args } = script({
  does: `From nothing to a cluster: checks this computer, downloads NixOS, makes certificates and
configurations, installs the machines that have no disk yet, all at once, boots all, waits for
Kubernetes, and gives it pod network, DNS, storage and metrics. If machines are named, it ends
when these are up. What is there already is kept, so that a second run only boots and looks.`,
  reads: ['cluster.env', 'configs/*.nix'],
  writes: ['images/', 'tls/', 'configs/', 'cloud-init/', 'run/', 'logs/', 'tools/'],
  flags: {
    until: {
      value: 'STAGE',
      choices: ['machines', 'cluster', 'all'],
      help: 'machines: up; cluster: workers Ready for pods; all: with DNS, storage, metrics (all)',
    },
  },
  args: '[NODE...]',
  examples: [
    './bin/bootstrap-cluster.mts',
    './bin/bootstrap-cluster.mts --until machines',
    'WORKER_MEM=4096 ./bin/bootstrap-cluster.mts',
  ],
})

const cluster = loadCluster()
const nodes = chooseNodes(cluster, args)
const signal = interruption()
const lock = cluster.path('run', 'bootstrap.lock')
// Some machines alone are no cluster.
const { until = args.length > 0 ? 'machines' : 'all' } = flags
if (args.length > 0 && until !== 'machines') {
  throw new StepError(`--until ${until} is for the whole cluster, not for ${args.join(', ')}`, {
    exitCode: 2,
  })
}

await withLock(lock, 'bootstrapping this cluster', async () => {
  const missing = nodes.filter((node) => !hasDisk(cluster, node))
  refuseWithoutKeys(cluster.nodes.filter((node) => hasDisk(cluster, node)))

  // What this computer has to have.
  await run('check-prereqs')

  // The installer, if there is something to install.
  if (missing.length > 0) await run('download-iso')

  // Who is who: the CA, a certificate for everybody, and the ssh keys of the machines.
  await run('generate-certs')

  // Where everybody finds the API server, and how they prove themselves there.
  await run('generate-kubeconfigs')

  // The key for Secrets in etcd.
  await run('generate-encryption-config')

  // What each machine is given: its NixOS configuration, certificates and kubeconfigs.
  await run('generate-nocloud-iso')

  const host = await detectHost(cluster)
  if (host.warning) console.error(`! ${host.warning}`)

  // NixOS on every machine that has none, all at the same time.
  if (missing.length > 0) await install(missing, host)

  // Power on, and wait for everybody to be up.
  await boot(host)
  if (until === 'machines') return

  // The control plane answers, and every kubelet has registered.
  await run('wait-for-cluster')

  // The pod network; with it the workers become Ready for pods.
  await run('install-cilium')
  await run('wait-for-cluster', '--ready')
  if (until === 'cluster') return

  // Names for services, volumes for claims, numbers for kubectl top. Each proves that it works.
  const patience = ['--timeout', `${cluster.settings.WAIT_TIMEOUT}`]
  for (const addOn of ['coredns', 'local-storage', 'metrics-server']) {
    await run(`deploy-${addOn}`, ...patience)
  }
})
const next: Record<string, string> = {
  machines: 'make wait, which watches the cluster come up',
  cluster: 'make dns, make storage, make metrics',
  all: 'make smoke, and: export KUBECONFIG=configs/admin.kubeconfig',
}
console.error(`next: ${next[until]}`)

/** Runs a step in this terminal as one would type it. It tells its own errors. */
function run(name: string, ...args: string[]): Promise<void> {
  const failure = 'so the cluster is not complete'
  const hint = 'what is done stays; make all goes on from here'
  return runScript(cluster, name, args, { signal, failure, hint })
}

async function install(missing: Node[], host: Host): Promise<void> {
  console.error(`\n$ ./bin/provision.mts --iso ${names(missing).join(' ')}`)
  const iso = await verifiedIso(cluster, host)
  await assertDiskSpace(cluster, missing)
  await inParallel(names(missing), (name, row) =>
    installNode(cluster, cluster.node(name), { iso, host, row, signal }),
  )
}

async function boot(host: Host): Promise<void> {
  console.error('\n$ ./bin/provision.mts')
  await assertPortsFree(cluster, nodes)
  const width = Math.max(...names(nodes).map((name) => name.length))
  const lines = await inParallel(names(nodes), async (name, row) => {
    const machine = new Machine(cluster, cluster.node(name), signal)
    row.step('power on')
    await startMachine(cluster, machine.node, host)
    row.step('waiting for ssh')
    await machine.waitForSsh({ detail: (text) => row.detail(text) })
    row.step('waiting for systemd')
    const system = await machine.waitForSystem({ detail: (text) => row.detail(text) })
    const failed = system.failedUnits.length > 0 ? `: ${system.failedUnits.join(', ')} failed` : ''
    return `${name.padEnd(width)}  ${system.state}${failed}`
  })
  console.log(lines.join('\n'))
}

/** New keys would not fit to machines that were installed with the old ones. */
function refuseWithoutKeys(installed: Node[]): void {
  const needed = ['tls/ca.pem', 'tls/ssh_ed25519', 'configs/encryption-config.yaml']
  const lost = needed.filter((file) => !existsSync(cluster.path(file)))
  if (installed.length === 0 || lost.length === 0) return
  throw new StepError(
    `${names(installed).join(', ')} were installed with keys that are not here any more: ${lost.join(', ')}`,
    { hint: 'put them back, or start anew: make clobber, then make all' },
  )
}

function names(of: readonly Node[]): string[] {
  return of.map(({ name }) => name)
}
