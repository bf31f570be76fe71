import assert from 'node:assert/strict'
import { execFileSync, spawn } from 'node:child_process'
import { createHash } from 'node:crypto'
import { existsSync } from 'node:fs'
import {
  appendFile,
  mkdir,
  readdir,
  readFile,
  realpath,
  rm,
  stat,
  truncate,
  writeFile,
} from 'node:fs/promises'
import { basename, join } from 'node:path'
import { after, afterEach, before, beforeEach, describe, it } from 'node:test'
import { setTimeout as wait } from 'node:timers/promises'
import { loadCluster } from '../../lib/cluster.mts'
import { detectArchitecture, detectSystem } from '../../lib/host.mts'
import { type Checkout, makeCheckout, type Outcome, run } from '../checkout.mts'
import { FakePrograms } from '../fake-programs.mts'
import { type FileServer, type ServedFile, startFileServer, startProxy } from '../file-server.mts'
import { largeInstaller, makeIso, noIso } from '../installer-iso.mts'

const script = 'bin/download-iso.mts'
const hash = (data: Buffer) => createHash('sha256').update(data).digest('hex')
/** This computer's own proxy has no part in these tests. */
const noProxy = Object.fromEntries(
  ['http_proxy', 'https_proxy', 'no_proxy'].flatMap((name) => [
    [name, ''],
    [name.toUpperCase(), ''],
  ]),
)

