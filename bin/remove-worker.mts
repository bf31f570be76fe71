#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// One worker less: its pods move to other nodes, then nothing of it is left but its disk.
import { readFileSync } from 'node:fs'
import { $ } from 'zx/core'
import { loadCluster } from '../lib/cluster.mts'
import { parseEnvFile } from '../lib/env-file.mts'
import { describeError, StepError } from '../lib/errors.mts'
import { writeFileAtomic } from '../lib/files.mts'
import { formatDuration, timestamp } from '../lib/format.mts'
import { interruption } from '../lib/interrupt.mts'
import { kubectlJson, printAndExit, useCluster } from '../lib/kubectl.mts'
import { ensureLanSwitch, lanSwitchStatus } from '../lib/lan.mts'
import { withClusterLock, withMachineLocks } from '../lib/lock.mts'
import { nodeVariable } from '../lib/nodes.mts'
import { runScript, script } from '../lib/script.mts'
import { perNodeVariables } from '../lib/settings.mts'
import { connect } from '../lib/ssh.mts'
import { step } from '../lib/steps.mts'
import { hasDisk, isRunning } from '../lib/vm.mts'

const { flags, args } = script({
  does: `Removes a worker: drains it, as far as disruption budgets allow, stops its machine, deletes its
node, and takes it out of the other machines' configuration and of cluster.env. Its disk is kept
in images/. Run again after an interruption, it continues.`,
  reads: ['cluster.env', 'tls/', 'run/'],
  writes: ['cluster.env', 'tls/, configs/, cloud-init/, images/, run/', 'machines: /etc/nixos'],
  flags: {
    'dry-run': { help: 'print cluster.env without the worker, and do nothing' },
    force: {
      help: 'ignore disruption budgets, pods without controller, local volumes and machines that do not answer; remove even the last worker',
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
const remaining = cluster.workers.filter((worker) => worker !== node).map((worker) => worker.name)
checkNode()
if (flags['dry-run']) await printAndExit(settingsWithout())

await withClusterLock(cluster, `removing the worker ${name}`, async () => {
  // 1. Whatever prevents the removal is found before anything is changed.
  loadCluster({ root: cluster.root, text: settingsWithout() })
  await useCluster(cluster)
  const others = await step('check the cluster', checkCluster)

  // 2. Its pods leave, then it stops. A machine that is off runs none.
  if (await isRunning(cluster, node)) {
    const { stdout } = await $`kubectl get node ${name} --ignore-not-found --output=name`
    if (stdout.trim()) await step(`drain ${name}`, drain)
    await runScript('shutdown', [name])
  }

  // 3. The node and its remaining pods, those of DaemonSets, are deleted: no kubelet is left to report
  //    that they ended. Not earlier: a kubelet that starts registers its node again.
  const $$ = $({ timeout: '60s' })
  await $$`kubectl delete node ${name} --ignore-not-found`
  const pods = ['--all-namespaces', `--field-selector=spec.nodeName=${name}`]
  await $$`kubectl delete pods ${pods} --force --grace-period=0 --ignore-not-found --wait=false`
  await $$`kubectl delete storageclass local-path-${name} --ignore-not-found`

  // 4. The other machines drop its name and the route to its pods; from here on without it.
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

function checkNode(): void {
  const refuse = (reason: string, hint: string) => {
    throw new StepError(reason, { hint, exitCode: 2 })
  }
  if (node === cluster.controlPlane) {
    refuse(`${name} is the control plane`, 'make clobber removes the whole cluster')
  }
  if (remaining.length === 0 && !flags.force) {
    refuse(`${name} is the last worker`, 'first make add-worker NAME=…, or use --force')
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
  if (others.length < cluster.nodes.length - 1)
    console.error('! when they run again: make reconfig')
  return others
}

type Requirement = { key: string; operator: string; values?: string[] }
type Term = { matchExpressions?: Requirement[]; matchFields?: Requirement[] }
interface PersistentVolume {
  spec: {
    claimRef?: { namespace: string; name: string }
    nodeAffinity?: { required?: { nodeSelectorTerms: Term[] } }
  }
}

/** The claims whose volumes can be used on this node only, as "namespace/name". */
async function localClaims(): Promise<string[]> {
  // Volumes refer to the node by its label, which need not be its name.
  const { stdout: label } =
    await $`kubectl get node ${name} --ignore-not-found --output='jsonpath={.metadata.labels.kubernetes\\.io/hostname}'`
  const value = new Map([
    ['kubernetes.io/hostname', label || name],
    ['metadata.name', name],
  ])
  const isHere = ({ key, operator, values = [] }: Requirement) =>
    operator === 'In' && values.length === 1 && values[0] === value.get(key)
  const { items } = await kubectlJson<{ items: PersistentVolume[] }>('get', 'persistentvolumes')
  const claims = items.flatMap(({ spec: { claimRef, nodeAffinity } }) => {
    // Terms are alternatives, each with conditions that all have to hold.
    const terms = nodeAffinity?.required?.nodeSelectorTerms ?? []
    const isOnlyHere = terms.every(({ matchExpressions = [], matchFields = [] }) =>
      [...matchExpressions, ...matchFields].some(isHere),
    )
    const isLocal = claimRef && terms.length > 0 && isOnlyHere
    return isLocal ? `${claimRef.namespace}/${claimRef.name}` : []
  })
  return claims.sort()
}

async function drain(): Promise<void> {
  const { stdout: wasCordoned } =
    await $`kubectl get node ${name} --output=jsonpath={.spec.unschedulable}`
  const force = flags.force ? ['--force', '--disable-eviction'] : []
  const limits = [...force, `--timeout=${Math.ceil(flags.timeout ?? 300)}s`]
  try {
    const $$ = $({ signal })
    await $$`kubectl drain ${name} --ignore-daemonsets --delete-emptydir-data ${limits}`
  } catch (error) {
    if (flags.force && !signal.aborted) {
      console.error(`! ${describeError(error)}\n! its pods end with the machine`)
      return
    }
    // Without the signal: also after Ctrl-C.
    if (!wasCordoned) await $({ nothrow: true })`kubectl uncordon ${name}`
    throw error
  }
}

/** Removes everything but the disk, which is renamed. @returns its new name, if there is one */
async function removeFiles(): Promise<string | undefined> {
  if (await isRunning(cluster, node)) throw new StepError(`${name} was started meanwhile`)
  await $`rm -rf cloud-init/${name} configs/${name}.kubeconfig logs/${name}-qemu.log`
  await $`rm -f tls/${name}{,-key}.pem tls/ssh_host_${name}_ed25519{,.pub}`
  await $`rm -f images/${name}{.qcow2.partial,.efivars.qcow2{,.old},-console.log{,.1},-install.log}`
  // All but its lock, which is ours.
  const ours = ['(', '-name', `${name}.*`, '-o', '-name', `${name}-install`, ')']
  await $`find run -maxdepth 1 ${ours} ! -name '${name}.lock*' -exec rm -rf {} +`
  if (!hasDisk(cluster, node)) return undefined
  const kept = `images/${name}.qcow2.removed-${timestamp()}`
  if (flags.purge) await $`rm images/${name}.qcow2`
  else await $`mv images/${name}.qcow2 ${kept}`
  return flags.purge ? undefined : kept
}

/**
 * cluster.env without the worker's block, or its lines and its name in WORKER_NODES; everything else
 * as its owner wrote it, to the byte. Read again each time, as it may have changed.
 */
function settingsWithout(): string {
  const text = readFileSync(cluster.path('cluster.env'), 'utf8')
  const own = perNodeVariables.map((prefix) => nodeVariable(prefix, name)).join('|')
  const itsLine = new RegExp(
    `^(# ── Worker ${name},|WORKER_NODES="\\$WORKER_NODES ${name}"$|\\s*(export\\s+)?(${own})=)`,
  )
  const list = /^(\s*(?:export\s+)?WORKER_NODES=)(["']?)([^"'#]*?)(\2(?:\s.*)?)$/
  const namesIn = (value: string) => value.split(/\s+/).filter(Boolean)
  const shortened = (line: string, start: string, quote: string, value: string, rest: string) => {
    if (!namesIn(value).includes(name)) return line
    const others = namesIn(value).filter((each) => each !== name)
    return start + quote + others.join(' ') + rest
  }
  const kept: string[] = []
  // One of the blank lines around its lines goes with them.
  let dropBlank = false
  for (const line of text.split('\n')) {
    if (itsLine.test(line)) {
      dropBlank ||= kept.at(-1) === '' || line.startsWith('#')
    } else {
      if (!dropBlank || line !== '') kept.push(line.replace(list, shortened))
      dropBlank = false
    }
  }
  const { assignments } = parseEnvFile(kept.join('\n'))
  const isLeft = assignments.some((each) => {
    return each.name === 'WORKER_NODES' && namesIn(each.value).includes(name)
  })
  if (!isLeft) return kept.join('\n')
  throw new StepError(`${name} cannot be taken out of WORKER_NODES`, {
    output: text.match(/^.*\bWORKER_NODES=.*$/gm)?.join('\n') ?? '',
    hint: 'write it as one list in quotes: WORKER_NODES="sigma gamma"',
  })
}
