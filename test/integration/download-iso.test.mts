import assert from 'node:assert/strict'
import { execFileSync, spawn } from 'node:child_process'
import { createHash } from 'node:crypto'
import { existsSync } from 'node:fs'
import {
  appendFile,
  readdir,
  readFile,
  realpath,
  rm,
  stat,
  truncate,
  writeFile,
} from 'node:fs/promises'
import { join } from 'node:path'
import { after, afterEach, before, beforeEach, describe, it } from 'node:test'
import { setTimeout as wait } from 'node:timers/promises'
import { loadCluster } from '../../lib/cluster.mts'
import { detectArchitecture, detectSystem } from '../../lib/qemu/processor.mts'
import { type Checkout, makeCheckout, type Outcome, run } from '../checkout.mts'
import { type FileServer, startFileServer, startProxy } from '../file-server.mts'
import { installerFiles, makeIso, noIsoTool } from '../iso-image.mts'

const script = 'bin/download-iso.mts'
const hash = (data: Buffer) => createHash('sha256').update(data).digest('hex')
/** This computer's own proxy has no part in these tests. */
const noProxy = Object.fromEntries(
  ['http_proxy', 'https_proxy', 'no_proxy'].flatMap((name) => [
    [name, ''],
    [name.toUpperCase(), ''],
  ]),
)

