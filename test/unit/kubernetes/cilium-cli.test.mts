import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import { readdirSync } from 'node:fs'
import { chmod, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, it } from 'node:test'
import { type Cluster, loadCluster } from '../../../lib/cluster.mts'
import type { StepError } from '../../../lib/errors.mts'
import {
  ciliumCommand,
  ciliumEnvironment,
  pinnedCilium,
} from '../../../lib/kubernetes/cilium-cli.mts'
import { type Checkout, makeCheckout } from '../../checkout.mts'
import { FakePrograms } from '../../fake-programs.mts'
import { type FileServer, startFileServer } from '../../file-server.mts'

describe('the cilium command', () => {
  let checkout: Checkout
  let cluster: Cluster
  let server: FileServer
  const environment = { ...process.env }
  beforeEach(async () => {
    checkout = await makeCheckout({ settings: { CILIUM_CLI_VERSION: '0.1.2' } })
    cluster = loadCluster({ root: checkout.root, env: {} })
    server = await startFileServer()
    for (const name of Object.keys(environment)) {
      if (/^(no|https?)_proxy$/i.test(name)) delete process.env[name]
    }
  })
  afterEach(async () => {
    Object.assign(process.env, environment)
    await server.close()
    await checkout.remove()
  })

  const options = (cpu = 'x64', os: NodeJS.Platform = 'linux') => ({ site: server.url, os, cpu })

  it('is that of the PATH if there is one', async () => {
    const programs = new FakePrograms()
    programs.add('cilium')
    process.env.PATH = programs.path
    assert.equal(await ciliumCommand(cluster, options()), join(programs.path, 'cilium'))
    assert.deepEqual(server.requests, [])
    programs.remove()
  })

  it('is fetched for this computer, checked, and kept', async () => {
    await release('linux-amd64')
    const path = await pinnedCilium(cluster, options())
    assert.equal(path, checkout.path('tools', 'cilium-0.1.2'))
    assert.equal(execFileSync(path, { encoding: 'utf8' }), 'cilium for linux-amd64\n')
    assert.deepEqual(readdirSync(checkout.path('tools')), ['cilium-0.1.2'])
    server.requests.length = 0
    assert.equal(await pinnedCilium(cluster, options()), path)
    assert.deepEqual(server.requests, [])
  })

  for (const [os, cpu, name] of [
    ['linux', 'arm64', 'linux-arm64'],
    ['darwin', 'x64', 'darwin-amd64'],
    ['darwin', 'arm64', 'darwin-arm64'],
  ] as const) {
    it(`is the one for ${name} on such a computer`, async () => {
      await release(name)
      const path = await pinnedCilium(cluster, options(cpu, os))
      assert.match(await readFile(path, 'utf8'), new RegExp(`cilium for ${name}`))
    })
  }

  it('of another version is another file', async () => {
    await release('linux-amd64')
    await pinnedCilium(cluster, options())
    await release('linux-amd64', '0.1.3')
    await checkout.set({ CILIUM_CLI_VERSION: '0.1.3' })
    cluster = loadCluster({ root: checkout.root, env: {} })
    assert.equal(await pinnedCilium(cluster, options()), checkout.path('tools', 'cilium-0.1.3'))
  })

  it('is not what its checksum says: nothing is kept', async () => {
    await release('linux-amd64')
    const sum = `${'0'.repeat(64)}  cilium-linux-amd64.tar.gz\n`
    server.files.set('/v0.1.2/cilium-linux-amd64.tar.gz.sha256sum', { data: Buffer.from(sum) })
    await assert.rejects(pinnedCilium(cluster, options()), /its checksum differs/)
    assert.deepEqual(readdirSync(checkout.path('tools')), [])
  })

  it('of a version that does not exist: says which variable it is', async () => {
    await assert.rejects(pinnedCilium(cluster, options()), (error: StepError) => {
      assert.match(error.message, /there is no cilium command 0\.1\.2 for linux-amd64/)
      assert.match(error.explanation.hint ?? '', /CILIUM_CLI_VERSION/)
      return true
    })
  })

  it('is not released for every computer', async () => {
    await assert.rejects(
      pinnedCilium(cluster, options('riscv64')),
      /not released for linux on riscv64/,
    )
    assert.deepEqual(server.requests, [])
  })

  it('has no proxy in its environment if there is none', async () => {
    assert.deepEqual(await ciliumEnvironment(cluster), {
      KUBECONFIG: checkout.path('configs', 'admin.kubeconfig'),
    })
  })

  it("has this computer's proxy in its environment", async () => {
    await checkout.set({ PROXY_HTTPS: 'http://10.0.2.2:3128', PROXY_NO: '.corp.example' })
    cluster = loadCluster({ root: checkout.root, env: {} })
    const { HTTPS_PROXY, NO_PROXY, HTTP_PROXY } = await ciliumEnvironment(cluster)
    assert.equal(HTTPS_PROXY, 'http://127.0.0.1:3128')
    assert.equal(NO_PROXY, '.corp.example')
    assert.equal(HTTP_PROXY, undefined)
  })

  /** Puts a release on the server: an archive with a program that says for what it is. */
  async function release(name: string, version = '0.1.2'): Promise<void> {
    const folder = await mkdtemp(join(tmpdir(), 'cilium-'))
    await writeFile(join(folder, 'cilium'), `#!/bin/sh\necho cilium for ${name}\n`)
    await chmod(join(folder, 'cilium'), 0o755)
    const data = execFileSync('tar', ['-czf', '-', '-C', folder, 'cilium'])
    await rm(folder, { recursive: true })
    const file = `cilium-${name}.tar.gz`
    const sum = `${createHash('sha256').update(data).digest('hex')}  ${file}\n`
    server.files.set(`/v${version}/${file}`, { data })
    server.files.set(`/v${version}/${file}.sha256sum`, { data: Buffer.from(sum) })
  }
})
