import assert from 'node:assert/strict'
import { rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import { loadCluster } from '../../../lib/cluster.mts'
import { hostProxy, proxyFor } from '../../../lib/download/host-proxy.mts'
import { projectRoot } from '../../checkout.mts'

const authority = join(tmpdir(), `proxy-ca-${process.pid}.pem`)
before(() => writeFileSync(authority, '-----BEGIN CERTIFICATE-----\n'))
after(() => rmSync(authority, { force: true }))

const settings = {
  PROXY_HTTP: 'http://10.0.2.2:3128',
  PROXY_HTTPS: 'http://proxy.corp.test:3129',
  PROXY_NO: '.corp.test 192.168.7.0/24',
  PROXY_CA_FILE: authority,
}
const cluster = (env: Record<string, string>) => loadCluster({ root: projectRoot, env })

describe('the proxy of this computer', () => {
  it('is that of cluster.env, as seen from here', () => {
    assert.deepEqual(hostProxy(cluster(settings), {}), {
      http: 'http://127.0.0.1:3128',
      https: 'http://proxy.corp.test:3129',
      no: '.corp.test 192.168.7.0/24',
      caFile: authority,
    })
  })

  it('is that of the environment first, in small letters or capitals', () => {
    const env = {
      http_proxy: 'http://a.test:1',
      HTTPS_PROXY: 'http://b.test:2',
      NO_PROXY: 'c.test',
    }
    const { http, https, no } = hostProxy(cluster(settings), env)
    assert.deepEqual([http, https], ['http://a.test:1', 'http://b.test:2'])
    assert.equal(no, 'c.test,.corp.test 192.168.7.0/24')
  })

  it('is none where nothing is set', () => {
    assert.deepEqual(hostProxy(cluster({}), {}), { http: '', https: '', no: '', caFile: '' })
  })
})

describe('a request', () => {
  const proxy = { http: 'http://p.test:80', https: 's.test:3128', no: '', caFile: '' }
  const through = (url: string, no = '') => proxyFor(new URL(url), { ...proxy, no })?.href

  it('goes through the proxy of its scheme; a proxy may be given without one', () => {
    assert.equal(through('http://nixos.org/'), 'http://p.test/')
    assert.equal(through('https://nixos.org/'), 'http://s.test:3128/')
  })

  const bypassing: [no: string, url: string][] = [
    ['*', 'https://nixos.org'],
    ['nixos.org', 'https://nixos.org'],
    ['nixos.org', 'https://releases.nixos.org'],
    ['.nixos.org', 'https://releases.NixOS.org'],
    ['*.nixos.org', 'https://releases.nixos.org'],
    ['a.test, nixos.org', 'http://nixos.org'],
    ['nixos.org:8080', 'http://nixos.org:8080'],
    ['10.0.0.0/8', 'http://10.1.2.3'],
    ['127.0.0.1', 'http://127.0.0.1:8000'],
    ['::1', 'http://[::1]:8000'],
    ['[::1]:8000', 'http://[::1]:8000'],
  ]
  for (const [no, url] of bypassing) {
    it(`goes past it to ${url} with NO_PROXY=${no}`, () => {
      assert.equal(through(url, no), undefined)
    })
  }

  const proxied: [no: string, url: string][] = [
    ['', 'https://nixos.org'],
    ['os.org', 'https://nixos.org'],
    ['releases.nixos.org', 'https://nixos.org'],
    ['nixos.org:8080', 'http://nixos.org'],
    ['10.0.0.0/8', 'http://11.1.2.3'],
    ['0.0.1', 'http://127.0.0.1'],
  ]
  for (const [no, url] of proxied) {
    it(`goes through it to ${url} with NO_PROXY=${no}`, () => {
      assert.notEqual(through(url, no), undefined)
    })
  }

  it('is refused for a proxy of another kind, without telling its password', () => {
    const socks = { ...proxy, https: 'socks5://user:secret@p.test' }
    assert.throws(
      () => proxyFor(new URL('https://nixos.org'), socks),
      (error) =>
        /is no http:\/\/ or https:\/\/ address/.test(String(error)) &&
        !/secret/.test(String(error)),
    )
  })
})
