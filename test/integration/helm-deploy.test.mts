// The helm that helm-deploy runs: the PATH's, or the pinned one. What it deploys is tested with the
// other add-ons.
import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import { readdirSync } from 'node:fs'
import { chmod, mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, afterEach, before, beforeEach, describe, it } from 'node:test'
import { type Checkout, makeCheckout, run } from '../checkout.mts'
import { FakePrograms } from '../fake-programs.mts'
import { type FileServer, startFileServer } from '../file-server.mts'

describe('helm', () => {
  let checkout: Checkout
  let server: FileServer
  let programs: FakePrograms
  const curl = execFileSync('sh', ['-c', 'command -v curl'], { encoding: 'utf8' }).trim()
  before(async () => {
    checkout = await makeCheckout({ settings: { HELM_VERSION: '4.9.9' }, keys: true })
    for (const script of ['generate-certs', 'generate-kubeconfigs']) {
      assert.equal((await run(checkout, `bin/${script}.mts`)).exitCode, 0)
    }
  })
  after(() => checkout.remove())
  beforeEach(async () => {
    server = await startFileServer()
    programs = new FakePrograms()
    // This computer may have a Helm of its own.
    programs.link('node', 'bash', 'dirname', 'readlink', 'ps', 'tar', 'gzip')
    programs.say('uname', 'Linux x86_64')
    const site = 'https://get.helm.sh'
    const here = `case $word in ${site}/*) word=${server.url}\${word#${site}};; esac`
    programs.add(
      'curl',
      `for word; do shift; ${here}; set -- "$@" "$word"; done; exec ${curl} "$@"`,
    )
  })
  afterEach(async () => {
    programs.remove()
    await server.close()
    await rm(checkout.path('tools'), { recursive: true, force: true })
  })

  // The helm of a release on the server fails, and says what it is for.
  const deploy = () =>
    run(checkout, 'bin/helm-deploy.mts', ['--delete', 'web'], { env: { PATH: programs.path } })

  /** The helm of the PATH; it has no release. */
  const onPath = (version: string) =>
    programs.add(
      'helm',
      `case $1 in version) echo ${version};; *) echo 'Error: release: not found' >&2; exit 1;; esac`,
    )

  for (const version of ['v3.14.0', 'v3.22.0', 'v4.0.1', 'v4.9.9']) {
    it(`is that of the PATH if that is ${version}`, async () => {
      onPath(version)
      const { exitCode, stderr } = await deploy()
      assert.equal(exitCode, 0, stderr)
      assert.match(programs.calls().at(-1) ?? '', /^helm get metadata web /)
      assert.deepEqual(server.requests, [])
    })
  }

  for (const version of ['v2.17.0', 'v3.8.2']) {
    it(`is the pinned one if that of the PATH is ${version}`, async () => {
      onPath(version)
      await release('linux-amd64')
      assert.match((await deploy()).stderr, /helm for linux-amd64/)
    })
  }

  it('is fetched for this computer, checked, and kept', async () => {
    await release('linux-amd64')
    assert.match((await deploy()).stderr, /helm for linux-amd64/)
    assert.deepEqual(readdirSync(checkout.path('tools')), ['helm-4.9.9'])
    assert.deepEqual(readdirSync(checkout.path('tools', 'helm-4.9.9')), ['helm'])
    server.requests.length = 0
    assert.match((await deploy()).stderr, /helm for linux-amd64/)
    assert.deepEqual(server.requests, [])
  })

  for (const [computer, name] of [
    ['Linux aarch64', 'linux-arm64'],
    ['Darwin x86_64', 'darwin-amd64'],
    ['Darwin arm64', 'darwin-arm64'],
  ] as const) {
    it(`is the one for ${name} on such a computer`, async () => {
      programs.say('uname', computer)
      await release(name)
      assert.match((await deploy()).stderr, new RegExp(`helm for ${name}`))
    })
  }

  it('is not kept when it is not what its checksum says', async () => {
    await release('linux-amd64')
    const sum = `${'0'.repeat(64)}  helm-v4.9.9-linux-amd64.tar.gz\n`
    server.files.set('/helm-v4.9.9-linux-amd64.tar.gz.sha256sum', { data: Buffer.from(sum) })
    const { exitCode, stderr } = await deploy()
    assert.equal(exitCode, 1)
    assert.match(stderr, /the checksum of https:\S+ does not match/)
    assert.deepEqual(readdirSync(checkout.path('tools')), [])
  })

  it('says which variable it is when there is no such version', async () => {
    const { exitCode, stderr } = await deploy()
    assert.equal(exitCode, 1)
    assert.match(stderr, /Helm 4\.9\.9 for linux-amd64 could not be downloaded/)
    assert.match(stderr, /404[\s\S]*HELM_VERSION/)
    assert.deepEqual(readdirSync(checkout.path('tools')), [])
  })

  it('is not released for every computer', async () => {
    programs.say('uname', 'Linux riscv64')
    const { exitCode, stderr } = await deploy()
    assert.equal(exitCode, 1)
    assert.match(stderr, /this script cannot download Helm for linux riscv64\n.*https:\/\/helm\.sh/)
    assert.deepEqual(server.requests, [])
  })

  /** Puts a release on the server: an archive with a program that says what it is for. */
  async function release(name: string): Promise<void> {
    const folder = await mkdtemp(join(tmpdir(), 'helm-'))
    await mkdir(join(folder, name))
    await writeFile(join(folder, name, 'helm'), `#!/bin/sh\necho helm for ${name} >&2\nexit 1\n`)
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
