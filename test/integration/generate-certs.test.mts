import assert from 'node:assert/strict'
import { execFileSync, spawn } from 'node:child_process'
import { X509Certificate } from 'node:crypto'
import {
  chmod,
  copyFile,
  cp,
  mkdir,
  readdir,
  readFile,
  rename,
  rm,
  stat,
  writeFile,
} from 'node:fs/promises'
import { after, before, beforeEach, describe, it } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { createServer, connect as tlsConnect } from 'node:tls'
import { loadCluster } from '../../lib/cluster.mts'
import { runOverSsh } from '../../lib/machine/ssh.mts'
import { type Checkout, makeCheckout, run } from '../checkout.mts'
import { noSshd, startSshd } from '../sshd.mts'
import { missing } from '../tools.mts'

const script = 'bin/generate-certs.mts'
const leaves = [
  'admin',
  'sigma',
  'gamma',
  'kube-controller-manager',
  'kube-scheduler',
  'kube-proxy',
  'kubernetes',
  'service-account',
  'front-proxy-client',
  'metrics-server',
]
const sshKeys = [
  'ssh_ed25519',
  'ssh_host_alpha_ed25519',
  'ssh_host_sigma_ed25519',
  'ssh_host_gamma_ed25519',
]

describe('generate-certs', () => {
  let checkout: Checkout
  let settings: string
  before(async () => {
    checkout = await makeCheckout()
    settings = await readFile(checkout.path('cluster.env'), 'utf8')
    await make()
    await rename(checkout.path('tls'), checkout.path('tls-made'))
  })
  after(() => checkout.remove())
  beforeEach(async () => {
    await rm(checkout.path('tls'), { recursive: true, force: true })
    await writeFile(checkout.path('cluster.env'), settings)
  })

  /** What one run makes; copied, as it takes a second each time. */
  const given = () => cp(checkout.path('tls-made'), checkout.path('tls'), { recursive: true })

  const tls = (name: string) => checkout.path('tls', name)
  const text = (name: string) => readFile(tls(name), 'utf8')
  const make = async (...args: string[]) => {
    const outcome = await run(checkout, script, args)
    assert.equal(outcome.exitCode, 0, outcome.stderr)
    return outcome
  }
  const refused = async (args: string[], reason: RegExp, exitCode: number) => {
    const before = await contents()
    const outcome = await run(checkout, script, args)
    assert.match(outcome.stderr, reason)
    assert.equal(outcome.exitCode, exitCode)
    assert.deepEqual(await contents(), before, 'something was changed')
  }
  /** Every file of tls/ with its content. */
  const contents = async (): Promise<Record<string, string>> => {
    const names = await readdir(checkout.path('tls')).catch(() => [])
    const pairs = names.sort().map(async (name) => [name, await text(name)] as const)
    return Object.fromEntries(await Promise.all(pairs))
  }
  /** The names of the files that differ, or are new, since then. */
  const changedSince = async (before: Record<string, string>) =>
    Object.entries(await contents()).flatMap(([name, now]) => (before[name] === now ? [] : name))
  const pairFiles = (...names: string[]) =>
    names.flatMap((name) => [`${name}-key.pem`, `${name}.pem`]).sort()
  const isSound = async () => (await run(checkout, script, ['--check'])).exitCode === 0

  it('makes everything, and nothing else', async () => {
    await make()
    const wanted = [
      ...pairFiles('ca', ...leaves),
      ...sshKeys.flatMap((name) => [name, `${name}.pub`]),
      'known_hosts',
    ]
    assert.deepEqual(Object.keys(await contents()), wanted.sort())
  })

  it('makes what openssl verifies', { skip: missing('openssl') }, async () => {
    await make()
    const files = leaves.map((name) => tls(`${name}.pem`))
    const args = ['verify', '-x509_strict', '-CAfile', tls('ca.pem'), ...files]
    const verified = execFileSync('openssl', args, { encoding: 'utf8' })
    assert.equal(verified.match(/: OK$/gm)?.length, leaves.length)
    for (const name of ['ca', ...leaves]) {
      const ofCertificate = ['x509', '-in', tls(`${name}.pem`), '-noout', '-pubkey']
      const ofKey = ['pkey', '-in', tls(`${name}-key.pem`), '-pubout']
      assert.equal(
        execFileSync('openssl', ofKey, { encoding: 'utf8' }),
        execFileSync('openssl', ofCertificate, { encoding: 'utf8' }),
        name,
      )
    }
  })

  it('keeps private keys to their owner, and off its output', async () => {
    const { stdout, stderr } = await make('--verbose')
    for (const name of [
      ...pairFiles('ca', ...leaves).filter((file) => file.includes('-key')),
      ...sshKeys,
    ]) {
      assert.equal((await stat(tls(name))).mode & 0o777, 0o600, name)
    }
    assert.doesNotMatch(stdout + stderr, /PRIVATE KEY|MII[A-Za-z0-9+/]{20}/)
  })

  it('makes no leftovers of temporary files', async () => {
    await make()
    const all = await readdir(checkout.root, { recursive: true })
    const odd = all.filter((name) => /\.tmp-|\.lock/.test(name) && !name.startsWith('node_modules'))
    assert.deepEqual(odd, [])
  })

  it('serves TLS under every name of the API server, to clients it knows', async () => {
    await given()
    const ca = await text('ca.pem')
    const server = createServer({
      ca,
      cert: await text('kubernetes.pem'),
      key: await text('kubernetes-key.pem'),
      requestCert: true,
    })
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
    const address = server.address()
    const port = typeof address === 'object' && address ? address.port : 0
    // The user that kube-apiserver would see.
    server.on('secureConnection', (socket) =>
      socket.end(String(socket.getPeerCertificate().subject?.CN)),
    )
    const login = async (servername: string, client: string) =>
      tlsLogin(port, servername, ca, await text(`${client}.pem`), await text(`${client}-key.pem`))
    try {
      for (const name of ['kubernetes', 'kubernetes.default.svc.cluster.local', 'alpha']) {
        assert.equal(await login(name, 'admin'), 'admin')
      }
      assert.equal(await login('kubernetes', 'sigma'), 'system:node:sigma')
      await assert.rejects(login('sigma', 'admin'), /does not match certificate's altnames/)
    } finally {
      server.close()
    }
  })

  it('changes nothing the second time', async () => {
    await given()
    const before = await contents()
    const made = (await stat(tls('known_hosts'))).mtimeMs
    const { stderr } = await make()
    assert.match(stderr, new RegExp(`${leaves.length} certificates stay, 0 are made`))
    assert.deepEqual(await contents(), before)
    assert.equal((await stat(tls('known_hosts'))).mtimeMs, made)
  })

  it('makes those anew whose names changed, with the same authority', async () => {
    await given()
    const before = await contents()
    await checkout.set({ NODE_IP_sigma: '192.168.100.77' })
    const { stderr } = await make()
    assert.match(stderr, /sigma · SANs changed \(\+192.168.100.77 -192.168.100.11\)/)
    assert.deepEqual(await changedSince(before), pairFiles('sigma'))
    assert.match(String(new X509Certificate(await text('sigma.pem')).subjectAltName), /100\.77/)
    assert.ok(await isSound())
  })

  it('makes those anew that end soon; the authority stays', async () => {
    await checkout.set({ CERT_DAYS: 40 })
    await make()
    const before = await contents()
    await checkout.set({ CERT_DAYS: 365, CERT_RENEW_DAYS: 41 })
    const { stderr } = await make()
    assert.match(stderr, /admin · it ends in 39 days/)
    // The key that signs tokens stays.
    const wanted = pairFiles(...leaves).filter((name) => name !== 'service-account-key.pem')
    assert.deepEqual(await changedSince(before), wanted)
    assert.ok(await isSound())
  })

  it('makes what is missing, and what does not fit together', async () => {
    await given()
    const before = await contents()
    await rm(tls('admin.pem'))
    await rm(tls('kube-proxy.pem'))
    await rm(tls('kube-proxy-key.pem'))
    await copyFile(tls('gamma-key.pem'), tls('sigma-key.pem'))
    await writeFile(tls('kubernetes.pem'), 'spoilt')
    await make()
    const wanted = pairFiles('admin', 'kube-proxy', 'kubernetes', 'sigma')
    assert.deepEqual(await changedSince(before), wanted)
    assert.ok(await isSound())
  })

  it("keeps the token's key when its certificate is made anew", async () => {
    await given()
    const before = await contents()
    await rm(tls('service-account.pem'))
    await make()
    assert.deepEqual(await changedSince(before), ['service-account.pem'])
    await make('--renew', 'service-account')
    assert.equal(await text('service-account-key.pem'), before['service-account-key.pem'])
    assert.ok(await isSound())
  })

  it('adds a worker that cluster.env has got', async () => {
    await given()
    const before = await contents()
    await checkout.set({
      WORKER_NODES: 'sigma gamma delta',
      SSH_PORT_delta: 2999,
      NODE_IP_delta: '192.168.100.13',
      MAC_delta: '52:54:00:12:34:59',
      POD_CIDR_delta: '10.200.3.0/24',
    })
    await make()
    const host = ['ssh_host_delta_ed25519', 'ssh_host_delta_ed25519.pub']
    const wanted = [...pairFiles('delta'), 'known_hosts', ...host].sort()
    assert.deepEqual((await changedSince(before)).sort(), wanted)
  })

  it('closes a key again that others can read', async () => {
    await given()
    const before = await contents()
    await chmod(tls('admin-key.pem'), 0o644)
    assert.ok(!(await isSound()))
    await make()
    assert.deepEqual(await changedSince(before), [])
    assert.equal((await stat(tls('admin-key.pem'))).mode & 0o777, 0o600)
  })

  it('pins the machines to new ports', async () => {
    await given()
    await checkout.set({ SSH_PORT_sigma: 2998 })
    assert.ok(!(await isSound()))
    await make()
    assert.match(await text('known_hosts'), /^\[127\.0\.0\.1\]:2998 ssh-ed25519 /m)
  })

  describe('refuses, and changes nothing,', () => {
    beforeEach(given)

    it("if the authority's key is gone", async () => {
      await rm(tls('ca-key.pem'))
      await rm(tls('sigma.pem'))
      await refused([], /authority cannot be used: tls\/ca-key.pem is missing[\s\S]*--force/, 1)
    })

    it("if the authority's key is another's", async () => {
      await copyFile(tls('admin-key.pem'), tls('ca-key.pem'))
      await refused([], /authority cannot be used: the key does not match/, 1)
      await refused(['--renew', 'sigma'], /authority cannot be used/, 1)
    })

    it('if the authority is unreadable', async () => {
      await writeFile(tls('ca.pem'), '')
      await refused([], /tls\/ca.pem holds no certificate/, 1)
    })

    it('an ssh key that is none', async () => {
      await writeFile(tls('ssh_ed25519'), 'my own, with a passphrase')
      await refused([], /tls\/ssh_ed25519 is no ed25519 key/, 1)
    })

    it('certificates that would be stale at once', async () => {
      await checkout.set({ CERT_DAYS: 30 })
      await refused([], /CERT_DAYS have to be more than CERT_RENEW_DAYS/, 1)
    })

    it('what it does not know', async () => {
      await refused(['--renew', 'nobody'], /no certificate "nobody" to renew[\s\S]*sigma/, 2)
      await refused(['--renew', 'ca'], /no certificate "ca" to renew/, 2)
      await refused(['--renew'], /--renew needs a value/, 2)
      await refused(['--force', '--check'], /only one of/, 2)
      await refused(['--force', '--renew', 'sigma'], /only one of/, 2)
      await refused(['--json'], /--json goes with --check/, 2)
      await refused(['--forse'], /unknown flag --forse/, 2)
      await refused(['sigma'], /unexpected argument "sigma"/, 2)
    })
  })

  it('goes on with the key of an authority whose certificate was not written', async () => {
    await given()
    const key = await text('ca-key.pem')
    await rm(tls('ca.pem'))
    await make()
    assert.equal(await text('ca-key.pem'), key)
    assert.ok(await isSound())
  })

  it('with --force makes the authority and all certificates anew, but no ssh key', async () => {
    await given()
    const before = await contents()
    await make('--force')
    assert.deepEqual(await changedSince(before), pairFiles('ca', ...leaves))
    assert.ok(await isSound())
  })

  it('with --force replaces an authority that cannot be used', async () => {
    await given()
    await writeFile(tls('ca-key.pem'), 'spoilt')
    await make('--force')
    assert.ok(await isSound())
  })

  it('with --renew makes this one anew, and no other', async () => {
    await given()
    const before = await contents()
    await make('--renew', 'sigma')
    assert.deepEqual(await changedSince(before), pairFiles('sigma'))
    assert.ok(await isSound())
  })

  describe('--check', () => {
    it('says that all is missing, and makes nothing', async () => {
      const { exitCode, stdout } = await run(checkout, script, ['--check'])
      assert.equal(exitCode, 1)
      assert.match(stdout, /^ca +- +- +- +- +missing$/m)
      assert.match(stdout, /tls\/ssh_ed25519 is missing/)
      assert.deepEqual(await contents(), {})
    })

    it('shows name, subject, names, usages, end and state', async () => {
      await given()
      const { exitCode, stdout } = await run(checkout, script, ['--check'])
      assert.equal(exitCode, 0)
      assert.match(stdout, /^NAME +SUBJECT +SANS +USAGES +EXPIRES +STATE$/m)
      assert.match(stdout, /^sigma +O=system:nodes +sigma +client +\d{4}-\d\d-\d\d +ok$/m)
      assert.match(stdout, /^ +CN=system:node:sigma +192.168.100.11 +server +364 days$/m)
      assert.match(stdout, /^known_hosts +- +ok$/m)
    })

    it('finds what is wrong', async () => {
      await given()
      await rm(tls('admin-key.pem'))
      await copyFile(tls('gamma.pem'), tls('sigma.pem'))
      await rm(tls('ssh_host_alpha_ed25519.pub'))
      const { exitCode, stdout } = await run(checkout, script, ['--check'])
      assert.equal(exitCode, 1)
      assert.match(stdout, /^admin .* tls\/admin-key.pem is missing$/m)
      assert.match(stdout, /^sigma .* the key does not match$/m)
      assert.match(stdout, /subject changed \(\+CN=system:node:sigma -CN=system:node:gamma\)/)
      assert.match(stdout, /tls\/ssh_host_alpha_ed25519.pub is not its other half/)
    })

    it('says the same as JSON', async () => {
      await given()
      await rm(tls('admin.pem'))
      const { exitCode, stdout } = await run(checkout, script, ['--check', '--json'])
      assert.equal(exitCode, 1)
      const { certificates, ssh } = JSON.parse(stdout)
      assert.deepEqual(
        certificates.map(({ name }: { name: string }) => name),
        ['ca', ...leaves],
      )
      assert.deepEqual(certificates[1], {
        name: 'admin',
        usedBy: 'you, by kubectl',
        state: 'wrong',
        problems: ['tls/admin.pem is missing'],
        subject: '',
        sans: [],
        usages: [],
        expires: null,
        daysLeft: null,
      })
      assert.deepEqual(certificates[2].sans, ['sigma', '192.168.100.11', '127.0.0.1'])
      assert.equal(certificates[2].state, 'ok')
      assert.equal(ssh.length, sshKeys.length + 1)
    })
  })

  it('works at a path of 150 characters with a space', async () => {
    const long = await makeCheckout({ long: true })
    try {
      const { exitCode, stderr } = await run(long, script)
      assert.equal(exitCode, 0, stderr)
      assert.equal((await run(long, script, ['--check'])).exitCode, 0)
    } finally {
      await long.remove()
    }
  })

  it('does not mix the pairs of runs at the same time', async () => {
    const outcomes = await Promise.all([1, 2, 3].map(() => run(checkout, script, ['--force'])))
    for (const { exitCode, stderr } of outcomes) {
      if (exitCode !== 0) assert.match(stderr, /another process is making certificates/)
    }
    assert.ok(outcomes.some(({ exitCode }) => exitCode === 0))
    assert.ok(await isSound())
  })

  it('is not held up by the lock of a run that was killed', async () => {
    await mkdir(checkout.path('run'), { recursive: true })
    const child = spawn('true')
    await new Promise((resolve) => child.once('exit', resolve))
    const holder = { pid: child.pid, command: 'true', purpose: 'making certificates', nonce: 'x' }
    await writeFile(checkout.path('run/pki.lock'), JSON.stringify(holder))
    await make()
  })

  it('can be killed at any moment, and the next run puts everything right', async () => {
    await given()
    // From the start of the script to the end of its writing, in steps.
    for (const [round, delay] of [150, 250, 300, 350, 400, 450, 500, 600].entries()) {
      const child = spawn(checkout.path(script), ['--force'], { stdio: 'ignore' })
      const ended = new Promise((resolve) => child.once('exit', resolve))
      await Promise.race([sleep(delay * 1.5), ended])
      child.kill('SIGKILL')
      await ended
      const { exitCode, stderr } = await run(checkout, script)
      assert.equal(exitCode, 0, `round ${round}: ${stderr}`)
      assert.ok(await isSound(), `round ${round}`)
    }
  })

  it('after an interruption between key and certificate makes the pair anew', async () => {
    await given()
    const old = await contents()
    await make('--force')
    const fresh = await contents()
    // As if it had been ended after the authority and the first key.
    for (const [name, content] of Object.entries(old)) {
      const written = ['ca.pem', 'ca-key.pem', 'admin-key.pem'].includes(name)
      await writeFile(tls(name), written ? (fresh[name] ?? '') : content)
    }
    await make()
    assert.equal(await text('ca.pem'), fresh['ca.pem'])
    assert.ok(await isSound())
  })

  it('lets ssh in to the machines it knows, and to no other', { skip: noSshd }, async () => {
    await given()
    const cluster = loadCluster({ root: checkout.root, env: {} })
    const login = (name: string) =>
      runOverSsh(cluster, cluster.node(name), 'echo "hello from $USER"', { timeout: 20 })
    const sigma = await startSshd(checkout, 'sigma')
    const impostor = await startSshd(checkout, 'gamma', { hostKeyOf: 'sigma' })
    try {
      assert.equal((await login('sigma')).stdout, 'hello from root\n')
      await assert.rejects(login('gamma'), /does not have gamma's host key/)
    } finally {
      await sigma.stop()
      await impostor.stop()
    }
  })
})

/** What the server says to a client that it has let in and that has believed it. */
function tlsLogin(
  port: number,
  servername: string,
  ca: string,
  cert: string,
  key: string,
): Promise<string> {
  return new Promise((resolve, reject) => {
    const socket = tlsConnect({ host: '127.0.0.1', port, servername, ca, cert, key })
    let said = ''
    socket.on('data', (chunk) => {
      said += chunk
    })
    socket.on('error', reject).on('end', () => resolve(said))
  })
}
