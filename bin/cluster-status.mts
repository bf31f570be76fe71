#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// The whole cluster at a glance: machines, services, nodes, pods, certificates, lan switch, and
// what is wrong with any of them.
import { loadCluster } from '../lib/cluster.mts'
import { formatTable } from '../lib/format.mts'
import { type ClusterReport, type Learned, reportOn } from '../lib/kubernetes/cluster-report.mts'
import { podTable } from '../lib/kubernetes/pod-report.mts'
import { clockTrouble } from '../lib/machine/clock.mts'
import { script } from '../lib/script.mts'

const { flags } = script({
  does: `Shows the state of machines, services, nodes, pods, certificates and the lan switch, and lists
what is wrong. Asks all of them at once; what does not answer is said. Looking is all it does:
it ends with status 0 whatever it sees ("healthy" in --json tells).`,
  reads: ['cluster.env', 'tls/', 'run/'],
  writes: [],
  flags: {
    json: { help: 'all of it as JSON' },
    timeout: { value: 'SECONDS', number: true, help: 'how long to wait for each answer (8)' },
  },
  examples: ['./bin/cluster-status.mts', './bin/cluster-status.mts --json | jq .problems'],
})

const cluster = loadCluster()
const report = await reportOn(cluster, flags.timeout ?? 8)
const problems = problemsOf(report)

if (flags.json) {
  console.log(JSON.stringify({ healthy: problems.length === 0, problems, ...report }, null, 2))
} else {
  print(report)
  if (problems.length === 0) console.log('\n✓ all is well')
  else console.log(`\n${problems.map((problem) => `✗ ${problem}`).join('\n')}`)
}

function print({ machines, api, nodes, pods, local, lanSwitch }: ClusterReport): void {
  const machineRows = machines.map(({ name, process, system, services }) => [
    name,
    process.state === 'stopped' ? 'stopped' : `${process.state} (pid ${process.pid})`,
    system.known ? `${system.state}, up ${duration(system.uptime)}` : '?',
    system.known ? `${system.name}, ${system.kernel}` : '?',
    services.known
      ? services.list.map((s) => `${s.healthy ? '✓' : '✗'} ${s.unit}`).join('\n')
      : '?',
  ])
  console.log(formatTable(['MACHINE', 'QEMU', 'SYSTEMD', 'SYSTEM', 'SERVICES'], machineRows))

  console.log(`\nAPI server  ${api.ready ? `ready, ${api.version}` : `not ready: ${api.reason}`}`)
  if (lanSwitch.known) {
    const { port, addresses, counters } = lanSwitch.status
    const traffic = `${addresses.length} addresses, ${counters.received} frames`
    console.log(`lan switch  port ${port}, ${traffic}`)
  }

  if (nodes.known && nodes.list.length > 0) {
    const rows = nodes.list.map((node) => [
      node.name,
      node.ready ? 'Ready' : 'NotReady',
      ...[node.address, node.kubelet, node.runtime],
    ])
    console.log(`\n${formatTable(['NODE', 'STATE', 'ADDRESS', 'KUBELET', 'RUNTIME'], rows)}`)
  }
  if (pods.known && pods.list.length > 0) {
    console.log(`\n${podTable(pods.list)}`)
  }

  const first = (days: (number | null)[]) => {
    const known = days.filter((day) => day !== null)
    return known.length > 0 ? `the first expires in ${Math.min(...known)} days` : 'none'
  }
  const rows = [
    ['tls/', first(local.map(({ daysLeft }) => daysLeft))],
    ...machines.map(({ name, certificates }) => [
      name,
      certificates.known ? first(certificates.list.map(({ daysLeft }) => daysLeft)) : '?',
    ]),
  ]
  console.log(`\n${formatTable(['CERTIFICATES', ''], rows)}`)
}

/** What is not as it should be, a line each. */
function problemsOf({ machines, api, nodes, pods, local, lanSwitch }: ClusterReport): string[] {
  const { CERT_RENEW_DAYS } = cluster.settings
  const unknown = (what: string, learned: Learned<object>) =>
    learned.known ? [] : [`${what}: ${learned.reason}`]
  const ofMachines = machines.flatMap(({ name, system, services, certificates }) => [
    ...unknown(name, system),
    ...(system.known ? [clockTrouble(name, system.clock)].filter(Boolean) : []),
    ...(system.known ? unknown(`services of ${name}`, services) : []),
    ...(system.known ? unknown(`certificates of ${name}`, certificates) : []),
    ...(system.known ? system.failedUnits.map((unit) => `${name}: unit ${unit} failed`) : []),
    ...(services.known ? services.list : [])
      .filter(({ healthy }) => !healthy)
      .map(({ reason }) => `${name}: ${reason}`),
    ...(certificates.known && certificates.list.length === 0 ? [`${name}: no certificates`] : []),
    ...(certificates.known ? certificates.list : [])
      .filter(({ daysLeft }) => daysLeft < CERT_RENEW_DAYS)
      .map(({ file, daysLeft }) => `${name}: ${file} has ${daysLeft} days left`),
  ])
  const registered = nodes.known ? nodes.list : []
  const ofNodes = cluster.workers.flatMap(({ name }) => {
    const node = registered.find((candidate) => candidate.name === name)
    if (!nodes.known || node?.ready) return []
    return [`node ${name}: ${node ? `not Ready, ${node.reason}` : 'has not registered'}`]
  })
  return [
    ...ofMachines,
    ...(api.ready ? [] : [`API server: ${api.reason}`]),
    ...ofNodes,
    ...(pods.known ? pods.list : [])
      .filter(({ ready }) => !ready)
      .map(({ namespace, name, reason }) => `pod ${namespace}/${name}: ${reason}`),
    ...local.flatMap((entry) =>
      entry.problems.map((problem) => `tls/${entry.name}.pem: ${problem}`),
    ),
    ...unknown('lan', lanSwitch),
  ]
}

function duration(seconds: number): string {
  const [days, hours, minutes] = [seconds / 86400, (seconds / 3600) % 24, (seconds / 60) % 60]
  if (days >= 1) return `${Math.floor(days)}d ${Math.floor(hours)}h`
  return hours >= 1 ? `${Math.floor(hours)}h ${Math.floor(minutes)}m` : `${Math.floor(minutes)}m`
}
