import assert from 'node:assert/strict'
import { createHash } from 'node:crypto'
import { existsSync } from 'node:fs'
import {
  appendFile,
  lstat,
  mkdir,
  mkdtemp,
  readFile,
  realpath,
  rm,
  truncate,
  writeFile,
} from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { basename, join } from 'node:path'
import { after, afterEach, before, beforeEach, describe, it } from 'node:test'
import { pathToFileURL } from 'node:url'
import { type Cluster, loadCluster } from '../../../lib/cluster.mts'
import {
  adoptIso,
  checksumIn,
  findRelease,
  inspectIso,
  isoFile,
  isoRecord,
  isoSource,
  recordIso,
  verifiedIso,
} from '../../../lib/download/iso.mts'
import { projectRoot } from '../../checkout.mts'
import { type FileServer, startFileServer } from '../../file-server.mts'
import { installerFiles, makeIso, noIsoTool } from '../../iso-image.mts'

const host = { arch: 'x86_64' } as const
const skip = noIsoTool
const [hash, otherHash] = ['a', 'b'].map((letter) => letter.repeat(64)) as [string, string]

let folder: string
before(async () => {
  folder = await realpath(await mkdtemp(join(tmpdir(), 'iso-test-')))
})
after(() => rm(folder, { recursive: true, force: true }))

/** The project's cluster, with its files in the test's folder. */
function clusterWith(env: Record<string, string> = {}): Cluster {
  const cluster = loadCluster({ root: projectRoot, env: { NIXOS_ISO_URL: '', ...env } })
  return { ...cluster, root: folder, path: (...parts) => join(folder, ...parts) }
}

describe('the place of the ISO', () => {
  it('is in images/, under release and processor', () => {
    const cluster = clusterWith({ NIXOS_VERSION: '26.05' })
    assert.equal(isoFile(cluster, host), join(folder, 'images/nixos-26.05-x86_64.iso'))
  })
})

describe('the source of the ISO', () => {
  it('is the channel’s minimal image for the processor', () => {
    assert.deepEqual(isoSource(clusterWith({ NIXOS_VERSION: '26.11' }), { arch: 'aarch64' }), {
      kind: 'url',
      url: 'https://channels.nixos.org/nixos-26.11/latest-nixos-minimal-aarch64-linux.iso',
      official: true,
    })
  })

  it('is NIXOS_ISO_URL where that is set, and what was given before both', () => {
    const cluster = clusterWith({ NIXOS_ISO_URL: 'http://mirror.test/a.iso' })
    const url = 'http://mirror.test/a.iso'
    assert.deepEqual(isoSource(cluster, host), { kind: 'url', url, official: false })
    const given = 'HTTPS://other.test/b.iso'
    assert.deepEqual(isoSource(cluster, host, given), { kind: 'url', url: given, official: false })
  })

  it('may be a file: of cluster.env beside that, of the command line where one is', () => {
    const cluster = clusterWith({ NIXOS_ISO_URL: 'my/a.iso' })
    assert.deepEqual(isoSource(cluster, host), { kind: 'file', path: join(folder, 'my/a.iso') })
    const path = join(process.cwd(), 'b.iso')
    assert.deepEqual(isoSource(cluster, host, 'b.iso'), { kind: 'file', path })
    const url = pathToFileURL('/with space/c.iso').href
    assert.deepEqual(isoSource(cluster, host, url), { kind: 'file', path: '/with space/c.iso' })
  })

  it('cannot be another kind of address', () => {
    assert.throws(() => isoSource(clusterWith(), host, 'ftp://mirror.test/a.iso'), {
      message: 'the ISO cannot come from ftp://',
    })
    assert.throws(() => isoSource(clusterWith(), host, 'http://'), /"http:\/\/" is no address/)
  })
})

