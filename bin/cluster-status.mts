#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// The whole cluster: machines, services, nodes, pods, certificates, LAN switch, and what is wrong.
import { X509Certificate } from 'node:crypto'
import { stat } from 'node:fs/promises'
import { $ } from 'zx/core'
import { loadCluster, type Node } from '../lib/cluster.mts'
import { explain } from '../lib/errors.mts'
import { formatDuration, formatTable } from '../lib/format.mts'
import { clockProbe, clockProblem, serviceProbe, servicesOf } from '../lib/health.mts'
import { type ApiNode, getNodes, printAndExit, useCluster } from '../lib/kubectl.mts'
import { lanSwitchStatus } from '../lib/lan.mts'
import { script } from '../lib/script.mts'
import { connect, remote, runProbes } from '../lib/ssh.mts'
import { filesOf, machineState } from '../lib/vm.mts'
import type { Health } from './cluster-health.mts'

const { flags } = script({
  does: `Shows the state of machines, services, nodes, pods, certificates and the LAN switch, and lists
what is wrong. Asks all of them at once; what does not answer is listed as such. It changes nothing
and ends with status 0 whatever it finds ("healthy" in --json has the result).`,
  reads: ['cluster.env', 'tls/', 'configs/admin.kubeconfig', 'run/'],
  writes: [],
  flags: {
    json: { help: 'all of it as JSON' },
    boot: { help: 'show the last boot of each machine as a timeline instead' },
    timeout: { value: 'SECONDS', number: true, help: 'how long to wait for each answer (8)' },
  },
  examples: ['./bin/cluster-status.mts --boot', './bin/cluster-status.mts --json | jq .problems'],
})

const cluster = loadCluster()
const { CERT_RENEW_DAYS } = cluster.settings
const { timeout = 8 } = flags

if (flags.boot) await printBoots()

// Asked besides the services, all in one ssh call: each takes seconds on an emulated processor.
const probes = {
  clock: clockProbe,
  // Name, kernel, uptime in seconds, and systemd's state.
  system: {
    command: `
      . /etc/os-release
      echo "$PRETTY_NAME"
      cat /proc/sys/kernel/osrelease /proc/uptime
      systemctl is-system-running || true
      systemctl list-units --state=failed --plain --no-legend | cut -d ' ' -f 1 || true`,
    read(output: string) {
      const [name, kernel, uptime = '', state, ...failedUnits] = output.trim().split('\n')
      return { name, kernel, uptime: Number.parseFloat(uptime), state, failedUnits }
    },
  },
  // The certificates that it has, which may be older than those in tls/. No private keys.
  certificates: {
    command: `
      cd /var/lib/kubernetes 2>/dev/null || exit 0
      for file in $(ls pki/*.pem *.kubeconfig 2>/dev/null | grep -v -e -key.pem); do
        echo "== $file"
        sed -n '/BEGIN CERTIFICATE/,/END CERTIFICATE/p; s/.*client-certificate-data: *//p' "$file"
      done`,
    read: (output: string) =>
      output.split(/^== /m).flatMap((section) => {
        const [file, ...lines] = section.trim().split('\n')
        // A public key alone has no expiry.
        if (lines.length === 0) return []
        const pem = lines.length > 1 ? lines.join('\n') : Buffer.from(lines.join(), 'base64')
        const { subject, validTo } = new X509Certificate(pem)
        const expires = new Date(validTo)
        const daysLeft = Math.floor((expires.getTime() - Date.now()) / 86_400_000)
        return { file: `/var/lib/kubernetes/${file}`, subject, expires, daysLeft }
      }),
  },
}

// All at once, so that the time does not grow with the number of machines.
const [machines, health, tls, lanSwitch] = await Promise.all([
  Promise.all(cluster.nodes.map(askMachine)),
  // Nodes and pods, asked of the API server.
  $`./bin/cluster-health.mts --json --timeout ${timeout}`,
  // Its status is 1 if anything is wrong.
  $({ nothrow: true })`./bin/generate-certs.mts --check --json`,
  lanSwitchStatus(cluster, timeout),
])
if (!tls.stdout) throw tls
type Certificate = { name: string; daysLeft: number | null; problems: string[] }
const { certificates }: { certificates: Certificate[] } = JSON.parse(tls.stdout)
const { api, nodes, pods, namespaces, problems: seen } = JSON.parse(health.stdout) as Health
const report = {
  ...{ machines, api, nodes, pods },
  local: certificates.map(({ name, daysLeft, problems }) => ({ name, daysLeft, problems })),
  lanSwitch: lanSwitch
    ? { known: true as const, status: lanSwitch }
    : { known: false as const, reason: 'the LAN switch does not answer' },
}
/** The result of --json, but for its "healthy" and "problems". */
export type Status = typeof report
const problems = problemsOf(report)
if (flags.json) {
  console.log(JSON.stringify({ healthy: problems.length === 0, problems, ...report }, null, 2))
} else {
  print(report)
  const lines = problems.map((problem) => `✗ ${problem}`)
  console.log(`\n${lines.length > 0 ? lines.join('\n') : '✓ everything is healthy'}`)
}

