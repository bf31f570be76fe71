import assert from 'node:assert/strict'
import { afterEach, beforeEach, describe, it } from 'node:test'
import { loadCluster } from '../../lib/cluster.mts'
import { hostEnvironment, machineProxy } from '../../lib/proxy.mts'
import { projectRoot } from '../checkout.mts'

const settings = {
  PROXY_HTTP: 'http://10.0.2.2:3128',
  PROXY_HTTPS: 'http://proxy.corp.test:3129',
  PROXY_NO: '.corp.test 192.168.7.0/24',
}
const cluster = (env: Record<string, string>) => loadCluster({ root: projectRoot, env })

describe('the proxy of this computer', () => {
  const saved = { ...process.env }
  beforeEach(() => {
    for (const name of ['http_proxy', 'https_proxy', 'no_proxy']) {
      delete process.env[name]
      delete process.env[name.toUpperCase()]
    }
  })
  afterEach(() => {
    process.env = { ...saved }
  })

  it('is that of cluster.env, as seen from here', async () => {
    const found = await hostEnvironment(cluster(settings))
    assert.equal(found.http_proxy, 'http://127.0.0.1:3128')
    assert.equal(found.https_proxy, 'http://proxy.corp.test:3129')
    assert.equal(found.no_proxy, '.corp.test 192.168.7.0/24')
  })

  it('keeps an address that only contains that of the gateway', async () => {
    const { http_proxy } = await hostEnvironment(cluster({ PROXY_HTTP: 'http://110.0.2.25:3128' }))
    assert.equal(http_proxy, 'http://110.0.2.25:3128')
  })

  it('is PROXY_HTTP for https:// as well if PROXY_HTTPS is empty', async () => {
    const found = await hostEnvironment(cluster({ PROXY_HTTP: 'http://10.0.2.2:3128' }))
    assert.equal(found.https_proxy, 'http://127.0.0.1:3128')
  })

  it('is that of the environment first, in small letters or capitals', async () => {
    process.env.http_proxy = 'http://a.test:1'
    process.env.HTTPS_PROXY = 'http://b.test:2'
    process.env.NO_PROXY = 'c.test'
    const found = await hostEnvironment(cluster(settings))
    assert.equal(found.http_proxy, 'http://a.test:1')
    assert.equal(found.https_proxy, 'http://b.test:2')
    assert.equal(found.no_proxy, 'c.test,.corp.test 192.168.7.0/24')
  })

  it('is none where nothing is set', async () => {
    assert.deepEqual(await hostEnvironment(cluster({ PROXY_NO: '' })), {})
  })
})

describe('the proxy of the machines', () => {
  it("is not used for the cluster's own ranges, nor for those of PROXY_NO", () => {
    const { https, no } = machineProxy(cluster({ PROXY_HTTP: 'http://10.0.2.2:3128' }))
    assert.equal(https, 'http://10.0.2.2:3128')
    for (const range of ['192.168.100.0/24', '10.32.0.0/24', '10.200.0.0/16', '.svc']) {
      assert.ok(no.includes(range), range)
    }
    const given = machineProxy(cluster({ ...settings, PROXY_NO: 'intra.example, 10.9.0.0/16' }))
    assert.deepEqual(given.no.slice(-2), ['intra.example', '10.9.0.0/16'])
  })

  it('stays the same when a worker is added', () => {
    const fewer = machineProxy(cluster({ WORKER_NODES: 'sigma' }))
    assert.deepEqual(machineProxy(cluster({})), fewer)
  })
})
