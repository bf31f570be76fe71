import assert from 'node:assert/strict'
import { chmod, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { after, before, describe, it } from 'node:test'
import { parse } from 'yaml'
import { loadCluster } from '../../lib/cluster.mts'
import { kubeconfigsOf } from '../../lib/pki/kubeconfig.mts'
import { type Checkout, makeCheckout, run } from '../checkout.mts'
import { missing } from '../tools.mts'

const script = 'bin/generate-kubeconfigs.mts'
const names = ['admin', 'gamma', 'kube-controller-manager', 'kube-proxy', 'kube-scheduler', 'sigma']

describe('generate-kubeconfigs', () => {
  let checkout: Checkout
  before(async () => {
    checkout = await makeCheckout()
    await makeCertificates()
  })
  after(() => checkout.remove())

  const fileOf = (name: string) => checkout.path('configs', `${name}.kubeconfig`)
  const makeCertificates = async (...args: string[]) => {
    const { exitCode, stderr } = await run(checkout, 'bin/generate-certs.mts', args)
    assert.equal(exitCode, 0, stderr)
  }
  const make = async (...args: string[]) => {
    const outcome = await run(checkout, script, args)
    assert.equal(outcome.exitCode, 0, outcome.stderr)
    return outcome
  }
  const present = async () =>
    (await readdir(checkout.path('configs'))).filter((name) => name.endsWith('.kubeconfig')).sort()
  const contents = () =>
    Promise.all(names.map(async (name) => [name, await readFile(fileOf(name), 'utf8')] as const))
  const changedSince = async (before: Awaited<ReturnType<typeof contents>>) => {
    const former = new Map(before)
    return (await contents()).flatMap(([name, text]) => (former.get(name) === text ? [] : name))
  }
  const kubectl = async (...args: string[]) => {
    const { stdout, stderr, exitCode } = await run(checkout, 'kubectl', ['config', ...args])
    assert.equal(exitCode, 0, stderr)
    return stdout
  }

  it('makes one for everyone who logs in, for its eyes alone', async () => {
    const { stdout, stderr } = await make()
    assert.deepEqual(
      await present(),
      names.map((name) => `${name}.kubeconfig`),
    )
    for (const name of names) assert.equal((await stat(fileOf(name))).mode & 0o777, 0o600)
    assert.doesNotMatch(stdout + stderr, /LS0t/)
  })

  it('makes what kubectl config makes', { skip: missing('kubectl') }, async () => {
    await make()
    const cluster = loadCluster({ root: checkout.root, env: {} })
    const tls = (name: string) => checkout.path('tls', name)
    for (const { name, server } of kubeconfigsOf(cluster)) {
      const theirs = ['--kubeconfig', checkout.path(`${name}.by-kubectl`)]
      const certificate = await readFile(tls(`${name}.pem`), 'utf8')
      const user = await commonName(checkout, certificate)
      const title = cluster.settings.CLUSTER_NAME
      await kubectl(
        ...['set-cluster', title, '--server', server, '--embed-certs'],
        ...['--certificate-authority', tls('ca.pem'), ...theirs],
      )
      await kubectl(
        ...['set-credentials', user, '--embed-certs'],
        ...['--client-certificate', tls(`${name}.pem`)],
        ...['--client-key', tls(`${name}-key.pem`), ...theirs],
      )
      await kubectl('set-context', 'default', '--cluster', title, '--user', user, ...theirs)
      await kubectl('use-context', 'default', ...theirs)

      const view = async (...which: string[]) =>
        JSON.parse(await kubectl('view', '--raw', '-o', 'json', ...which))
      assert.deepEqual(await view('--kubeconfig', fileOf(name)), await view(...theirs), name)
      const raw = async (path: string) => parse(await readFile(path, 'utf8'))
      assert.deepEqual(
        await raw(fileOf(name)),
        await raw(checkout.path(`${name}.by-kubectl`)),
        name,
      )
    }
  })

  it('keeps them as they are the second time', async () => {
    await make()
    const before = await contents()
    const made = (await stat(fileOf('admin'))).mtimeMs
    await make()
    assert.deepEqual(await changedSince(before), [])
    assert.equal((await stat(fileOf('admin'))).mtimeMs, made)
  })

  it('makes the one anew whose certificate was renewed', async () => {
    await make()
    const before = await contents()
    await makeCertificates('--renew', 'sigma')
    await make()
    assert.deepEqual(await changedSince(before), ['sigma'])
  })

  it('makes all anew when the authority is another', async () => {
    await make()
    const before = await contents()
    await makeCertificates('--force')
    await make()
    assert.deepEqual(await changedSince(before), names)
  })

  it('makes those anew whose way to the API server changed', async () => {
    await make()
    const before = await contents()
    await checkout.set({ API_PORT: 16443 })
    await make()
    assert.deepEqual(await changedSince(before), names)
    assert.match(await readFile(fileOf('admin'), 'utf8'), /server: https:\/\/127\.0\.0\.1:16443\n/)
    assert.match(
      await readFile(fileOf('sigma'), 'utf8'),
      /server: https:\/\/192\.168\.100\.10:16443\n/,
    )
  })

  it('makes one anew that is spoilt', async () => {
    await make()
    const before = await contents()
    await writeFile(fileOf('admin'), (await readFile(fileOf('admin'), 'utf8')).slice(0, 1000))
    await make()
    assert.deepEqual(await changedSince(before), [])
  })

  it('leaves what was added to one, and closes it to others', {
    skip: missing('kubectl'),
  }, async () => {
    await make()
    const admin = ['--kubeconfig', fileOf('admin')]
    await kubectl('set-context', 'default', '--namespace', 'kube-system', ...admin)
    await chmod(fileOf('admin'), 0o644)
    const before = await contents()
    await make()
    assert.deepEqual(await changedSince(before), [])
    assert.equal((await stat(fileOf('admin'))).mode & 0o777, 0o600)
  })

  it('with --force makes all anew', async () => {
    await make('--force')
    const before = await contents()
    await writeFile(fileOf('admin'), `# mine\n${await readFile(fileOf('admin'), 'utf8')}`)
    await make('--force')
    assert.deepEqual(await changedSince(before), [])
  })

  it('refuses certificates that are not right, names all of them, and changes nothing', async () => {
    await make()
    const before = await contents()
    await rm(checkout.path('tls/admin-key.pem'))
    await checkout.set({ NODE_IP_gamma: '192.168.100.99' })
    try {
      const { exitCode, stderr } = await run(checkout, script, ['--force'])
      assert.equal(exitCode, 1)
      assert.match(stderr, /certificates are missing or not right/)
      assert.match(stderr, /admin: tls\/admin-key.pem is missing/)
      assert.match(stderr, /gamma: SANs changed/)
      assert.match(stderr, /hint: +\.\/bin\/generate-certs.mts/)
      assert.deepEqual(await changedSince(before), [])
    } finally {
      await makeCertificates()
    }
  })

  it("does without the authority's key, which may be kept elsewhere", async () => {
    await rm(checkout.path('tls/ca-key.pem'))
    try {
      await make('--force')
    } finally {
      await makeCertificates('--force')
    }
  })

  it('refuses arguments that it does not know', async () => {
    for (const args of [['sigma'], ['--all']]) {
      assert.equal((await run(checkout, script, args)).exitCode, 2)
    }
  })
})

/** The user that kube-apiserver takes it for. */
async function commonName(checkout: Checkout, certificate: string): Promise<string> {
  const args = ['x509', '-noout', '-subject', '-nameopt', 'multiline']
  const { stdout } = await run(checkout, 'openssl', args, { input: certificate })
  return stdout.match(/commonName += (.*)/)?.[1] ?? ''
}
