import assert from 'node:assert/strict'
import { describe, it } from 'node:test'
import { parse } from 'yaml'
import {
  differingValues,
  type HelmRelease,
  helmRelease,
  valuesFile,
} from '../../../lib/kubernetes/helm.mts'
import type { Kubectl } from '../../../lib/kubernetes/kubectl.mts'
import { helmRecord } from '../../kubernetes/helm-record.mts'

const values = [
  { name: 'ipam.mode', value: 'kubernetes', why: 'pod ranges of nodes' },
  { name: 'devices', value: ['lan', 'outside'], why: 'the cards' },
  { name: 'ipam.other', value: 3, why: 'a number' },
]
const release: HelmRelease = {
  revision: 2,
  status: 'deployed',
  chartVersion: '1.20.1',
  values: { ipam: { mode: 'kubernetes', other: 3 }, devices: ['lan', 'outside'], more: true },
  secret: 'sh.helm.release.v1.cilium.v2',
}

/** The API's answer to a question for records. */
function holding(...records: Omit<HelmRelease, 'secret'>[]): Kubectl {
  const items = records.map((record) => {
    const { stringData, ...secret } = helmRecord('cilium', record) as {
      stringData: { release: string }
    }
    return { ...secret, data: { release: Buffer.from(stringData.release).toString('base64') } }
  })
  return { get: async () => ({ items }) } as unknown as Kubectl
}

describe('a release of Helm', () => {
  it('is read from its latest record', async () => {
    const records = [9, 10, 2].map((revision) => ({ ...release, revision }))
    const found = await helmRelease(holding(...records), 'cilium', 'kube-system')
    assert.deepEqual(found, { ...release, revision: 10, secret: 'sh.helm.release.v1.cilium.v10' })
  })

  it('may not be there', async () => {
    assert.equal(await helmRelease(holding(), 'cilium', 'kube-system'), undefined)
  })

  it('differs in values that are missing or other, not in those that others have set', () => {
    assert.deepEqual(differingValues(values, release), [])
    const changed = { ...release, values: { ipam: 'cluster-pool', devices: ['outside', 'lan'] } }
    assert.deepEqual(differingValues(values, changed), ['ipam.mode', 'devices', 'ipam.other'])
  })
})

describe('a file of values', () => {
  it('has them nested, as Helm reads them', () => {
    const { more, ...given } = release.values
    assert.deepEqual(parse(valuesFile(values)), given)
  })

  it('has the reason above each', () => {
    const lines = valuesFile(values).split('\n')
    assert.equal(lines[lines.indexOf('  mode: kubernetes') - 1], '  # pod ranges of nodes')
    assert.equal(lines[lines.indexOf('  other: 3') - 1], '  # a number')
    assert.equal(lines[lines.indexOf('devices:') - 1], '# the cards')
  })
})
