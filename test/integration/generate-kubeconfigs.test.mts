import assert from 'node:assert/strict'
import { chmod, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { after, before, describe, it } from 'node:test'
import { parse, stringify } from 'yaml'
import { loadCluster } from '../../lib/cluster.mts'
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

  it('generates one for each client of the API server, readable by its owner only', async () => {
    const { stdout, stderr } = await make()
    assert.deepEqual(
      await present(),
      names.map((name) => `${name}.kubeconfig`),
    )
    for (const name of names) assert.equal((await stat(fileOf(name))).mode & 0o777, 0o600)
    assert.doesNotMatch(stdout + stderr, /LS0t/)
  })

  it('generates what kubectl config writes', { skip: missing('kubectl') }, async () => {
    await make()
    const cluster = loadCluster({ root: checkout.root, env: {} })
    const tls = (name: string) => checkout.path('tls', name)
    for (const name of names) {
      const isLocal = /^(admin|kube-controller-manager|kube-scheduler)$/.test(name)
      const server = isLocal ? `https://127.0.0.1:${cluster.settings.API_PORT}` : cluster.apiServer
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

  it('updates the one whose certificate was renewed', async () => {
    await make()
    const before = await contents()
    await makeCertificates('--renew', 'sigma')
    await make()
    assert.deepEqual(await changedSince(before), ['sigma'])
  })

  it('updates all of them when the authority was replaced', async () => {
    await make()
    const before = await contents()
    await makeCertificates('--force')
    await make()
    assert.deepEqual(await changedSince(before), names)
  })

  it('updates those whose address of the API server changed', async () => {
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

  it('generates one again that is damaged', async () => {
    await make()
    const before = await contents()
    const text = await readFile(fileOf('admin'), 'utf8')
    for (const damaged of ['', '[]', '42', 'a: b: c', 'clusters: none', text.slice(0, 1000)]) {
      await writeFile(fileOf('admin'), damaged)
      await make()
      const config = parse(await readFile(fileOf('admin'), 'utf8'))
      assert.deepEqual({ preferences: {}, ...config }, parse(text), damaged)
    }
    await make('--force')
    assert.deepEqual(await changedSince(before), [])
  })

  it('keeps one that means the same, and closes it to others', async () => {
    await make()
    const config = parse(await readFile(fileOf('admin'), 'utf8'))
    for (const text of [JSON.stringify(config), stringify(config, { indent: 4 })]) {
      await writeFile(fileOf('admin'), text)
      await chmod(fileOf('admin'), 0o644)
      await make()
      assert.equal(await readFile(fileOf('admin'), 'utf8'), text)
      assert.equal((await stat(fileOf('admin'))).mode & 0o777, 0o600)
    }
    await make('--force')
  })

  it("renews its own entries, and keeps the user's", { skip: missing('kubectl') }, async () => {
    await make('--force')
    const change = (...args: string[]) => kubectl(...args, '--kubeconfig', fileOf('admin'))
    const fresh = parse(await readFile(fileOf('admin'), 'utf8'))
    await change('rename-context', 'default', 'mine')
    await change('set-context', 'default', '--namespace', 'lab')
    await change('set-context', 'work', '--cluster', 'work', '--user', 'me', '--namespace', 'team')
    await change('set-cluster', 'work', '--server', 'https://example.test')
    await change('set-credentials', 'me', '--token', 'abc')
    await change('use-context', 'mine')
    await makeCertificates('--renew', 'admin')
    await make()

    const { clusters, users, contexts, ...rest } = parse(await readFile(fileOf('admin'), 'utf8'))
    const named = (list: { name: string }[], name: string) =>
      list.find((each) => each.name === name)
    assert.equal(rest['current-context'], 'mine')
    const ours = fresh.contexts[0].context
    assert.deepEqual(named(contexts, 'mine'), { name: 'mine', context: ours })
    const context = { ...ours, namespace: 'lab' }
    assert.deepEqual(named(contexts, 'default'), { name: 'default', context })
    const work = { cluster: 'work', user: 'me', namespace: 'team' }
    assert.deepEqual(named(contexts, 'work'), { name: 'work', context: work })
    const cluster = { server: 'https://example.test' }
    assert.deepEqual(named(clusters, 'work'), { name: 'work', cluster })
    assert.deepEqual(named(clusters, ours.cluster), fresh.clusters[0])
    assert.deepEqual(named(users, 'me'), { name: 'me', user: { token: 'abc' } })
    const pem = await readFile(checkout.path('tls/admin.pem'), 'base64')
    const embedded = users.find((each: { name: string }) => each.name === 'admin').user
    assert.equal(embedded['client-certificate-data'], pem)
    assert.equal(users.length, 2)

    // A second run finds nothing to do. A current context that is gone is replaced.
    const before = await contents()
    await make()
    assert.deepEqual(await changedSince(before), [])
    await change('delete-context', 'mine')
    await make()
    assert.equal((await change('current-context')).trim(), 'default')
    await make('--force')
  })

  it('does not use one that other users can change', async () => {
    await make()
    await chmod(fileOf('admin'), 0o666)
    const { exitCode, stderr } = await run(checkout, script)
    assert.equal(exitCode, 1)
    assert.match(stderr, /other users can change configs\/admin.kubeconfig/)
    await make('--force')
    assert.equal((await stat(fileOf('admin'))).mode & 0o777, 0o600)
  })

  it("quotes names that Go's YAML would take for something else", async () => {
    const [{ name, cluster }] = parse(await readFile(fileOf('admin'), 'utf8')).clusters
    for (const odd of ['on', '0123']) {
      await checkout.set({ CLUSTER_NAME: odd })
      await make('--force')
      const text = await readFile(fileOf('admin'), 'utf8')
      assert.ok(text.includes(`name: "${odd}"\n`) && text.includes(`cluster: "${odd}"\n`), text)
      // A value is on one line, however long it is.
      assert.ok(
        text.includes(`certificate-authority-data: ${cluster['certificate-authority-data']}\n`),
      )
    }
    await checkout.set({ CLUSTER_NAME: name })
    await make('--force')
  })

  it('with --force writes all of them again', async () => {
    await make('--force')
    const before = await contents()
    await writeFile(fileOf('admin'), `# mine\n${await readFile(fileOf('admin'), 'utf8')}`)
    await make('--force')
    assert.deepEqual(await changedSince(before), [])
  })

  it('refuses certificates that are wrong, names all of them, and changes nothing', async () => {
    await make()
    const before = await contents()
    await rm(checkout.path('tls/admin-key.pem'))
    await checkout.set({ NODE_IP_gamma: '192.168.100.99' })
    try {
      const { exitCode, stderr } = await run(checkout, script, ['--force'])
      assert.equal(exitCode, 1)
      assert.match(stderr, /certificates are unusable/)
      assert.match(stderr, /admin: tls\/admin-key.pem is missing/)
      assert.match(stderr, /gamma: SANs changed/)
      assert.match(stderr, /hint: +make certs/)
      assert.deepEqual(await changedSince(before), [])
    } finally {
      await makeCertificates()
    }
  })

  it("does not need the authority's key, which may be kept elsewhere", async () => {
    await rm(checkout.path('tls/ca-key.pem'))
    try {
      await make('--force')
    } finally {
      await makeCertificates('--force')
    }
  })

  it('refuses unknown arguments', async () => {
    for (const args of [['sigma'], ['--all']]) {
      assert.equal((await run(checkout, script, args)).exitCode, 2)
    }
  })
})

/** The user that kube-apiserver derives from it. */
async function commonName(checkout: Checkout, certificate: string): Promise<string> {
  const args = ['x509', '-noout', '-subject', '-nameopt', 'multiline']
  const { stdout } = await run(checkout, 'openssl', args, { input: certificate })
  return stdout.match(/commonName += (.*)/)?.[1] ?? ''
}