describe('a checksum file', () => {
  it('may be a bare checksum, or what sha256sum prints', () => {
    assert.equal(checksumIn(hash, 'a.iso'), hash)
    assert.equal(
      checksumIn(`${hash.toUpperCase()}  nixos-minimal-26.05.1-x86.iso\n`, 'a.iso'),
      hash,
    )
    assert.equal(checksumIn(`${hash} *a.iso\r\n`, 'a.iso'), hash)
  })

  it('of several files is searched for the one', () => {
    const text = `${hash}  b.iso\n${otherHash}  a.iso\n`
    assert.equal(checksumIn(text, 'a.iso'), otherHash)
    assert.equal(checksumIn(text, 'c.iso'), undefined)
  })

  it('that is a page of a proxy is none', () => {
    assert.equal(checksumIn('<html>Please log in</html>', 'a.iso'), undefined)
  })
})

describe('the release behind an address', () => {
  const proxy = { http: '', https: '', no: '', caFile: '' }
  let server: FileServer
  beforeEach(async () => {
    server = await startFileServer()
  })
  afterEach(() => server.close())
  const serve = (path: string, data: string) => server.files.set(path, { data: Buffer.from(data) })

  it('is where the channel leads, with the checksum that stands there', async () => {
    server.redirects.set('/latest.iso', '/26.05.1234/nixos.iso')
    serve('/26.05.1234/nixos.iso', 'ISO')
    serve('/26.05.1234/nixos.iso.sha256', `${hash}  nixos.iso\n`)
    serve('/latest.iso.sha256', `${otherHash}  nixos.iso\n`)
    assert.deepEqual(await findRelease(`${server.url}/latest.iso`, { proxy }), {
      url: `${server.url}/26.05.1234/nixos.iso`,
      sha256: hash,
    })
  })

  it('may have its checksum only beside the first address', async () => {
    server.redirects.set('/latest.iso', '/store/1.iso')
    serve('/store/1.iso', 'ISO')
    serve('/latest.iso.sha256', hash)
    const url = `${server.url}/latest.iso`
    assert.deepEqual(await findRelease(url, { proxy }), { url, sha256: hash })
  })

  it('may have no checksum', async () => {
    serve('/a.iso', 'ISO')
    const url = `${server.url}/a.iso`
    assert.deepEqual(await findRelease(url, { proxy }), { url, sha256: undefined })
  })

  it('is told to be missing', async () => {
    await assert.rejects(findRelease(`${server.url}/a.iso`, { proxy }), {
      message: `there is no ${server.url}/a.iso`,
    })
  })
})

describe('a file taken for the installer', { skip }, () => {
  let iso: string
  beforeEach(async () => {
    iso = join(folder, 'a.iso')
    await makeIso(iso)
  })

  it('passes if it is a whole ISO image with GRUB for UEFI', () => inspectIso(iso, host))

  it('passes with the folder name of older installers', async () => {
    await makeIso(iso, { 'EFI/boot/grub.cfg': 'menu\n', 'EFI/boot/bootx64.efi': 'MZ' })
    await inspectIso(iso, host)
  })

  it('is refused if it is something else', async () => {
    const expected = { message: 'b.iso is no ISO 9660 image' }
    await writeFile(join(folder, 'b.iso'), '<html>Please log in</html>')
    await assert.rejects(inspectIso(join(folder, 'b.iso'), host), expected)
    await writeFile(join(folder, 'b.iso'), Buffer.alloc(1_000_000))
    await assert.rejects(inspectIso(join(folder, 'b.iso'), host), expected)
    await assert.rejects(inspectIso(folder, host), /is no ISO 9660 image/)
  })

  it('is refused if it is cut off', async () => {
    await truncate(iso, 900_000)
    await assert.rejects(
      inspectIso(iso, host),
      /^StepError: a\.iso is cut off: 900000 of \d+ bytes/,
    )
  })

  it('is refused if it has no boot menu', async () => {
    await makeIso(iso, { 'README.txt': 'holiday pictures' })
    await assert.rejects(inspectIso(iso, host), /is no NixOS installer: it has no EFI\/BOOT\/grub/)
  })

  it('is refused if it is for another processor', async () => {
    await assert.rejects(inspectIso(iso, { arch: 'aarch64' }), /for another processor than aarch64/)
  })
})

