#!/usr/bin/env -S sh -c 'exec node --disable-warning=ExperimentalWarning "$(dirname "$0")/../lib/launch.mjs" "$0" "$@"'
// From nothing to running machines. Read it as a table of contents: each step is a script of its
// own, or a few lines below.
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync } from 'node:fs'
import { chooseNodes, loadCluster, type Node } from '../lib/cluster.mts'
import { verifiedIso } from '../lib/download/iso.mts'
import { installNode } from '../lib/installer/install-node.mts'
import { interruption } from '../lib/interrupt.mts'
import { withLock } from '../lib/lock.mts'
import { Machine } from '../lib/machine/machine.mts'
import { assertDiskSpace, hasDisk } from '../lib/qemu/disk.mts'
import { detectHost, type Host } from '../lib/qemu/host.mts'
import { assertPortsFree, startMachine } from '../lib/qemu/vm.mts'
import { script } from '../lib/script.mts'
import { StepError } from '../lib/step-error.mts'
import { inParallel } from '../lib/steps.mts'

const { args } = script({
  does: 'From nothing to running machines: checks this computer, downloads NixOS, makes certificates\nand configurations, installs the machines that have no disk yet, all at once, and boots all,\nunless some are named. What is there already is kept, so that a second run only boots.',
  reads: ['cluster.env', 'configs/*.nix'],
  writes: ['images/', 'tls/', 'configs/', 'cloud-init/', 'run/', 'logs/'],
  args: '[NODE...]',
  examples: ['./bin/bootstrap-cluster.mts', 'WORKER_MEM=4096 ./bin/bootstrap-cluster.mts'],
})

const cluster = loadCluster()
const nodes = chooseNodes(cluster, args)
const signal = interruption()
const lock = cluster.path('run', 'bootstrap.lock')

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
})
console.error('next: make wait, which watches the cluster come up')

/** Runs a step in this terminal as one would type it. It tells its own errors. */
async function run(name: string): Promise<void> {
  signal.throwIfAborted()
  console.error(`\n$ ./bin/${name}.mts`)
  const child = spawn(cluster.path('bin', `${name}.mts`), { stdio: 'inherit' })
  // Ctrl-C reaches both of us; what is sent to this process alone has to be passed on.
  const forward = () => child.kill('SIGTERM')
  process.once('SIGTERM', forward)
  const [status] = await once(child, 'exit')
  process.off('SIGTERM', forward)
  signal.throwIfAborted()
  if (status !== 0) {
    throw new StepError(`${name} did not succeed, so the cluster is not up`, {
      command: `./bin/${name}.mts`,
      hint: 'what is done stays; make all goes on from here',
      exitCode: status ?? 1,
    })
  }
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
