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
import { createServer as createSocket } from 'node:net'
import { join } from 'node:path'
import { after, before, beforeEach, describe, it } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { createServer, connect as tlsConnect } from 'node:tls'
import { loadCluster } from '../../lib/cluster.mts'
import { type Checkout, makeCheckout, type Outcome, projectRoot, run } from '../checkout.mts'
import { noSshd, type Sshd, startSshd } from '../sshd.mts'
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

// What this script does when the clock of the computer is 30 days behind.
const clockBehind = {
  NODE_OPTIONS:
    '--import=data:text/javascript,const/**/real=Date.now;Date.now=()=>real()-30*24*3600e3',
}

describe('generate-certs', () => {
  let checkout: Checkout
  let settings: string
  let first: Outcome
  before(async () => {
    checkout = await makeCheckout()
    settings = await readFile(checkout.path('cluster.env'), 'utf8')
    // Whatever the umask is.
    const command = 'umask 000; exec ./bin/generate-certs.mts --verbose'
    first = await run(checkout, 'sh', ['-c', command])
    assert.equal(first.exitCode, 0, first.stderr)
    await rename(checkout.path('tls'), checkout.path('tls-made'))
  })
  after(() => checkout.remove())
  beforeEach(async () => {
    await rm(checkout.path('tls'), { recursive: true, force: true })
    await writeFile(checkout.path('cluster.env'), settings)
  })

  /** What that run has generated; copied, because a run takes a second. */
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

  it('generates everything, and nothing else', async () => {
    await given()
    const wanted = [
      ...pairFiles('ca', ...leaves),
      ...sshKeys.flatMap((name) => [name, `${name}.pub`]),
      ...['known_hosts', 'ssh_config'],
    ]
    assert.deepEqual(Object.keys(await contents()), wanted.sort())
    const all = await readdir(checkout.root, { recursive: true })
    const odd = all.filter(
      (name) => /\.tmp-|\.lock|\.new/.test(name) && !/^node_modules/.test(name),
    )
    assert.deepEqual(odd, [], 'temporary files are left')
  })

  it('generates what openssl and ssh-keygen accept', {
    skip: missing('openssl', 'ssh-keygen'),
  }, async () => {
    await given()
    const openssl = (...args: string[]) => execFileSync('openssl', args, { encoding: 'utf8' })
    const files = leaves.map((name) => tls(`${name}.pem`))
    const verified = openssl('verify', '-x509_strict', '-CAfile', tls('ca.pem'), ...files)
    assert.equal(verified.match(/: OK$/gm)?.length, leaves.length)
    for (const name of ['ca', ...leaves]) {
      const ofCertificate = openssl('x509', '-in', tls(`${name}.pem`), '-noout', '-pubkey')
      assert.equal(openssl('pkey', '-in', tls(`${name}-key.pem`), '-pubout'), ofCertificate, name)
    }
    for (const { name, sshPort } of loadCluster({ root: checkout.root, env: {} }).nodes) {
      const args = ['-F', `[127.0.0.1]:${sshPort}`, '-f', tls('known_hosts')]
      const found = execFileSync('ssh-keygen', args, { encoding: 'utf8' })
      const [algorithm, key] = (await text(`ssh_host_${name}_ed25519.pub`)).split(' ')
      assert.ok(found.includes(`${algorithm} ${key}`), name)
    }
  })

  it('keeps private keys to their owner whatever the umask, and out of its output', async () => {
    await given()
    assert.equal((await stat(checkout.path('tls'))).mode & 0o777, 0o700)
    for (const name of await readdir(checkout.path('tls'))) {
      const isKey = name.includes('-key') || sshKeys.includes(name)
      assert.equal((await stat(tls(name))).mode & 0o777, isKey ? 0o600 : 0o644, name)
    }
    assert.match(first.stderr, /^\$ ssh-keygen -q -t ed25519 -N '' -C sigma -f tls\//m)
    assert.doesNotMatch(first.stdout + first.stderr, /PRIVATE KEY|MII[A-Za-z0-9+/]{20}/)
  })

  it('serves TLS under every name of the API server, to the clients of the CA', async () => {
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
    const written = (await stat(tls('known_hosts'))).mtimeMs
    const { stderr } = await make()
    assert.match(stderr, new RegExp(`${leaves.length} certificates kept, 0 to issue`))
    assert.deepEqual(await contents(), before)
    assert.equal((await stat(tls('known_hosts'))).mtimeMs, written)
  })

  it('renews those whose names changed, with the same authority', async () => {
    await given()
    const before = await contents()
    await checkout.set({ NODE_IP_sigma: '192.168.100.77' })
    const { stderr } = await make()
    assert.match(stderr, /sigma · SANs changed \(\+192.168.100.77 -192.168.100.11\)/)
    assert.deepEqual(await changedSince(before), pairFiles('sigma'))
    assert.match(String(new X509Certificate(await text('sigma.pem')).subjectAltName), /100\.77/)
    assert.ok(await isSound())
  })

  it('renews those that expire soon; the authority is kept', async () => {
    await checkout.set({ CERT_DAYS: 40 })
    await make()
    const before = await contents()
    await checkout.set({ CERT_DAYS: 365, CERT_RENEW_DAYS: 41 })
    const { stderr } = await make()
    assert.match(stderr, /admin · it expires in 39 days/)
    // The key that signs tokens is kept.
    const wanted = pairFiles(...leaves).filter((name) => name !== 'service-account-key.pem')
    assert.deepEqual(await changedSince(before), wanted)
    assert.ok(await isSound())
  })

  it('generates what is missing, and what does not match', async () => {
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

  it('keeps the key that signs tokens when its certificate is renewed', async () => {
    await given()
    const before = await contents()
    await rm(tls('service-account.pem'))
    await make()
    assert.deepEqual(await changedSince(before), ['service-account.pem'])
    await make('--renew', 'service-account')
    assert.equal(await text('service-account-key.pem'), before['service-account-key.pem'])
    assert.ok(await isSound())
  })

  it('adds a worker of cluster.env', async () => {
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
    const wanted = [...pairFiles('delta'), 'known_hosts', 'ssh_config', ...host].sort()
    assert.deepEqual((await changedSince(before)).sort(), wanted)
  })

  it('closes keys that others can read, and a folder that others can change', async () => {
    await given()
    const before = await contents()
    for (const name of ['admin-key.pem', 'ssh_ed25519']) await chmod(tls(name), 0o644)
    await chmod(checkout.path('tls'), 0o777)
    const { stdout, exitCode } = await run(checkout, script, ['--check'])
    assert.equal(exitCode, 1)
    assert.match(stdout, /^admin .*tls\/admin-key.pem can be read by other users$/m)
    assert.match(stdout, /^ssh_ed25519 .*tls\/ssh_ed25519 can be read by other users$/m)
    assert.match(stdout, /^ca .*tls\/ can be changed by other users$/m)
    await make()
    assert.deepEqual(await changedSince(before), [])
    assert.equal((await stat(tls('admin-key.pem'))).mode & 0o777, 0o600)
    assert.equal((await stat(tls('ssh_ed25519'))).mode & 0o777, 0o600)
    assert.equal((await stat(checkout.path('tls'))).mode & 0o777, 0o700)
  })

  it('writes the public half of an ssh key again', async () => {
    await given()
    const before = await contents()
    await rm(tls('ssh_ed25519.pub'))
    await writeFile(tls('ssh_host_sigma_ed25519.pub'), 'ssh-ed25519 AAAA someone\n')
    await make()
    assert.deepEqual(await contents(), before)
  })

  it('follows new ports', async () => {
    await given()
    await checkout.set({ SSH_PORT_sigma: 2998 })
    assert.ok(!(await isSound()))
    await make()
    assert.match(await text('known_hosts'), /^\[127\.0\.0\.1\]:2998 ssh-ed25519 /m)
    assert.match(await text('ssh_config'), /^Host sigma\n +Port 2998$/m)
    assert.ok(await isSound())
  })

  describe('refuses, and changes nothing,', () => {
    beforeEach(given)

    it("if the authority's key is gone", async () => {
      await rm(tls('ca-key.pem'))
      await rm(tls('sigma.pem'))
      await refused([], /authority cannot be used: tls\/ca-key.pem is missing[\s\S]*--force/, 1)
    })

    it("if the authority's key is that of another", async () => {
      await copyFile(tls('admin-key.pem'), tls('ca-key.pem'))
      await refused([], /authority cannot be used: the key does not match/, 1)
      await refused(['--renew', 'sigma'], /authority cannot be used/, 1)
    })

    it('if the authority is unreadable', async () => {
      await writeFile(tls('ca.pem'), '')
      await refused([], /tls\/ca.pem does not contain a certificate/, 1)
    })

    it('if an ssh key is something else', async () => {
      await writeFile(tls('ssh_ed25519'), 'my own, with a passphrase')
      await refused([], /tls\/ssh_ed25519 is not an ed25519 key[\s\S]*restore it from a copy/, 1)
    })

    it('if new certificates would be due for renewal at once', async () => {
      await checkout.set({ CERT_DAYS: 30 })
      await refused([], /CERT_DAYS have to be more than CERT_RENEW_DAYS/, 1)
    })

    for (const name of ['ca.pem', 'ca-key.pem', 'sigma-key.pem', 'ssh_ed25519']) {
      it(`if other users can change tls/${name}`, async () => {
        await chmod(tls(name), 0o666)
        const reason = new RegExp(
          `other users can change tls/${name},[\\s\\S]*chmod go-w tls/${name}`,
        )
        await refused([], reason, 1)
        const { stdout, exitCode } = await run(checkout, script, ['--check'])
        assert.equal(exitCode, 1)
        assert.ok(stdout.includes(`tls/${name} can be changed by other users`), stdout)
      })
    }

    it('if the authority is not a CA certificate, or expires soon', async () => {
      await checkout.set({ CA_DAYS: 4000, CERT_DAYS: 4000, CERT_RENEW_DAYS: 3655 })
      await refused([], /authority cannot be used: it expires in 3649 days/, 1)
      for (const end of ['.pem', '-key.pem']) await copyFile(tls(`admin${end}`), tls(`ca${end}`))
      await refused([], /authority cannot be used: it is not a CA certificate/, 1)
    })

    it('while the clock of this computer is behind, which is named', async () => {
      const { NODE_OPTIONS } = clockBehind
      for (const args of [[], ['--renew', 'sigma']]) {
        const outcome = await run(checkout, script, args, { env: { NODE_OPTIONS } })
        assert.match(outcome.stderr, /the clock of this computer is behind, so nothing was renewed/)
        assert.match(outcome.stderr, /tls\/ca.pem: it is valid from .* GMT on/)
        assert.equal(outcome.exitCode, 1)
      }
      const check = await run(checkout, script, ['--check'], { env: { NODE_OPTIONS } })
      assert.match(check.stdout, /it is valid from .* and the clock of this computer is at/)
      assert.equal(check.exitCode, 1)
      assert.ok(await isSound())
    })

    it('a node whose certificate would replace another file', async () => {
      await checkout.set({
        WORKER_NODES: 'sigma ca-key',
        SSH_PORT_ca_key: 2999,
        NODE_IP_ca_key: '192.168.100.13',
        MAC_ca_key: '52:54:00:12:34:59',
        POD_CIDR_ca_key: '10.200.3.0/24',
      })
      await refused([], /"ca-key"/, 1)
    })

    it('certificates without end', async () => {
      for (const name of ['CA_DAYS', 'CERT_DAYS']) {
        await checkout.set({ [name]: 9_999_999 })
        await refused([], /_DAYS is "9999999", not a number of days from 1 to \d+/, 1)
      }
    })

    it('what is unknown', async () => {
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

  it('continues with the key of an authority whose certificate was not written', async () => {
    await given()
    const key = await text('ca-key.pem')
    await rm(tls('ca.pem'))
    await make()
    assert.equal(await text('ca-key.pem'), key)
    assert.ok(await isSound())
  })

  it('with --force replaces the authority and all certificates, but no ssh key', async () => {
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

  it('with --renew renews this one, and no other', async () => {
    await given()
    const before = await contents()
    await make('--renew', 'sigma')
    assert.deepEqual(await changedSince(before), pairFiles('sigma'))
    assert.ok(await isSound())
  })

  describe('--check', () => {
    it('says that everything is missing, and generates nothing', async () => {
      const { exitCode, stdout } = await run(checkout, script, ['--check'])
      assert.equal(exitCode, 1)
      assert.match(stdout, /^ca +- +- +- +- +missing$/m)
      assert.match(stdout, /tls\/ssh_ed25519 is missing/)
      assert.deepEqual(await contents(), {})
    })

    it('shows name, subject, names, usages, expiry and state', async () => {
      await given()
      const { exitCode, stdout } = await run(checkout, script, ['--check'])
      assert.equal(exitCode, 0)
      assert.match(stdout, /^NAME +SUBJECT +SANS +USAGES +EXPIRES +STATE$/m)
      assert.match(stdout, /^sigma +O=system:nodes +sigma +client +\d{4}-\d\d-\d\d +ok$/m)
      assert.match(stdout, /^ +CN=system:node:sigma +192.168.100.11 +server +364 days$/m)
      assert.match(stdout, /^ssh_ed25519 +SHA256:\S{43} +ok$/m)
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
      assert.match(stdout, /tls\/ssh_host_alpha_ed25519.pub does not match the key/)
    })

    it('prints the same as JSON', async () => {
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
      assert.equal(ssh.length, sshKeys.length + 2)
    })
  })

  it('does not mix the pairs of runs at the same time', async () => {
    const outcomes = await Promise.all([1, 2, 3].map(() => run(checkout, script, ['--force'])))
    for (const { exitCode, stderr } of outcomes) {
      if (exitCode !== 0) assert.match(stderr, /another process is generating certificates/)
    }
    assert.ok(outcomes.some(({ exitCode }) => exitCode === 0))
    assert.ok(await isSound())
  })

  it('ignores the lock of a run that was killed', async () => {
    await mkdir(checkout.path('run'), { recursive: true })
    const child = spawn('true')
    await new Promise((resolve) => child.once('exit', resolve))
    const holder = {
      pid: child.pid,
      command: 'true',
      purpose: 'generating certificates',
      nonce: 'x',
    }
    await writeFile(checkout.path('run/pki.lock'), JSON.stringify(holder))
    await make()
  })

  it('can be killed at any moment, and the next run repairs everything', async () => {
    await given()
    // Between the start of the script and the last file.
    for (const [round, delay] of [300, 500, 650, 800].entries()) {
      const child = spawn(checkout.path(script), ['--force'], { stdio: 'ignore' })
      const ended = new Promise((resolve) => child.once('exit', resolve))
      await Promise.race([sleep(delay), ended])
      child.kill('SIGKILL')
      await ended
      const { exitCode, stderr } = await run(checkout, script)
      assert.equal(exitCode, 0, `round ${round}: ${stderr}`)
      assert.ok(await isSound(), `round ${round}`)
    }
  })

  it('renews a pair after an interruption between key and certificate', async () => {
    await given()
    const old = await contents()
    await make('--force')
    const fresh = await contents()
    // As if it had been killed after the authority and the first key.
    for (const [name, content] of Object.entries(old)) {
      const written = ['ca.pem', 'ca-key.pem', 'admin-key.pem'].includes(name)
      await writeFile(tls(name), written ? (fresh[name] ?? '') : content)
    }
    await make()
    assert.equal(await text('ca.pem'), fresh['ca.pem'])
    assert.ok(await isSound())
  })

  describe('the ssh_config', { skip: noSshd }, () => {
    let sigma: Sshd
    before(async () => {
      await writeFile(checkout.path('cluster.env'), settings)
      await rm(checkout.path('tls'), { recursive: true, force: true })
      await given()
      await mkdir(checkout.path('run'), { recursive: true })
      sigma = await startSshd(checkout, 'sigma')
    })
    after(() => sigma?.stop())
    beforeEach(given)

    const login = (where: Pick<Checkout, 'root'>, name: string, env: Record<string, string> = {}) =>
      run(where, 'ssh', ['-F', 'tls/ssh_config', name, 'echo "hello from $USER"'], { env })

    it('leads to the nodes, and to no other machine', async () => {
      assert.equal((await login(checkout, 'sigma')).stdout, 'hello from root\n')
      const impostor = await startSshd(checkout, 'gamma', { hostKeyOf: 'sigma' })
      const { stderr, exitCode } = await login(checkout, 'gamma').finally(() => impostor.stop())
      assert.match(stderr, /Host key verification failed/)
      assert.equal(exitCode, 255)
    })

    it('works at a path of 150 characters with spaces, quotes and other letters', async () => {
      const odd = join(checkout.root, '..', `it's "Übung" $HOME ${'x'.repeat(100)}`)
      await cp(checkout.root, odd, { recursive: true, verbatimSymlinks: true })
      for (const args of [[], ['--renew', 'sigma'], ['--check']]) {
        const { exitCode, stdout, stderr } = await run({ root: odd }, script, args)
        assert.equal(exitCode, 0, stdout + stderr)
      }
      const master = await run({ root: odd }, 'sh', [
        ...['-c', 'ssh -F tls/ssh_config -fNM sigma && ssh -F tls/ssh_config -O exit sigma'],
      ])
      assert.equal(master.exitCode, 0, master.stderr)
      const { stdout, stderr } = await login({ root: odd }, 'sigma')
      assert.equal(stdout, 'hello from root\n', stderr)
    })

    it("does not use the user's agent", async () => {
      let asked = 0
      const agent = createSocket(() => {
        asked += 1
      })
      const socket = checkout.path('run', 'agent')
      await new Promise<void>((resolve) => agent.listen(socket, resolve))
      const { stdout } = await login(checkout, 'sigma', { SSH_AUTH_SOCK: socket })
      agent.close()
      assert.equal(stdout, 'hello from root\n')
      assert.equal(asked, 0)
    })

    // In a mount namespace, where another folder hides the user's own ~/.ssh.
    const skip = process.getuid?.() === 0 ? missing('unshare') : 'needs root'
    it("does not use the user's ~/.ssh/config", { skip }, async () => {
      const command = `mount -t tmpfs tmpfs ~ && mkdir -m 700 ~/.ssh && cat >~/.ssh/config <<'END'
Host *
  ProxyJump nowhere.invalid
  Port 1
  User nobody
  ControlMaster auto
  ControlPath ~/%C
END
ssh -G sigma | grep -q '^proxyjump nowhere.invalid' || exit 9
ssh -F tls/ssh_config sigma 'echo "hello from $USER"'; ls ~`
      const { stdout, stderr } = await run(checkout, 'unshare', ['-m', 'sh', '-c', command])
      assert.equal(stdout, 'hello from root\n', stderr)
    })
  })
})

/** What the server sends to a client, after both have verified each other. */
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

describe('a certificate made by hand, as docs/certificates.md says', {
  skip: missing('openssl'),
}, () => {
  it('is right by the table, and kept', async () => {
    const checkout = await makeCheckout()
    try {
      assert.equal((await run(checkout, script)).exitCode, 0)
      const page = await readFile(join(projectRoot, 'docs/certificates.md'), 'utf8')
      const [, commands = ''] = page.match(/^```bash\n([\s\S]*?)^```$/m) ?? []
      const typed = await run(checkout, 'bash', ['-ec', commands])
      assert.equal(typed.exitCode, 0, typed.stdout + typed.stderr)

      const made = await readFile(checkout.path('tls', 'sigma.pem'), 'utf8')
      const ours = new X509Certificate(made)
      const table = new X509Certificate(await readFile(checkout.path('tls', 'gamma.pem')))
      assert.deepEqual(ours.keyUsage, table.keyUsage)
      const again = await run(checkout, script)
      assert.match(again.stderr, /10 certificates kept, 0 to issue/)
      assert.equal(await readFile(checkout.path('tls', 'sigma.pem'), 'utf8'), made)
    } finally {
      await checkout.remove()
    }
  })
})
