// cluster-status with an API server that answers what the tests choose, and hollow machines: real
// sshd, no real services. (add-ons/observe.mts asks a real API server.)
import assert from 'node:assert/strict'
import { readFile, rename, rm, writeFile } from 'node:fs/promises'
import { after, afterEach, before, beforeEach, describe, it } from 'node:test'
import forge from 'node-forge'
import { type Cluster, loadCluster } from '../../lib/cluster.mts'
import { ensureLanSwitch, stopLanSwitch } from '../../lib/lan.mts'
import { type FakeApiServer, nodeList, startFakeApiServer } from '../api-server.mts'
import { type Checkout, makeCheckout, run } from '../checkout.mts'
import { HollowMachines } from '../hollow-machines.mts'
import { noQemu } from '../idle-qemu.mts'
import { noSshd } from '../sshd.mts'

const names = ['alpha', 'sigma', 'gamma']
const script = 'bin/cluster-status.mts'

interface Report {
  healthy: boolean
  problems: string[]
  machines: {
    name: string
    process: { state: string }
    system: { known: boolean; state: string; uptime: number }
    services: { known: boolean; list: { unit: string }[] }
    certificates: { known: boolean; list: { file: string; subject: string; daysLeft: number }[] }
  }[]
  api: { version: string }
  nodes: { list: { name: string; kubelet: string }[] }
  local: { daysLeft: number }[]
  lanSwitch: { known: boolean; status: { port: number } }
}

