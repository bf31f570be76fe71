#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// Another release of NixOS, and the Kubernetes in it, on running machines: one after another, so that
// the pods of each have room on the others.
import { $ } from 'zx/core'
import { loadCluster, type Node } from '../lib/cluster.mts'
import { describeError, StepError } from '../lib/errors.mts'
import { probeApiServer, waitForReady, waitForServices } from '../lib/health.mts'
import { interruption, takingTime } from '../lib/interrupt.mts'
import { kubectlJson, useCluster } from '../lib/kubectl.mts'
import { locksForChildren, withClusterLock } from '../lib/lock.mts'
import { runScript, script } from '../lib/script.mts'
import { connect, noAnswer, remote, setClocks, waitForSsh } from '../lib/ssh.mts'
import { step } from '../lib/steps.mts'
import { runUnit } from '../lib/unit.mts'
import { isRunning } from '../lib/vm.mts'
import { waitFor } from '../lib/wait.mts'

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
    timeout: {
      value: 'SECONDS',
      number: true,
      help: 'for pods to leave, and for services (WAIT_TIMEOUT)',
    },
  },
  args: 'NODE|all',
  examples: [
    'NIXOS_VERSION=26.11 ./bin/rolling-upgrade.mts all',
    './bin/rolling-upgrade.mts sigma',
  ],
})

const cluster = loadCluster()
const nodes = args[0] === 'all' ? cluster.nodes : [cluster.node(args[0] ?? '')]
const signal = interruption()
const { NIXOS_VERSION, INSTALL_TIMEOUT, WAIT_TIMEOUT } = cluster.settings
const timeout = flags.timeout ?? WAIT_TIMEOUT
/** reconfig's folder on the machine; `former-channel` in it marks an upgrade that has not finished. */
const home = '/var/lib/reconfig'

