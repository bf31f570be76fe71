#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// Another worker for a running cluster, from its lines in cluster.env until it is Ready.
import { existsSync, readFileSync } from 'node:fs'
import { totalmem } from 'node:os'
import { $ } from 'zx/core'
import { type Cluster, loadCluster, type Node } from '../lib/cluster.mts'
import { describeError, StepError } from '../lib/errors.mts'
import { writeFileAtomic } from '../lib/files.mts'
import { formatBytes, formatDuration } from '../lib/format.mts'
import { probeApiServer, waitForReady, waitForServices } from '../lib/health.mts'
import { interruption } from '../lib/interrupt.mts'
import { printAndExit, useCluster } from '../lib/kubectl.mts'
import { withClusterLock } from '../lib/lock.mts'
import { nodeVariable, reservedFor } from '../lib/nodes.mts'
import { isPortFree } from '../lib/processes.mts'
import { runScript, script } from '../lib/script.mts'
import { kinds, overlap, parseAddress, parseCidr, perNodeVariables } from '../lib/settings.mts'
import { connect, setClocks } from '../lib/ssh.mts'
import { inParallel, step } from '../lib/steps.mts'
import { assertRoomForDisks, hasDisk, isRunning } from '../lib/vm.mts'
import { waitFor } from '../lib/wait.mts'

const { flags, args } = script({
  does: `Adds a worker to a running cluster: chooses its addresses and writes them to cluster.env, creates
its certificate and configuration, installs and starts it, gives the other machines its name and a
route to its pods, and waits until it is Ready. Run again after an interruption, it continues.`,
  reads: ['cluster.env', 'configs/', 'tls/', 'images/'],
  writes: ['cluster.env', 'tls/, configs/, cloud-init/, images/, run/', 'machines: /etc/nixos'],
  flags: {
    'dry-run': { help: 'print the lines for cluster.env, and do nothing' },
    timeout: { value: 'SECONDS', number: true, help: 'for the node to be Ready (WAIT_TIMEOUT)' },
  },
  args: 'NAME',
  examples: ['./bin/add-worker.mts delta', 'make add-worker NAME=delta'],
})
const [name = ''] = args
const before = loadCluster()
const settingsFile = before.path('cluster.env')
const addition = `WORKER_NODES="$WORKER_NODES ${name}"`
const continued =
  readFileSync(settingsFile, 'utf8').split('\n').includes(addition) &&
  before.workers.some((node) => node.name === name)
if (!continued) checkName()
if (flags['dry-run']) {
  const lines = continued ? `${name} is in cluster.env already` : await chooseSettings(before)
  await printAndExit(`${lines}\n`)
}

const began = performance.now()
const signal = interruption()
await withClusterLock(before, `adding the worker ${name}`, async () => {
  // 1. What would keep it from joining is found before anything is changed.
  await useCluster(before)
  await checkCluster()
  if (!continued) await refuseIfKnown()
  if (!continued || !hasDisk(before, before.node(name))) await run('download-iso')

  // 2. Its lines in cluster.env.
  const cluster = continued ? before : await step(`${name} in cluster.env`, writeSettings)
  const node = cluster.node(name)
  await join(cluster, node).catch((error) => {
    console.error(
      `\n${name} is in cluster.env: make add-worker NAME=${name} continues, make remove-worker NAME=${name} takes it out`,
    )
    throw error
  })
  const { ip, podCidr, sshPort } = node
  const time = formatDuration(performance.now() - began)
  console.log(`${name} is a worker: ${ip}, pods ${podCidr}, ssh port ${sshPort} (${time})`)
})

