// Which claims' data are on one worker alone, by what kubectl tells of volumes and nodes.
import assert from 'node:assert/strict'
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import { loadCluster } from '../../../lib/cluster.mts'
import { Kubectl } from '../../../lib/kubernetes/kubectl.mts'
import { claimsOn } from '../../../lib/workers/local-volumes.mts'
import { projectRoot } from '../../checkout.mts'
import { FakePrograms } from '../../fake-programs.mts'

type Term = Record<
  'matchExpressions' | 'matchFields',
  { key: string; operator: string; values?: string[] }[]
>

/** A volume of the claim default/NAME that these terms keep on nodes; none keep it nowhere. */
function volume(name: string, ...nodeSelectorTerms: Partial<Term>[]): object {
  const affinity = { nodeAffinity: { required: { nodeSelectorTerms } } }
  return {
    metadata: { name: `pv-${name}` },
    spec: {
      claimRef: { namespace: 'default', name },
      ...(nodeSelectorTerms.length > 0 ? affinity : {}),
    },
  }
}

function on(...values: string[]): Partial<Term> {
  return { matchExpressions: [{ key: 'kubernetes.io/hostname', operator: 'In', values }] }
}

describe('claims on a node', () => {
  const programs = new FakePrograms()
  const { PATH } = process.env
  before(() => {
    // "get nodes|persistentvolumes …", answered from a file of that name.
    programs.link('cat', 'bash')
    programs.add('kubectl', 'cat "$BIN/$2.json"')
    process.env.PATH = programs.path
  })
  after(() => {
    process.env.PATH = PATH
    programs.remove()
  })

  /** @param hostname of the one node there is, by its label */
  function claims(node: string, hostname: string | undefined, ...volumes: object[]) {
    const labels = hostname === undefined ? {} : { 'kubernetes.io/hostname': hostname }
    const answers = { nodes: [{ metadata: { name: node, labels } }], persistentvolumes: volumes }
    for (const [what, items] of Object.entries(answers)) {
      writeFileSync(join(programs.path, `${what}.json`), JSON.stringify({ items }))
    }
    return claimsOn(new Kubectl(loadCluster({ root: projectRoot, env: {} })), node)
  }

  it('are those whose volume is a folder of it, in order', async () => {
    const found = await claims('delta', 'delta', volume('b', on('delta')), volume('a', on('delta')))
    assert.deepEqual(found, ['default/a', 'default/b'])
    assert.ok(programs.calls().some((call) => call.includes('metadata.name=delta')))
  })

  it('are known by the label of the node where that is not its name', async () => {
    const volumes = [volume('here', on('delta.lan')), volume('namesake', on('delta'))]
    assert.deepEqual(await claims('delta', 'delta.lan', ...volumes), ['default/here'])
  })

  it('are known by its name where the volume means that', async () => {
    const field = [{ key: 'metadata.name', operator: 'In', values: ['delta'] }]
    const other = [{ key: 'metadata.name', operator: 'In', values: ['delta.lan'] }]
    const volumes = [volume('here', { matchFields: field }), volume('no', { matchFields: other })]
    assert.deepEqual(await claims('delta', 'delta.lan', ...volumes), ['default/here'])
  })

  it('are known by its name when the node has no label, or is gone', async () => {
    assert.deepEqual(await claims('delta', undefined, volume('a', on('delta'))), ['default/a'])
  })

  it('are none that can be used elsewhere as well, or are on another node', async () => {
    const elsewhere = [
      volume('network'),
      volume('other', on('delta2')),
      volume('either', on('delta', 'gamma')),
      volume('alternative', on('delta'), on('gamma')),
      volume('without', {
        matchExpressions: [{ key: 'kubernetes.io/hostname', operator: 'NotIn', values: ['delta'] }],
      }),
      volume('zone', {
        matchExpressions: [
          { key: 'topology.kubernetes.io/zone', operator: 'In', values: ['delta'] },
        ],
      }),
    ]
    assert.deepEqual(await claims('delta', 'delta', ...elsewhere), [])
  })

  it('are none of a volume that nobody has claimed yet', async () => {
    const { spec, ...rest } = volume('free', on('delta')) as { spec: object }
    assert.deepEqual(
      await claims('delta', 'delta', { ...rest, spec: { ...spec, claimRef: undefined } }),
      [],
    )
  })
})
