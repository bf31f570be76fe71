import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { createHash, randomBytes } from 'node:crypto'
import { existsSync } from 'node:fs'
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, afterEach, before, beforeEach, describe, it } from 'node:test'
import { type DownloadOptions, download, type Progress } from '../../../lib/download/download.mts'
import type { StepError } from '../../../lib/errors.mts'
import { type FileServer, startFileServer, startProxy } from '../../file-server.mts'

const data = randomBytes(3_000_000)
const other = randomBytes(2_000_000)
const hash = (bytes: Buffer) => createHash('sha256').update(bytes).digest('hex')
const none = { http: '', https: '', no: '', caFile: '' }

let folder: string
let path: string
let server: FileServer
let options: DownloadOptions

before(async () => {
  folder = await mkdtemp(join(tmpdir(), 'download-'))
  path = join(folder, 'file.iso')
})

after(() => rm(folder, { recursive: true, force: true }))

beforeEach(async () => {
  server = await startFileServer()
  options = { proxy: none, retryDelay: 1 }
})

afterEach(async () => {
  await server.close()
  for (const suffix of ['', '.partial', '.partial.json']) {
    await rm(path + suffix, { force: true })
  }
})

/** Breaks a download off after about `bytes`. @returns how many are left of it */
async function breakOff(bytes: number, sha256?: string): Promise<number> {
  const file = server.files.get('/file.iso')
  assert.ok(file)
  file.cuts = [bytes]
  file.statuses = [0, 403]
  await assert.rejects(download(`${server.url}/file.iso`, path, { ...options, sha256 }), /403/)
  server.requests.length = 0
  const { length } = await readFile(`${path}.partial`)
  // What had arrived in memory only is lost.
  assert.ok(length > bytes - 200_000 && length <= bytes, `${length} of ${bytes} bytes are left`)
  return length
}