async function join(cluster: Cluster, node: Node): Promise<void> {
  const others = cluster.nodes.filter((each) => each !== node).map((each) => each.name)

  // 3. Its identity, the way to the API server, its configuration.
  await run('generate-certs')
  await run('generate-kubeconfigs')
  await run('generate-nocloud-iso', name)

  // 4. NixOS on its disk.
  if (!hasDisk(cluster, node)) await run('provision', '--iso', name)

  // 5. The others get its name and a route to its pods before there are any.
  await run('reconfig', '--node', others.join(','))
  // networkd has read its new configuration, but adds the route a little later.
  const route = `ip route show exact ${node.podCidr} via ${node.ip}`
  const wait60 = `timeout 60 sh -c 'until ${route} | grep -q .; do sleep 1; done'`
  for (const other of others) await $({ signal })`ssh -F tls/ssh_config ${other} ${wait60}`

  // 6. Power on; its kubelet registers it.
  await run('provision', '--wait', name)
  const timeout = flags.timeout ?? cluster.settings.WAIT_TIMEOUT
  const wait = (detail: (text: string) => void) => ({ timeout, detail, signal })
  await step(`${name}: services`, (detail) => waitForServices(cluster, node, wait(detail)))
  await step(`${name}: registered`, (detail) =>
    waitFor({ failure: `${name} has not registered`, ...wait(detail) }, async () => {
      const { nodes, reason } = await probeApiServer(cluster, { signal })
      return nodes?.has(name) ? undefined : reason || 'its kubelet has not registered it yet'
    }),
  )

  // 7. Its pod CIDR, and its role, which a kubelet may not give itself. Then the pod network starts.
  const spec = JSON.stringify({ spec: { podCIDR: node.podCidr, podCIDRs: [node.podCidr] } })
  const $$ = $({ signal, timeout: '60s' })
  await $$`kubectl patch node ${name} --patch ${spec}`
  await $$`kubectl label node ${name} node-role.kubernetes.io/worker= --overwrite`
  const cilium = ['daemonset/cilium', '--namespace=kube-system']
  const { stdout } = await $$`kubectl get ${cilium} --ignore-not-found --output=name`
  if (stdout.trim() === '') console.error('next: make network, as there is no pod network yet')
  else await step(`${name}: Ready`, (detail) => waitForReady(cluster, node, wait(detail)))

  // 8. Local storage, where it is deployed, has a class for each worker.
  const found = await $$`kubectl get storageclass local-path --ignore-not-found --output=name`
  const apply = ['--server-side', `--selector=local-path/worker=${name}`, '--filename=-']
  const manager = '--field-manager=deploy-local-storage'
  if (found.stdout) {
    await $$`./bin/deploy-local-storage.mts --print | kubectl apply ${apply} ${manager}`
  }
}

function checkName(): void {
  const existing = before.nodes.find((node) => node.name === name)
  const of = reservedFor(name)
  const own = ['WORKER_NODES', ...perNodeVariables.map((prefix) => nodeVariable(prefix, name))]
  const set = own.find((variable) => process.env[variable] !== undefined)
  const unfit = `a node cannot be named "${name}"`
  const another = 'use another name'
  for (const [isWrong, reason, hint] of [
    [!kinds.label.parse(name), unfit, `a name is ${kinds.label.expects}`],
    [existing, `there is already a node "${name}": a ${existing?.role}`, another],
    [of, `${unfit}, the name of ${of}`, another],
    [set, `${set} is set in the environment and wins over cluster.env`, `unset ${set}`],
  ] as const) {
    if (isWrong) throw new StepError(reason, { hint, exitCode: 2 })
  }
}

/** The API server and all machines must answer: all of them are changed. */
async function checkCluster(): Promise<void> {
  await $({ signal, timeout: '30s' })`kubectl get --raw /readyz`
  const others = before.nodes.map((node) => node.name).filter((each) => each !== name)
  await inParallel(others, async (other) => {
    const node = before.node(other)
    if (!(await isRunning(before, node))) throw new StepError(`${other} is not running`)
    await connect(before, node, { signal })
  }).catch((error) => {
    signal.throwIfAborted()
    throw new StepError('all machines must be reachable to add a worker; nothing was changed', {
      output: describeError(error),
      hint: 'make up starts machines; make status shows their state',
    })
  })
  await setClocks(before, signal)
}

/** A worker of that name that is not in cluster.env is not ours to overwrite. */
async function refuseIfKnown(): Promise<void> {
  const { stdout } = await $`kubectl get node ${name} --ignore-not-found --output=name`
  if (stdout.trim()) {
    throw new StepError(`the API server knows a node "${name}" that cluster.env does not`, {
      hint: `use another name, or:\nkubectl delete node ${name}`,
    })
  }
  if (existsSync(before.path('images', `${name}.qcow2`))) {
    const hint = 'move it away, or use another name'
    throw new StepError(`there is a disk of another "${name}": images/${name}.qcow2`, { hint })
  }
}

function run(step: string, ...stepArgs: string[]): Promise<void> {
  const hint = `make add-worker NAME=${name}`
  return runScript(step, stepArgs, { failure: `so ${name} is not a worker yet`, hint })
}