describe('cluster-status', { skip: noSshd || noQemu }, () => {
  let checkout: Checkout
  let cluster: Cluster
  let api: FakeApiServer
  let machines: HollowMachines
  before(async () => {
    checkout = await makeCheckout({ keys: true })
    for (const step of ['certs', 'kubeconfigs']) {
      const made = await run(checkout, `bin/generate-${step}.mts`)
      assert.equal(made.exitCode, 0, made.stderr)
    }
    cluster = loadCluster({ root: checkout.root, env: {} })
    machines = new HollowMachines(checkout)
    await machines.start(...names)
    await ensureLanSwitch(cluster)
  })
  after(async () => {
    await machines?.stop(...names)
    await checkout?.remove()
  })
  beforeEach(async () => {
    api = await startFakeApiServer(checkout)
    api.answers['/readyz'] = { body: 'readyz check passed' }
    api.answers['/version'] = { body: JSON.stringify({ gitVersion: 'v1.36.3' }) }
    api.answers['/api/v1/nodes'] = {
      body: nodeList({ sigma: { ready: true }, gamma: { ready: true } }),
    }
    setPods({ phase: 'Running', conditions: [{ type: 'Ready', status: 'True' }] })
  })
  afterEach(async () => {
    await api.stop()
    for (const name of names) await machines.reset(name)
    await machines.start(...names)
  })

  /** One pod, of this status. */
  function setPods(status: object): void {
    const metadata = { namespace: 'default', name: 'web-1' }
    const items = [{ metadata, spec: { nodeName: 'sigma' }, status }]
    api.answers['/api/v1/pods'] = {
      body: JSON.stringify({ kind: 'PodList', apiVersion: 'v1', items }),
    }
  }
  async function status(...args: string[]): Promise<Report & { seconds: number }> {
    const began = performance.now()
    // On a busy computer an answer may take longer than a healthy cluster should.
    const limit = args.length > 0 ? [] : ['--timeout', '60']
    const { stdout, stderr, exitCode } = await run(checkout, script, ['--json', ...limit, ...args])
    assert.equal(exitCode, 0, stderr)
    return { ...JSON.parse(stdout), seconds: (performance.now() - began) / 1000 }
  }
  const machine = (report: Report, name: string) =>
    report.machines.find((candidate) => candidate.name === name) ?? assert.fail()

  it('finds nothing wrong with a healthy cluster, and shows all of it', async () => {
    const report = await status()
    assert.deepEqual(report.problems, [])
    assert.equal(report.healthy, true)
    const alpha = machine(report, 'alpha')
    assert.equal(alpha.process.state, 'running')
    assert.ok(alpha.system.state === 'running' && alpha.system.uptime > 0)
    assert.deepEqual(
      alpha.services.list.map(({ unit }) => unit),
      ['etcd', 'kube-apiserver', 'kube-controller-manager', 'kube-scheduler'],
    )
    assert.equal(report.api.version, 'v1.36.3')
    assert.deepEqual(
      report.nodes.list.map(({ name }) => name),
      ['sigma', 'gamma'],
    )
    assert.ok(report.local.every(({ daysLeft }) => daysLeft > 300))
    assert.equal(report.lanSwitch.status.port, cluster.settings.LAN_SWITCH_PORT)
  })

  it('shows it as tables', async () => {
    const { stdout, exitCode } = await run(checkout, script, ['--timeout', '60'])
    assert.equal(exitCode, 0)
    assert.match(stdout, /^alpha +running \(pid \d+\) +running, up .*✓ etcd$/m)
    assert.match(stdout, /^API server +ready, v1\.36\.3$/m)
    assert.match(stdout, /^sigma +Ready +192\.168\.100\.11 +v1\.36\.3/m)
    assert.match(stdout, /^default +1\/1 +0$/m)
    assert.match(stdout, /^tls\/ +the first expires in \d+ days$/m)
    assert.match(stdout, /✓ everything is healthy\n$/)
  })

  it('is not disturbed by a variable that overrides cluster.env, which it names once', async () => {
    const env = { WAIT_TIMEOUT: '901' }
    const outcome = await run(checkout, script, ['--json', '--timeout', '60'], { env })
    assert.equal(JSON.parse(outcome.stdout || '{}').healthy, true, outcome.stderr)
    assert.equal(outcome.stderr, '! from the environment instead of cluster.env: WAIT_TIMEOUT\n')
  })

  it('ends quietly when its reader has seen enough', async () => {
    const pipe = `${script} --timeout 60 | head -n 1; echo "\${PIPESTATUS[*]}"`
    const { stdout, stderr } = await run(checkout, 'bash', ['-c', pipe])
    assert.match(stdout, /^MACHINE.*\n0 0\n$/)
    assert.equal(stderr, '')
  })

  it('says what is wrong with each part', async () => {
    await machines.set('alpha', 'ill-kube-scheduler')
    await machines.set('sigma', 'broken-kubelet')
    await machines.set('gamma', 'ahead-730')
    api.answers['/api/v1/nodes'] = { body: nodeList({ sigma: { ready: false } }) }
    setPods({
      phase: 'Pending',
      containerStatuses: [{ restartCount: 0, state: { waiting: { reason: 'ImagePullBackOff' } } }],
    })
    await stopLanSwitch(cluster)
    const { problems, healthy } = await status()
    await ensureLanSwitch(cluster)
    assert.equal(healthy, false)
    assert.deepEqual(problems, [
      'alpha: kube-scheduler is not healthy: HTTP 503 [-]leaderElection failed',
      'sigma: kubelet is activating (auto-restart, exit-code)',
      "the clock of gamma is 730 days ahead of this computer's",
      'node sigma is not Ready: cni plugin not initialized',
      'node gamma has not registered',
      'pod default/web-1: ImagePullBackOff',
      'the LAN switch does not answer',
    ])
  })

  it('says that a certificate on a machine is damaged, and shows the other machines', async () => {
    const broken = checkout.path('homes', 'alpha', 'pki', 'broken.pem')
    const pem = await readFile(checkout.path('tls', 'admin.pem'), 'utf8')
    await writeFile(broken, `${pem.slice(0, 500)}\n-----END CERTIFICATE-----\n`)
    const report = await status()
    await rm(broken)
    assert.match(report.problems.join('\n'), /^alpha: .*PEM/)
    assert.equal(machine(report, 'sigma').certificates.known, true)
  })

  it('reads the certificates of a machine, but not its private keys', async () => {
    const home = checkout.path('homes', 'alpha')
    const [pem, caKey] = await Promise.all(
      ['admin.pem', 'ca-key.pem'].map((name) => readFile(checkout.path('tls', name), 'utf8')),
    )
    const expired = forge.pki.certificateFromPem(pem ?? '')
    expired.validity.notAfter = new Date(Date.now() - 50.5 * 86_400_000)
    expired.sign(forge.pki.privateKeyFromPem(caKey ?? ''), forge.md.sha256.create())
    await writeFile(`${home}/pki/expired.pem`, forge.pki.certificateToPem(expired))
    await writeFile(
      `${home}/pki/public.pem`,
      '-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n',
    )
    const kubeconfig = await readFile(checkout.path('configs', 'kube-scheduler.kubeconfig'), 'utf8')
    await writeFile(`${home}/kube-scheduler.kubeconfig`, kubeconfig)
    // All that leaves the machine.
    const seen = checkout.path('seen')
    await machines.sshd('alpha').program('bash', `#!/bin/sh\n/bin/bash "$@" | tee '${seen}'\n`)
    const report = await status()
    const found = new Map(machine(report, 'alpha').certificates.list.map((one) => [one.file, one]))
    const folder = '/var/lib/kubernetes'
    assert.deepEqual([...found.keys()].sort(), [
      `${folder}/kube-scheduler.kubeconfig`,
      ...['ca', 'expired', 'kubernetes'].map((name) => `${folder}/pki/${name}.pem`),
    ])
    assert.match(found.get(`${folder}/pki/ca.pem`)?.subject ?? '', /CN=Kubernetes$/m)
    const scheduler = found.get(`${folder}/kube-scheduler.kubeconfig`)
    assert.match(scheduler?.subject ?? '', /CN=system:kube-scheduler$/m)
    assert.deepEqual(report.problems, [`alpha: ${folder}/pki/expired.pem has -51 days left`])
    const printed = await readFile(seen, 'utf8')
    assert.match(printed, /BEGIN CERTIFICATE/)
    assert.doesNotMatch(printed, /PRIVATE KEY|client-key-data/)
    const key = kubeconfig.match(/client-key-data: (\S+)/)?.[1] ?? assert.fail()
    assert.ok(!printed.includes(key))
    for (const name of ['expired', 'public']) await rm(`${home}/pki/${name}.pem`)
    await machines.stop('alpha')
  })

  it('says which machine is off and which does not answer, and shows the others', async () => {
    await machines.stop('sigma')
    await machines.sshd('gamma').stop()
    const report = await status()
    assert.ok(report.problems.includes('sigma: it is switched off'))
    assert.ok(report.problems.some((problem) => /^gamma: gamma does not answer ssh/.test(problem)))
    assert.ok(machine(report, 'alpha').services.known)
    await machines.stop('gamma')
  })

  it('says with --boot which machine is off, and shows the boots of the others', async () => {
    await machines.stop('sigma')
    const { stdout, stderr, exitCode } = await run(checkout, script, ['--boot', '--json'])
    assert.equal(exitCode, 0, stderr)
    const boots: { name: string; events: { what: string }[]; reason: string }[] = JSON.parse(stdout)
    const of = (name: string) => boots.find((boot) => boot.name === name) ?? assert.fail()
    assert.match(of('sigma').reason, /sigma/)
    assert.deepEqual(of('sigma').events, [])
    assert.equal(of('gamma').reason, '')
    assert.ok(of('gamma').events.some(({ what }) => what === 'kernel'))
    const table = await run(checkout, script, ['--boot'])
    assert.match(table.stdout, /^sigma +sigma .*\ngamma +kernel/m)

    // When it was powered on is then unknown.
    await rename(checkout.path('run', 'gamma.pid'), checkout.path('run', 'gamma.away'))
    const without = await run(checkout, script, ['--boot'])
    await rename(checkout.path('run', 'gamma.away'), checkout.path('run', 'gamma.pid'))
    assert.match(without.stdout, /^gamma +kernel +0\.0 s/m, without.stderr)
  })

  it('asks all machines at once, and waits for one that hangs no longer than --timeout', async () => {
    for (const name of names)
      await machines.sshd(name).program('systemctl', '#!/bin/sh\nsleep 90\n')
    const report = await status('--timeout', '5')
    assert.ok(report.seconds < 20, `${report.seconds} s`)
    assert.deepEqual(
      report.problems,
      names.map((name) => `${name}: ${name} did not answer within 5 s`),
    )
    await machines.stop(...names)
  })

  it('says that the API server is down, and still shows the machines', async () => {
    await api.stop()
    const report = await status()
    assert.deepEqual(report.problems, [
      'API server: the API server does not answer: nothing listens there',
    ])
    assert.ok(machine(report, 'alpha').services.known)
    api = await startFakeApiServer(checkout)
  })
})
