import assert from 'node:assert/strict'
import { writeFile } from 'node:fs/promises'
import { after, afterEach, before, beforeEach, describe, it } from 'node:test'
import { loadCluster } from '../../lib/cluster.mts'
import { becomes } from '../../lib/wait.mts'
import { type FakeApiServer, nodeList, startFakeApiServer } from '../api-server.mts'
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
  const consoleSays = (name: string, text: string) =>
    writeFile(checkout.path('images', `${name}-console.log`), text)

  before(async () => {
    checkout = await makeCheckout()
    const made = await run(checkout, 'bin/generate-certs.mts')
    assert.equal(made.exitCode, 0, made.stderr)
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
      await consoleSays(name, '')
      await machines.start(name)
    }
  })

  const components = (outcome: Outcome) =>
    JSON.parse(outcome.stdout).components as {
      name: string
      state: string
      reason: string
      machine: string
    }[]
  const reasonOf = (outcome: Outcome, name: string) =>
    components(outcome).find((row) => row.name === name)?.reason

  /**
   * Lets it give up, and checks what it then says. How much it has seen by that time depends on the
   * host's speed, so it gets more time if need be.
   */
  async function gaveUp(args: string[], check: (outcome: Outcome, seconds: number) => void) {
    for (const seconds of [4, 20, 80]) {
      const limit = ['--timeout', String(seconds), '--json']
      const outcome = await run(checkout, script, [...args, ...limit])
      try {
        assert.equal(outcome.exitCode, 1)
        return check(outcome, seconds)
      } catch (error) {
        if (seconds === 80) throw error
      }
    }
  }

  it('ends well when all are active, with a line for each', async () => {
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
  })

  it('asks the API server as the admin', async () => {
    await run(checkout, script)
    assert.deepEqual([...new Set(api.askedBy)], ['admin'])
  })

  it('tells the states as JSON', async () => {
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

  it('waits for a service that comes later', async () => {
    await machines.set('alpha', 'broken-etcd')
    const waiting = run(checkout, script)
    await becomes(() => machines.asked('alpha'), 100)
    await machines.unset('alpha', 'broken-etcd')
    const { stderr, exitCode } = await waiting
    assert.equal(exitCode, 0, stderr)
    assert.match(stderr, /• etcd +waiting .*etcd is activating \(auto-restart, exit-code\)/)
    assert.match(stderr, /✓ etcd +active/)
  })

  it('gives up in the end, and says who was missing and why', async () => {
    await machines.set('alpha', 'ill-kube-scheduler')
    await machines.set('alpha', 'gone-etcd')
    api.answers['/readyz'] = { status: 500, body: '[+]ping ok\n[-]etcd failed: reason withheld\n' }
    await gaveUp([], (outcome, seconds) => {
      const missing = `not active after ${seconds} s: API server, etcd, scheduler, sigma, gamma`
      assert.match(outcome.stderr, new RegExp(missing))
      assert.equal(reasonOf(outcome, 'API server'), 'not ready: etcd')
      assert.equal(
        reasonOf(outcome, 'scheduler'),
        'kube-scheduler is not healthy: HTTP 503 [-]leaderElection failed',
      )
      assert.equal(reasonOf(outcome, 'etcd'), 'etcd is not healthy: Connection refused')
      assert.equal(reasonOf(outcome, 'controller-manager'), '')
    })
  })

  it('says when programs are missing on a machine', async () => {
    await machines.set('sigma', 'absent-kubelet')
    await gaveUp([], (outcome) => {
      assert.equal(reasonOf(outcome, 'sigma'), 'the program of kubelet is missing on the machine')
      assert.equal(reasonOf(outcome, 'gamma'), '')
    })
  })

  it('says when the clock of a machine is why certificates are refused', async () => {
    await machines.set('alpha', 'ahead-730')
    api.answers['/readyz'] = { status: 401, body: '{"reason":"Unauthorized"}' }
    const reason = /does not accept the admin certificate .*; the clock of alpha is 730 days ahead/
    await gaveUp([], (outcome) => assert.match(reasonOf(outcome, 'API server') ?? '', reason))
  })

  it('says when Secrets are encrypted with another key than the API server has', async () => {
    api.answers['/readyz'] = { status: 500, body: '[+]ping ok\n[-]informer-sync failed: 1\n' }
    const message = 'Internal error occurred: unable to transform key "/registry/secrets/x"'
    api.answers['/api/v1/secrets'] = { status: 500, body: JSON.stringify({ message }) }
    const reason = /not ready: Secrets in etcd are encrypted with another key/
    await gaveUp([], (outcome) => assert.match(reasonOf(outcome, 'API server') ?? '', reason))
  })

  it('waits for no other machines than those that are named, if any are', async () => {
    await machines.set('alpha', 'broken-etcd')
    await machines.set('gamma', 'broken-kubelet')
    const outcome = await run(checkout, script, ['sigma', '--json'])
    assert.equal(outcome.exitCode, 0, outcome.stderr)
    assert.deepEqual(
      components(outcome).map(({ name }) => name),
      ['sigma'],
    )
  })

  it('names an API server that is down while the rest is up', async () => {
    await api.stop()
    await gaveUp([], (outcome) => {
      assert.match(reasonOf(outcome, 'API server') ?? '', /nothing listens there/)
      assert.equal(reasonOf(outcome, 'etcd'), '')
    })
    api = await startFakeApiServer(checkout)
  })

  it('waits with --ready until the workers are Ready', async () => {
    await gaveUp(['--ready'], (outcome) => {
      assert.equal(reasonOf(outcome, 'sigma'), 'not Ready: cni plugin not initialized')
    })
    api.answers['/api/v1/nodes'] = {
      body: nodeList({ sigma: { ready: true }, gamma: { ready: true } }),
    }
    assert.equal((await run(checkout, script, ['--ready'])).exitCode, 0)
  })

  it('names a worker that never comes, with its last console lines', async () => {
    await machines.sshd('gamma').stop()
    await consoleSays('gamma', 'A start job is running for /dev/vda2 (1min / no limit)\r\n')
    await gaveUp([], ({ stderr }, seconds) => {
      assert.match(stderr, new RegExp(`not active after ${seconds} s: gamma`))
      assert.match(stderr, /gamma does not answer ssh: .*refused/)
      assert.match(stderr, /the console of gamma:\n.*A start job is running for \/dev\/vda2/)
    })
    await machines.stop('gamma')
  })

  it('gives up at once when a machine does not run', async () => {
    await machines.stop('sigma')
    const { stderr, exitCode } = await run(checkout, script)
    assert.equal(exitCode, 1)
    assert.match(stderr, /sigma will not come: its QEMU is not running/)
    assert.match(stderr, /hint: +make boot-sigma/)
  })

  it('gives up at once when the kernel of a machine has panicked', async () => {
    await machines.sshd('sigma').stop()
    await consoleSays(
      'sigma',
      '[  3.1] Kernel panic - not syncing: VFS: Unable to mount root fs\r\n',
    )
    const { stderr, exitCode } = await run(checkout, script)
    assert.equal(exitCode, 1)
    assert.match(stderr, /sigma will not come: Kernel panic - not syncing: VFS/)
    await machines.stop('sigma')
  })

  it('does not take another cluster for ours', async () => {
    const other = await makeCheckout()
    await run(other, 'bin/generate-certs.mts')
    await api.stop()
    await other.set({ API_PORT: loadCluster({ root: checkout.root, env: {} }).settings.API_PORT })
    const stranger = await startFakeApiServer(other)
    const reason = /not of this cluster's CA/
    await gaveUp([], (outcome) => assert.match(reasonOf(outcome, 'API server') ?? '', reason))
    await stranger.stop()
    await other.remove()
    api = await startFakeApiServer(checkout)
  })

  it('refuses what it does not know', async () => {
    assert.equal((await run(checkout, script, ['--timeout', 'soon'])).exitCode, 2)
    assert.equal((await run(checkout, script, ['nobody'])).exitCode, 2)
  })
})