describe('download-iso', { skip: noIsoTool }, () => {
  let arch: 'x86_64' | 'aarch64'
  let iso: Buffer
  let otherIso: Buffer
  let checkout: Checkout
  let server: FileServer
  let file: string

  const call = (args: string[] = [], env: Record<string, string> = {}): Promise<Outcome> =>
    run(checkout, script, args, { env: { ...noProxy, ...env } })

  /** Serves an ISO with its checksum. @returns its address */
  function serve(data: Buffer, path = '/mirror/my.iso'): string {
    server.files.set(path, { data })
    server.files.set(`${path}.sha256`, { data: Buffer.from(`${hash(data)}  my.iso\n`) })
    return server.url + path
  }

  before(async () => {
    arch = await detectArchitecture(detectSystem())
    checkout = await makeCheckout()
    const { NIXOS_VERSION } = loadCluster({ root: checkout.root, env: {} }).settings
    file = checkout.path('images', `nixos-${NIXOS_VERSION}-${arch}.iso`)
    const loader = arch === 'x86_64' ? 'EFI/BOOT/BOOTX64.EFI' : 'EFI/BOOT/BOOTAA64.EFI'
    const files = { 'EFI/BOOT/grub.cfg': 'menu', [loader]: 'MZ' }
    const path = checkout.path('made.iso')
    await makeIso(path, { ...files, bulk: installerFiles['nix-store.squashfs'] ?? '' })
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

  it('has the channel’s ISO, through a proxy that intercepts TLS, and asks no second time', async () => {
    const key = checkout.path('key.pem')
    const names = 'subjectAltName=DNS:channels.nixos.org,DNS:releases.nixos.org'
    execFileSync(
      'openssl',
      [
        'req',
        '-x509',
        '-newkey',
        'rsa:2048',
        '-nodes',
        '-subj',
        '/CN=Proxy',
        '-addext',
        names,
      ].concat(['-keyout', key, '-out', checkout.path('proxy-ca.pem')]),
      { stdio: 'pipe' },
    )
    const cert = await readFile(checkout.path('proxy-ca.pem'), 'utf8')
    const nixos = await startFileServer({ key: await readFile(key, 'utf8'), cert })
    const proxy = await startProxy(nixos.url)
    try {
      const latest = `/nixos-26.05/latest-nixos-minimal-${arch}-linux.iso`
      const release = `/nixos/26.05/nixos-26.05.1/nixos-minimal-26.05.1-${arch}-linux.iso`
      nixos.redirects.set(latest, `https://releases.nixos.org${release}`)
      nixos.files.set(release, { data: iso })
      nixos.files.set(`${release}.sha256`, { data: Buffer.from(hash(iso)) })
      const env = {
        NIXOS_VERSION: '26.05',
        PROXY_HTTPS: proxy.url.replace('127.0.0.1', '10.0.2.2'),
        PROXY_CA_FILE: 'proxy-ca.pem',
      }
      const first = await call([], env)
      assert.equal(first.exitCode, 0, first.stderr)
      assert.deepEqual(await readFile(file), iso)
      assert.ok(proxy.requests.includes('CONNECT channels.nixos.org:443'))
      assert.ok(proxy.requests.includes('CONNECT releases.nixos.org:443'))

      const asked = nixos.requests.length
      const second = await call([], env)
      assert.equal(second.exitCode, 0)
      assert.match(second.stderr, /✓ images\/nixos-.* is there and verified \(from https:/)
      assert.equal(nixos.requests.length, asked)
    } finally {
      await proxy.close()
      await nixos.close()
    }
  })

  it('tells its progress in plain lines where there is no terminal', async () => {
    const { stderr } = await call(['--iso-url', serve(iso)])
    assert.match(stderr, /^█{5}░{5} 5\d % of 1\.\d MB/m)
    assert.ok(!stderr.includes('\x1b'))
  })

  it('keeps only the ISO and its record', async () => {
    await call(['--iso-url', serve(iso)])
    const names = await readdir(checkout.path('images'))
    assert.deepEqual(
      names,
      [file, `${file}.json`].map((path) => path.split('/').at(-1)),
    )
    const record = JSON.parse(await readFile(`${file}.json`, 'utf8'))
    assert.equal(record.source, `${server.url}/mirror/my.iso`)
    assert.equal(record.sha256, hash(iso))
  })

  it('goes on where Ctrl-C broke it off', async () => {
    const url = serve(iso)
    const served = server.files.get('/mirror/my.iso')
    assert.ok(served)
    served.pause = 30
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

    delete served.pause
    server.requests.length = 0
    const { exitCode } = await call(['--iso-url', url])
    assert.equal(exitCode, 0)
    assert.deepEqual(await readFile(file), iso)
    assert.match(server.requests.at(-1) ?? '', /^GET \/mirror\/my\.iso bytes=\d+-$/)
  })

  it('starts over if the server has a newer ISO by then', async () => {
    const url = serve(iso)
    const served = server.files.get('/mirror/my.iso')
    assert.ok(served)
    served.cuts = [500_000]
    served.statuses = [0, 0, 403]
    assert.equal((await call(['--iso-url', url])).exitCode, 1)
    assert.ok((await stat(`${file}.partial`)).size > 0)
    serve(otherIso)
    assert.equal((await call(['--iso-url', url])).exitCode, 0)
    assert.deepEqual(await readFile(file), otherIso)
  })

  it('refuses an ISO with a wrong checksum', async () => {
    const url = serve(iso)
    server.files.set('/mirror/my.iso', { data: otherIso })
    const { exitCode, stderr } = await call(['--iso-url', url])
    assert.equal(exitCode, 1)
    assert.match(stderr, /my\.iso is not the expected file: its checksum differs/)
    assert.ok(!existsSync(file))
  })

  it('refuses what is no installer, and warns where there is no checksum', async () => {
    server.files.set('/my.iso', { data: Buffer.from('<html>Please log in</html>') })
    const { exitCode, stderr } = await call(['--iso-url', `${server.url}/my.iso`])
    assert.equal(exitCode, 1)
    assert.match(stderr, /! there is no checksum file .*\/my\.iso\.sha256: only that it is a whole/)
    assert.match(stderr, /download-iso: .* is no ISO 9660 image/)
    assert.ok(!existsSync(file))
  })

  it('says what is not there', async () => {
    const { exitCode, stderr } = await call(['--iso-url', `${server.url}/gone.iso`])
    assert.equal(exitCode, 1)
    assert.match(stderr, /download-iso: there is no http:.*\/gone\.iso\n +hint: +NIXOS_VERSION and/)
  })

  it('takes another ISO when NIXOS_ISO_URL changes, and the same one again with --force', async () => {
    await checkout.set({ NIXOS_ISO_URL: serve(iso) })
    await call()
    await checkout.set({ NIXOS_ISO_URL: serve(otherIso, '/other.iso') })
    await call()
    assert.deepEqual(await readFile(file), otherIso)

    server.requests.length = 0
    await call()
    assert.equal(server.requests.length, 0)
    await call(['--force'])
    assert.ok(server.requests.includes('GET /other.iso'))
  })

  it('takes no ISO for verified that was cut off or changed since', async () => {
    const url = serve(iso)
    await call(['--iso-url', url])
    await truncate(file, 100_000)
    await call(['--iso-url', url])
    assert.deepEqual(await readFile(file), iso)
    await writeFile(file, Buffer.alloc(iso.length))
    await call(['--iso-url', url])
    assert.deepEqual(await readFile(file), iso)
  })

  it('links to a file of the user, and looks at it again when it has changed', async () => {
    const own = checkout.path('my own.iso')
    await writeFile(own, iso)
    const { exitCode, stderr } = await call(['--iso-url', 'my own.iso'])
    assert.equal(exitCode, 0, stderr)
    assert.equal(await realpath(file), await realpath(own))
    await appendFile(own, 'x')
    assert.match((await call(['--iso-url', own])).stderr, /✓ look at .*my own\.iso/)
    await truncate(own, 100_000)
    const cut = await call(['--iso-url', own])
    assert.equal(cut.exitCode, 1)
    assert.match(cut.stderr, /my own\.iso is cut off: 100000 of \d+ bytes are there/)
  })

  it('never writes through the link to the user’s file', async () => {
    const own = checkout.path('precious.iso')
    await writeFile(own, otherIso)
    await call(['--iso-url', own])
    await call(['--iso-url', serve(iso)])
    assert.deepEqual(await readFile(file), iso)
    assert.deepEqual(await readFile(own), otherIso)
  })

  it('does not run twice at a time', async () => {
    const url = serve(iso)
    const served = server.files.get('/mirror/my.iso')
    assert.ok(served)
    served.pause = 100
    const first = call(['--iso-url', url])
    while (!existsSync(`${file}.partial`)) await wait(10)
    const second = await call(['--iso-url', url])
    assert.equal(second.exitCode, 1)
    assert.match(second.stderr, /another process is downloading the ISO/)
    assert.equal((await first).exitCode, 0)
  })

  it('refuses what it does not know and then does nothing', async () => {
    for (const args of [['--iso'], ['now'], ['--iso-url'], ['--iso-url', 'ftp://mirror/x.iso']]) {
      const { exitCode } = await call(args)
      assert.notEqual(exitCode, 0, args.join(' '))
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