describe('an ISO of one’s own', { skip }, () => {
  let own: string
  let file: string
  beforeEach(async () => {
    own = join(folder, 'own', 'my nixos.iso')
    file = isoFile(clusterWith(), host)
    await rm(join(folder, 'images'), { recursive: true, force: true })
    await rm(join(folder, 'own'), { recursive: true, force: true })
    await mkdir(join(folder, 'own'))
    await makeIso(own)
  })

  it('is linked to and stays as it is', async () => {
    const before = await lstat(own)
    assert.equal(await adoptIso(own, file, host), undefined)
    assert.equal(await realpath(file), own)
    const { mtimeMs, ino, size } = await lstat(own)
    assert.deepEqual([mtimeMs, ino, size], [before.mtimeMs, before.ino, before.size])
  })

  it('takes the place of a former link', async () => {
    await adoptIso(own, file, host)
    const second = join(folder, 'own', 'second.iso')
    await makeIso(second)
    await adoptIso(second, file, host)
    assert.equal(await realpath(file), second)
  })

  it('may lie at the ISO’s place already', async () => {
    await mkdir(join(folder, 'images'))
    await makeIso(file)
    await adoptIso(file, file, host)
    assert.ok((await lstat(file)).isFile())
  })

  it('is compared with the .sha256 file beside it', async () => {
    const sha256 = createHash('sha256')
      .update(await readFile(own))
      .digest('hex')
    await writeFile(`${own}.sha256`, `${sha256}  ${basename(own)}\n`)
    assert.equal(await adoptIso(own, file, host), sha256)
    await appendFile(own, 'x')
    await assert.rejects(adoptIso(own, file, host), /its checksum differs/)
  })

  it('is refused, and nothing linked, if it is missing or no installer', async () => {
    await assert.rejects(adoptIso(`${own}.gone`, file, host), /^StepError: the ISO .* is not there/)
    await makeIso(own, { 'a.txt': '' })
    await assert.rejects(adoptIso(own, file, host), /no NixOS installer/)
    assert.ok(!existsSync(file))
  })
})

describe('a verified ISO', () => {
  let file: string
  beforeEach(async () => {
    file = isoFile(clusterWith(), host)
    await rm(join(folder, 'images'), { recursive: true, force: true })
    await mkdir(join(folder, 'images'))
    await writeFile(file, installerFiles['nix-store.squashfs'] ?? '')
  })

  it('is taken as long as its size and time are those of the record', async () => {
    await recordIso(file, 'http://mirror.test/a.iso', hash)
    assert.equal(await verifiedIso(clusterWith(), host), file)
    assert.equal((await isoRecord(file))?.source, 'http://mirror.test/a.iso')
  })

  it('is not taken without a record, after a change, or cut off', async () => {
    const changed = /is not as \.\/bin\/download-iso\.mts left it/
    await assert.rejects(verifiedIso(clusterWith(), host), changed)
    await recordIso(file, 'http://mirror.test/a.iso', hash)
    await truncate(file, 1000)
    await assert.rejects(verifiedIso(clusterWith(), host), changed)
    await recordIso(file, 'http://mirror.test/a.iso', hash)
    await writeFile(`${file}.json`, 'half a rec')
    await assert.rejects(verifiedIso(clusterWith(), host), changed)
  })

  it('that is missing is told with the way to get it', async () => {
    await rm(file)
    await assert.rejects(verifiedIso(clusterWith(), host), (error: unknown) => {
      assert.match(String(error), /there is no installer ISO: .*images\/nixos-/)
      return true
    })
  })
})
