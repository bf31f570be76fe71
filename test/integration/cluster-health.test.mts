// cluster-health with answers of the API that the tests choose, and in a real terminal.
import assert from 'node:assert/strict'
import { after, afterEach, before, beforeEach, describe, it } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { type IPty, spawn } from 'node-pty'
import { plainText } from '../../lib/terminal.mts'
import { becomes } from '../../lib/wait.mts'
import { type FakeApiServer, nodeList, startFakeApiServer } from '../api-server.mts'
import { type Checkout, makeCheckout, run } from '../checkout.mts'

const metricsPath = '/apis/metrics.k8s.io/v1beta1/nodes'

/** Seconds for what takes a moment on a computer that is not busy. */
const limit = 60

describe('cluster-health', () => {
  let checkout: Checkout
  let api: FakeApiServer
  before(async () => {
    checkout = await makeCheckout({ keys: true })
    for (const step of ['certs', 'kubeconfigs']) {
      const made = await run(checkout, `bin/generate-${step}.mts`)
      assert.equal(made.exitCode, 0, made.stderr)
    }
  })
  after(() => checkout.remove())
  beforeEach(async () => {
    api = await startFakeApiServer(checkout)
    api.answers['/readyz'] = { body: 'readyz check passed' }
    api.answers['/api/v1/nodes'] = { body: nodes({ sigma: {}, gamma: { ready: false } }) }
    api.answers['/api/v1/pods'] = list('PodList', [pod('web-1', 'sigma')])
    api.answers['/api/v1/events'] = list('EventList', [])
  })
  afterEach(() => api.stop())

  const health = (...args: string[]) => run(checkout, 'bin/cluster-health.mts', args)
  const asJson = async (...args: string[]) => JSON.parse((await health('--json', ...args)).stdout)

  it('prints as JSON what is wrong, and asks the API server as the admin', async () => {
    const found = await asJson()
    assert.equal(found.healthy, false)
    assert.deepEqual(found.problems, [
      'machine alpha is stopped',
      'machine sigma is stopped',
      'machine gamma is stopped',
      'node gamma is not Ready: cni plugin not initialized',
    ])
    assert.equal(found.nodes.list.length, 2)
    assert.deepEqual([...new Set(api.askedBy)], ['admin'])
  })

  it('shows nodes, and pods with the reason why they are not ready, with --once', async () => {
    api.answers['/api/v1/nodes'] = {
      body: nodes({ sigma: { unschedulable: true }, gamma: { ready: false } }),
    }
    const crashing = pod('web-2', 'gamma', 'CrashLoopBackOff')
    const items = [pod('web-1', 'sigma'), crashing, pod('dns', 'sigma', '', 'kube-system')]
    api.answers['/api/v1/pods'] = list('PodList', items)
    const { stdout, exitCode } = await health('--once')
    assert.equal(exitCode, 0)
    assert.match(stdout, /^sigma +stopped +Ready, cordoned +2\/2/m)
    assert.match(stdout, /^gamma +stopped +NotReady +0\/1/m)
    assert.match(stdout, /^default +1\/2 +3$/m)
    assert.match(stdout, /^✗ pod default\/web-2: CrashLoopBackOff$/m)
  })

  it('shows what nodes use when metrics-server has measured it', async () => {
    const usage = { cpu: '500000000n', memory: '1048576Ki' }
    const measured = [{ metadata: { name: 'sigma' }, usage }]
    api.answers[metricsPath] = list('NodeMetricsList', measured, 'metrics.k8s.io/v1beta1')
    const { stdout } = await health('--once')
    assert.match(stdout, /^sigma .* 500m \(25%\) +1024Mi \(25%\)$/m)
    assert.match(stdout, /^gamma .* \? +\?$/m)
    assert.doesNotMatch(stdout, /make metrics/)
  })

  it('says what usage needs when there is none', async () => {
    const { stdout } = await health('--once')
    assert.match(stdout, /^usage: Metrics API not available \(make metrics\)$/m)
  })

  it('shows the last events first, whichever of their fields has the time', async () => {
    const ago = (seconds: number) => new Date(Date.now() - seconds * 1000).toISOString()
    const object = { kind: 'Pod', namespace: 'default', name: 'web-1' }
    const event = (reason: string, times: object) => ({
      ...{ metadata: { creationTimestamp: ago(9000) }, involvedObject: object },
      ...{ type: 'Normal', reason, message: `${reason}\nhas happened`, ...times },
    })
    const items = [
      event('Oldest', { firstTimestamp: ago(5000), lastTimestamp: null, eventTime: null }),
      event('Newest', { series: { count: 7, lastObservedTime: ago(10) }, eventTime: ago(8000) }),
      event('Middle', { lastTimestamp: ago(100), count: 3 }),
    ]
    api.answers['/api/v1/events'] = list('EventList', items)
    const { stdout } = await health('--once', '--events', '2')
    assert.match(
      stdout,
      /\d+s +Normal +pod default\/web-1 +Newest \(7x\) +Newest has happened\n.*Middle \(3x\)/,
    )
    assert.doesNotMatch(stdout, /Oldest/)
  })

  it('says for each part that the API server does not answer', async () => {
    await api.stop()
    const found = await asJson()
    assert.match(found.api.reason, /nothing listens there/)
    assert.equal(found.pods.known, false)
    const { stdout, exitCode } = await health('--once')
    assert.equal(exitCode, 0)
    assert.match(stdout, /^nodes: .*nothing listens there/m)
    api = await startFakeApiServer(checkout)
  })

  it('shows it once where there is no terminal', async () => {
    const { stdout, stderr, exitCode } = await health()
    assert.equal(exitCode, 0)
    assert.match(stdout, /^sigma +stopped +Ready/m)
    assert.equal(stderr, '')
  })

  it('refuses unknown flags, arguments and numbers that are none', async () => {
    const outcomes = [health('--often'), health('sigma'), health('--interval', 'often')]
    for (const { exitCode } of await Promise.all(outcomes)) assert.equal(exitCode, 2)
  })

  describe('in a terminal', () => {
    const terminals: IPty[] = []
    after(() => {
      for (const pty of terminals) pty.kill()
    })

    /** A terminal in which a shell starts it, and then compares the terminal's settings. */
    function terminal(flags = '--interval 0.1', TERM = 'xterm') {
      const line = `stty -g >before; echo $$ >shell; ./bin/cluster-health.mts ${flags}; echo "status $?"; stty -g | cmp - before && echo "as before"`
      const size = { cols: 160, rows: 40 }
      const env = { ...process.env, TERM } as Record<string, string>
      const pty = spawn('bash', ['-mc', line], { cwd: checkout.root, env, ...size })
      terminals.push(pty)
      let raw = ''
      pty.onData((data) => {
        raw += data
      })
      const shows = (what: RegExp, from = 0) =>
        becomes(() => what.test(plainText(raw.slice(from))), limit)
      return { pty, shows, text: () => plainText(raw), raw: () => raw, length: () => raw.length }
    }
    type Terminal = ReturnType<typeof terminal>

    async function assertRestored(shown: Terminal, status: number): Promise<void> {
      const end = new RegExp(`status ${status}[\\s\\S]*as before`)
      assert.ok(await shown.shows(end), shown.text())
      assert.ok(shown.raw().lastIndexOf('\x1b[?25h') > shown.raw().lastIndexOf('\x1b[?25l'))
    }

    /** The process that bash -m has made the leader of a group of its own. */
    async function pidOf(): Promise<number> {
      const { stdout } = await run(checkout, 'sh', ['-c', 'pgrep -P $(cat shell)'])
      return Number(stdout.trim())
    }

    it('shows what changes, until q is pressed', async () => {
      const shown = terminal()
      assert.ok(await shown.shows(/gamma +stopped +NotReady/), shown.text())
      const before = shown.length()
      api.answers['/api/v1/nodes'] = { body: nodes({ sigma: {}, gamma: {} }) }
      assert.ok(await shown.shows(/gamma +stopped +Ready/, before), shown.text())
      shown.pty.write('q')
      await assertRestored(shown, 0)
    })

    it('shows and asks nothing while it is paused, and resumes', async () => {
      const shown = terminal()
      assert.ok(await shown.shows(/gamma +stopped +NotReady/), shown.text())
      shown.pty.write('p')
      assert.ok(await shown.shows(/paused, p resumes/), shown.text())
      const paused = shown.length()
      api.answers['/api/v1/nodes'] = { body: nodes({ sigma: {}, gamma: {} }) }
      // Requests that are under way when the key is pressed come to their end.
      let before = -1
      const calm = async () => {
        const same = api.requests.length === before
        before = api.requests.length
        await sleep(1000)
        return same
      }
      assert.ok(await becomes(calm, limit), 'it still asks')
      assert.doesNotMatch(plainText(shown.raw().slice(paused)), /gamma +stopped +Ready/)
      shown.pty.write('p')
      assert.ok(await shown.shows(/gamma +stopped +Ready/, paused), shown.text())
      shown.pty.write('q')
      await assertRestored(shown, 0)
    })

    it('gives the terminal back after Ctrl-C', async () => {
      const shown = terminal()
      assert.ok(await shown.shows(/gamma +stopped/), shown.text())
      shown.pty.write('\x03')
      await assertRestored(shown, 130)
    })

    it('gives the terminal back when it is ended from outside', async () => {
      const shown = terminal()
      assert.ok(await shown.shows(/gamma +stopped/), shown.text())
      process.kill(await pidOf(), 'SIGTERM')
      await assertRestored(shown, 143)
    })

    it('gives the terminal back after an error', async () => {
      const shown = terminal()
      assert.ok(await shown.shows(/gamma +stopped/), shown.text())
      api.answers['/api/v1/nodes'] = list('NodeList', [{ metadata: {} }])
      await assertRestored(shown, 1)
    })

    it('ends at a key even while an answer is missing', async () => {
      const shown = terminal('--interval 0.1 --timeout 300')
      assert.ok(await shown.shows(/gamma +stopped/), shown.text())
      api.answers['/api/v1/pods'] = { body: '', held: true }
      assert.ok(await becomes(() => api.held.length > 0, limit), 'nothing was asked')
      shown.pty.write('q')
      await assertRestored(shown, 0)
    })

    it('shows it once, in plain lines, in a terminal that cannot redraw', async () => {
      const shown = terminal('', 'dumb')
      assert.ok(await shown.shows(/status 0[\s\S]*as before/), shown.text())
      assert.match(shown.raw(), /^sigma +stopped +Ready/m)
      assert.ok(!shown.raw().includes('\x1b'), shown.raw())
    })

    it('shows that nothing answers', async () => {
      await api.stop()
      const shown = terminal()
      assert.ok(await shown.shows(/nodes: .*nothing listens there/), shown.text())
      shown.pty.write('q')
      await assertRestored(shown, 0)
      api = await startFakeApiServer(checkout)
    })
  })
})

function nodes(of: Record<string, { ready?: boolean; unschedulable?: boolean }>): string {
  const ready = Object.entries(of).map(([name, { ready = true }]) => [name, { ready }] as const)
  const list = JSON.parse(nodeList(Object.fromEntries(ready)))
  for (const item of list.items) {
    item.spec = { unschedulable: of[item.metadata.name]?.unschedulable }
    item.status.allocatable = { cpu: '2', memory: '4194304Ki' }
  }
  return JSON.stringify(list)
}

function list(kind: string, items: object[], apiVersion = 'v1'): { body: string } {
  return { body: JSON.stringify({ kind, apiVersion, items }) }
}

function pod(name: string, nodeName: string, waiting = '', namespace = 'default'): object {
  const status = waiting ? 'False' : 'True'
  const state = waiting ? { waiting: { reason: waiting } } : { running: {} }
  return {
    metadata: { namespace, name },
    spec: { nodeName },
    status: {
      phase: 'Running',
      conditions: [{ type: 'Ready', status }],
      containerStatuses: [{ restartCount: waiting ? 3 : 0, state }],
    },
  }
}