describe('a download', () => {
  it('arrives whole, with its checksum', async () => {
    server.files.set('/file.iso', { data })
    const result = await download(`${server.url}/file.iso`, path, {
      ...options,
      sha256: hash(data),
    })
    assert.deepEqual(result, { size: data.length, sha256: hash(data) })
    assert.deepEqual(await readFile(path), data)
    assert.ok(!existsSync(`${path}.partial`) && !existsSync(`${path}.partial.json`))
  })

  it('tells its progress up to the last byte', async () => {
    server.files.set('/file.iso', { data })
    const told: Progress[] = []
    await download(`${server.url}/file.iso`, path, {
      ...options,
      onProgress: (progress) => told.push(progress),
    })
    const last = { received: data.length, total: data.length }
    assert.deepEqual(told.at(-2), { ...last, verifying: false })
    assert.deepEqual(told.at(-1), { ...last, verifying: true })
  })

  it('goes on by itself when the connection is cut', async () => {
    server.files.set('/file.iso', { data, cuts: [1_000_000, 500_000] })
    await download(`${server.url}/file.iso`, path, options)
    assert.deepEqual(await readFile(path), data)
    const starts = server.requests.map((request) => Number(request.match(/bytes=(\d+)-/)?.[1] ?? 0))
    const [first, second = 0, third = 0] = starts
    assert.ok(first === 0 && second > 0 && third > second, starts.join(', '))
  })

  it('goes on where an earlier call broke off', async () => {
    server.files.set('/file.iso', { data })
    const part = await breakOff(1_200_000)
    await download(`${server.url}/file.iso`, path, options)
    assert.deepEqual(await readFile(path), data)
    assert.deepEqual(server.requests, [`GET /file.iso bytes=${part}-`])
  })

  it('starts over when the file on the server has another ETag by now', async () => {
    server.files.set('/file.iso', { data })
    await breakOff(1_200_000)
    server.files.set('/file.iso', { data: other })
    await download(`${server.url}/file.iso`, path, options)
    assert.deepEqual(await readFile(path), other)
  })

  it('goes by Last-Modified where there is only a weak ETag', async () => {
    const etag = 'W/"1"'
    server.files.set('/file.iso', { data, etag, modified: 'Mon, 01 Jun 2026 10:00:00 GMT' })
    await breakOff(1_200_000)
    server.files.set('/file.iso', {
      data: other,
      etag,
      modified: 'Tue, 02 Jun 2026 10:00:00 GMT',
    })
    await download(`${server.url}/file.iso`, path, options)
    assert.deepEqual(await readFile(path), other)
  })

  it('starts over when nothing would tell whether the file is the same', async () => {
    server.files.set('/file.iso', { data, etag: false })
    await breakOff(1_200_000)
    await download(`${server.url}/file.iso`, path, options)
    assert.deepEqual(await readFile(path), data)
    assert.deepEqual(server.requests, ['GET /file.iso'])
  })

  it('starts over when its parts turn out to be of two files', async () => {
    const newer = Buffer.concat([other, data]).subarray(0, data.length)
    server.files.set('/file.iso', { data, etag: false })
    const part = await breakOff(1_200_000, hash(newer))
    server.files.set('/file.iso', { data: newer, etag: false })
    await download(`${server.url}/file.iso`, path, { ...options, sha256: hash(newer) })
    assert.deepEqual(await readFile(path), newer)
    assert.deepEqual(server.requests, [`GET /file.iso bytes=${part}-`, 'GET /file.iso'])
  })

  it('throws the part away when another checksum is wanted', async () => {
    server.files.set('/file.iso', { data })
    await breakOff(1_200_000, hash(data))
    await download(`${server.url}/file.iso`, path, options)
    assert.deepEqual(server.requests, ['GET /file.iso'])
  })

  it('throws a part away that comes without its note', async () => {
    server.files.set('/file.iso', { data })
    await writeFile(`${path}.partial`, other)
    await download(`${server.url}/file.iso`, path, options)
    assert.deepEqual(await readFile(path), data)
  })

  it('is complete when only its end was not noticed', async () => {
    server.files.set('/file.iso', { data })
    await breakOff(1_200_000)
    await writeFile(`${path}.partial`, data)
    await download(`${server.url}/file.iso`, path, options)
    assert.deepEqual(await readFile(path), data)
  })

  it('starts over when the server has less than the part that is here', async () => {
    server.files.set('/file.iso', { data, etag: false })
    await breakOff(2_500_000, hash(other))
    server.files.set('/file.iso', { data: other, etag: false })
    await download(`${server.url}/file.iso`, path, { ...options, sha256: hash(other) })
    assert.deepEqual(await readFile(path), other)
  })

  it('copes with a server that knows no ranges', async () => {
    server.files.set('/file.iso', { data, noRanges: true, cuts: [1_000_000] })
    await download(`${server.url}/file.iso`, path, options)
    assert.deepEqual(await readFile(path), data)
  })

  it('waits for a server that is busy', async () => {
    server.files.set('/file.iso', { data, statuses: [503, 429, 500] })
    await download(`${server.url}/file.iso`, path, options)
    assert.deepEqual(await readFile(path), data)
  })

  it('gives up after five attempts without a new byte, and keeps what it has', async () => {
    server.files.set('/file.iso', { data, cuts: [300_000, 0, 0, 0, 0, 0, 0] })
    await assert.rejects(download(`${server.url}/file.iso`, path, options), /broke off|ended after/)
    assert.equal(server.requests.length, 5)
    assert.ok((await readFile(`${path}.partial`)).length > 0)
    assert.ok(!existsSync(path))
  })

  it('follows redirects', async () => {
    server.files.set('/release/file.iso', { data })
    server.redirects.set('/latest.iso', '/release/file.iso')
    await download(`${server.url}/latest.iso`, path, options)
    assert.deepEqual(await readFile(path), data)
  })

  it('ends a circle of redirects', async () => {
    server.redirects.set('/a', '/b')
    server.redirects.set('/b', '/a')
    await assert.rejects(download(`${server.url}/a`, path, options), /more than ten times/)
  })

  it('refuses a file with a wrong checksum and keeps the former one', async () => {
    await writeFile(path, 'the former one')
    server.files.set('/file.iso', { data })
    await assert.rejects(
      download(`${server.url}/file.iso`, path, { ...options, sha256: hash(other) }),
      (error: StepError) => {
        assert.match(error.message, /file\.iso is not the expected file: its checksum differs/)
        assert.match(error.explanation.output ?? '', new RegExp(`${hash(other)}\n.*${hash(data)}`))
        return true
      },
    )
    assert.equal(await readFile(path, 'utf8'), 'the former one')
    assert.ok(!existsSync(`${path}.partial`))
  })

  it('refuses what the caller refuses', async () => {
    server.files.set('/file.iso', { data })
    const verify = () => Promise.reject(new Error('no ISO'))
    await assert.rejects(download(`${server.url}/file.iso`, path, { ...options, verify }), {
      message: 'no ISO',
    })
    assert.ok(!existsSync(path) && !existsSync(`${path}.partial`))
  })

  it('says so at once when there is no such file', async () => {
    await assert.rejects(download(`${server.url}/gone.iso`, path, options), {
      message: `${server.url}/gone.iso: the server answers 404 Not Found`,
    })
    assert.equal(server.requests.length, 1)
  })

  it('says which server cannot be reached', async () => {
    await server.close()
    await assert.rejects(
      download(`${server.url}/file.iso`, path, options),
      new RegExp(`${new URL(server.url).host} cannot be reached: .*ECONNREFUSED`),
    )
  })

  it('does not wait for ever for a silent server', async () => {
    server.files.set('/file.iso', { data, pause: 1000 })
    await assert.rejects(
      download(`${server.url}/file.iso`, path, { ...options, patience: 50 }),
      /the connection broke off/,
    )
  })

  it('stops when it is told to, and keeps what it has', async () => {
    server.files.set('/file.iso', { data, pause: 20 })
    const controller = new AbortController()
    const stopped = download(`${server.url}/file.iso`, path, {
      ...options,
      signal: controller.signal,
      onProgress: () => controller.abort(new Error('interrupted')),
    })
    await assert.rejects(stopped, { message: 'interrupted' })
    assert.ok((await readFile(`${path}.partial`)).length > 0)
    assert.ok(!existsSync(path))
  })
})

