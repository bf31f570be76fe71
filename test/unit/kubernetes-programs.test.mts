import assert from 'node:assert/strict'
import { execFileSync, spawnSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import { existsSync } from 'node:fs'
import { mkdir, mkdtemp, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { createServer, type Server } from 'node:http'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, afterEach, before, beforeEach, describe, it } from 'node:test'
import { loadCluster } from '../../lib/cluster.mts'
import { projectRoot } from '../checkout.mts'
import { goModules, pinnedVersion } from '../kubernetes/go-programs.mts'
import { goPrograms, kubernetesPrograms } from '../kubernetes/programs.mts'

const arch = process.arch === 'x64' ? 'amd64' : process.arch
const all = Object.keys(goModules.kubernetes.programs)
const skip = process.platform === 'linux' ? false : 'the programs are for Linux'
// Nothing listens on this port of loopback.
const nowhere = 'http://127.0.0.1:1'

let folder = ''
let env: NodeJS.ProcessEnv = {}

beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'programs-'))
  env = {
    PATH: `${join(folder, 'path')}:/usr/bin:/bin`,
    HOME: folder,
    XDG_CACHE_HOME: join(folder, 'cache'),
    KUBERNETES_VERSION: '1.36.3',
  }
})
afterEach(() => rm(folder, { recursive: true, force: true }))

const cache = () =>
  join(folder, 'cache', 'kubernetes-the-hardest-way', `kubernetes-v1.36.3-linux-${arch}`)

async function script(path: string, text: string): Promise<void> {
  await mkdir(join(path, '..'), { recursive: true })
  await writeFile(path, `#!/bin/sh\n${text}\n`, { mode: 0o755 })
}

/** A Go that notes its calls and "builds" scripts that print their package. */
async function fakeGo(build = ''): Promise<void> {
  await script(
    join(folder, 'path', 'go'),
    `if [ "$1" = env ]; then echo go1.26.0; exit; fi
    echo "$CGO_ENABLED $GOOS $GOARCH $*" >> ${folder}/calls
    while [ "$1" != -o ]; do shift; done
    into=$2; shift 2
    ${build}
    for package; do echo "$package" > "$into$(basename "$(echo "$package" | sed 's,/v3$,,')")"; done`,
  )
}

const calls = async () => (await readFile(join(folder, 'calls'), 'utf8')).trim().split('\n')

describe('programs of KUBE_BIN_DIR', { skip }, () => {
  let bin = ''
  beforeEach(async () => {
    bin = join(folder, 'bin')
    env.KUBE_BIN_DIR = bin
    for (const name of all) await script(join(bin, name), 'echo Kubernetes v1.36.0')
  })

  it('are taken when they are of the minor version', async () => {
    assert.deepEqual(await kubernetesPrograms({ env }), { folder: bin })
  })

  it('are refused when one is missing, which is named', async () => {
    await rm(join(bin, 'kubelet'))
    await assert.rejects(kubernetesPrograms({ env }), {
      explanation: {
        output: 'kubelet: not there, or not executable',
        hint: 'unset KUBE_BIN_DIR to have the programs downloaded or built',
      },
    })
  })

  it('are refused when of another minor version, all of them named at once', async () => {
    await script(join(bin, 'kube-proxy'), 'echo Kubernetes v1.35.4')
    await script(join(bin, 'kubectl'), 'echo Client Version: v1.37.0; echo Kustomize Version: v5')
    await script(join(bin, 'kubelet'), 'exit 3')
    await assert.rejects(kubernetesPrograms({ env }), (error: Error) => {
      assert.match(error.message, /KUBE_BIN_DIR is not of Kubernetes 1\.36/)
      const { output } = (error as Error & { explanation: { output: string } }).explanation
      assert.deepEqual(output.split('\n').sort(), [
        'kube-proxy: it is "Kubernetes v1.35.4"',
        'kubectl: it is "Client Version: v1.37.0"',
        'kubelet: --version fails',
      ])
      return true
    })
  })

  it('need only those that were asked for', async () => {
    await rm(join(bin, 'kubelet'))
    assert.equal((await kubernetesPrograms({ env, names: ['kubectl'] })).folder, bin)
  })

  it('are printed by the script', () => {
    const stdout = execFileSync(
      process.execPath,
      ['--import', 'tsx', 'test/kubernetes/programs.mts'],
      { cwd: projectRoot, env: { ...env, KUBE_BIN_DIR: bin }, encoding: 'utf8' },
    )
    assert.equal(stdout, `${bin}\n`)
  })
})

