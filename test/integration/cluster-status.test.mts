// cluster-status against a real control plane; workers, pods and machines are hollow.
import assert from 'node:assert/strict'
import { after, afterEach, before, describe, it } from 'node:test'
import type { ClusterReport } from '../../lib/kubernetes/cluster-report.mts'
import { ensureLanSwitch, stopLanSwitch } from '../../lib/lan/lan-switch.mts'
import { HollowMachines } from '../hollow-machines.mts'
import { noQemu } from '../idle-qemu.mts'
import { HollowCluster } from '../kubernetes/hollow-cluster.mts'
import { findTools } from '../kubernetes/prepared.mts'
import { noSshd } from '../sshd.mts'

const tools = await findTools()
const skip = (typeof tools === 'string' && tools) || noSshd || noQemu
// A skipped suite is counted nowhere; a skipped test is.
it('what this needs is there', { skip }, () => {})

const names = ['alpha', 'sigma', 'gamma']

describe('cluster-status', { skip }, () => {
  let hollow: HollowCluster
  let machines: HollowMachines
  before(async () => {
    if (typeof tools === 'string') return
    hollow = await HollowCluster.start(tools)
    machines = new HollowMachines(hollow.checkout)
    await machines.start(...names)
    const nodes = await hollow.addNodes()
    await nodes.useLanAddresses()
    await ensureLanSwitch(hollow.cluster)
  })
  after(async () => {
    await stopLanSwitch(hollow.cluster)
    await machines?.stop(...names)
    await hollow?.stop()
  })
  afterEach(async () => {
    for (const name of names) await machines.reset(name)
    await machines.start(...names)
  })

  async function status(...args: string[]) {
    const began = performance.now()
    // On a busy host an answer may take longer than a healthy cluster should.
    const patience = args.length > 0 ? [] : ['--timeout', '60']
    const outcome = await hollow.script('cluster-status', '--json', ...patience, ...args)
    assert.equal(outcome.exitCode, 0, outcome.stderr)
    const seconds = (performance.now() - began) / 1000
    const report = JSON.parse(outcome.stdout) as ClusterReport & {
      healthy: boolean
      problems: string[]
    }
    return { ...report, seconds }
  }
  const machine = (report: ClusterReport, name: string) =>
    report.machines.find((candidate) => candidate.name === name) ?? assert.fail()

  it('finds nothing wrong with a cluster that is well', async () => {
    const { problems, healthy } = await status()
    assert.deepEqual(problems, [])
    assert.equal(healthy, true)
  })

  it('shows machines, services, nodes, versions, certificates and the lan switch', async () => {
    const report = await status()
    const alpha = machine(report, 'alpha')
    assert.equal(alpha.process.state, 'running')
    assert.ok(alpha.system.known && alpha.system.state === 'running' && alpha.system.uptime > 0)
    assert.ok(alpha.services.known)
    assert.deepEqual(
      alpha.services.list.map(({ unit }) => unit),
      ['etcd', 'kube-apiserver', 'kube-controller-manager', 'kube-scheduler'],
    )
    assert.match(report.api.version, /^v1\./)
    assert.ok(report.nodes.known)
    assert.deepEqual(
      report.nodes.list.map(({ name, address }) => [name, address]).sort(),
      hollow.cluster.workers.map(({ name, ip }) => [name, ip]).sort(),
    )
    assert.ok(report.local.every(({ daysLeft }) => (daysLeft ?? 0) > 300))
    assert.ok(alpha.certificates.known)
    assert.ok(report.lanSwitch.known)
    assert.equal(report.lanSwitch.status.port, hollow.cluster.settings.LAN_SWITCH_PORT)
  })

  it('shows it as tables', async () => {
    const { stdout, exitCode } = await hollow.script('cluster-status', '--timeout', '60')
    assert.equal(exitCode, 0)
    assert.match(stdout, /^alpha +running \(pid \d+\) +running, up .*✓ etcd$/m)
    assert.match(stdout, /^sigma +Ready +192\.168\.100\.11/m)
    assert.match(stdout, /^tls\/ +the first expires in \d+ days$/m)
    assert.match(stdout, /✓ all is well\n$/)
  })

  it('says of each thing that is wrong what it is', async () => {
    await machines.set('alpha', 'ill-kube-scheduler')
    await machines.set('sigma', 'broken-kubelet')
    const { problems, healthy } = await status()
    assert.equal(healthy, false)
    assert.deepEqual(problems, [
      'alpha: kube-scheduler is not healthy: HTTP 503 [-]leaderElection failed',
      'sigma: kubelet is activating (auto-restart, exit-code)',
    ])
  })

  it('says whose clock is wrong', async () => {
    await machines.set('gamma', 'ahead-730')
    const clock = "the clock of gamma is 730 days ahead of this computer's"
    assert.deepEqual((await status()).problems, [clock])
  })

  it('says which machine is off, which does not answer, and shows the others', async () => {
    await machines.stop('sigma')
    await machines.sshd('gamma').stop()
    const report = await status()
    assert.ok(report.problems.includes('sigma: it is switched off'))
    assert.ok(report.problems.some((problem) => /^gamma: gamma does not answer ssh/.test(problem)))
    assert.ok(machine(report, 'alpha').services.known)
    await machines.stop('gamma')
  })

  it('waits for a machine that is stuck no longer than it was told to', async () => {
    await machines.sshd('gamma').program('systemctl', '#!/bin/sh\nsleep 90\n')
    const report = await status('--timeout', '10')
    assert.ok(report.seconds < 50, `${report.seconds} s`)
    assert.ok(report.problems.includes('gamma: gamma did not answer within 10 s'))
    assert.ok(machine(report, 'sigma').services.known)
    await machines.stop('gamma')
  })

  it('counts pods, and names those that are not ready with the reason', async () => {
    hollow.setFate(() => ({ reason: 'ImagePullBackOff', message: 'x' }))
    await hollow.kubectl(['create', 'deployment', 'stuck', '--image=none'])
    let found: string[] = []
    while (found.length === 0) {
      found = (await status()).problems.filter((problem) => /ImagePullBackOff/.test(problem))
    }
    assert.match(found[0] ?? '', /^pod default\/stuck-\S+: ImagePullBackOff$/)
    await hollow.kubectl(['delete', 'deployment', 'stuck', '--wait'])
    hollow.setFate()
  })

  it('names a worker that has not registered', async () => {
    await hollow.kubectl(['delete', 'node', 'gamma'])
    assert.ok((await status()).problems.includes('node gamma: has not registered'))
  })

  it('says that the lan switch does not answer', async () => {
    await stopLanSwitch(hollow.cluster)
    assert.ok((await status()).problems.includes('lan: the lan switch does not answer'))
    await ensureLanSwitch(hollow.cluster)
  })

  it('says that the API server is down, and still shows the machines', async () => {
    await hollow.controlPlane.stop()
    const report = await status()
    assert.ok(report.problems.some((problem) => /^API server: .*nothing listens/.test(problem)))
    assert.ok(machine(report, 'alpha').services.known)
  })
})
