import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import { mkdir, mkdtemp, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import { type Cluster, loadCluster } from '../../../lib/cluster.mts'
import { stagedFiles, targetOf } from '../../../lib/staging/staged-files.mts'
import { clusterJson, stage, stagedArchive, stagingFolder } from '../../../lib/staging/staging.mts'
import { type Checkout, makeCheckout } from '../../checkout.mts'

const isSecret = (path: string) => /-key\.pem$|\.kubeconfig$|encryption-config|_key$/.test(path)

describe('the table of staged files', () => {
  let checkout: Checkout
  let cluster: Cluster
  const targets = (name: string, of = cluster) =>
    stagedFiles(of, of.node(name)).map(({ target }) => target)
  before(async () => {
    checkout = await makeCheckout()
    cluster = loadCluster({ root: checkout.root, env: {} })
  })
  after(() => checkout.remove())

  it('gives the key of the CA to the control plane only', () => {
    const holders = cluster.nodes.filter(({ name }) =>
      targets(name).includes('/var/lib/kubernetes/pki/ca-key.pem'),
    )
    assert.deepEqual(
      holders.map(({ name }) => name),
      ['alpha'],
    )
  })

  it("gives a worker its own key and kubeconfig, and no other machine's", () => {
    assert.deepEqual(targets('sigma').filter(isSecret).sort(), [
      '/etc/ssh/ssh_host_ed25519_key',
      '/var/lib/kubernetes/pki/sigma-key.pem',
      '/var/lib/kubernetes/sigma.kubeconfig',
    ])
  })

  it("gives the administrator's kubeconfig to no machine", () => {
    for (const { name } of cluster.nodes) {
      assert.ok(!targets(name).some((target) => target.includes('admin')), name)
    }
  })

  it("gives kube-proxy's kubeconfig to workers on which it runs", () => {
    const kubeconfig = '/var/lib/kubernetes/kube-proxy.kubeconfig'
    const proxied = loadCluster({ root: checkout.root, env: { KUBE_PROXY_MODE: 'nftables' } })
    assert.ok(!targets('sigma').includes(kubeconfig))
    assert.ok(targets('sigma', proxied).includes(kubeconfig))
    assert.ok(!targets('alpha', proxied).includes(kubeconfig))
  })

  it('lets only the owner read what is secret', () => {
    for (const node of cluster.nodes) {
      for (const { target, mode } of stagedFiles(cluster, node)) {
        assert.equal(mode, isSecret(target) ? 0o600 : 0o644, target)
      }
    }
  })

  it('says where each staged file goes on the machine', () => {
    assert.equal(targetOf('cluster.json'), '/etc/nixos/cluster.json')
    assert.equal(targetOf('pki/ca.pem'), '/var/lib/kubernetes/pki/ca.pem')
    assert.equal(targetOf('kubeconfigs/a.kubeconfig'), '/var/lib/kubernetes/a.kubeconfig')
    assert.equal(targetOf('encryption-config.yaml'), '/var/lib/kubernetes/encryption-config.yaml')
    assert.equal(targetOf('ssh/ssh_host_ed25519_key'), '/etc/ssh/ssh_host_ed25519_key')
  })
})

describe('cluster.json', () => {
  const values = (name: string, env: Record<string, string> = {}) => {
    const cluster = loadCluster({ env: { ...env } })
    return clusterJson(cluster, cluster.node(name), [], {})
  }

  it("has the node's own cards and every node's addresses", () => {
    const { node, nodes, lanPrefixLength } = values('sigma', { LAN_CIDR: '192.168.96.0/20' })
    assert.equal(node.lanMac.replace(':01:', ':00:'), node.mac)
    assert.deepEqual(
      nodes.map(({ name, podCidr }) => [name, podCidr]),
      [
        ['alpha', null],
        ['sigma', '10.200.1.0/24'],
        ['gamma', '10.200.2.0/24'],
      ],
    )
    assert.equal(lanPrefixLength, 20)
  })

  it("keeps the cluster's own traffic away from the proxy, beside what PROXY_NO says", () => {
    const { proxy } = values('sigma', {
      PROXY_HTTP: 'http://10.0.2.2:3128',
      PROXY_NO: 'intra.example, 10.9.0.0/16',
    })
    assert.equal(proxy.https, 'http://10.0.2.2:3128')
    for (const entry of ['192.168.100.0/24', '10.32.0.0/24', '10.200.0.0/16', '.svc', 'gamma']) {
      assert.ok(proxy.no.includes(entry), entry)
    }
    assert.deepEqual(proxy.no.slice(-2), ['intra.example', '10.9.0.0/16'])
  })
})

describe('staging', () => {
  let checkout: Checkout
  let cluster: Cluster
  let umask: number
  const read = (...parts: string[]) =>
    readFile(join(stagingFolder(cluster, cluster.node('sigma')), ...parts), 'utf8')

  before(async () => {
    checkout = await makeCheckout()
    cluster = loadCluster({ root: checkout.root, env: {} })
    umask = process.umask(0o077)
    const sources = cluster.nodes.flatMap((node) => stagedFiles(cluster, node))
    const login = checkout.path('tls/ssh_ed25519.pub')
    for (const source of [login, ...sources.map((file) => file.source)]) {
      if (source.startsWith(checkout.path('configs')) && source.endsWith('.nix')) continue
      await mkdir(dirname(source), { recursive: true })
      await writeFile(source, `content of ${source.slice(checkout.root.length)}\n`)
    }
  })
  after(async () => {
    process.umask(umask)
    await checkout.remove()
  })

  it('writes every file of the table with its mode, whatever the umask', async () => {
    for (const node of cluster.nodes) {
      const staged = await stage(cluster, node)
      const table = stagedFiles(cluster, node)
      assert.deepEqual(staged.sort(), [...table.map((file) => file.staged), 'cluster.json'].sort())
      for (const { staged, source, mode } of table) {
        const path = join(stagingFolder(cluster, node), staged)
        assert.equal((await stat(path)).mode & 0o777, mode, staged)
        assert.deepEqual(await readFile(path), await readFile(source), staged)
      }
    }
  })

  it('lets the login key of the cluster in, without its private half', async () => {
    const { sshKeys } = JSON.parse(await read('cluster.json'))
    assert.deepEqual(sshKeys, ['content of /tls/ssh_ed25519.pub'])
  })

  it('leaves nothing beside the staged folder, and drops files that are no longer needed', async () => {
    const sigma = cluster.node('sigma')
    const folder = stagingFolder(cluster, sigma)
    await writeFile(join(folder, 'pki/old-key.pem'), 'old')
    // What a killed run leaves behind.
    await mkdir(`${folder}.new/pki`, { recursive: true })
    await mkdir(`${folder}.former`)
    await stage(cluster, sigma)
    assert.deepEqual(await readdir(dirname(folder)), ['nixos'])
    assert.deepEqual((await readdir(join(folder, 'pki'))).sort(), [
      'ca.pem',
      'sigma-key.pem',
      'sigma.pem',
    ])
  })

  it('changes the digest of what has changed, and no other', async () => {
    const before = JSON.parse(await read('cluster.json')).digests
    await writeFile(checkout.path('tls/sigma.pem'), 'renewed\n')
    await stage(cluster, cluster.node('sigma'))
    const after = JSON.parse(await read('cluster.json')).digests
    const changed = Object.keys(before).filter((name) => before[name] !== after[name])
    assert.deepEqual(changed, ['pki/sigma.pem'])
  })

  it('says which files are missing and what makes them, and keeps what was staged', async () => {
    const former = await read('cluster.json')
    await rm(checkout.path('tls/sigma-key.pem'))
    await rm(checkout.path('configs/sigma.kubeconfig'))
    await assert.rejects(stage(cluster, cluster.node('sigma')), (error: Error) => {
      assert.match(error.message, /sigma cannot be staged: 2 files are missing/)
      const { output, hint } = (error as Error & { explanation: Record<string, string> })
        .explanation
      assert.equal(output, 'tls/sigma-key.pem\nconfigs/sigma.kubeconfig')
      assert.equal(hint, './bin/generate-certs.mts\n./bin/generate-kubeconfigs.mts')
      return true
    })
    assert.equal(await read('cluster.json'), former)
  })

  it('stages the certificate of the proxy, and says so when it is not there', async () => {
    const file = checkout.path('proxy.pem')
    await writeFile(file, '-----BEGIN CERTIFICATE-----\n')
    const proxied = loadCluster({ root: checkout.root, env: { PROXY_CA_FILE: 'proxy.pem' } })
    const alpha = proxied.node('alpha')
    await rm(file)
    await assert.rejects(stage(proxied, alpha), /a file is missing/)
    await writeFile(file, '-----BEGIN CERTIFICATE-----\n')
    assert.ok((await stage(proxied, alpha)).includes('proxy-ca.pem'))
    const path = join(stagingFolder(proxied, alpha), 'cluster.json')
    assert.equal(JSON.parse(await readFile(path, 'utf8')).proxy.ca, true)
  })

  it('packs what is staged as it lies on the machine', async () => {
    const gamma = cluster.node('gamma')
    const root = await mkdtemp(join(tmpdir(), 'staging-'))
    await new Promise<void>((resolve, reject) => {
      const child = execFile('tar', ['-xzpf', '-', '-C', root], (error) =>
        error ? reject(error) : resolve(),
      )
      stagedArchive(cluster, gamma).then((data) => child.stdin?.end(data), reject)
    })
    for (const { target, source, mode } of stagedFiles(cluster, gamma)) {
      const path = join(root, target)
      assert.deepEqual(await readFile(path), await readFile(source), target)
      assert.equal((await stat(path)).mode & 0o777, mode, target)
    }
    assert.equal((await stat(join(root, 'etc/nixos'))).mode & 0o777, 0o755)
    assert.ok((await readFile(join(root, 'etc/nixos/cluster.json'))).length > 0)
    await rm(root, { recursive: true })
  })

  it('does not pack a node that is not staged', async () => {
    const gamma = cluster.node('gamma')
    await rm(stagingFolder(cluster, gamma), { recursive: true })
    await assert.rejects(stagedArchive(cluster, gamma), /gamma has no staged configuration/)
  })
})
