#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// Another release of NixOS, and its Kubernetes: one machine after another, so that pods have room.
import { $ } from 'zx/core'
import { loadCluster, type Node } from '../lib/cluster.mts'
import { describeError, StepError } from '../lib/errors.mts'
import { probeApiServer } from '../lib/health.mts'
import { interruption, takingTime } from '../lib/interrupt.mts'
import { kubectlJson, useCluster } from '../lib/kubectl.mts'
import { locksForChildren, withClusterLock } from '../lib/lock.mts'
import { runScript, script } from '../lib/script.mts'
import { connect, remote, setClocks } from '../lib/ssh.mts'
import { step } from '../lib/steps.mts'
import { isRunning } from '../lib/vm.mts'

const { flags, args } = script({
  does: `Upgrades a node, or all, to NIXOS_VERSION of cluster.env and the Kubernetes in it: the control
plane first, then one worker after another. Each builds the new system while the current one runs;
if Kubernetes' version skew policy allows it, the node is drained, restarts with the new system, and
is uncordoned when it is Ready. A node that has the system already is left alone. Stops at the first
node that is not healthy, which stays cordoned. Take a snapshot before: make snapshot.`,
  reads: ['cluster.env', 'configs/', 'tls/'],
  writes: ['configs/*.kubeconfig', 'cloud-init/NODE/nixos/', 'on the machines: their system'],
  flags: {
    force: { help: 'delete pods whatever disruption budgets say, also those without a controller' },
    timeout: { value: 'SECONDS', number: true, help: 'for pods, then services (WAIT_TIMEOUT)' },
  },
  args: 'NODE|all',
  examples: ['./bin/rolling-upgrade.mts sigma', 'NIXOS_VERSION=26.11 make upgrade NAME=all'],
})

const cluster = loadCluster()
const nodes = args[0] === 'all' ? cluster.nodes : [cluster.node(args[0] ?? '')]
const signal = interruption()
const timeout = flags.timeout ?? cluster.settings.WAIT_TIMEOUT
/** reconfig's folder on the machine; `former-channel` in it marks an upgrade that has not finished. */
const home = '/var/lib/reconfig'

await withClusterLock(cluster, 'upgrading machines', async () => {
  // All must run, and the API server answer, before the first one is changed.
  await useCluster(cluster)
  await runningVersions()
  for (const { name } of nodes) {
    if (await isRunning(cluster, cluster.node(name))) continue
    const hint = `make boot-${name}`
    throw new StepError(`${name} is not running, so no machine was upgraded`, { hint })
  }
  await setClocks(cluster, signal)
  for (const [index, node] of nodes.entries()) {
    const outcome = await upgrade(node).catch((error) => {
      const rest = nodes.slice(index + 1).map(({ name }) => name)
      if (rest.length > 0) console.error(`! not touched: ${rest.join(', ')}`)
      throw error
    })
    console.log(`${node.name}: ${outcome}`)
  }
})

/** @returns the outcome in words */
async function upgrade(node: Node): Promise<string> {
  const { name, role } = node
  await connect(cluster, node, { signal })
  const left = (await remote(node, `mkdir -p ${home}; ls ${home}`, { signal })).split('\n')
  const continued = left.includes('former-channel')
  if (left.includes('unfinished') && !continued) {
    const hint = `./bin/reconfig.mts --node ${name} finishes it`
    throw new StepError(`the last change of ${name} has not finished`, { hint })
  }

  // 1. The staged configuration on the machine, and the system of it built while the current runs.
  const failure = `so ${name} was not upgraded`
  await runScript('reconfig', ['--build', '--node', name], { failure })
  let cordoned = left.includes('cordoned') // by this script
  const { now, built } = await readSystems(node).catch((error) => undo(name, cordoned, error))
  const release = `NixOS ${built.nixos}, Kubernetes ${built.kubernetes}`
  const finished = `cd ${home}; rm -f unfinished former-channel cordoned result`

  try {
    if (now.path !== built.path) {
      // 2. Whether it may run in this cluster.
      assertSkew(node, now.kubernetes, built.kubernetes, await runningVersions())

      // 3. The pods leave, as far as disruption budgets allow.
      if (role === 'worker') {
        const { spec } = await kubectlJson<{ spec: { unschedulable?: true } }>('get', 'node', name)
        if (!spec.unschedulable) await remote(node, `touch ${home}/cordoned`)
        cordoned ||= !spec.unschedulable
        const force = flags.force ? ['--force', '--disable-eviction'] : []
        const options = ['--ignore-daemonsets', '--delete-emptydir-data', ...force]
        const limit = `--timeout=${Math.ceil(timeout)}s`
        await step(`${name}: drain`, () => $({ signal })`kubectl drain ${name} ${options} ${limit}`)
      }
    } else if (!continued) {
      await remote(node, finished)
      return `has ${release} already`
    }
  } catch (error) {
    return await undo(name, cordoned, error)
  }

  // 4. The restart with the new system, until the node is healthy.
  const options = ['--restart', '--node', name, '--timeout', `${timeout}`]
  await runScript('reconfig', options).catch((cause) => {
    const ssh = `ssh -F tls/ssh_config ${name}`
    const state = role === 'worker' ? ' and stays cordoned' : ''
    const where = role === 'worker' ? '' : ' (to another minor version only by make restore)'
    const uncordon = cordoned ? `\nkubectl uncordon ${name} && ${ssh} rm ${home}/cordoned` : ''
    throw new StepError(`${name} has not come back from its upgrade${state}`, {
      exitCode: cause.explanation?.exitCode,
      hint: `make upgrade NAME=${name} tries again; to go back${where}:
${ssh} 'set -e; former=$(tail -n 1 ${home}/former-channel)
nix-env --profile /nix/var/nix/profiles/system --set $former
$former/bin/switch-to-configuration boot; reboot'
when it is up again: ./bin/reconfig.mts --take-back --node ${name}${uncordon}`,
      cause,
    })
  })

  // 5. Pods may come back, unless the node was cordoned before. Also after Ctrl-C, as only this is left.
  if (cordoned) await $`kubectl uncordon ${name}`
  await remote(node, finished)
  return `NixOS ${now.nixos}, Kubernetes ${now.kubernetes} → ${release}`
}

