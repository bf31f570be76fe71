#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// From nothing to a cluster. A table of contents: each step is a script of its own.
import { existsSync } from 'node:fs'
import { chooseNodes, loadCluster, type Node } from '../lib/cluster.mts'
import { StepError } from '../lib/errors.mts'
import { withClusterLock } from '../lib/lock.mts'
import { refuseIf, runScript, script } from '../lib/script.mts'
import { hasDisk } from '../lib/vm.mts'

const { flags, args } = script({
  does: `From nothing to a cluster: checks this computer, downloads NixOS, generates certificates and
configurations, installs the machines that have no disk yet, all at once, boots all of them, waits
for Kubernetes, and adds pod network, DNS, storage and metrics. If machines are named, it ends when
these are up. Whatever exists is kept, so that a second run only boots and verifies.`,
  reads: ['cluster.env', 'configs/*.nix'],
  writes: ['images/', 'tls/', 'configs/', 'cloud-init/', 'run/', 'logs/', 'tools/'],
  flags: {
    until: {
      value: 'STAGE',
      choices: ['machines', 'cluster', 'all'],
      help: 'machines: booted; cluster: workers Ready; all: add-ons deployed, too (the default)',
    },
  },
  args: '[NODE...]',
  examples: ['./bin/bootstrap-cluster.mts', 'WORKER_MEM=4096 ./bin/bootstrap-cluster.mts'],
})

const cluster = loadCluster()
const nodes = chooseNodes(cluster, args)
const names = (of: readonly Node[]) => of.map(({ name }) => name)
// Some machines alone are not a cluster.
const { until = args.length > 0 ? 'machines' : 'all' } = flags
refuseIf(args.length > 0 && until !== 'machines', `--until ${until} is for the whole cluster`)

await withClusterLock(cluster, 'bootstrapping this cluster', async () => {
  const missing = nodes.filter((node) => !hasDisk(cluster, node))
  refuseWithoutKeys(cluster.nodes.filter((node) => hasDisk(cluster, node)))

  // What this computer needs: QEMU, firmware, kubectl, memory, …
  await run('check-prereqs')

  // The installer, if there is something to install.
  if (missing.length > 0) await run('download-iso')

  // Identities: the CA, a certificate for each component, ssh keys of the machines.
  await run('generate-certs')

  // How each component reaches the API server, and authenticates there.
  await run('generate-kubeconfigs')

  // The key that encrypts Secrets in etcd.
  await run('generate-encryption-config')

  // The files of each machine: its NixOS configuration, certificates and kubeconfigs.
  await run('generate-nocloud-iso')

  // NixOS on every machine that has none, all at the same time.
  if (missing.length > 0) await run('provision', '--iso', ...names(missing))

  // Power on; wait until ssh and systemd of every machine are up.
  await run('provision', '--wait', ...args)
  if (until === 'machines') return

  // The control plane answers, and every kubelet has registered.
  await run('wait-for-cluster')

  if (cluster.workers.length === 0) return

  // The pod network; with it the workers become Ready.
  const timeout = `${cluster.settings.WAIT_TIMEOUT}`
  await run('install-cilium', '--timeout', timeout)
  await run('wait-for-cluster', '--ready')
  if (until === 'cluster') return

  // DNS, volumes, metrics: they need only the network, so all at the same time, with plain lines.
  process.env.TERM = 'dumb'
  const addOns = ['deploy-coredns', 'deploy-local-storage', 'deploy-metrics-server']
  const all = await Promise.allSettled(addOns.map((name) => run(name, '--timeout', timeout)))
  for (const ended of all) if (ended.status === 'rejected') throw ended.reason
})
let next = 'make smoke; for kubectl: export KUBECONFIG="$PWD/configs/admin.kubeconfig"'
if (cluster.workers.length === 0) next = 'make add-worker NAME=sigma: pods need a worker'
if (until === 'machines') next = 'make wait, which watches the cluster come up'
if (until === 'cluster') next = 'make dns, make storage, make metrics'
console.error(`next: ${next}`)

/** Runs a step in this terminal, as a person would type it. */
function run(name: string, ...args: string[]): Promise<void> {
  const hint = 'everything done so far is kept; make all continues from here'
  return runScript(name, args, { failure: 'so the cluster is not complete', hint })
}

/** New keys would not match machines that were installed with the old ones. */
function refuseWithoutKeys(installed: Node[]): void {
  const needed = ['tls/ca.pem', 'tls/ssh_ed25519', 'configs/encryption-config.yaml']
  const lost = needed.filter((file) => !existsSync(cluster.path(file))).join(', ')
  if (installed.length === 0 || !lost) return
  const reason = `${names(installed).join(', ')} were installed with keys that are missing now: ${lost}`
  const hint = 'restore them from a copy, or start again from nothing: make clobber, then make all'
  throw new StepError(reason, { hint })
}