async function askMachine(node: Node) {
  const { name, role } = node
  const found = await machineState(cluster, node)
  const process = { pid: undefined, ...found }
  const unknown = (reason: string) => {
    const part = { known: false as const, reason }
    return { name, role, process, system: part, services: part, certificates: part }
  }
  if (found.state === 'stopped') return unknown('it is switched off')
  if (found.state === 'installing') return unknown('it is being installed')
  try {
    await connect(cluster, node, { timeout })
    const all = { ...probes, services: serviceProbe(cluster, node) }
    const { system, clock, services, certificates } = await runProbes(node, all, timeout)
    return {
      ...{ name, role, process },
      system: { known: true as const, ...system, clock },
      services: { known: true as const, list: services },
      certificates: { known: true as const, list: certificates },
    }
  } catch (error) {
    return unknown(explain(error).reason)
  }
}

/** The last boot of each machine, as systemd and the API know it, or why it is not known. */
async function printBoots(): Promise<never> {
  const asked = useCluster(cluster).then(getNodes)
  const nodes = await asked.catch(() => undefined)
  const boots = await Promise.all(cluster.nodes.map((node) => bootOf(node, nodes?.get(node.name))))
  if (flags.json) return printAndExit(`${JSON.stringify(boots, null, 2)}\n`)
  const longest = Math.max(...boots.map(({ events }) => events.at(-1)?.after ?? 0))
  const rows = boots.flatMap(({ name, events, reason }) => {
    if (reason) return [[name, reason]]
    return events.map(({ what, after }, index) => {
      const bar = '█'.repeat(Math.round((40 * after) / longest))
      return [index > 0 ? '' : name, what, `${after.toFixed(1).padStart(7)} s`, bar]
    })
  })
  return printAndExit(`${formatTable(['MACHINE', 'REACHED', '  AFTER', ''], rows)}\n`)
}

/** What a machine has reached, and how many seconds after power-on (or the kernel's start). */
async function bootOf(node: Node, registered: ApiNode | undefined) {
  const { name } = node
  // In microseconds: the kernel's start since 1970, the rest since the kernel's start.
  const command = `echo Kernel=$(($(date +%s%6N) - $(sed 's/\\.//; s/ .*/0000/' /proc/uptime)))
    systemctl show --property=UserspaceTimestampMonotonic,FinishTimestampMonotonic; echo
    systemctl show --property=Id,ActiveEnterTimestampMonotonic sshd ${servicesOf(cluster, node).join(' ')}`
  const ask = connect(cluster, node, { timeout }).then(() => remote(node, command, { timeout }))
  const answer = await ask.catch(explain)
  if (typeof answer !== 'string') return { name, events: [], reason: answer.reason }
  const [first = '', ...units] = answer.split('\n\n')
  const read = (text: string, name: string) =>
    Number(text.match(new RegExp(`^${name}=(\\d+)$`, 'm'))?.[1] ?? 0) / 1e6
  const [kernel, systemd] = [read(first, 'Kernel'), read(first, 'UserspaceTimestampMonotonic')]
  // If QEMU started later than the guest's systemd, it has loaded a snapshot. If it started long
  // before the kernel, the guest has rebooted.
  const { mtimeMs } = await stat(filesOf(cluster, node).pid).catch(() => ({ mtimeMs: 0 }))
  const poweredOn = mtimeMs / 1000 - kernel
  const isRestored = poweredOn > systemd
  const ready = registered?.status.conditions?.find(({ type }) => type === 'Ready')
  // Times that the API server recorded before a restore cannot be compared with the guest's clock.
  const isReady = ready?.status === 'True' && !isRestored
  const readyAt = isReady ? Date.parse(ready.lastTransitionTime) / 1000 : 0
  const reached = [
    { what: 'systemd', at: systemd },
    { what: 'end of boot', at: read(first, 'FinishTimestampMonotonic') },
    { what: 'node Ready', at: readyAt - kernel },
    ...units.map((text) => ({
      what: text.match(/^Id=(.+)\.service$/m)?.[1] ?? '',
      at: read(text, 'ActiveEnterTimestampMonotonic'),
    })),
  ].filter(({ at }) => at > 0)
  const zero = isRestored || poweredOn < -120 ? 0 : poweredOn
  // A machine made of namespaces has no kernel of its own.
  if (zero < 1) reached.push({ what: 'kernel', at: Math.max(0, zero) })
  const events = reached
    .map(({ what, at }) => ({ what, after: at - zero }))
    .sort((one, other) => one.after - other.after)
  return { name, events, reason: '' }
}