describe('programs of the download site', { skip }, () => {
  let server: Server
  let site = ''
  let requests: string[] = []
  let damaged = ''
  before(async () => {
    server = createServer((request, response) => {
      const url = request.url ?? ''
      requests.push(url)
      const name = url.match(/^\/release\/v1\.36\.3\/bin\/linux\/\w+\/([\w-]+)(\.sha256)?$/)
      const text = `#!/bin/sh\necho ${name?.[1]}\n`
      response.statusCode = name ? 200 : 404
      if (name?.[2]) response.end(createHash('sha256').update(text).digest('hex'))
      else response.end(name?.[1] === damaged ? text.slice(1) : text)
    })
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
    const address = server.address()
    site = `http://127.0.0.1:${typeof address === 'object' ? address?.port : 0}`
  })
  after(() => server.close())
  beforeEach(() => {
    requests = []
    damaged = ''
  })

  it('are checked, made executable and kept by version', async () => {
    assert.deepEqual(await kubernetesPrograms({ env, site }), { folder: cache() })
    for (const name of all) {
      assert.equal(execFileSync(join(cache(), name), { encoding: 'utf8' }), `${name}\n`)
    }
    assert.equal(requests.length, 2 * all.length)
  })

  it('are not fetched again, and missing ones are added', async () => {
    await kubernetesPrograms({ env, site, names: ['kubectl'] })
    await kubernetesPrograms({ env, site, names: ['kubectl'] })
    assert.equal(requests.length, 2)
    await kubernetesPrograms({ env, site, names: ['kubectl', 'kubelet'] })
    assert.deepEqual(
      requests.slice(2).map((url) => url.split('/').at(-1)),
      ['kubelet.sha256', 'kubelet'],
    )
  })

  it('are refused when one is not what its checksum says, and nothing is kept', async () => {
    damaged = 'kube-proxy'
    await fakeGo()
    await assert.rejects(
      kubernetesPrograms({ env, site }),
      /the checksum of http:\S+kube-proxy does not match/,
    )
    assert.deepEqual(await readdir(cache()), [])
    assert.deepEqual(await readdir(join(cache(), '..')), [`kubernetes-v1.36.3-linux-${arch}`])
    assert.equal(existsSync(join(folder, 'calls')), false)
  })

  it('are built when the site does not have the version', async () => {
    await fakeGo()
    const programs = await kubernetesPrograms({
      env,
      site: `${site}/elsewhere`,
      names: ['kubectl'],
    })
    assert.deepEqual(programs, { folder: cache() })
    assert.equal((await calls()).length, 1)
  })
})

