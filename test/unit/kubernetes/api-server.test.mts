// What is said of an API server that cannot be believed or does not answer.
import assert from 'node:assert/strict'
import { readFile, rm, writeFile } from 'node:fs/promises'
import { createServer } from 'node:net'
import { after, afterEach, before, describe, it } from 'node:test'
import forge from 'node-forge'
import { type Cluster, loadCluster } from '../../../lib/cluster.mts'
import { askApiServer } from '../../../lib/kubernetes/api-server.mts'
import { type FakeApiServer, startFakeApiServer } from '../../api-server.mts'
import { type Checkout, makeCheckout, run } from '../../checkout.mts'

const year = 365 * 24 * 3600_000

describe('asking the API server', () => {
  let checkout: Checkout
  let cluster: Cluster
  let server: FakeApiServer | undefined
  let former: string
  const file = () => checkout.path('tls', 'kubernetes.pem')
  before(async () => {
    checkout = await makeCheckout()
    const made = await run(checkout, 'bin/generate-certs.mts')
    assert.equal(made.exitCode, 0, made.stderr)
    cluster = loadCluster({ root: checkout.root, env: {} })
    former = await readFile(file(), 'utf8')
  })
  after(() => checkout?.remove())
  afterEach(async () => {
    await server?.stop()
    server = undefined
    await writeFile(file(), former)
  })

  /** Starts a server whose certificate is the cluster's but for what is changed in it. */
  async function startWith(change: (certificate: forge.pki.Certificate) => void): Promise<void> {
    const certificate = forge.pki.certificateFromPem(former)
    change(certificate)
    const key = await readFile(checkout.path('tls', 'ca-key.pem'), 'utf8')
    certificate.sign(forge.pki.privateKeyFromPem(key), forge.md.sha256.create())
    await writeFile(file(), forge.pki.certificateToPem(certificate))
    server = await startFakeApiServer(checkout)
  }
  const ask = (timeout?: number) =>
    askApiServer(cluster, '/readyz', timeout === undefined ? {} : { timeout })

  it('gets its answer, whatever its status', async () => {
    await startWith(() => {})
    if (server) server.answers['/readyz'] = { status: 500, body: 'not yet' }
    assert.deepEqual(await ask(), { status: 500, body: 'not yet' })
  })

  it('says that the certificate has expired', async () => {
    await startWith(({ validity }) => {
      validity.notAfter = new Date(Date.now() - 60_000)
    })
    await assert.rejects(ask(), /the API server's certificate has expired/)
  })

  it('says that clocks differ when the certificate is not valid yet', async () => {
    await startWith(({ validity }) => {
      validity.notBefore = new Date(Date.now() + 2 * year)
      validity.notAfter = new Date(Date.now() + 3 * year)
    })
    await assert.rejects(ask(), /not valid yet: clocks differ/)
  })

  it('says that the certificate does not have our address', async () => {
    await startWith((certificate) => {
      certificate.setExtensions([
        ...certificate.extensions.filter(({ name }) => name !== 'subjectAltName'),
        { name: 'subjectAltName', altNames: [{ type: 7, ip: '192.0.2.1' }] },
      ])
    })
    await assert.rejects(ask(), /certificate has no SAN 127\.0\.0\.1/)
  })

  it('says that nobody listens', async () => {
    await assert.rejects(ask(), /127\.0\.0\.1:\d+: nothing listens there/)
  })

  it('says that there is no answer in time', async () => {
    const silent = createServer().listen(cluster.settings.API_PORT, '127.0.0.1')
    await assert.rejects(ask(0.5), /no answer in time/)
    silent.close()
  })

  it('says what makes its own certificate when it is missing', async () => {
    const path = checkout.path('tls', 'admin.pem')
    const own = await readFile(path)
    await rm(path)
    await assert.rejects(ask(), /tls\/admin\.pem is missing/)
    await writeFile(path, own)
  })
})
