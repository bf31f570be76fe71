#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// Another worker for a running cluster, from its lines in cluster.env to its being Ready.
import { existsSync, readFileSync } from 'node:fs'
import { type Cluster, loadCluster, type Node } from '../lib/cluster.mts'
import { StepError } from '../lib/errors.mts'
import { writeFileAtomic } from '../lib/files.mts'
import { formatDuration } from '../lib/format.mts'
import { interruption } from '../lib/interrupt.mts'
import { describeWorkers } from '../lib/kubernetes/describe-workers.mts'
import { Kubectl } from '../lib/kubernetes/kubectl.mts'
import { waitForNode, waitForReady } from '../lib/kubernetes/wait-for-node.mts'
import { withClusterLock } from '../lib/lock.mts'
import { Machine } from '../lib/machine/machine.mts'
import { waitForServices } from '../lib/machine/wait-for-services.mts'
import { certificatesOf } from '../lib/pki/certificates.mts'
import { checkMemory } from '../lib/prerequisites/resource-checks.mts'
import { assertDiskSpace, hasDisk } from '../lib/qemu/disk.mts'
import { detectHost } from '../lib/qemu/host.mts'
import { isPortFree } from '../lib/qemu/ports.mts'
import { startMachine } from '../lib/qemu/vm.mts'
import { runScript } from '../lib/run-script.mts'
import { script } from '../lib/script.mts'
import { inParallel, step } from '../lib/steps.mts'
import { checkWorkerName, chooseAddresses } from '../lib/workers/new-worker.mts'
import { introduce, unreachable } from '../lib/workers/other-machines.mts'
import { isAddition, withWorker } from '../lib/workers/worker-settings.mts'

const { flags, args } = script({
  does: `Adds a worker to a running cluster: chooses its addresses and writes them to cluster.env, makes
its certificate and configuration, installs and starts it, tells the other machines the way to
its pods, and waits until it is Ready. Run again after an interruption, it goes on from there.`,
  reads: ['cluster.env', 'configs/', 'tls/', 'images/'],
  writes: [
    ...['cluster.env', 'tls/', 'configs/NAME.kubeconfig', 'cloud-init/', 'images/NAME.qcow2'],
    ...['run/', 'on the other machines: /etc/nixos'],
  ],
  flags: {
    timeout: { value: 'SECONDS', number: true, help: 'for the node to be Ready (WAIT_TIMEOUT)' },
  },
  args: 'NAME',
  examples: ['./bin/add-worker.mts delta', 'make add-worker NAME=delta'],
})
const [name = ''] = args
const began = performance.now()
const signal = interruption()
const before = loadCluster()
const kubectl = new Kubectl(before, signal)

await withClusterLock(before, `adding the worker ${name}`, async () => {
  // 1. Whatever would keep it from joining is found before anything is touched.
  const text = readFileSync(before.path('cluster.env'), 'utf8')
  const goesOn = isAddition(text, name) && before.workers.some((node) => node.name === name)
  if (!goesOn) checkWorkerName(before, name, process.env)
  await step('check the cluster', checkCluster)
  if (!goesOn) await refuseIfKnown()
  if (!goesOn || !hasDisk(before, before.node(name))) await run('download-iso')

  // 2. Who it is: a block of its own in cluster.env.
  const cluster = goesOn ? before : await step(`${name} in cluster.env`, describe)
  const node = cluster.node(name)
  await join(cluster, node).catch((error) => {
    console.error(
      `\n${name} is in cluster.env: make add-worker NAME=${name} goes on, make remove-worker NAME=${name} takes it out`,
    )
    throw error
  })
  const { ip, podCidr, sshPort } = node
  const time = formatDuration(performance.now() - began)
  console.log(`${name} is a worker: ${ip}, pods ${podCidr}, ssh port ${sshPort} (${time})`)
})

async function join(cluster: Cluster, node: Node): Promise<void> {
  const others = cluster.nodes.filter((each) => each !== node)
  const timeout = flags.timeout ?? cluster.settings.WAIT_TIMEOUT

  // 3. How it proves who it is, where it finds the API server, and what it is to be.
  await run('generate-certs')
  await run('generate-kubeconfigs')
  await run('generate-nocloud-iso', name)

  // 4. NixOS on its disk.
  if (!hasDisk(cluster, node)) await run('provision', '--iso', name)

  // 5. The others know its name and the way to its pods before there are any.
  await introduce(cluster, node, others, { timeout, signal })

  // 6. Power on; its kubelet registers it.
  const host = await detectHost(cluster)
  await inParallel([name], async (_, row) => {
    row.step('power on')
    await startMachine(cluster, node, host)
    const machine = new Machine(cluster, node, signal)
    row.step('waiting for ssh')
    await machine.waitForSsh({ detail: (said) => row.detail(said) })
    row.step('waiting for its services')
    await waitForServices(machine, { timeout, detail: (said) => row.detail(said), signal })
    row.step('waiting for its kubelet to register')
    await waitForNode(cluster, node, { timeout, detail: (said) => row.detail(said), signal })
  })

  // 7. What the API cannot know by itself; with that, the pod network comes up on it.
  await step('pod range and label', () => describeWorkers(kubectl, [node]))
  if (await kubectl.exists('daemonset/cilium', '--namespace=kube-system')) {
    await step(`${name} is Ready`, (detail) =>
      waitForReady(cluster, node, { timeout, detail, signal }),
    )
  } else console.error('next: make network, as there is no pod network yet')
}

/** The API server and all machines: each of them has something to do with it. */
async function checkCluster(): Promise<void> {
  await kubectl.run(['get', '--raw', '/readyz'])
  const others = before.nodes.filter((node) => node.name !== name)
  const silent = await unreachable(before, others, signal)
  if (silent.size === 0) return
  throw new StepError('not all machines can be told of a new worker, so nothing was done', {
    output: [...silent.values()].join('\n'),
    hint: 'make up starts machines; make status shows how they are',
  })
}

/** A worker of that name that is not in cluster.env is not ours to overwrite. */
async function refuseIfKnown(): Promise<void> {
  if (await kubectl.exists('node', name)) {
    throw new StepError(`the API server knows a node "${name}" that cluster.env does not`, {
      hint: `take another name, or: KUBECONFIG=configs/admin.kubeconfig kubectl delete node ${name}`,
    })
  }
  if (existsSync(before.path('images', `${name}.qcow2`))) {
    throw new StepError(`there is a disk of another "${name}": images/${name}.qcow2`, {
      hint: 'move it away, or take another name',
    })
  }
}

/** @returns the cluster with it */
async function describe(): Promise<Cluster> {
  // Read anew: its owner may have changed something while the ISO was downloaded.
  const text = readFileSync(before.path('cluster.env'), 'utf8')
  const longer = withWorker(text, await chooseAddresses(before, name, isPortFree))
  // Checked as a whole before it is written.
  const cluster = loadCluster({ root: before.root, text: longer })
  certificatesOf(cluster)
  await assertDiskSpace(cluster, [cluster.node(name)])
  const { found, advice } = await checkMemory(cluster)
  if (advice) console.error(`! ${found} of memory are free, and ${advice}`)
  await writeFileAtomic(before.path('cluster.env'), longer)
  return cluster
}

function run(step: string, ...stepArgs: string[]): Promise<void> {
  const failure = `so ${name} is not a worker yet`
  const hint = `make add-worker NAME=${name}`
  return runScript(before, step, stepArgs, { signal, failure, hint })
}