await withClusterLock(cluster, 'upgrading machines', async () => {
  // All must run, and the API server answer, before the first one is changed.
  await useCluster(cluster)
  await runningVersions()
  for (const node of nodes) {
    if (await isRunning(cluster, node)) continue
    throw new StepError(`${node.name} is not running, so no machine was upgraded`, {
      hint: `make boot-${node.name}`,
    })
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
    throw new StepError(`the last change of ${name} has not finished`, {
      hint: `./bin/reconfig.mts --node ${name} finishes it`,
    })
  }

  // 1. The staged configuration on the machine, and the system of it built while the current runs.
  await runScript('reconfig', ['--push-only', '--node', name])
  let found: { now: System; built: System } | undefined
  let cordoned = false
  try {
    await step(`${name}: build NixOS ${NIXOS_VERSION}`, (detail) => build(node, detail))
    found = await readSystems(node)
    if (found.now.path !== found.built.path) {
      // 2. Whether it may run in this cluster.
      assertSkew(node, found.now.kubernetes, found.built.kubernetes, await runningVersions())

      // 3. The pods leave, as far as disruption budgets allow.
      if (role === 'worker') {
        const { spec } = await kubectlJson<{ spec: { unschedulable?: true } }>('get', 'node', name)
        cordoned = !spec.unschedulable
        const force = flags.force ? ['--force', '--disable-eviction'] : []
        const options = ['--ignore-daemonsets', '--delete-emptydir-data', ...force]
        const limit = `--timeout=${Math.ceil(timeout)}s`
        await step(`${name}: drain`, () => $({ signal })`kubectl drain ${name} ${options} ${limit}`)
      }
    }
  } catch (error) {
    // Interrupted, it may still be building: the next upgrade continues from there.
    if (signal.aborted && !found) throw error
    throw await takingTime(() => undo(node, cordoned, error))
  }

  // 4. The restart with the new system. Not a switch: a running D-Bus or init cannot be replaced.
  const { now, built } = found
  const release = `NixOS ${built.nixos}, Kubernetes ${built.kubernetes}`
  const restarting = now.path !== built.path
  const wait = { timeout, signal }
  try {
    if (restarting) {
      const boot = 'nixos-rebuild boot'
      await step(`${name}: ${boot}`, (detail) => runOnMachine(node, boot, boot, detail))
      await step(`${name}: restart`, (detail) => restart(node, built, detail))
    }
    if (restarting || continued) {
      await step(`${name}: services`, (detail) =>
        waitForServices(cluster, node, { ...wait, detail }),
      )
      if (role === 'worker') {
        await step(`${name}: Ready`, (detail) => waitForReady(cluster, node, { ...wait, detail }))
      }
    }
    await remote(node, `cd ${home}; rm -f unfinished former-channel result`)
  } catch (error) {
    const state = role === 'worker' ? ' and stays cordoned' : ''
    throw new StepError(`${name} has not come back from its upgrade${state}`, {
      ...(error instanceof StepError ? { exitCode: error.explanation.exitCode ?? 1 } : {}),
      output: describeError(error),
      hint: `make upgrade NAME=${name} tries again; to go back:
ssh -F tls/ssh_config ${name} 'nixos-rebuild boot --rollback && reboot'`,
      cause: error,
    })
  }
  if (!restarting && !continued) return `has ${release} already`

  // 5. Pods may come back. Without the signal: after Ctrl-C, this is all that is left to do.
  if (role === 'worker') await $`kubectl uncordon ${name}`
  return `NixOS ${now.nixos}, Kubernetes ${now.kubernetes} → ${release}`
}

// ── On the machine ───────────────────────────────────────────────────────────────────────────

/** Takes NixOS from the channel of the release, and builds it. The former channel is kept. */
async function build(node: Node, detail: (text: string) => void): Promise<void> {
  const channel = `https://channels.nixos.org/nixos-${NIXOS_VERSION}`
  const command = `
    cd ${home}
    if [ ! -e former-channel ]; then
      url=$(nix-channel --list | sed -n 's/^nixos //p')
      echo "\${url:-${channel}}" >former-channel.new
      readlink /nix/var/nix/profiles/per-user/root/channels >>former-channel.new
      mv former-channel.new former-channel
    fi
    nix-channel --add ${channel} nixos
    nix-channel --update nixos
    rm -f result
    nixos-rebuild build`
  const hint = `nothing was changed; ${channel} must exist, and ${node.name} must reach it`
  await runOnMachine(node, `the build of NixOS ${NIXOS_VERSION}`, command, detail, hint)
}

async function runOnMachine(
  node: Node,
  what: string,
  command: string,
  detail: (text: string) => void,
  hint?: string,
): Promise<void> {
  const locked = `exec 9>${home}/lock; flock --nonblock 9; ${command}`
  const limits = { timeout: INSTALL_TIMEOUT, detail, signal }
  const { status, lines } = await runUnit(cluster, node, 'reconfig', locked, limits)
  if (status === 0) return
  throw new StepError(`${what} failed on ${node.name} (exit status ${status})`, {
    output: lines.slice(-15).join('\n'),
    ...(hint ? { hint } : {}),
  })
}

/** Its path in the Nix store, and versions: "26.05.1234.abcdef0", "v1.36.3". */
type System = Record<'path' | 'nixos' | 'kubernetes', string>

/** The system that runs, and the one that was built. */
async function readSystems(node: Node): Promise<{ now: System; built: System }> {
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

async function restart(node: Node, built: System, detail: (text: string) => void): Promise<void> {
  const { name } = node
  const bootId = 'cat /proc/sys/kernel/random/boot_id'
  const before = await remote(node, bootId)
  const unlessSilent = (error: unknown) => {
    if (!noAnswer(error)) throw error
    return before
  }
  await remote(node, 'systemctl reboot --no-block').catch(unlessSilent)
  const { BOOT_TIMEOUT, STOP_TIMEOUT } = cluster.settings
  const limits = { timeout: BOOT_TIMEOUT + STOP_TIMEOUT, detail, signal }
  await waitFor({ failure: `${name} has not restarted`, ...limits }, async () => {
    await waitForSsh(cluster, node, { detail, signal })
    const now = await remote(node, bootId).catch(unlessSilent)
    return now === before ? 'it is shutting down' : undefined
  })
  const running = (await remote(node, 'readlink -f /run/current-system')).trim()
  if (running === built.path) return
  throw new StepError(`${name} has started another system than the new one`, { output: running })
}

/** Puts channel, configuration and scheduling back. @returns the error to throw */
async function undo(node: Node, cordoned: boolean, error: unknown): Promise<unknown> {
  const { name } = node
  const channel = `
    cd ${home}
    [ -e former-channel ] || exit 0
    { read -r url && read -r generation; } <former-channel
    nix-channel --add "$url" nixos
    # channels-3-link
    generation=\${generation#channels-}
    nix-channel --rollback "\${generation%-link}"
    rm -f former-channel result`
  try {
    await step(`${name}: undo`, () => remote(node, channel, { timeout: 300 }))
    // Not by runScript, which runs nothing after Ctrl-C.
    const env = { ...$.env, ...locksForChildren() }
    await $({ env, stdio: 'inherit' })`./bin/reconfig.mts --take-back --node ${name}`
    if (cordoned) await $`kubectl uncordon ${name}`
    return error
  } catch (second) {
    return new StepError(`${name} was not upgraded, and could not be put back as it was`, {
      output: [error, second].map((reason) => describeError(reason)).join('\n'),
      hint: `nothing was switched to: make upgrade NAME=${name} continues from there`,
      cause: error,
    })
  }
}

// ── Kubernetes' version skew policy ──────────────────────────────────────────────────────────

type Versions = { apiServer: string; kubelets: Map<string, string> }

async function runningVersions(): Promise<Versions> {
  const { nodes: found, reason } = await probeApiServer(cluster, { signal })
  if (!found) throw new StepError(`the API server does not answer: ${reason}`, { hint: 'make up' })
  const { gitVersion } = JSON.parse((await $`kubectl get --raw /version`).stdout)
  const kubelets = [...found].map(([name, { kubelet }]) => [name, kubelet] as const)
  return { apiServer: gitVersion, kubelets: new Map(kubelets) }
}

/**
 * No minor version is skipped or gone back to, no kubelet is newer than the API server, and none more
 * than three minor versions older. https://kubernetes.io/releases/version-skew-policy/
 */
function assertSkew(
  { name, role }: Node,
  from: string,
  to: string,
  { apiServer, kubelets }: Versions,
): void {
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
    role === 'worker' && minor(to) > minor(apiServer),
    `its kubelet would be ${to}, newer than the API server (${apiServer})`,
    'the control plane comes first: make upgrade NAME=all',
  )
  if (role === 'worker') return
  refuseIf(
    skipped > 0,
    `from ${from} to ${to} skips ${skipped} minor version${skipped > 1 ? 's' : ''}`,
    'set NIXOS_VERSION to one release after the other',
  )
  const old = [...kubelets].filter(([, version]) => minor(version) < minor(to) - 3)
  refuseIf(
    old.length > 0,
    `with ${to} the API server is too new for ${old.map((pair) => pair.join(' ')).join(', ')}`,
    'a kubelet may be 3 minor versions older: upgrade these first',
  )
}

/** 36 of "v1.36.3". */
function minor(version: string): number {
  const found = version.match(/^v1\.(\d+)\./)?.[1]
  if (found) return Number(found)
  throw new StepError(`"${version}" is not a version of Kubernetes`)
}
