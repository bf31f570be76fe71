import assert from 'node:assert/strict'
import { describe, it } from 'node:test'
import { parse, stringify } from 'yaml'
import { loadCluster } from '../../../lib/cluster.mts'
import { formatKubeconfig, isUpToDate, kubeconfigsOf } from '../../../lib/pki/kubeconfig.mts'

const cluster = loadCluster({ env: { API_PORT: '16443' } })
const credentials = { authority: 'the CA', certificate: 'the certificate', key: 'the key' }
const base64 = (text: string) => Buffer.from(text).toString('base64')
const format = (name: string, changes: Partial<typeof credentials> = {}) => {
  const entry = kubeconfigsOf(cluster).find((row) => row.name === name)
  assert.ok(entry, `no row ${name}`)
  return formatKubeconfig(cluster, entry, { ...credentials, ...changes })
}

describe('the table of kubeconfigs', () => {
  it('sends each to the API server by the way it has', () => {
    const rows = kubeconfigsOf(cluster).map(({ name, server }) => `${name} ${server}`)
    assert.deepEqual(rows.sort(), [
      'admin https://127.0.0.1:16443',
      'gamma https://192.168.100.10:16443',
      'kube-controller-manager https://127.0.0.1:16443',
      'kube-proxy https://192.168.100.10:16443',
      'kube-scheduler https://127.0.0.1:16443',
      'sigma https://192.168.100.10:16443',
    ])
  })
})

describe('a kubeconfig', () => {
  it('has everything embedded', () => {
    assert.deepEqual(parse(format('sigma')), {
      apiVersion: 'v1',
      kind: 'Config',
      clusters: [
        {
          name: 'kubernetes-the-hardest-way',
          cluster: {
            server: 'https://192.168.100.10:16443',
            'certificate-authority-data': base64('the CA'),
          },
        },
      ],
      users: [
        {
          name: 'system:node:sigma',
          user: {
            'client-certificate-data': base64('the certificate'),
            'client-key-data': base64('the key'),
          },
        },
      ],
      contexts: [
        {
          name: 'default',
          context: { cluster: 'kubernetes-the-hardest-way', user: 'system:node:sigma' },
        },
      ],
      'current-context': 'default',
      preferences: {},
    })
  })

  it('has names that YAML would take for something else', () => {
    const odd = loadCluster({ env: { CLUSTER_NAME: '0123' } })
    const [entry] = kubeconfigsOf(odd)
    assert.ok(entry)
    const { clusters, contexts } = parse(formatKubeconfig(odd, entry, credentials))
    assert.equal(clusters[0].name, '0123')
    assert.equal(contexts[0].context.cluster, '0123')
  })

  it('keeps long lines whole', () => {
    const line = /certificate-authority-data: (\S+)\n/
    assert.equal(format('admin', { authority: 'x'.repeat(3000) }).match(line)?.[1]?.length, 4000)
  })

  it('is up to date if it says the same, in whatever words', async () => {
    const text = format('admin')
    assert.ok(await isUpToDate(text, text))
    assert.ok(await isUpToDate(stringify(parse(text), { indent: 4 }), text))
    assert.ok(await isUpToDate(JSON.stringify(parse(text)), text))
  })

  it('is up to date with a namespace, another context, another current one', async () => {
    const config = parse(format('admin'))
    config.contexts[0].context.namespace = 'kube-system'
    config.contexts.unshift({ name: 'work', context: { cluster: 'work', user: 'me' } })
    config.clusters.unshift({ name: 'work', cluster: { server: 'https://example.test' } })
    config['current-context'] = 'work'
    assert.ok(await isUpToDate(stringify(config), format('admin')))
  })

  for (const part of ['authority', 'certificate', 'key'] as const) {
    it(`is out of date if the ${part} is another`, async () => {
      assert.ok(!(await isUpToDate(format('admin', { [part]: 'another' }), format('admin'))))
    })
  }

  it('is out of date if the server or the user is another', async () => {
    const config = parse(format('admin'))
    config.clusters[0].cluster.server = 'https://127.0.0.1:6443'
    assert.ok(!(await isUpToDate(stringify(config), format('admin'))))
    assert.ok(!(await isUpToDate(format('kube-scheduler'), format('admin'))))
  })

  it('is out of date if it is empty, cut off or something else', async () => {
    const text = format('admin')
    for (const other of ['', '[]', '42', 'a: b: c', 'clusters: none', text.slice(0, 300)]) {
      assert.ok(!(await isUpToDate(other, text)), other)
    }
  })
})
