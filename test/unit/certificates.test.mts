import assert from 'node:assert/strict'
import { describe, it } from 'node:test'
import { authorityOf, certificatesOf } from '../../lib/certificates.mts'
import { loadCluster } from '../../lib/cluster.mts'
import { reservedFor } from '../../lib/nodes.mts'

const load = (env: Record<string, string> = {}) => loadCluster({ env })
const rowOf = (name: string, env?: Record<string, string>) => {
  const row = certificatesOf(load(env)).find((entry) => entry.name === name)
  assert.ok(row, `no row ${name}`)
  return row
}

describe('the table of certificates', () => {
  it('has the subjects that Kubernetes expects', () => {
    const identities = [authorityOf(load()), ...certificatesOf(load())].map(
      ({ name, subject: { CN, O, OU } }) => `${name}: ${CN} / ${O ?? '-'} / ${OU}`,
    )
    const unit = 'Kubernetes The Hardest Way'
    assert.deepEqual(identities, [
      'ca: Kubernetes / Kubernetes / CA',
      `admin: admin / system:masters / ${unit}`,
      `sigma: system:node:sigma / system:nodes / ${unit}`,
      `gamma: system:node:gamma / system:nodes / ${unit}`,
      `kube-controller-manager: system:kube-controller-manager / system:kube-controller-manager / ${unit}`,
      `kube-scheduler: system:kube-scheduler / system:kube-scheduler / ${unit}`,
      `kube-proxy: system:kube-proxy / system:node-proxier / ${unit}`,
      `kubernetes: kubernetes / Kubernetes / ${unit}`,
      `service-account: service-accounts / - / ${unit}`,
      `front-proxy-client: front-proxy-client / - / ${unit}`,
      `metrics-server: metrics-server / - / ${unit}`,
    ])
  })

  it('has the same place in every subject', () => {
    for (const { subject } of [authorityOf(load()), ...certificatesOf(load())]) {
      assert.deepEqual([subject.C, subject.ST, subject.L], ['US', 'Oregon', 'Portland'])
    }
  })

  it('gives a key the usages that its owner needs, and no more', () => {
    const usages = Object.fromEntries(certificatesOf(load()).map((row) => [row.name, row.usages]))
    assert.deepEqual(usages, {
      admin: ['client'],
      sigma: ['client', 'server'],
      gamma: ['client', 'server'],
      'kube-controller-manager': ['client'],
      'kube-scheduler': ['client'],
      'kube-proxy': ['client'],
      kubernetes: ['client', 'server'],
      'service-account': ['tokens'],
      'front-proxy-client': ['client'],
      'metrics-server': ['server'],
    })
  })

  it('has every name and address of the API server in its certificate', () => {
    assert.deepEqual(rowOf('kubernetes').sans, [
      '10.32.0.1',
      '192.168.100.10',
      '10.0.2.2',
      '127.0.0.1',
      'kubernetes',
      'kubernetes.default',
      'kubernetes.default.svc',
      'kubernetes.default.svc.cluster.local',
      'alpha',
    ])
  })

  it('follows the addresses and the domain of cluster.env', () => {
    const { sans } = rowOf('kubernetes', {
      K8S_CLUSTER_DOMAIN: 'example.test',
      NODE_IP_alpha: '192.168.100.99',
    })
    assert.ok(sans.includes('kubernetes.default.svc.example.test'))
    assert.ok(sans.includes('192.168.100.99'))
    assert.ok(!sans.includes('192.168.100.10'))
  })

  it("has the LAN address in a kubelet's certificate, which logs and exec connect to", () => {
    assert.deepEqual(rowOf('sigma').sans, ['sigma', '192.168.100.11', '127.0.0.1'])
  })

  it('gives each node only the files that it needs', () => {
    const rows = [authorityOf(load()), ...certificatesOf(load())]
    const filesOf = (node: string) =>
      rows.flatMap(({ name, on, keyOn }) => [
        ...(on.includes(node) ? [name] : []),
        ...(keyOn.includes(node) ? [`${name}-key`] : []),
      ])
    assert.deepEqual(filesOf('alpha'), [
      'ca',
      'ca-key',
      'kubernetes',
      'kubernetes-key',
      'service-account',
      'service-account-key',
      'front-proxy-client',
      'front-proxy-client-key',
    ])
    assert.deepEqual(filesOf('sigma'), ['ca', 'sigma', 'sigma-key'])
  })

  it('has no name that a node could have as well', () => {
    const cluster = load({ WORKER_NODES: '' })
    for (const { name } of [authorityOf(cluster), ...certificatesOf(cluster)]) {
      assert.ok(reservedFor(name), `a node could be named ${name}`)
      assert.ok(reservedFor(`${name}-key`), `a node could be named ${name}-key`)
    }
  })
})
