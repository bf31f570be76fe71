import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, it } from 'node:test'
import { loadCluster } from '../../../lib/cluster.mts'
import { StepError } from '../../../lib/errors.mts'
import { checkWorkerName, chooseAddresses } from '../../../lib/workers/new-worker.mts'
import { withoutWorker, withWorker } from '../../../lib/workers/worker-settings.mts'
import { projectRoot } from '../../checkout.mts'

const original = readFileSync(join(projectRoot, 'cluster.env'), 'utf8')
type Env = Record<string, string>
const load = (env: Env = {}, text = original) => loadCluster({ root: projectRoot, env, text })
const allFree = async () => true
const choose = (env: Env = {}, isFree: Parameters<typeof chooseAddresses>[2] = allFree) =>
  chooseAddresses(load(env), 'delta', isFree)

describe('addresses for a new worker', () => {
  it('follow those of the last one', async () => {
    assert.deepEqual(await choose(), {
      name: 'delta',
      sshPort: 2225,
      ip: '192.168.100.13',
      mac: '52:54:00:12:34:59',
      podCidr: '10.200.3.0/24',
    })
  })

  it('give a cluster without mistakes, again and again', async () => {
    let text = original
    for (const name of ['delta', 'epsilon', 'zeta-1', 'eta', 'theta']) {
      text = withWorker(text, await chooseAddresses(load({}, text), name, allFree))
    }
    assert.equal(load({}, text).workers.length, 7)
  })

  it('are those of one that was removed before', async () => {
    const with_ = withWorker(original, await choose())
    const again = await chooseAddresses(load({}, withoutWorker(with_, 'delta')), 'other', allFree)
    assert.equal(again.ip, '192.168.100.13')
  })

  it('leave out ports that are taken on this computer', async () => {
    const taken = ['tcp 2225', 'tcp 2226', 'udp 24113']
    const found = await choose({}, async (transport, port) => {
      return !taken.includes(`${transport} ${port}`)
    })
    assert.equal(found.sshPort, 2227)
    assert.equal(found.ip, '192.168.100.14')
  })

  it('leave out the port of the API server', async () => {
    assert.equal((await choose({ API_PORT: '2225' })).sshPort, 2226)
  })

  it('fill gaps when there is nothing above', async () => {
    const found = await choose({
      NODE_IP_gamma: '192.168.100.254',
      POD_CIDR_gamma: '10.200.255.0/24',
      MAC_gamma: '52:54:00:ff:ff:ff',
    })
    assert.equal(found.ip, '192.168.100.1')
    assert.equal(found.podCidr, '10.200.0.0/24')
    assert.equal(found.mac, '52:54:00:00:00:00')
  })

  it('are no MAC that another machine has on the lan', async () => {
    const found = await choose({
      MAC_alpha: '52:54:01:12:34:58',
      MAC_sigma: '52:54:00:12:34:59',
      MAC_gamma: '52:54:00:12:34:58',
    })
    // The highest is alpha's, and gamma's lan card has the same.
    assert.equal(found.mac, '52:54:01:12:34:5a')
  })

  it('are a range for pods of the size of the others', async () => {
    const env = { POD_CIDR_sigma: '10.200.0.0/26', POD_CIDR_gamma: '10.200.0.64/26' }
    assert.equal((await choose(env)).podCidr, '10.200.0.128/26')
  })

  it('are a range for pods that overlaps none of another size', async () => {
    const env = { POD_CIDR_sigma: '10.200.16.0/20', POD_CIDR_gamma: '10.200.1.0/24' }
    assert.equal((await choose(env)).podCidr, '10.200.32.0/24')
  })

  it('are refused where a range is full', async () => {
    const refused = (env: Env, reason: RegExp) =>
      assert.rejects(
        choose(env),
        (error) => error instanceof StepError && reason.test(error.message),
      )
    await refused(
      {
        LAN_CIDR: '192.168.100.0/29',
        NODE_IP_alpha: '192.168.100.1',
        NODE_IP_sigma: '192.168.100.2',
        NODE_IP_gamma: '192.168.100.3',
        K8S_POD_CIDR: '10.200.0.0/23',
        POD_CIDR_sigma: '10.200.0.0/24',
        POD_CIDR_gamma: '10.200.1.0/24',
      },
      /K8S_POD_CIDR \(10\.200\.0\.0\/23\) has no room for another \/24/,
    )
    await refused(
      {
        LAN_CIDR: '192.168.100.8/30',
        NODE_IP_alpha: '192.168.100.9',
        NODE_IP_sigma: '192.168.100.10',
        NODE_IP_gamma: '',
        WORKER_NODES: 'sigma',
      },
      /LAN_CIDR \(192\.168\.100\.8\/30\) has no address left/,
    )
  })
})

describe('the name of a new worker', () => {
  const refused = (name: string, reason: RegExp) =>
    assert.throws(
      () => checkWorkerName(load(), name),
      (error) =>
        error instanceof StepError &&
        error.explanation.exitCode === 2 &&
        reason.test(error.message),
    )

  it('may be any host name', () => {
    for (const name of ['delta', 'd', 'node-7', '7', 'a'.repeat(63)]) {
      checkWorkerName(load(), name)
    }
  })

  for (const name of [
    ...['', ' ', 'two words', '../delta', 'delta/x', 'Delta', 'del_ta', '-delta', 'delta-'],
    ...['délta', 'delta\n', 'a.b', 'a'.repeat(64), '$(reboot)'],
  ]) {
    it(`is not ${JSON.stringify(name)}`, () => refused(name, /a node cannot be named/))
  }

  it('is not that of a node', () => {
    refused('sigma', /there is a node "sigma" already: a worker/)
    refused('alpha', /there is a node "alpha" already: a control-plane/)
  })

  it('is not that of something else in the same folders', () => {
    for (const name of [
      'bootstrap',
      'lan-switch',
      'pki',
      'sigma-install',
      'sigma-key',
      'localhost',
    ])
      refused(name, /a node cannot be named/)
  })
})
