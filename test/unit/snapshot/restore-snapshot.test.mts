// What is said when a snapshot is of other machines than there are now. (Restoring itself is tested
// with machines, in test/integration/snapshot.test.mts.)
import assert from 'node:assert/strict'
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, describe, it } from 'node:test'
import { type Cluster, loadCluster } from '../../../lib/cluster.mts'
import { StepError } from '../../../lib/errors.mts'
import { assertRestorable } from '../../../lib/snapshot/restore-snapshot.mts'
import type { Snapshot } from '../../../lib/snapshot/snapshots.mts'
import { withoutWorker, withWorker } from '../../../lib/workers/worker-settings.mts'
import { projectRoot } from '../../checkout.mts'

describe('a snapshot of other machines', () => {
  const root = mkdtempSync(join(tmpdir(), 'restore-'))
  const original = readFileSync(join(projectRoot, 'cluster.env'), 'utf8')
  after(() => rmSync(root, { recursive: true }))

  const clusterOf = (text: string) => loadCluster({ root, env: {}, text })
  const snapshot: Snapshot = {
    name: 'before',
    taken: '2026-11-22T18:00:00.000Z',
    automatic: false,
    nixos: '26.05',
    pause: 1,
    machines: clusterOf(original).nodes.map(({ name, role }) => ({
      ...{ name, role, running: true, bytes: 0 },
      disk: { name: 'before', id: '1', time: 0 } as Snapshot['machines'][number]['disk'],
    })),
    files: [],
  }

  async function refusal(cluster: Cluster): Promise<StepError> {
    try {
      await assertRestorable(cluster, snapshot)
    } catch (error) {
      if (error instanceof StepError) return error
      throw error
    }
    return assert.fail('it was not refused')
  }

  it('names the workers that came later, and how they go', async () => {
    const delta = {
      ...{ name: 'delta', sshPort: 2225, ip: '192.168.100.13' },
      ...{ mac: '52:54:00:12:34:59', podCidr: '10.200.3.0/24' },
    }
    const { message, explanation } = await refusal(clusterOf(withWorker(original, delta)))
    assert.match(message, /"before" cannot be restored; nothing was touched/)
    assert.match(explanation.output ?? '', /^it does not have delta \(worker\)$/m)
    assert.match(explanation.hint ?? '', /has to go first: make remove-worker NAME=delta$/)
  })

  it('names the workers that are gone', async () => {
    const { explanation } = await refusal(clusterOf(withoutWorker(original, 'gamma')))
    assert.match(explanation.output ?? '', /^it is also of gamma \(worker\)$/m)
    assert.doesNotMatch(explanation.hint ?? '', /remove-worker/)
  })
})
