#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// One worker less: its pods move to other nodes, then nothing of it is left but its disk.
import { readFileSync } from 'node:fs'
import { readdir, rename, rm } from 'node:fs/promises'
import { basename } from 'node:path'
import { $ } from 'zx/core'
import { loadCluster } from '../lib/cluster.mts'
import { withoutWorker } from '../lib/cluster-env.mts'
import { describeError, StepError } from '../lib/errors.mts'
import { writeFileAtomic } from '../lib/files.mts'
import { formatDuration, timestamp } from '../lib/format.mts'
import { interruption } from '../lib/interrupt.mts'
import { type ApiObject, kubectlJson, useCluster } from '../lib/kubectl.mts'
import { ensureLanSwitch, lanSwitchStatus } from '../lib/lan.mts'
import { withClusterLock, withMachineLocks } from '../lib/lock.mts'
import { runScript, script } from '../lib/script.mts'
import { connect } from '../lib/ssh.mts'
import { step } from '../lib/steps.mts'
import { filesOf, hasDisk, isRunning } from '../lib/vm.mts'

const { flags, args } = script({
  does: `Removes a worker: drains it, as far as disruption budgets allow, stops its machine, deletes its
node, and takes it out of the other machines' configuration and of cluster.env. Its disk is kept
in images/. Run again after an interruption, it continues.`,
  reads: ['cluster.env', 'tls/', 'run/'],
  writes: [
    ...['cluster.env', 'tls/', 'configs/NAME.kubeconfig', 'cloud-init/', 'images/', 'run/'],
    'on the other machines: /etc/nixos',
  ],
  flags: {
    force: {
      help: 'despite disruption budgets, pods without controller, local volumes or machines that do not answer; also the last worker',
    },
    purge: { help: 'delete its disk, with everything on it' },
    timeout: { value: 'SECONDS', number: true, help: 'for its pods to leave (300)' },
  },
  args: 'NAME',
  examples: ['./bin/remove-worker.mts delta', 'make remove-worker NAME=delta FLAGS=--purge'],
})
const [name = ''] = args
const began = performance.now()
const signal = interruption()
const cluster = loadCluster()
const node = cluster.node(name)
const files = filesOf(cluster, node)
const remaining = cluster.workers.filter((worker) => worker !== node).map((worker) => worker.name)
checkNode()

await withClusterLock(cluster, `removing the worker ${name}`, async () => {
  // 1. What speaks against it is found before anything is changed.
  loadCluster({ root: cluster.root, text: settingsWithout() })
  await useCluster(cluster)
  const others = await step('check the cluster', checkCluster)

  // 2. Its pods leave, then it stops. A machine that is off runs none.
  if (await isRunning(cluster, node)) {
    const { stdout } = await $`kubectl get node ${name} --ignore-not-found --output=name`
    if (stdout.trim()) await step(`drain ${name}`, drain)
    await runScript('shutdown', [name])
  }

  // 3. The API forgets it, and the pods of DaemonSets on it, whose end nobody would report. Not
  //    earlier: a kubelet that starts registers its node again.
  await $`kubectl delete node ${name} --ignore-not-found`
  const pods = ['--all-namespaces', `--field-selector=spec.nodeName=${name}`]
  await $`kubectl delete pods ${pods} --force --grace-period=0 --ignore-not-found --wait=false`

  // 4. The others forget its name and the route to its pods; from here on without it.
  process.env.WORKER_NODES = remaining.join(' ')
  if (others.length > 0) await runScript('reconfig', ['--node', others.join(',')])
  for (const other of others) {
    // Cilium adds routes as well as networkd; both lead nowhere now.
    const command = `while ip route delete ${node.podCidr} 2>/dev/null; do true; done`
    await $`ssh -F tls/ssh_config ${other} ${command}`
  }

  // 5. Its files here, and at last its lines in cluster.env: until then this can be run again.
  await runScript('generate-certs')
  const kept = await withMachineLocks(cluster, [node], 'removing', removeFiles)
  await writeFileAtomic(cluster.path('cluster.env'), settingsWithout())
  const without = loadCluster({ root: cluster.root })
  if (await lanSwitchStatus(without)) await ensureLanSwitch(without)
  console.log(`${name} is gone (${formatDuration(performance.now() - began)})`)
  if (kept) console.log(`its disk, with its keys on it, is kept: ${kept}`)
})

/** Read again each time: its owner may have changed something meanwhile. */
function settingsWithout(): string {
  return withoutWorker(readFileSync(cluster.path('cluster.env'), 'utf8'), name)
}

// ── Checks ───────────────────────────────────────────────────────────────────────────────────

function checkNode(): void {
  const refuse = (reason: string, hint: string) => {
    throw new StepError(reason, { hint, exitCode: 2 })
  }
  if (node === cluster.controlPlane) {
    refuse(`${name} is the control plane`, 'make clobber removes the whole cluster')
  }
  if (remaining.length === 0 && !flags.force) {
    refuse(`${name} is the last worker`, 'add another one first (make add-worker), or use --force')
  }
  if (process.env.WORKER_NODES !== undefined) {
    const reason = 'WORKER_NODES is set in the environment and wins over cluster.env'
    refuse(reason, 'unset WORKER_NODES')
  }
}

