import assert from 'node:assert/strict'
import { spawn as spawnProcess } from 'node:child_process'
import { once } from 'node:events'
import { writeFile } from 'node:fs/promises'
import { after, afterEach, before, beforeEach, describe, it } from 'node:test'
import { spawn as spawnInTerminal } from 'node-pty'
import { becomes } from '../../lib/wait.mts'
import { type FakeApiServer, failure, nodeList, startFakeApiServer } from '../api-server.mts'
import { type Checkout, makeCheckout, type Outcome, run } from '../checkout.mts'
import { HollowMachines } from '../hollow-machines.mts'
import { noQemu } from '../idle-qemu.mts'
import { noSshd } from '../sshd.mts'

const names = ['alpha', 'sigma', 'gamma']
const script = 'bin/wait-for-cluster.mts'

describe('wait-for-cluster', { skip: noSshd || noQemu }, () => {
  let checkout: Checkout
  let api: FakeApiServer
  let machines: HollowMachines
  const setConsole = (name: string, text: string) =>
    writeFile(checkout.path('images', `${name}-console.log`), text)

  before(async () => {
    checkout = await makeCheckout({ keys: true })
    for (const step of ['certs', 'kubeconfigs']) {
      const made = await run(checkout, `bin/generate-${step}.mts`)
      assert.equal(made.exitCode, 0, made.stderr)
    }
    machines = new HollowMachines(checkout)
    await machines.start(...names)
  })
  after(async () => {
    await machines?.stop(...names)
    await checkout?.remove()
  })
  beforeEach(async () => {
    api = await startFakeApiServer(checkout)
    api.answers['/readyz'] = { body: 'readyz check passed' }
    api.answers['/api/v1/nodes'] = {
      body: nodeList({ sigma: { ready: false }, gamma: { ready: false } }),
    }
  })
  afterEach(async () => {
    await api.stop()
    for (const name of names) {
      await machines.reset(name)
      await setConsole(name, '')
    }
    await machines.start(...names)
  })

  const components = ({ stdout }: Outcome) =>
    JSON.parse(stdout).components as {
      name: string
      machine: string
      state: string
      seconds: number
      reason: string
    }[]

  /** Starts it and returns once it has printed all of that; it is then ended. */
  async function prints(args: string[], ...patterns: RegExp[]): Promise<void> {
    const child = spawnProcess(checkout.path(script), args, { stdio: ['ignore', 'ignore', 'pipe'] })
    let printed = ''
    child.stderr.setEncoding('utf8').on('data', (text: string) => {
      printed += text
    })
    const all = () => patterns.every((pattern) => pattern.test(printed))
    const seen = await becomes(() => all() || child.exitCode !== null, 100)
    if (child.exitCode === null) {
      child.kill('SIGTERM')
      await once(child, 'exit')
    }
    assert.ok(seen && all(), printed)
  }

  it('succeeds when all are active, with a line for each', async () => {
    const { stderr, exitCode } = await run(checkout, script)
    assert.equal(exitCode, 0, stderr)
    for (const name of [
      'API server',
      'etcd',
      'controller-manager',
      'scheduler',
      'sigma',
      'gamma',
    ]) {
      assert.match(stderr, new RegExp(`^✓ ${name} +active`, 'm'))
    }
    assert.match(stderr, /✓ all are active/)
    assert.deepEqual([...new Set(api.askedBy)], ['admin'], 'asked the API server as the admin')
  })

  it('prints the states as JSON', async () => {
    const outcome = await run(checkout, script, ['--json'])
    assert.equal(JSON.parse(outcome.stdout).ready, true)
    assert.deepEqual(
      components(outcome).map(({ name, machine, state }) => [name, machine, state]),
      [
        ['API server', 'alpha', 'active'],
        ['etcd', 'alpha', 'active'],
        ['controller-manager', 'alpha', 'active'],
        ['scheduler', 'alpha', 'active'],
        ['sigma', 'sigma', 'active'],
        ['gamma', 'gamma', 'active'],
      ],
    )
  })

  it('waits for a service that starts later', async () => {
    await machines.set('alpha', 'broken-etcd')
    const waiting = run(checkout, script)
    await becomes(() => machines.asked('alpha'), 100)
    await machines.unset('alpha', 'broken-etcd')
    const { stderr, exitCode } = await waiting
    assert.equal(exitCode, 0, stderr)
    assert.match(stderr, /• etcd +waiting .*etcd is activating \(auto-restart, exit-code\)/)
    assert.match(stderr, /✓ etcd +active/)
  })

  it('gives up in the end, and says what is missing and why', async () => {
    await machines.set('alpha', 'ill-kube-scheduler')
    await machines.set('alpha', 'gone-etcd')
    await machines.set('sigma', 'absent-kubelet')
    await machines.sshd('gamma').stop()
    await setConsole('gamma', 'A start job is running for /dev/vda2 (1min / no limit)\r\n')
    api.answers['/readyz'] = { status: 500, body: '[+]ping ok\n[-]etcd failed: reason withheld\n' }
    // How much it has seen by then depends on the computer's speed.
    let outcome: Outcome | undefined
    for (const seconds of [4, 20, 80]) {
      outcome = await run(checkout, script, ['--timeout', String(seconds), '--json'])
      assert.equal(outcome.exitCode, 1)
      assert.match(outcome.stderr, new RegExp(`: not all are active after ${seconds} s\\n`))
      if (components(outcome).every(({ reason }) => reason !== 'not asked yet')) break
    }
    assert.ok(outcome)
    const found = new Map(components(outcome).map((row) => [row.name, row]))
    const reasons = [...found].map(
      ([name, { reason }]) => [name, reason.replace(/\d{4,}/, 'N')] as const,
    )
    const silent =
      'gamma does not answer ssh: ssh: connect to host 127.0.0.1 port N: Connection refused'
    assert.deepEqual(reasons, [
      ['API server', 'not ready: etcd'],
      ['etcd', 'etcd is not healthy: Connection refused'],
      ['controller-manager', ''],
      ['scheduler', 'kube-scheduler is not healthy: HTTP 503 [-]leaderElection failed'],
      ['sigma', 'the program of kubelet is missing on the machine'],
      ['gamma', silent],
    ])
    const { seconds } = JSON.parse(outcome.stdout)
    assert.ok((found.get('etcd')?.seconds ?? 0) >= seconds - 1, 'for how long it has been missing')
    for (const [name, reason] of reasons) {
      const line = `| ${name}: ${reason.replace(/ N:.*/, '')}`
      assert.equal(outcome.stderr.includes(line), reason !== '', line)
    }
    assert.match(outcome.stderr, /the console of gamma:\n.*A start job is running for \/dev\/vda2/)
    await machines.stop('gamma')
  })

  it('prefers the state of a unit to the port on which nothing listens', async () => {
    await api.stop()
    const nothing = /• API server .*nothing listens there/
    await prints(['alpha'], nothing, /✓ etcd +active/)
    await machines.set('alpha', 'broken-kube-apiserver')
    await prints(
      ['alpha'],
      /• API server .*kube-apiserver is activating \(auto-restart, exit-code\)/,
    )
    await prints(['gamma'], /• gamma .*kubelet runs; the API server does not answer yet/)
    api = await startFakeApiServer(checkout)
  })

  it('waits until the workers have registered', async () => {
    api.answers['/api/v1/nodes'] = { body: nodeList({ sigma: { ready: false } }) }
    await prints([], /✓ sigma +active/, /• gamma .*kubelet runs, but has not registered/)
  })

  it('says when the clock of a machine is why certificates are refused', async () => {
    await machines.set('alpha', 'ahead-730')
    api.answers['/readyz'] = failure(401, 'Unauthorized', 'Unauthorized')
    const reason = /does not accept the admin certificate; the clock of alpha is 730 days ahead/
    await prints([], reason, /✓ etcd +active/)
  })

  it('waits for the named machines alone, if any are named', async () => {
    await machines.set('alpha', 'broken-etcd')
    await machines.set('gamma', 'broken-kubelet')
    const outcome = await run(checkout, script, ['sigma', '--json'])
    assert.equal(outcome.exitCode, 0, outcome.stderr)
    assert.deepEqual(
      components(outcome).map(({ name }) => name),
      ['sigma'],
    )
  })

  it('waits with --ready until the workers are Ready', async () => {
    await prints(['--ready'], /• sigma .*not Ready: cni plugin not initialized/)
    api.answers['/api/v1/nodes'] = {
      body: nodeList({ sigma: { ready: true }, gamma: { ready: true } }),
    }
    assert.equal((await run(checkout, script, ['--ready'])).exitCode, 0)
  })

  it('gives up at once when a machine does not run', async () => {
    await machines.stop('sigma')
    const { stderr, exitCode } = await run(checkout, script)
    assert.equal(exitCode, 1)
    assert.match(stderr, /sigma will not start: its QEMU is not running/)
    assert.match(stderr, /hint: +make boot-sigma/)
  })

  it('gives up at once when the kernel of a machine has panicked', async () => {
    await machines.sshd('sigma').stop()
    await setConsole(
      'sigma',
      '[  3.1] Kernel panic - not syncing: VFS: Unable to mount root fs\r\n',
    )
    const { stderr, exitCode } = await run(checkout, script)
    assert.equal(exitCode, 1)
    assert.match(stderr, /sigma will not start: Kernel panic - not syncing: VFS/)
    await machines.stop('sigma')
  })

  it('ends with the status of the signal after Ctrl-C, and leaves no command behind', async () => {
    api.answers['/readyz'] = { body: '', held: true }
    const child = spawnProcess(checkout.path(script), [], { stdio: ['ignore', 'ignore', 'pipe'] })
    const ended = once(child, 'exit')
    await becomes(() => api.held.length > 0, 100)
    child.kill('SIGINT')
    assert.deepEqual(await ended, [130, null])
    // With their environments, which name the checkout.
    const { stdout } = await run(checkout, 'ps', ['axeww'])
    const left = stdout.split('\n').filter((line) => line.includes(`KUBECONFIG=${checkout.root}`))
    assert.deepEqual(left, [])
  })

  it('redraws its rows in a terminal, and prints plain lines in one that cannot', async () => {
    const inTerminal = async (TERM: string) => {
      const env = { ...process.env, TERM } as Record<string, string>
      const pty = spawnInTerminal(checkout.path(script), [], { cols: 200, rows: 40, env })
      let printed = ''
      pty.onData((data) => {
        printed += data
      })
      await new Promise((resolve) => pty.onExit(resolve))
      return printed
    }
    const [live, dumb] = await Promise.all([inTerminal('xterm'), inTerminal('dumb')])
    assert.ok(live.includes('\x1b[6A'), live)
    assert.ok(!dumb.includes('\x1b'), dumb)
    assert.match(dumb, /^✓ gamma +active.*\r\n/m)
  })

  it('refuses unknown nodes and numbers that are none', async () => {
    const outcomes = [
      run(checkout, script, ['--timeout', 'soon']),
      run(checkout, script, ['nobody']),
    ]
    for (const { exitCode } of await Promise.all(outcomes)) assert.equal(exitCode, 2)
  })
})
