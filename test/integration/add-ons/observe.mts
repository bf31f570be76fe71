// cluster-health and cluster-status against a real API server. What else they show is tested with
// one that answers what the tests choose.
import assert from 'node:assert/strict'
import { after, describe, it } from 'node:test'
import { becomes } from '../../../lib/wait.mts'
import type { Shared } from './shared.mts'

export const observe = (shared: Shared) =>
  describe('cluster-health and cluster-status', () => {
    const json = async (name: string) => {
      const { stdout, stderr } = await shared.hollow.script(name, '--json', '--timeout', '60')
      assert.ok(stdout, stderr)
      return JSON.parse(stdout)
    }
    after(async () => {
      await shared.hollow.kubectl(['delete', 'deployment', 'stuck', '--wait'])
      shared.hollow.setFate()
    })

    it('show nodes, pods with the reason why they are not ready, and events', async () => {
      shared.hollow.setFate(() => ({ reason: 'ImagePullBackOff', message: 'x' }))
      await shared.hollow.kubectl(['create', 'deployment', 'stuck', '--image=none'])
      const isWaiting = async () => {
        const pods = ['get', 'pods', '--selector=app=stuck', '--output=json']
        return (await shared.hollow.kubectl(pods)).includes('ImagePullBackOff')
      }
      assert.ok(await becomes(isWaiting, 60))
      const [health, status] = await Promise.all([json('cluster-health'), json('cluster-status')])
      const trouble = /^pod default\/stuck-\S+: ImagePullBackOff$/
      assert.ok(
        health.problems.some((text: string) => trouble.test(text)),
        health.problems,
      )
      assert.ok(
        status.problems.some((text: string) => trouble.test(text)),
        status.problems,
      )
      assert.match(health.api.version, /^v1\./)
      const ready = health.nodes.list.map(({ name, ready }: Record<string, unknown>) => [
        name,
        ready,
      ])
      assert.deepEqual(ready.sort(), [
        ['gamma', true],
        ['sigma', true],
      ])
      assert.deepEqual(status.nodes, health.nodes)
      assert.equal(health.metrics.reason, 'Metrics API not available')
      const reasons = health.events.list.map(({ reason }: Record<string, unknown>) => reason)
      assert.ok(reasons.includes('Scheduled'), String(reasons))
    })
  })