describe('programs built with Go', { skip }, () => {
  it('are static, stripped, without local paths, and say their version', async () => {
    await fakeGo()
    assert.deepEqual(await kubernetesPrograms({ env, site: nowhere }), { folder: cache() })
    const [call = '', ...more] = await calls()
    assert.equal(more.length, 0)
    assert.match(call, new RegExp(`^0 linux ${arch} build `))
    assert.match(call, / -trimpath /)
    assert.match(call, / -s -w /)
    assert.match(call, / -X k8s\.io\/component-base\/version\.gitVersion=v1\.36\.3 /)
    for (const name of all) {
      assert.equal((await stat(join(cache(), name))).mode & 0o777, 0o755)
      const text = await readFile(join(cache(), name), 'utf8')
      assert.equal(text, `k8s.io/kubernetes/cmd/${name}\n`)
    }
  })

  it('have the names of the programs, not of their modules', async () => {
    await fakeGo()
    const { folder: etcd = '' } = await goPrograms('etcd', { env })
    assert.deepEqual((await readdir(etcd)).sort(), ['etcd', 'etcdctl', 'etcdutl'])
    const text = await readFile(join(etcd, 'etcd'), 'utf8')
    assert.equal(text, 'go.etcd.io/etcd/server/v3\n')
  })

  it('are built once when two ask at the same time', async () => {
    await fakeGo('sleep 0.5')
    const both = await Promise.all([
      kubernetesPrograms({ env, site: nowhere, names: ['kubelet'] }),
      kubernetesPrograms({ env, site: nowhere, names: ['kubelet', 'kubectl'] }),
    ])
    assert.deepEqual(both, [{ folder: cache() }, { folder: cache() }])
    const built = (await calls()).join('\n').match(/cmd\/kubelet/g)
    assert.equal(built?.length, 1)
    assert.deepEqual((await readdir(cache())).sort(), ['kubectl', 'kubelet'])
  })

  it('do not wait for a process that was killed while it built', async () => {
    await fakeGo()
    const lock = `${cache()}.lock`
    await mkdir(join(lock, '..'), { recursive: true })
    const ended = spawnSync(process.execPath, ['--version']).pid
    await writeFile(lock, JSON.stringify({ pid: ended, command: 'node', purpose: '', nonce: '' }))
    assert.deepEqual(await kubernetesPrograms({ env, site: nowhere }), { folder: cache() })
    assert.equal(existsSync(lock), false)
  })

  it('leave nothing behind when the build fails, and the reason is the compiler’s', async () => {
    await fakeGo(
      'touch "$into/kubelet"; echo some/package >&2; echo "x.go:1: bad type" >&2; exit 1',
    )
    const { reason } = await kubernetesPrograms({ env, site: nowhere })
    assert.match(reason ?? '', /kubernetes 1\.36\.3 does not build/)
    assert.match(reason ?? '', /\| x\.go:1: bad type/)
    assert.doesNotMatch(reason ?? '', /some\/package/)
    assert.deepEqual(await readdir(cache()), [])
  })
})

describe('without any way to the programs', { skip }, () => {
  it('the reason names each way, and no error is thrown', async () => {
    await script(join(folder, 'path', 'go'), 'echo "go: not found" >&2; exit 127')
    const { folder: found, reason = '' } = await kubernetesPrograms({ env, site: nowhere })
    assert.equal(found, undefined)
    assert.match(reason, /KUBE_BIN_DIR is not set; no download: [^;]*127\.0\.0\.1/)
    assert.match(reason, /no build: there is no Go/)
    assert.match(reason, /install Go 1\.26 or later/)
  })

  it('a Go too old is named as such', async () => {
    await script(join(folder, 'path', 'go'), 'echo "go.mod requires go >= 1.26.0" >&2; exit 1')
    const { reason = '' } = await kubernetesPrograms({ env, site: nowhere })
    assert.match(reason, /no build: this Go is too old/)
    assert.match(reason, /requires go >= 1\.26\.0/)
  })
})

describe('the go.mod files', () => {
  const { settings } = loadCluster({ env: {} })

  it('pin the versions of cluster.env', async () => {
    assert.equal(await pinnedVersion('kubernetes'), settings.KUBERNETES_VERSION)
    assert.equal(await pinnedVersion('coredns'), settings.COREDNS_VERSION)
    assert.equal(await pinnedVersion('metrics-server'), settings.METRICS_SERVER_VERSION)
    const localPath = await pinnedVersion('local-path-provisioner')
    assert.equal(localPath, settings.LOCAL_PATH_VERSION)
    assert.equal(await pinnedVersion('helm'), settings.HELM_VERSION)
  })

  it('replace the staging modules of Kubernetes by those of the same release', async () => {
    const text = await readFile(join(projectRoot, 'test/kubernetes/go.mod'), 'utf8')
    const versions = [...text.matchAll(/ => k8s\.io\/\S+ v(\S+)/g)].map(([, version]) => version)
    assert.ok(versions.length > 20)
    const expected = settings.KUBERNETES_VERSION.replace(/^1\./, '0.')
    assert.deepEqual([...new Set(versions)], [expected])
  })

  it('name every program as a tool', async () => {
    for (const { folder, programs } of Object.values(goModules)) {
      const text = await readFile(join(projectRoot, 'test/kubernetes', folder, 'go.mod'), 'utf8')
      for (const package_ of Object.values(programs)) {
        assert.match(text, new RegExp(`^(tool |\t)${package_}$`, 'm'))
      }
    }
  })
})