/** @returns the cluster with the worker */
async function writeSettings(): Promise<Cluster> {
  // Read again: its owner may have changed something while the ISO was downloaded.
  const text = readFileSync(settingsFile, 'utf8')
  const longer = `${text}\n${await chooseSettings(before)}\n`
  // Checked as a whole before it is written.
  const cluster = loadCluster({ root: before.root, text: longer })
  const warning = await assertRoomForDisks(cluster, [cluster.node(name)])
  if (warning) console.error(`! ${warning}`)
  const needed = cluster.nodes.reduce((sum, { memory }) => sum + memory, 0) * 2 ** 20
  const [machines, computer] = [needed, totalmem()].map(formatBytes)
  if (needed > totalmem()) {
    console.error(`! the machines have ${machines} of memory, this computer ${computer}`)
  }
  await writeFileAtomic(settingsFile, longer)
  return cluster
}

/**
 * The worker's block: it appends to WORKER_NODES, so that taking it out restores the file. Each value
 * follows the highest that a node has: ssh port and LAN address (both with a free port on this
 * computer), MAC, and a range for pods of the size of the last worker's.
 */
async function chooseSettings({ nodes, workers, settings }: Cluster): Promise<string> {
  const [lan, all] = [parseCidr(settings.LAN_CIDR), parseCidr(settings.K8S_POD_CIDR)]
  if (!lan || !all) throw new Error('loadCluster has checked the ranges')

  const highest = Math.max(...nodes.map((node) => node.sshPort))
  const sshPort = await search(highest + 1, highest + 1, 65535, async (port) => {
    return port !== settings.API_PORT && (await isPortFree('tcp', port))
  })
  if (!sshPort) throw new StepError(`no port above ${highest} is free for ssh`)

  const taken = nodes.map((node) => parseAddress(node.ip) ?? 0)
  // The first and the last address are the network's and the broadcast address.
  const ip = await search(Math.max(...taken) + 1, lan.first + 1, lan.last - 1, async (address) => {
    const port = settings.LAN_SWITCH_PORT + (address - lan.first)
    return !taken.includes(address) && port <= 65535 && (await isPortFree('udp', port))
  })
  if (ip === undefined) {
    throw new StepError(`LAN_CIDR (${lan.text}) has no address left with a free UDP port`, {
      hint: 'each machine uses LAN_SWITCH_PORT plus the last number of its address',
    })
  }

  // Three bytes of vendor, three of number. The MAC in the LAN differs in the byte before them.
  const macs = nodes.flatMap(({ mac, lanMac }) => [mac, lanMac])
  const highestMac = nodes.reduce((most, { mac }) => (mac > most ? mac : most), '')
  const macOf = (number: number) =>
    highestMac.slice(0, 8) + number.toString(16).padStart(6, '0').replace(/../g, ':$&')
  const number = Number.parseInt(highestMac.slice(9).replaceAll(':', ''), 16)
  const mac = await search(number + 1, 0, 2 ** 24 - 1, (each) => !macs.includes(macOf(each)))

  const bits = (cidr: string) => Number(cidr.split('/')[1])
  const length = bits(workers.at(-1)?.podCidr ?? `/${Math.max(24, bits(all.text))}`)
  const size = 2 ** (32 - length)
  const podsFrom = (first: number) => {
    return { text: `${formatAddress(first)}/${length}`, first, last: first + size - 1 }
  }
  const ranges = workers.flatMap(({ podCidr }) => parseCidr(podCidr) ?? [])
  // Next to ranges of other sizes a range still starts at a multiple of its size.
  const start = Math.max(all.first, ...ranges.map(({ last }) => last - (last % size) + size))
  const fits = (first: number) => !ranges.some((range) => overlap(range, podsFrom(first)))
  const pods = await search(start, all.first, all.last - size + 1, fits, size)
  if (pods === undefined) {
    throw new StepError(`K8S_POD_CIDR (${all.text}) has no room for another /${length}`, {
      hint: 'each worker has a range of its own in it: POD_CIDR_… in cluster.env',
    })
  }

  const header = `# ── Worker ${name}, by ./bin/add-worker.mts; ./bin/remove-worker.mts takes it out `
  const values = [sshPort, formatAddress(ip), macOf(mac ?? 0), podsFrom(pods).text]
  const lines = perNodeVariables.map((each, i) => `${nodeVariable(each, name)}=${values[i]}`)
  return [header.padEnd(96, '─'), addition, ...lines].join('\n')
}

/** The first number that fits: from `start` to the last, then from the first on. */
async function search(
  start: number,
  first: number,
  last: number,
  fits: (candidate: number) => unknown,
  step = 1,
) {
  for (let each = start; each <= last; each += step) if (await fits(each)) return each
  for (let each = first; each < start; each += step) if (await fits(each)) return each
  return undefined
}

function formatAddress(address: number): string {
  return [24, 16, 8, 0].map((shift) => Math.floor(address / 2 ** shift) % 256).join('.')
}