/** Everything that is wrong, a line each. */
function problemsOf({ machines, local, lanSwitch }: Status): string[] {
  const found: string[] = []
  for (const { name, system, services, certificates } of machines) {
    if (!system.known || !services.known || !certificates.known) {
      found.push(`${name}: ${system.known ? '' : system.reason}`)
      continue
    }
    const clock = clockProblem(name, system.clock)
    if (clock) found.push(clock)
    const unhealthy = services.list.filter(({ healthy }) => !healthy)
    const old = certificates.list.filter(({ daysLeft }) => daysLeft < CERT_RENEW_DAYS)
    const wrong = [
      ...system.failedUnits.map((unit) => `unit ${unit} failed`),
      ...unhealthy.map(({ reason }) => reason),
      ...(certificates.list.length === 0 ? ['no certificates'] : []),
      ...old.map(({ file, daysLeft }) => `${file} has ${daysLeft} days left`),
    ]
    found.push(...wrong.map((problem) => `${name}: ${problem}`))
  }
  // Those of cluster-health; what it says about machines is less detailed than ours.
  found.push(...seen.filter((problem) => !problem.startsWith('machine ')))
  for (const { name, problems } of local) {
    found.push(...problems.map((problem) => `tls/${name}.pem: ${problem}`))
  }
  if (!lanSwitch.known) found.push(lanSwitch.reason)
  return found
}

function print({ machines, api, nodes, pods, local, lanSwitch }: Status): void {
  const rows = machines.map(({ name, process, system, services }) => [
    name,
    process.state === 'stopped' ? 'stopped' : `${process.state} (pid ${process.pid})`,
    system.known ? `${system.state}, up ${formatDuration(system.uptime * 1000)}` : '?',
    system.known ? `${system.name}, ${system.kernel}` : '?',
    services.known
      ? services.list.map(({ healthy, unit }) => `${healthy ? '✓' : '✗'} ${unit}`).join('\n')
      : '?',
  ])
  console.log(formatTable(['MACHINE', 'QEMU', 'SYSTEMD', 'SYSTEM', 'SERVICES'], rows))

  console.log(`\nAPI server  ${api.ready ? `ready, ${api.version}` : `not ready: ${api.reason}`}`)
  if (lanSwitch.known) {
    const { port, addresses, counters } = lanSwitch.status
    console.log(`LAN switch  port ${port}, ${addresses} addresses, ${counters.received} frames`)
  }

  if (nodes.known && nodes.list.length > 0) {
    const rows = nodes.list.map(({ name, ready, address, kubelet, runtime }) => {
      return [name, ready ? 'Ready' : 'NotReady', address, kubelet, runtime]
    })
    console.log(`\n${formatTable(['NODE', 'STATE', 'ADDRESS', 'KUBELET', 'RUNTIME'], rows)}`)
  }
  if (pods.known && pods.list.length > 0) {
    const rows = namespaces.map((one) => {
      return [one.namespace, `${one.ready}/${one.all}`, `${one.restarts}`]
    })
    console.log(`\n${formatTable(['NAMESPACE', 'PODS READY', 'RESTARTS'], rows)}`)
  }

  const first = (days: (number | null)[]) => {
    const known = days.filter((day) => day !== null)
    return known.length > 0 ? `the first expires in ${Math.min(...known)} days` : 'none'
  }
  const expiries = machines.map(({ name, certificates }) => [
    name,
    certificates.known ? first(certificates.list.map(({ daysLeft }) => daysLeft)) : '?',
  ])
  const own = ['tls/', first(local.map(({ daysLeft }) => daysLeft))]
  console.log(`\n${formatTable(['CERTIFICATES', ''], [own, ...expiries])}`)
}
