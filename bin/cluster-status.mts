#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// The whole cluster at a glance: machines, services, nodes, pods, certificates, LAN switch, and what
// is wrong with any of them.
import { X509Certificate } from 'node:crypto'
import { $ } from 'zx/core'
import { loadCluster, type Node } from '../lib/cluster.mts'
import { StepError } from '../lib/errors.mts'
import { formatTable } from '../lib/format.mts'
import { clockProbe, clockTrouble, serviceProbe } from '../lib/health.mts'
import { lanSwitchStatus } from '../lib/lan.mts'
import { script } from '../lib/script.mts'
import { connect, runProbes } from '../lib/ssh.mts'
import { inspectTls } from '../lib/tls.mts'
import { machineState } from '../lib/vm.mts'
import type { Health } from './cluster-health.mts'

const { flags } = script({
  does: `Shows the state of machines, services, nodes, pods, certificates and the LAN switch, and lists
what is wrong. Asks all of them at once; what does not answer is listed as such. It changes nothing
and ends with status 0 whatever it finds ("healthy" in --json has the result).`,
  reads: ['cluster.env', 'tls/', 'configs/admin.kubeconfig', 'run/'],
  writes: [],
  flags: {
    json: { help: 'all of it as JSON' },
    timeout: { value: 'SECONDS', number: true, help: 'how long to wait for each answer (8)' },
  },
  examples: ['./bin/cluster-status.mts', './bin/cluster-status.mts --json | jq .problems'],
})

const cluster = loadCluster()
const timeout = flags.timeout ?? 8

// All at once, so that the time does not grow with the number of machines.
const [machines, health, tls, lanSwitch] = await Promise.all([
  Promise.all(cluster.nodes.map(askMachine)),
  // Nodes and pods, asked of the API server.
  $`./bin/cluster-health.mts --json --timeout ${timeout}`,
  inspectTls(cluster),
  lanSwitchStatus(cluster, timeout),
])
const { api, nodes, pods, namespaces, troubles } = JSON.parse(health.stdout) as Health
const report = {
  ...{ machines, api, nodes, pods },
  local: tls.certificates.map(({ name, daysLeft, problems }) => ({ name, daysLeft, problems })),
  lanSwitch: lanSwitch
    ? { known: true as const, status: lanSwitch }
    : { known: false as const, reason: 'the LAN switch does not answer' },
}
const problems = problemsOf(report)
if (flags.json) {
  console.log(JSON.stringify({ healthy: problems.length === 0, problems, ...report }, null, 2))
} else {
  print(report)
  const lines = problems.map((problem) => `✗ ${problem}`)
  console.log(`\n${lines.length > 0 ? lines.join('\n') : '✓ everything is healthy'}`)
}

/** Asks a machine everything in one ssh call: where QEMU emulates the processor, each takes seconds. */
async function askMachine(node: Node) {
  const { name, role } = node
  const unknown = (reason: string) => {
    const part = { known: false as const, reason }
    return { system: part, services: part, certificates: part }
  }
  const found = await machineState(cluster, node)
  if (found.state === 'stopped') {
    return { name, role, process: found, ...unknown('it is switched off') }
  }
  const { pid } = found
  if (found.mode === 'install') {
    const process = { state: 'installing' as const, pid }
    return { name, role, process, ...unknown('it is being installed') }
  }
  const process = { state: 'running' as const, pid }
  const services = serviceProbe(cluster, node)
  const probes = {
    system: systemProbe(),
    clock: clockProbe,
    services,
    certificates: certificates(),
  }
  try {
    await connect(cluster, node, { timeout })
    const answer = await runProbes(node, probes, timeout)
    return {
      ...{ name, role, process },
      system: { known: true as const, ...answer.system, clock: answer.clock },
      services: { known: true as const, list: answer.services },
      certificates: { known: true as const, list: answer.certificates },
    }
  } catch (error) {
    if (!(error instanceof StepError)) throw error
    return { name, role, process, ...unknown(error.message) }
  }
}

/** Name, kernel, uptime in seconds, and systemd's state. */
function systemProbe() {
  return {
    command: `
      . /etc/os-release
      echo "$PRETTY_NAME"
      echo "$(</proc/sys/kernel/osrelease)"
      read -r uptime _ </proc/uptime
      echo "$uptime"
      systemctl is-system-running || true
      systemctl list-units --state=failed --plain --no-legend || true`,
    read(output: string) {
      const [name = '', kernel = '', uptime = '', state = '', ...units] = output.trim().split('\n')
      const failedUnits = units.map((line) => line.trim().split(/\s+/)[0] ?? '')
      return { name, kernel, uptime: Number(uptime), state, failedUnits }
    },
  }
}

