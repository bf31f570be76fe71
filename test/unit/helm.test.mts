import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import { readdirSync } from 'node:fs'
import { chmod, mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, it } from 'node:test'
import { $ } from 'zx/core'
import { type Cluster, loadCluster } from '../../lib/cluster.mts'
import { describeError } from '../../lib/errors.mts'
import { ensureHelm } from '../../lib/helm.mts'
import { type Checkout, makeCheckout } from '../checkout.mts'
import { FakePrograms } from '../fake-programs.mts'
import { type FileServer, startFileServer } from '../file-server.mts'

describe('helm', () => {
  let checkout: Checkout
  let cluster: Cluster
  let server: FileServer
  let programs: FakePrograms
  const environment = $.env
  beforeEach(async () => {
    checkout = await makeCheckout({ settings: { HELM_VERSION: '4.9.9' } })
    cluster = loadCluster({ root: checkout.root, env: {} })
    server = await startFileServer()
    programs = new FakePrograms()
    // This computer may have a Helm of its own.
    programs.link('bash', 'curl', 'tar', 'gzip', 'sh', 'cat')
    $.env = { PATH: programs.path }
  })
  afterEach(async () => {
    $.env = environment
    programs.remove()
    await server.close()
    await checkout.remove()
  })

  const ensure = (cpu = 'x64', os = 'linux') => ensureHelm(cluster, { site: server.url, os, cpu })
  const run = async () => (await $({ quiet: true })`helm`).stdout

  it('is that of the PATH if it is new enough', async () => {
    for (const version of ['v3.14.0', 'v3.22.0', 'v4.0.1', 'v4.9.9']) {
      programs.say('helm', version)
      await ensure()
      assert.equal(await run(), `${version}\n`)
    }
    assert.deepEqual(server.requests, [])
  })

  for (const version of ['v2.17.0', 'v3.8.2']) {
    it(`is the pinned one if that of the PATH is ${version}`, async () => {
      programs.say('helm', version)
      await release('linux-amd64')
      await ensure()
      assert.equal(await run(), 'helm for linux-amd64\n')
    })
  }

  it('is fetched for this computer, checked, and kept', async () => {
    await release('linux-amd64')
    await ensure()
    assert.equal(await run(), 'helm for linux-amd64\n')
    assert.deepEqual(readdirSync(checkout.path('tools')), ['helm-4.9.9'])
    assert.deepEqual(readdirSync(checkout.path('tools', 'helm-4.9.9')), ['helm'])
    $.env = { PATH: programs.path }
    server.requests.length = 0
    await ensure()
    assert.equal(await run(), 'helm for linux-amd64\n')
    assert.deepEqual(server.requests, [])
  })

  for (const [os, cpu, name] of [
    ['linux', 'arm64', 'linux-arm64'],
    ['darwin', 'x64', 'darwin-amd64'],
    ['darwin', 'arm64', 'darwin-arm64'],
  ] as const) {
    it(`is the one for ${name} on such a computer`, async () => {
      await release(name)
      await ensure(cpu, os)
      assert.equal(await run(), `helm for ${name}\n`)
    })
  }

  it('is not kept when it is not what its checksum says', async () => {
    await release('linux-amd64')
    const sum = `${'0'.repeat(64)}  helm-v4.9.9-linux-amd64.tar.gz\n`
    server.files.set('/helm-v4.9.9-linux-amd64.tar.gz.sha256sum', { data: Buffer.from(sum) })
    await assert.rejects(ensure(), /the checksum of http:\S+ does not match/)
    assert.deepEqual(readdirSync(checkout.path('tools')), [])
  })

  it('says which variable it is when there is no such version', async () => {
    const error = await ensure().catch((error: unknown) => error)
    assert.match(describeError(error), /Helm 4\.9\.9 for linux-amd64 could not be downloaded/)
    assert.match(describeError(error), /404[\s\S]*HELM_VERSION/)
    assert.deepEqual(readdirSync(checkout.path('tools')), [])
  })

  it('is not released for every computer', async () => {
    await assert.rejects(ensure('riscv64'), /Helm is not released for linux on riscv64/)
    assert.deepEqual(server.requests, [])
  })

  /** Puts a release on the server: an archive with a program that prints what it is for. */
  async function release(name: string): Promise<void> {
    const folder = await mkdtemp(join(tmpdir(), 'helm-'))
    await mkdir(join(folder, name))
    await writeFile(join(folder, name, 'helm'), `#!/bin/sh\necho helm for ${name}\n`)
    await chmod(join(folder, name, 'helm'), 0o755)
    await writeFile(join(folder, name, 'LICENSE'), '')
    const data = execFileSync('tar', ['-czf', '-', '-C', folder, name])
    await rm(folder, { recursive: true })
    const file = `helm-v4.9.9-${name}.tar.gz`
    const sum = `${createHash('sha256').update(data).digest('hex')}  ${file}\n`
    server.files.set(`/${file}`, { data })
    server.files.set(`/${file}.sha256sum`, { data: Buffer.from(sum) })
  }
})