describe('download-iso', { skip: noIso }, () => {
  let arch: 'x86_64' | 'aarch64'
  let iso: Buffer
  let otherIso: Buffer
  let checkout: Checkout
  let server: FileServer
  let file: string

  const call = (args: string[] = [], env: Record<string, string> = {}): Promise<Outcome> =>
    run(checkout, script, args, { env: { ...noProxy, ...env } })

  /** Serves an ISO with its checksum, and tells its address. */
  function serve(data: Buffer, path = '/mirror/my.iso', options: Partial<ServedFile> = {}): string {
    server.files.set(path, { data, ...options })
    server.files.set(`${path}.sha256`, { data: Buffer.from(`${hash(data)}  my.iso\n`) })
    return server.url + path
  }
  const served = (path = '/mirror/my.iso'): ServedFile => {
    const found = server.files.get(path)
    assert.ok(found)
    return found
  }
  /** Ends a download after about half a megabyte. */
  async function breakOff(url: string): Promise<void> {
    served().cuts = [500_000]
    served().statuses = [0, 0, 403]
    const { exitCode, stderr } = await call(['--iso-url', url])
    assert.equal(exitCode, 1)
    assert.match(stderr, /download-iso: the server answers with HTTP status 403\n.*curl/)
    assert.ok((await stat(`${file}.partial`)).size > 0)
    server.requests.length = 0
  }
  const hasIso = async (expected: Buffer) => assert.deepEqual(await readFile(file), expected)
  const gets = () => server.requests.filter((line) => /^GET \S+\.iso( |$)/.test(line))

  before(async () => {
    arch = await detectArchitecture(detectSystem())
    checkout = await makeCheckout()
    const { NIXOS_VERSION } = loadCluster({ root: checkout.root, env: {} }).settings
    file = checkout.path('images', `nixos-${NIXOS_VERSION}-${arch}.iso`)
    const loader = arch === 'x86_64' ? 'EFI/BOOT/BOOTX64.EFI' : 'EFI/BOOT/BOOTAA64.EFI'
    const files = { 'EFI/BOOT/grub.cfg': 'menu', [loader]: 'MZ' }
    const path = checkout.path('made.iso')
    await makeIso(path, { ...files, bulk: largeInstaller['nix-store.squashfs'] ?? '' })
    iso = await readFile(path)
    await makeIso(path, { ...files, version: 'other' })
    otherIso = await readFile(path)
  })

  after(() => checkout.remove())

  beforeEach(async () => {
    server = await startFileServer()
    await rm(checkout.path('images'), { recursive: true, force: true })
    await checkout.set({ NIXOS_ISO_URL: '' })
  })

  afterEach(() => server.close())

  it('takes the release that the channel leads to, through a proxy that intercepts TLS, once', async () => {
    const key = checkout.path('key.pem')
    const names = 'subjectAltName=DNS:channels.nixos.org,DNS:releases.nixos.org'
    const request = ['req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-subj', '/CN=Proxy']
    const output = ['-keyout', key, '-out', checkout.path('proxy-ca.pem')]
    execFileSync('openssl', [...request, '-addext', names, ...output], { stdio: 'pipe' })
    const cert = await readFile(checkout.path('proxy-ca.pem'), 'utf8')
    const nixos = await startFileServer({ key: await readFile(key, 'utf8'), cert })
    const proxy = await startProxy(nixos.url)
    try {
      const latest = `/nixos-26.05/latest-nixos-minimal-${arch}-linux.iso`
      const release = `/nixos/26.05/nixos-26.05.1/nixos-minimal-26.05.1-${arch}-linux.iso`
      nixos.redirects.set(latest, `https://releases.nixos.org${release}`)
      nixos.files.set(release, { data: iso })
      nixos.files.set(`${release}.sha256`, { data: Buffer.from(hash(iso)) })
      // That of another release, which the channel has by the time that it is read.
      nixos.files.set(`${latest}.sha256`, { data: Buffer.from(hash(otherIso)) })
      const env = {
        NIXOS_VERSION: '26.05',
        PROXY_HTTPS: proxy.url.replace('127.0.0.1', '10.0.2.2'),
      }
      const untrusted = await call([], env)
      assert.equal(untrusted.exitCode, 1)
      assert.match(untrusted.stderr, /not signed by a known CA\n[\s\S]*hint: +.*PROXY_CA_FILE/)

      const trusting = { ...env, PROXY_CA_FILE: 'proxy-ca.pem' }
      const first = await call([], trusting)
      assert.equal(first.exitCode, 0, first.stderr)
      await hasIso(iso)
      assert.ok(proxy.requests.includes('CONNECT channels.nixos.org:443'))
      assert.ok(proxy.requests.includes('CONNECT releases.nixos.org:443'))

      const asked = nixos.requests.length
      const second = await call([], trusting)
      assert.equal(second.exitCode, 0)
      assert.match(second.stderr, /✓ images\/nixos-.* is there and verified \(from https:/)
      assert.equal(nixos.requests.length, asked)
    } finally {
      await proxy.close()
      await nixos.close()
    }
  })

  describe('with passwords', () => {
    const secret = 'p@ss w0rd"$x'
    const account = `user:${encodeURIComponent(secret)}@`
    let programs: FakePrograms
    let proxy: Awaited<ReturnType<typeof startProxy>>
    before(() => {
      programs = new FakePrograms()
      const curl = execFileSync('which', ['curl'], { encoding: 'utf8' }).trim()
      programs.add('curl', `exec '${curl}' "$@"`)
    })
    after(() => programs.remove())
    beforeEach(async () => {
      proxy = await startProxy(server.url, `user:${secret}`)
    })
    afterEach(() => proxy.close())

    const hidden = (outcome: Outcome) => {
      const shown = [outcome.stdout, outcome.stderr, ...programs.calls()].join('\n')
      assert.doesNotMatch(shown, /p@ss|p%40ss|w0rd/)
    }
    const callWith = (args: string[], env: Record<string, string> = {}) => {
      const path = `${programs.path}:${process.env.PATH}`
      return call(['--verbose', ...args], { PATH: path, ...env })
    }
    const through = (address: string) => {
      return callWith(['--iso-url', 'http://iso.test/mirror/my.iso'], { http_proxy: address })
    }

    it('logs in at the proxy, and shows the password nowhere', async () => {
      serve(iso)
      const outcome = await through(proxy.url.replace('://', `://${account}`))
      assert.equal(outcome.exitCode, 0, outcome.stderr)
      assert.ok(proxy.requests.includes(`GET http://iso.test/mirror/my.iso by user:${secret}`))
      hidden(outcome)
    })

    it('says that the proxy refuses or cannot be used, and shows the password nowhere', async () => {
      serve(iso)
      const refused = await through(proxy.url.replace('://', '://user:p%40ss@'))
      assert.match(refused.stderr, /there is no checksum|answers with HTTP status 407|407/)
      const nowhere = await through(`http://${account}127.0.0.1:9`)
      assert.match(
        nowhere.stderr,
        /download-iso: 127\.0\.0\.1 cannot be reached\n[\s\S]*http_proxy/,
      )
      const unclear = await through(`http://user:p@ss w0rd@127.0.0.1:9`)
      for (const outcome of [refused, nowhere, unclear]) {
        assert.equal(outcome.exitCode, 1)
        hidden(outcome)
      }
    })

    it('logs in at a server, and not at another to which that redirects', async () => {
      const login = `user:${secret}`
      serve(iso, '/mirror/my.iso', { login })
      const other = await startFileServer()
      try {
        const outcome = await callWith([
          '--iso-url',
          serve(iso, '/mirror/my.iso', { login }).replace('://', `://${account}`),
        ])
        assert.equal(outcome.exitCode, 0, outcome.stderr)
        hidden(outcome)
        assert.doesNotMatch(await readFile(`${file}.json`, 'utf8'), /p%40ss/)

        other.files.set('/my.iso', { data: iso, login })
        server.redirects.set('/elsewhere.iso', `${other.url}/my.iso`)
        const url = `${server.url}/elsewhere.iso`.replace('://', `://${account}`)
        const sent = await callWith(['--iso-url', url])
        assert.match(sent.stderr, /HTTP status 401/)
        hidden(sent)
      } finally {
        await other.close()
      }
    })
  })

  it('shows its progress in plain lines, and keeps only the ISO and its record', async () => {
    const { stderr } = await call(['--iso-url', serve(iso, '/mirror/my.iso', { pause: 60 })])
    assert.match(stderr, /^█+░+ \d\d % of 1\.\d MB/m)
    assert.ok(!stderr.includes('\x1b'))
    const names = [file, `${file}.json`].map((path) => basename(path))
    assert.deepEqual(await readdir(checkout.path('images')), names)
    const record = JSON.parse(await readFile(`${file}.json`, 'utf8'))
    assert.equal(record.source, `${server.url}/mirror/my.iso`)
    assert.equal(record.sha256, hash(iso))
  })

  it('continues where Ctrl-C interrupted it', async () => {
    const url = serve(iso, '/mirror/my.iso', { pause: 30 })
    const child = spawn(checkout.path(script), ['--iso-url', url], {
      env: { ...process.env, ...noProxy },
      stdio: ['ignore', 'ignore', 'pipe'],
    })
    let stderr = ''
    child.stderr.on('data', (chunk) => {
      stderr += chunk
    })
    const ended = new Promise<number | null>((resolve) => child.on('close', resolve))
    while ((await stat(`${file}.partial`).catch(() => ({ size: 0 }))).size === 0) {
      assert.equal(child.exitCode, null, stderr)
      await wait(10)
    }
    child.kill('SIGINT')
    assert.equal(await ended, 130)
    assert.match(stderr, /download-iso: interrupted by SIGINT/)
    assert.ok(!existsSync(file))

    delete served().pause
    server.requests.length = 0
    const { exitCode } = await call(['--iso-url', url])
    assert.equal(exitCode, 0)
    await hasIso(iso)
    assert.match(server.requests.at(-1) ?? '', /^GET \/mirror\/my\.iso bytes=\d+-$/)
  })

  it('continues by itself when the connection is lost, or the server busy', async () => {
    const url = serve(iso, '/mirror/my.iso', { cuts: [900_000, 300_000], statuses: [0, 0, 503] })
    const { exitCode, stderr } = await call(['--iso-url', url])
    assert.equal(exitCode, 0, stderr)
    await hasIso(iso)
    const starts = gets().map((line) => Number(line.match(/bytes=(\d+)-/)?.[1] ?? 0))
    assert.equal(starts.length, 4)
    assert.ok(starts[0] === 0 && (starts[1] ?? 0) > 0 && (starts[3] ?? 0) > (starts[1] ?? 0))
  })

  it('starts again where the server cannot continue', async () => {
    const url = serve(iso, '/mirror/my.iso', { noRanges: true, cuts: [900_000] })
    const { exitCode, stderr } = await call(['--iso-url', url])
    assert.equal(exitCode, 0, stderr)
    await hasIso(iso)
  })

  it('only verifies what had arrived completely', async () => {
    const url = serve(iso)
    await breakOff(url)
    await writeFile(`${file}.partial`, iso)
    assert.equal((await call(['--iso-url', url])).exitCode, 0)
    await hasIso(iso)
    assert.deepEqual(gets(), [])
  })

  it('starts over if the server has a newer ISO by then', async () => {
    const url = serve(iso)
    await breakOff(url)
    serve(otherIso)
    assert.equal((await call(['--iso-url', url])).exitCode, 0)
    await hasIso(otherIso)
    assert.deepEqual(gets(), ['GET /mirror/my.iso'])
  })

  it('recognizes a newer ISO without checksum by ETag or time, and never mixes two', async () => {
    const weak = (modified: string) => ({
      etag: 'W/"1"',
      modified: `${modified} 2026 10:00:00 GMT`,
    })
    const changes = [
      [{}, {}],
      [weak('Mon, 01 Jun'), weak('Tue, 02 Jun')],
    ]
    for (const [former, newer] of changes) {
      const url = serve(iso, '/mirror/my.iso', former)
      server.files.delete('/mirror/my.iso.sha256')
      await breakOff(url)
      server.files.set('/mirror/my.iso', { data: otherIso, ...newer })
      assert.equal((await call(['--iso-url', url])).exitCode, 0)
      await hasIso(otherIso)
      await rm(file)
    }
    // Nothing would show that the file has changed: each attempt starts from the beginning.
    server.files.set('/plain.iso', { data: iso, etag: false, cuts: [500_000] })
    assert.equal((await call(['--iso-url', `${server.url}/plain.iso`])).exitCode, 0)
    await hasIso(iso)
    assert.deepEqual(gets().slice(-2), ['GET /plain.iso', 'GET /plain.iso'])
  })

  it('refuses an ISO with a wrong checksum, and keeps the former one', async () => {
    await call(['--iso-url', serve(otherIso, '/former.iso')])
    const url = serve(iso)
    served().data = otherIso
    const { exitCode, stderr } = await call(['--iso-url', url])
    assert.equal(exitCode, 1)
    assert.match(
      stderr,
      /checksum of .*my\.iso does not match, so it was deleted\n.*expected SHA-256/,
    )
    await hasIso(otherIso)
    assert.deepEqual(
      (await readdir(checkout.path('images'))).filter((name) => /partial$/.test(name)),
      [],
    )
  })

  it('refuses what is not an installer, and warns where there is no checksum', async () => {
    const page = Buffer.from('<html>Please log in</html>')
    server.files.set('/my.iso', { data: page })
    server.files.set('/my.iso.sha256', { data: page })
    const { exitCode, stderr } = await call(['--iso-url', `${server.url}/my.iso`])
    assert.equal(exitCode, 1)
    assert.match(stderr, /! there is no checksum file .*\/my\.iso\.sha256: it can only be verified/)
    assert.match(stderr, /download-iso: .* is not an ISO 9660 image/)
    assert.ok(!existsSync(file))
  })

  it('finds the checksum in a list, or only at the first address', async () => {
    server.redirects.set('/latest.iso', '/store/1.iso')
    server.files.set('/store/1.iso', { data: iso })
    const list = `${hash(otherIso)}  other.iso\r\n${hash(iso).toUpperCase()} *latest.iso\r\n`
    server.files.set('/latest.iso.sha256', { data: Buffer.from(list) })
    const { exitCode, stderr } = await call(['--iso-url', `${server.url}/latest.iso`])
    assert.equal(exitCode, 0, stderr)
    assert.equal(JSON.parse(await readFile(`${file}.json`, 'utf8')).sha256, hash(iso))
    assert.doesNotMatch(stderr, /!/)
  })

  it('says what does not exist', async () => {
    const { exitCode, stderr } = await call(['--iso-url', `${server.url}/gone.iso`])
    assert.equal(exitCode, 1)
    assert.match(stderr, /download-iso: there is no http:.*\/gone\.iso\n +hint: +NIXOS_VERSION and/)
  })

  it('says before the download that the disk is too small', async () => {
    const { exitCode, stderr } = await call([
      '--iso-url',
      serve(iso, '/big.iso', { announced: 1e15 }),
    ])
    assert.equal(exitCode, 1)
    assert.match(
      stderr,
      /not enough disk space for images\/nixos.*: 1000 TB are needed, .* are free/,
    )
    assert.deepEqual(gets(), [])
  })

  it('takes another ISO when NIXOS_ISO_URL changes, and the same one again with --force', async () => {
    await checkout.set({ NIXOS_ISO_URL: serve(iso) })
    await call()
    await checkout.set({ NIXOS_ISO_URL: serve(otherIso, '/other.iso') })
    await call()
    await hasIso(otherIso)

    server.requests.length = 0
    await call()
    assert.equal(server.requests.length, 0)
    await call(['--force'])
    assert.ok(server.requests.includes('GET /other.iso'))
  })

  it('does not accept an ISO as verified that was cut off or changed since', async () => {
    const url = serve(iso)
    await call(['--iso-url', url])
    await truncate(file, 100_000)
    await call(['--iso-url', url])
    await hasIso(iso)
    await writeFile(file, Buffer.alloc(iso.length))
    await call(['--iso-url', url])
    await hasIso(iso)
  })

  it('links to a file of the user, and checks it again when it has changed', async () => {
    const own = checkout.path('my own.iso')
    await writeFile(own, iso)
    const { exitCode, stderr } = await call(['--iso-url', 'my own.iso'])
    assert.equal(exitCode, 0, stderr)
    assert.equal(await realpath(file), await realpath(own))
    await appendFile(own, 'x')
    assert.match((await call(['--iso-url', own])).stderr, /✓ check .*my own\.iso/)
    await writeFile(`${own}.sha256`, `${hash(iso)}  my own.iso\n`)
    await appendFile(own, 'x')
    const wrong = await call(['--iso-url', own])
    assert.match(wrong.stderr, /the checksum of .*my own\.iso is not the one in .*\.sha256/)
    await truncate(own, 100_000)
    const cut = await call(['--iso-url', own])
    assert.equal(cut.exitCode, 1)
    assert.match(cut.stderr, /my own\.iso is cut off: 100000 of \d+ bytes are there/)
  })

  it('accepts a file at the ISO’s own place, and one in another folder than the project', async () => {
    await mkdir(checkout.path('images'))
    await writeFile(file, iso)
    assert.equal((await call(['--iso-url', file])).exitCode, 0)
    assert.ok((await stat(file)).isFile())
    await hasIso(iso)
    const cwd = checkout.path('images')
    const args = ['--iso-url', 'missing.iso']
    const { stderr } = await run(checkout, script, args, { cwd, env: noProxy })
    assert.match(stderr, /the ISO .*\/images\/missing\.iso does not exist/)
  })

  it('never writes through the link to the user’s file', async () => {
    const own = checkout.path('precious.iso')
    await writeFile(own, otherIso)
    await call(['--iso-url', own])
    await call(['--iso-url', serve(iso)])
    await hasIso(iso)
    assert.deepEqual(await readFile(own), otherIso)
  })

  it('does not run twice at a time', async () => {
    const url = serve(iso, '/mirror/my.iso', { pause: 500 })
    const first = call(['--iso-url', url])
    while (!existsSync(`${file}.partial`)) await wait(10)
    const second = await call(['--iso-url', url])
    served().pause = 0
    assert.equal(second.exitCode, 1)
    assert.match(second.stderr, /another process is downloading the ISO/)
    assert.equal((await first).exitCode, 0)
  })

  it('refuses an address that it cannot use, and then does nothing', async () => {
    for (const address of ['ftp://mirror/x.iso', 'http://user:secret@', '']) {
      const { exitCode, stderr } = await call(['--iso-url', address])
      assert.notEqual(exitCode, 0, address)
      assert.doesNotMatch(stderr, /secret/)
    }
    assert.ok(!existsSync(checkout.path('images')))
  })

  it('works at a path of 150 characters with a space', async () => {
    const long = await makeCheckout({ long: true })
    try {
      const args = ['--iso-url', serve(iso)]
      const { exitCode, stderr } = await run(long, script, args, { cwd: '/', env: noProxy })
      assert.equal(exitCode, 0, stderr)
      assert.equal((await readdir(join(long.root, 'images'))).length, 2)
    } finally {
      await long.remove()
    }
  })
})
