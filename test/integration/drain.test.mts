// Taking a node out of service, with a real API server, its controllers and workers without
// machines.
import assert from 'node:assert/strict'
import { after, before, describe, it } from 'node:test'
import { StepError } from '../../lib/errors.mts'
import { cordon, drain, forgetNode, uncordon } from '../../lib/kubernetes/drain.mts'
import { Kubectl } from '../../lib/kubernetes/kubectl.mts'
import { claimsOn } from '../../lib/workers/local-volumes.mts'
import { HollowCluster } from '../kubernetes/hollow-cluster.mts'
import { findTools } from '../kubernetes/prepared.mts'

const tools = await findTools()
const skip = typeof tools === 'string' && tools
// A skipped suite is counted nowhere; a skipped test is.
it('what this needs is there', { skip }, () => {})

describe('a node taken out of service', { skip }, () => {
  let hollow: HollowCluster
  let kubectl: Kubectl
  const path = process.env.PATH
  before(async () => {
    if (typeof tools === 'string') return
    hollow = await HollowCluster.start(tools)
    await hollow.addNodes()
    process.env.PATH = `${tools.kubernetes}:${path}`
    kubectl = new Kubectl(hollow.cluster)
    // Of one pod that must run, on sigma; kubectl waits for its ServiceAccount.
    await hollow.kubectl(['cordon', 'gamma'])
    await hollow.kubectl(['create', 'deployment', 'web', '--image=web'])
    await hollow.kubectl(['create', 'pdb', 'web', '--selector=app=web', '--min-available=1'])
    await hollow.kubectl(['rollout', 'status', 'deployment/web', '--timeout=120s'])
    await hollow.kubectl(['uncordon', 'gamma'])
  })
  after(async () => {
    process.env.PATH = path
    await hollow?.stop()
  })

  const podsOn = async (node: string) => {
    const { items } = await hollow.get<{ items: { metadata: { name: string } }[] }>(
      ...['pods', '--all-namespaces', `--field-selector=spec.nodeName=${node}`],
    )
    return items.map(({ metadata }) => metadata.name)
  }
  const schedulable = async (node: string) => {
    const { spec } = await hollow.get<{ spec: { unschedulable?: boolean } }>('node', node)
    return !spec.unschedulable
  }

  it('says whether it took pods before', async () => {
    assert.equal(await cordon(kubectl, 'sigma'), true)
    assert.equal(await cordon(kubectl, 'sigma'), false)
    assert.equal(await schedulable('sigma'), false)
    await uncordon(kubectl, 'sigma')
    assert.equal(await schedulable('sigma'), true)
  })

  it('keeps the pods that a disruption budget keeps, and says so', async () => {
    await assert.rejects(drain(kubectl, 'sigma', { timeout: 8 }), (error) => {
      assert.ok(error instanceof StepError)
      assert.equal(error.message, 'a disruption budget keeps pods on sigma')
      assert.match(error.explanation.output ?? '', /web-/)
      return true
    })
    assert.equal((await podsOn('sigma')).length, 1)
  })

  it('lets them go when the budget does, and they start elsewhere', async () => {
    await hollow.kubectl(['scale', 'deployment/web', '--replicas=2'])
    await hollow.kubectl(['rollout', 'status', 'deployment/web', '--timeout=120s'])
    await drain(kubectl, 'sigma', { timeout: 120 })
    assert.deepEqual(await podsOn('sigma'), [])
    assert.equal((await podsOn('gamma')).length, 2)
  })

  it('does not lose a pod that nothing would start anew, unless it is forced', async () => {
    await uncordon(kubectl, 'sigma')
    await hollow.kubectl(['cordon', 'gamma'])
    const bare = { apiVersion: 'v1', kind: 'Pod', metadata: { name: 'bare' } }
    const spec = { nodeName: 'sigma', containers: [{ name: 'bare', image: 'bare' }] }
    await hollow.kubectl(['apply', '--filename=-'], JSON.stringify({ ...bare, spec }))
    await assert.rejects(
      drain(kubectl, 'sigma', { timeout: 60 }),
      /on sigma there are pods that nothing would start anew elsewhere/,
    )
    assert.deepEqual(await podsOn('sigma'), ['bare'])
    await drain(kubectl, 'sigma', { timeout: 120, force: true })
    assert.deepEqual(await podsOn('sigma'), [])
  })

  it('holds the claims whose volumes are folders of it', async () => {
    const volume = (name: string, node: string) => ({
      ...{ apiVersion: 'v1', kind: 'PersistentVolume', metadata: { name } },
      spec: {
        capacity: { storage: '1Gi' },
        accessModes: ['ReadWriteOnce'],
        claimRef: { namespace: 'default', name: `data-${name}` },
        local: { path: '/data' },
        nodeAffinity: {
          required: {
            nodeSelectorTerms: [
              {
                matchExpressions: [
                  { key: 'kubernetes.io/hostname', operator: 'In', values: [node] },
                ],
              },
            ],
          },
        },
      },
    })
    const items = [volume('one', 'sigma'), volume('two', 'gamma')]
    const list = JSON.stringify({ apiVersion: 'v1', kind: 'List', items })
    await hollow.kubectl(['apply', '--filename=-'], list)
    assert.deepEqual(await claimsOn(kubectl, 'sigma'), ['default/data-one'])
    assert.deepEqual(await claimsOn(kubectl, 'delta'), [])
  })

  it('is forgotten together with the pods that were on it, also when it is not there', async () => {
    await forgetNode(kubectl, 'sigma')
    assert.equal(await kubectl.exists('node', 'sigma'), false)
    assert.deepEqual(await podsOn('sigma'), [])
    await forgetNode(kubectl, 'sigma')
    assert.equal(await kubectl.exists('node', 'gamma'), true)
  })
})
