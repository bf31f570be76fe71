import assert from 'node:assert/strict'
import { describe, it } from 'node:test'
import { loadCluster } from '../../../lib/cluster.mts'
import {
  assess,
  componentsOf,
  type MachineState,
  type Measured,
  type Row,
} from '../../../lib/kubernetes/readiness.mts'
import {
  type ApiState,
  type NodeState,
  type ServiceState,
  servicesOf,
} from '../../../lib/machine/probes.mts'

const cluster = loadCluster({ env: {} })

const registered = (ready: boolean): NodeState => ({
  ready,
  reason: ready ? '' : 'cni plugin not initialized',
  address: '192.168.100.11',
  kubelet: 'v1.36.3',
  runtime: 'containerd://2.1.9',
})

const api = (nodes: Record<string, NodeState>): ApiState => ({
  ready: true,
  reason: '',
  nodes: new Map(Object.entries(nodes)),
})

/** All machines with every service healthy, but for those that a test names. */
function measured(
  options: {
    api?: ApiState
    broken?: Record<string, string>
    unreachable?: string[]
    clocks?: Record<string, number>
  } = {},
): Measured {
  const { broken = {}, unreachable = [], clocks = {} } = options
  const machines: Measured['machines'] = new Map(
    cluster.nodes.map((node): [string, MachineState] => {
      const { name } = node
      if (unreachable.includes(name)) return [name, { unreachable: `${name} does not answer ssh` }]
      const states: ServiceState[] = servicesOf(cluster, node).map(({ unit }) => {
        const reason = broken[unit] ?? ''
        return { unit, healthy: reason === '', reason, restarts: 0 }
      })
      return [name, { services: states, clock: clocks[name] ?? 0 }]
    }),
  )
  return {
    api: options.api ?? api({ sigma: registered(false), gamma: registered(false) }),
    machines,
  }
}

const rowsOf = (now: Measured, nodesReady = false): Map<string, Row> =>
  new Map(assess(componentsOf(cluster, nodesReady), now, [], 0).map((row) => [row.name, row]))

describe('the rows of the dashboard', () => {
  it('are the four control plane components and every worker', () => {
    assert.deepEqual(
      componentsOf(cluster).map(({ name }) => name),
      ['API server', 'etcd', 'controller-manager', 'scheduler', 'sigma', 'gamma'],
    )
  })

  it('are all waiting before anything was measured', () => {
    const rows = [...rowsOf({ machines: new Map() }).values()]
    assert.ok(rows.every(({ active, reason }) => !active && reason === 'not asked yet'))
  })

  it('are all active when every endpoint is well and the workers have registered', () => {
    assert.ok([...rowsOf(measured()).values()].every(({ active }) => active))
  })

  it('tell what a machine that does not answer leaves unknown', () => {
    const rows = rowsOf(measured({ unreachable: ['sigma'] }))
    assert.equal(rows.get('sigma')?.reason, 'sigma does not answer ssh')
    assert.equal(rows.get('sigma')?.unreachable, true)
    assert.equal(rows.get('gamma')?.active, true)
  })

  it('tell a unit that does not run, rather than the port where nobody listens', () => {
    const silent: ApiState = { ready: false, reason: 'nothing listens there' }
    const unit = 'kube-apiserver is activating (auto-restart, exit-code)'
    const rows = rowsOf(measured({ api: silent, broken: { 'kube-apiserver': unit } }))
    assert.equal(rows.get('API server')?.reason, unit)
    assert.equal(rowsOf(measured({ api: silent })).get('API server')?.reason, silent.reason)
  })

  it('call the API server active by its own answer, even while its machine is not asked yet', () => {
    assert.equal(rowsOf({ api: api({}), machines: new Map() }).get('API server')?.active, true)
  })

  it('tell a worker whose kubelet is not healthy', () => {
    const rows = rowsOf(measured({ broken: { kubelet: 'kubelet is failed (failed)' } }))
    assert.equal(rows.get('sigma')?.reason, 'kubelet is failed (failed)')
  })

  it('tell a worker whose kubelet runs but has not registered', () => {
    const rows = rowsOf(measured({ api: api({ sigma: registered(true) }) }))
    assert.equal(rows.get('sigma')?.active, true)
    assert.match(rows.get('gamma')?.reason ?? '', /not registered/)
  })

  it('do not know of a worker while the API server cannot be asked', () => {
    const rows = rowsOf(measured({ api: { ready: false, reason: 'not ready: etcd' } }))
    assert.match(rows.get('sigma')?.reason ?? '', /API server cannot be asked/)
  })

  it('let a worker without pod network count, unless it is to be Ready', () => {
    assert.equal(rowsOf(measured()).get('sigma')?.active, true)
    const row = rowsOf(measured(), true).get('sigma')
    assert.equal(row?.reason, 'not Ready: cni plugin not initialized')
  })

  it('tell of a clock that is wrong, as certificates fail by it, but not while all is well', () => {
    const years = 2 * 365 * 86_400
    const broken = { kubelet: 'kubelet is activating (auto-restart, exit-code)' }
    const rows = rowsOf(measured({ broken, clocks: { sigma: -years, gamma: 20 } }))
    assert.equal(
      rows.get('sigma')?.reason,
      `${broken.kubelet}; the clock of sigma is 730 days behind this computer's`,
    )
    assert.equal(rows.get('gamma')?.reason, broken.kubelet)
    assert.equal(rowsOf(measured({ clocks: { sigma: years } })).get('sigma')?.reason, '')
  })

  it('keep the time of a row while its state is the same, whatever the reason', () => {
    const components = componentsOf(cluster)
    const first = assess(components, measured({ unreachable: ['sigma'] }), [], 1000)
    const second = assess(components, measured({ broken: { kubelet: 'x' } }), first, 2000)
    const third = assess(components, measured(), second, 3000)
    const times = [first, second, third].map((rows) => rows.find((r) => r.name === 'sigma')?.since)
    assert.deepEqual(times, [1000, 1000, 3000])
  })
})