/** The system that runs, and the one that was built: path, versions "26.05.1234.abcdef0", "v1.36.3". */
async function readSystems(node: Node) {
  const unit = node.role === 'worker' ? 'kubelet' : 'kube-apiserver'
  const look = `for system in /run/current-system ${home}/result; do
      unit=$system/etc/systemd/system/${unit}.service
      program=$(sed -n 's/^ExecStart=\\([^ ]*\\).*/\\1/p' $unit | head -n 1)
      echo $(readlink -f $system) $(cat $system/nixos-version) $($program --version)
    done`
  const lines = (await remote(node, look)).trim().split('\n')
  const [now, built] = lines.map((line) => {
    // The last is "Kubernetes v1.36.3".
    const [path = '', nixos = '', , kubernetes = ''] = line.split(' ')
    return { path, nixos, kubernetes }
  })
  if (now && built) return { now, built }
  throw new StepError(`${node.name} does not say which system it runs`)
}

/** Puts release, configuration and scheduling back. @throws the error, or also why that failed */
async function undo(name: string, cordoned: boolean, error: unknown): Promise<never> {
  // Not by runScript, which runs nothing after Ctrl-C.
  const $$ = $({ env: { ...$.env, ...locksForChildren() }, stdio: 'inherit' })
  await takingTime(async () => {
    await $$`./bin/reconfig.mts --take-back --node ${name}`
    if (cordoned)
      await $`kubectl uncordon ${name} && ssh -F tls/ssh_config ${name} rm -f ${home}/cordoned`
  }).catch((second) => {
    throw new StepError(`${name} was not upgraded, and could not be put back as it was`, {
      output: [error, second].map((reason) => describeError(reason)).join('\n'),
      hint: `nothing was switched to: make upgrade NAME=${name} continues from there`,
      cause: error,
    })
  })
  throw error
}

type Versions = Awaited<ReturnType<typeof runningVersions>>

async function runningVersions() {
  const { nodes: found, reason } = await probeApiServer(cluster, { signal })
  if (!found) throw new StepError(`the API server does not answer: ${reason}`, { hint: 'make up' })
  const { gitVersion } = JSON.parse((await $`kubectl get --raw /version`).stdout)
  const kubelets = [...found].map(([name, { kubelet }]) => ({ name, version: kubelet }))
  return { apiServer: gitVersion as string, kubelets }
}

/**
 * No minor version is skipped or gone back to, no kubelet is newer than the API server, and none more
 * than three minor versions older. https://kubernetes.io/releases/version-skew-policy/
 */
function assertSkew({ name, role }: Node, from: string, to: string, versions: Versions): void {
  const refuseIf = (condition: boolean, reason: string, hint: string) => {
    if (condition) throw new StepError(`${name}: ${reason}`, { hint })
  }
  const skipped = minor(to) - minor(from) - 1
  refuseIf(
    skipped < -1,
    `Kubernetes would go back from ${from} to ${to}, which its data do not allow`,
    'NIXOS_VERSION is older than what runs; make restore goes back to a snapshot',
  )
  refuseIf(
    role === 'worker' && minor(to) > minor(versions.apiServer),
    `its kubelet would be ${to}, newer than the API server (${versions.apiServer})`,
    'the control plane comes first: make upgrade NAME=all',
  )
  if (role === 'worker') return
  refuseIf(
    skipped > 0,
    `from ${from} to ${to} skips ${skipped} minor version${skipped > 1 ? 's' : ''}`,
    'set NIXOS_VERSION to a release in between; without one: make clobber && make all',
  )
  const old = versions.kubelets.filter(({ version }) => minor(version) < minor(to) - 3)
  refuseIf(
    old.length > 0,
    `with ${to} the API server is too new for ${old.map((one) => `${one.name} ${one.version}`).join(', ')}`,
    'a kubelet may be 3 minor versions older: upgrade these first',
  )
}

/** 36 of "v1.36.3". */
function minor(version: string): number {
  const found = version.match(/^v1\.(\d+)\./)?.[1]
  if (found) return Number(found)
  throw new StepError(`"${version}" is not a version of Kubernetes`)
}
