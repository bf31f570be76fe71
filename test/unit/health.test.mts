// What is said about an API server that is not ready, does not answer, or is not ours.
import assert from 'node:assert/strict'
import { readFile, rename, writeFile } from 'node:fs/promises'
import { createServer } from 'node:net'
import { after, afterEach, before, describe, it } from 'node:test'
import forge from 'node-forge'
import { $ } from 'zx/core'
import { type Cluster, loadCluster } from '../../lib/cluster.mts'
import { clockProblem, probeApiServer, waitForReady } from '../../lib/health.mts'
import { prepareCommands } from '../../lib/script.mts'
import { type FakeApiServer, failure, nodeList, startFakeApiServer } from '../api-server.mts'
import { type Checkout, makeCheckout, run } from '../checkout.mts'

const year = 365 * 24 * 3600_000

describe('probing the API server', () => {
  let checkout: Checkout
  let cluster: Cluster
  let server: FakeApiServer | undefined
  let former: string
  const file = () => checkout.path('tls', 'kubernetes.pem')
  before(async () => {
    checkout = await makeCheckout({ keys: true })
    for (const step of ['certs', 'kubeconfigs']) {
      const made = await run(checkout, `bin/generate-${step}.mts`)
      assert.equal(made.exitCode, 0, made.stderr)
    }
    cluster = loadCluster({ root: checkout.root, env: {} })
    former = await readFile(file(), 'utf8')
    prepareCommands(false)
    $.cwd = checkout.root
  })
  after(() => checkout?.remove())
  afterEach(async () => {
    await server?.stop()
    server = undefined
    await writeFile(file(), former)
  })

  /** Starts a server whose certificate is the cluster's, apart from what is changed in it. */
  async function startWith(
    change: (certificate: forge.pki.Certificate) => void = () => {},
    authority?: forge.pki.rsa.PrivateKey,
  ): Promise<FakeApiServer['answers']> {
    const certificate = forge.pki.certificateFromPem(former)
    change(certificate)
    const key = await readFile(checkout.path('tls', 'ca-key.pem'), 'utf8')
    certificate.sign(authority ?? forge.pki.privateKeyFromPem(key), forge.md.sha256.create())
    await writeFile(file(), forge.pki.certificateToPem(certificate))
    server = await startFakeApiServer(checkout)
    return server.answers
  }
  async function assertNotReady(reason: RegExp, limits?: { timeout: number }): Promise<void> {
    const found = await probeApiServer(cluster, limits)
    assert.equal(found.ready, false)
    assert.match(found.reason, reason)
  }

  it('lists its nodes when it is ready', async () => {
    const answers = await startWith()
    answers['/readyz'] = { body: 'ok' }
    answers['/api/v1/nodes'] = {
      body: nodeList({ sigma: { ready: true }, gamma: { ready: false } }),
    }
    const { ready, nodes } = await probeApiServer(cluster)
    assert.equal(ready, true)
    assert.equal(nodes?.get('sigma')?.ready, true)
    assert.equal(nodes?.get('gamma')?.reason, 'cni plugin not initialized')
  })

  it('takes a node for Ready that has renewed its lease since its kubelet was started', async () => {
    const answers = await startWith()
    answers['/readyz'] = { body: 'ok' }
    answers['/api/v1/nodes'] = { body: nodeList({ sigma: { ready: true } }) }
    const path = '/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/sigma'
    const renewed = (renewTime: string) => {
      answers[path] = { body: JSON.stringify({ spec: { renewTime } }) }
    }
    const sigma = cluster.node('sigma')
    const started = '2026-11-30T03:20:34.030327Z'
    renewed('2026-11-30T03:20:34.028000Z')
    await assert.rejects(
      waitForReady(cluster, sigma, { timeout: 1 }, started),
      /sigma is not Ready after 1 s/,
    )
    renewed('2026-11-30T03:20:34.074041Z')
    await waitForReady(cluster, sigma, { timeout: 1 }, started)
    // Of a kubelet that was not started, the last renewal shows nothing.
    await assert.rejects(waitForReady(cluster, sigma, { timeout: 1 }), /sigma is not Ready/)
    // Also if it could not be read at first.
    answers[path] = { status: 500, body: 'etcdserver: request timed out' }
    const wait = waitForReady(cluster, sigma, {
      timeout: 2,
      detail: () => renewed('2026-11-30T03:20:34.074041Z'),
    })
    await assert.rejects(wait, /sigma is not Ready after 2 s/)
  })

  it('names the checks that fail', async () => {
    const answers = await startWith()
    const body = '[+]ping ok\n[-]etcd failed: reason withheld\n[-]rbac/x failed: reason withheld\n'
    answers['/readyz'] = { status: 500, body }
    await assertNotReady(/^not ready: etcd, rbac\/x$/)
  })

  it('says when Secrets are encrypted with another key than the API server has', async () => {
    const answers = await startWith()
    answers['/readyz'] = { status: 500, body: '[+]ping ok\n[-]informer-sync failed: 1\n' }
    await assertNotReady(/^not ready: informer-sync$/)
    const message = 'Internal error occurred: unable to transform key "/registry/secrets/x"'
    answers['/api/v1/secrets'] = failure(500, 'InternalError', message)
    await assertNotReady(/^not ready: Secrets in etcd are encrypted with another key/)
  })

  it('says that it does not accept the admin certificate', async () => {
    const answers = await startWith()
    answers['/readyz'] = failure(401, 'Unauthorized', 'Unauthorized')
    await assertNotReady(/does not accept the admin certificate/)
  })

  it('says that its certificate has expired', async () => {
    await startWith(({ validity }) => {
      validity.notAfter = new Date(Date.now() - 60_000)
    })
    await assertNotReady(/certificate has expired, or the clocks/)
  })

  it('says that clocks differ when its certificate is not valid yet', async () => {
    await startWith(({ validity }) => {
      validity.notBefore = new Date(Date.now() + 2 * year)
      validity.notAfter = new Date(Date.now() + 3 * year)
    })
    await assertNotReady(/certificate is not valid yet: the clocks .* differ/)
  })

  it('says that its certificate does not have our address', async () => {
    await startWith((certificate) => {
      certificate.setExtensions([
        ...certificate.extensions.filter(({ name }) => name !== 'subjectAltName'),
        { name: 'subjectAltName', altNames: [{ type: 7, ip: '192.0.2.1' }] },
      ])
    })
    await assertNotReady(/certificate has no SAN 127\.0\.0\.1/)
  })

  it('says that another cluster answers', async () => {
    const { privateKey } = forge.pki.rsa.generateKeyPair(2048)
    await startWith(() => {}, privateKey)
    await assertNotReady(/certificate of another CA than tls\/ca\.pem/)
  })

  it('says that nothing listens', async () => {
    await assertNotReady(/does not answer: nothing listens there/)
  })

  it('says that nothing listens on the machine yet when QEMU closes the connection', async () => {
    const closing = createServer((socket) => socket.end()).listen(
      cluster.settings.API_PORT,
      '127.0.0.1',
    )
    await assertNotReady(/nothing listens on the machine yet/)
    closing.close()
  })

  it('says that there is no answer in time', async () => {
    const silent = createServer().listen(cluster.settings.API_PORT, '127.0.0.1')
    await assertNotReady(/did not answer within 0\.5 s/, { timeout: 0.5 })
    silent.close()
  })

  it('says what makes the kubeconfig when it is missing', async () => {
    const path = checkout.path('configs', 'admin.kubeconfig')
    await rename(path, `${path}.away`)
    await assertNotReady(/configs\/admin\.kubeconfig is missing/)
    await rename(`${path}.away`, path)
  })

  it('throws the reason of an interruption', async () => {
    const signal = AbortSignal.abort(new Error('interrupted'))
    await assert.rejects(probeApiServer(cluster, { signal }), /^Error: interrupted$/)
  })
})

describe('a clock that is wrong', () => {
  it('is named by minutes or days, and up to five minutes not at all', () => {
    assert.equal(clockProblem('alpha', -300), '')
    assert.equal(
      clockProblem('alpha', -301),
      "the clock of alpha is 5 minutes behind this computer's",
    )
    assert.equal(
      clockProblem('alpha', 730 * 86_400),
      "the clock of alpha is 730 days ahead of this computer's",
    )
  })
})