/** The certificates that the machine has, which may be older than those in tls/. No private keys. */
function certificates() {
  return {
    command: `
      cd /var/lib/kubernetes 2>/dev/null || exit 0
      for file in pki/*.pem; do
        case $file in *-key.pem | 'pki/*.pem') continue;; esac
        echo "== $file"
        echo "$(<"$file")"
      done
      for file in *.kubeconfig; do
        [ -e "$file" ] || continue
        echo "== $file"
        while read -r key value; do
          case $key in client-certificate-data:) echo "$value";; esac
        done <"$file"
      done`,
    read(output: string) {
      return output
        .split(/^== /m)
        .slice(1)
        .flatMap((section) => {
          const [file = '', ...lines] = section.trim().split('\n')
          const text = lines.join('\n')
          // A public key alone has no expiry.
          if (/BEGIN (?!CERTIFICATE)/.test(text) || text === '') return []
          const der = Buffer.from(text.replaceAll('"', ''), 'base64')
          const { subject, validTo } = new X509Certificate(text.includes('-----') ? text : der)
          const expires = new Date(validTo)
          const daysLeft = Math.floor((expires.getTime() - Date.now()) / 86_400_000)
          return { file: `/var/lib/kubernetes/${file}`, subject, expires, daysLeft }
        })
    },
  }
}

/** Everything that is wrong, a line each. */
function problemsOf({ machines, local, lanSwitch }: typeof report): string[] {
  const found: string[] = []
  for (const { name, system, services, certificates } of machines) {
    if (!system.known || !services.known || !certificates.known) {
      found.push(`${name}: ${system.known ? '' : system.reason}`)
      continue
    }
    const clock = clockTrouble(name, system.clock)
    if (clock) found.push(clock)
    found.push(...system.failedUnits.map((unit) => `${name}: unit ${unit} failed`))
    const unhealthy = services.list.filter(({ healthy }) => !healthy)
    found.push(...unhealthy.map(({ reason }) => `${name}: ${reason}`))
    if (certificates.list.length === 0) found.push(`${name}: no certificates`)
    for (const { file, daysLeft } of certificates.list) {
      if (daysLeft >= cluster.settings.CERT_RENEW_DAYS) continue
      found.push(`${name}: ${file} has ${daysLeft} days left`)
    }
  }
  // Those about machines are less detailed than ours.
  found.push(...troubles.filter((trouble) => !trouble.startsWith('machine ')))
  for (const { name, problems } of local) {
    found.push(...problems.map((problem) => `tls/${name}.pem: ${problem}`))
  }
  if (!lanSwitch.known) found.push(lanSwitch.reason)
  return found
}

function print({ machines, api, nodes, pods, local, lanSwitch }: typeof report): void {
  const rows = machines.map(({ name, process, system, services }) => [
    name,
    process.state === 'stopped' ? 'stopped' : `${process.state} (pid ${process.pid})`,
    system.known ? `${system.state}, up ${duration(system.uptime)}` : '?',
    system.known ? `${system.name}, ${system.kernel}` : '?',
    services.known
      ? services.list.map(({ healthy, unit }) => `${healthy ? '✓' : '✗'} ${unit}`).join('\n')
      : '?',
  ])
  console.log(formatTable(['MACHINE', 'QEMU', 'SYSTEMD', 'SYSTEM', 'SERVICES'], rows))

  console.log(`\nAPI server  ${api.ready ? `ready, ${api.version}` : `not ready: ${api.reason}`}`)
  if (lanSwitch.known) {
    const { port, addresses, counters } = lanSwitch.status
    const traffic = `${addresses.length} addresses, ${counters.received} frames`
    console.log(`LAN switch  port ${port}, ${traffic}`)
  }

  if (nodes.known && nodes.list.length > 0) {
    const rows = nodes.list.map(({ name, ready, address, kubelet, runtime }) => {
      return [name, ready ? 'Ready' : 'NotReady', address, kubelet, runtime]
    })
    console.log(`\n${formatTable(['NODE', 'STATE', 'ADDRESS', 'KUBELET', 'RUNTIME'], rows)}`)
  }
  if (pods.known && pods.list.length > 0) {
    const rows = namespaces.map(({ namespace, ready, all, restarts }) => {
      return [namespace, `${ready}/${all}`, `${restarts}`]
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

function duration(seconds: number): string {
  const [days, hours, minutes] = [seconds / 86400, (seconds / 3600) % 24, (seconds / 60) % 60]
  if (days >= 1) return `${Math.floor(days)}d ${Math.floor(hours)}h`
  return hours >= 1 ? `${Math.floor(hours)}h ${Math.floor(minutes)}m` : `${Math.floor(minutes)}m`
}