/** @returns the machines that can be given a configuration without the worker */
async function checkCluster(): Promise<string[]> {
  await $({ signal, timeout: '30s' })`kubectl get --raw /readyz`
  const claims = await localClaims()
  const reasons =
    claims.length > 0 ? [`volumes on ${name} have the only copy of ${claims.join(', ')}`] : []
  const others: string[] = []
  for (const other of cluster.nodes.filter((each) => each !== node)) {
    const reason = (await isRunning(cluster, other))
      ? await connect(cluster, other, { signal }).then(() => '', describeError)
      : `${other.name} is not running`
    signal.throwIfAborted()
    if (!reason) others.push(other.name)
    else reasons.push(`${reason}, and cannot be reconfigured`)
  }
  if (reasons.length > 0 && !flags.force) {
    throw new StepError(`${name} cannot be removed, and nothing was done`, {
      output: reasons.join('\n'),
      hint: '--force removes it all the same; make up starts machines',
    })
  }
  for (const reason of reasons) console.error(`! ${reason}`)
  const all = others.length === cluster.nodes.length - 1
  if (!all) console.error('! when they run again: make reconfig')
  return others
}

interface Requirement {
  key: string
  operator: string
  values?: string[]
}

interface PersistentVolume extends ApiObject {
  spec: {
    claimRef?: { namespace: string; name: string }
    nodeAffinity?: {
      required?: {
        nodeSelectorTerms: { matchExpressions?: Requirement[]; matchFields?: Requirement[] }[]
      }
    }
  }
}

/** The claims whose volumes can be used on this node only, as "namespace/name". */
async function localClaims(): Promise<string[]> {
  const label = 'kubernetes.io/hostname'
  const { items: nodes } = await kubectlJson<{ items: ApiObject[] }>('get', 'nodes')
  const found = nodes.find(({ metadata }) => metadata.name === name)
  // Volumes refer to the node by its label, which need not be its name.
  const value = { [label]: found?.metadata.labels?.[label] ?? name, 'metadata.name': name }
  const isHere = ({ key, operator, values = [] }: Requirement) =>
    operator === 'In' && values.length === 1 && values[0] === value[key as keyof typeof value]
  const { items } = await kubectlJson<{ items: PersistentVolume[] }>('get', 'persistentvolumes')
  const claims = items.flatMap(({ spec: { claimRef, nodeAffinity } }) => {
    // Terms are alternatives, each with conditions that all have to hold.
    const terms = nodeAffinity?.required?.nodeSelectorTerms ?? []
    const isOnlyHere = terms.every(({ matchExpressions = [], matchFields = [] }) =>
      [...matchExpressions, ...matchFields].some(isHere),
    )
    if (!claimRef || terms.length === 0 || !isOnlyHere) return []
    return `${claimRef.namespace}/${claimRef.name}`
  })
  return claims.sort()
}

// ── Parts ────────────────────────────────────────────────────────────────────────────────────

async function drain(): Promise<void> {
  const { spec } = await kubectlJson<{ spec: { unschedulable?: boolean } }>('get', 'node', name)
  const force = flags.force ? ['--force', '--disable-eviction'] : []
  const limit = `--timeout=${Math.ceil(flags.timeout ?? 300)}s`
  try {
    await $({
      signal,
    })`kubectl drain ${name} --ignore-daemonsets --delete-emptydir-data ${force} ${limit}`
  } catch (error) {
    if (flags.force && !signal.aborted) {
      console.error(`! ${describeError(error)}\n! its pods end with the machine`)
      return
    }
    // Without the signal: also after Ctrl-C.
    if (spec.unschedulable !== true) await $({ nothrow: true })`kubectl uncordon ${name}`
    throw error
  }
}

/** Removes everything but the disk, which is renamed. @returns its new name, if there is one */
async function removeFiles(): Promise<string | undefined> {
  if (await isRunning(cluster, node)) throw new StepError(`${name} was started meanwhile`)
  const { disk, partialDisk, efiVars, consoleLog, installLog, qemuLog, lock } = files
  const runFiles = (await readdir(cluster.path('run'))).filter(
    (file) => file.startsWith(`${name}.`) || file === `${name}-install`,
  )
  const ours = [
    ...['.pem', '-key.pem'].map((end) => cluster.path('tls', `${name}${end}`)),
    ...['', '.pub'].map((end) => cluster.path('tls', `ssh_host_${name}_ed25519${end}`)),
    ...[cluster.path('configs', `${name}.kubeconfig`), cluster.path('cloud-init', name)],
    ...[partialDisk, efiVars, `${efiVars}.old`],
    ...[consoleLog, `${consoleLog}.1`, installLog, qemuLog],
    ...runFiles.map((file) => cluster.path('run', file)).filter((file) => !file.startsWith(lock)),
  ]
  for (const path of ours) await rm(path, { recursive: true, force: true })
  if (!hasDisk(cluster, node)) return undefined
  if (flags.purge) {
    await rm(disk)
    return undefined
  }
  const kept = `${disk}.removed-${timestamp()}`
  await rename(disk, kept)
  return `images/${basename(kept)}`
}