describe('a download through a proxy', () => {
  it('asks the proxy for the whole address, with the proxy’s credentials', async () => {
    server.files.set('/file.iso', { data })
    const proxy = await startProxy(server.url)
    const http = proxy.url.replace('://', '://user:p%40ss@')
    await download('http://iso.test/file.iso', path, { ...options, proxy: { ...none, http } })
    await proxy.close()
    assert.deepEqual(await readFile(path), data)
    assert.deepEqual(proxy.requests, ['GET http://iso.test/file.iso by user:p@ss'])
  })

  it('tunnels TLS, and trusts the authority of PROXY_CA_FILE', async () => {
    const key = join(folder, 'key.pem')
    const cert = join(folder, 'cert.pem')
    const subject = ['-subj', '/CN=iso.test', '-addext', 'subjectAltName=DNS:iso.test']
    const request = ['req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-keyout', key, '-out', cert]
    execFileSync('openssl', [...request, ...subject], { stdio: 'pipe' })
    const tls = { key: await readFile(key, 'utf8'), cert: await readFile(cert, 'utf8') }
    const secure = await startFileServer(tls)
    const proxy = await startProxy(secure.url)
    secure.files.set('/file.iso', { data, cuts: [1_000_000] })
    const settings = { ...none, https: proxy.url }
    try {
      await assert.rejects(
        download('https://iso.test/file.iso', path, { ...options, proxy: settings }),
        (error: StepError) => {
          assert.match(error.message, /cannot be reached through the proxy .*self-signed/)
          assert.match(error.explanation.hint ?? '', /PROXY_CA_FILE/)
          return true
        },
      )
      await download('https://iso.test/file.iso', path, {
        ...options,
        proxy: { ...settings, caFile: cert },
      })
      assert.deepEqual(await readFile(path), data)
      assert.equal(proxy.requests.at(-1), 'CONNECT iso.test:443')
      assert.match(secure.requests.at(-1) ?? '', /^GET \/file\.iso bytes=\d+-$/)
    } finally {
      await proxy.close()
      await secure.close()
    }
  })

  it('names a proxy that is not there', async () => {
    const proxy = { ...none, http: 'http://user:secret@127.0.0.1:9' }
    await assert.rejects(
      download('http://iso.test/file.iso', path, { ...options, proxy }),
      /iso.test cannot be reached through the proxy 127.0.0.1:9: /,
    )
  })
})
