// The rehearsal's container images: their form is looked at with tar, and what is in them is run.
import assert from 'node:assert/strict'
import { existsSync } from 'node:fs'
import { mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { basename, join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import { $ } from 'zx'
import { loadCluster } from '../../lib/cluster.mts'
import { type Checkout, freePorts, makeCheckout, projectRoot, run } from '../checkout.mts'
import { writeDockerArchive } from '../rehearsal/docker-archive.mts'
import { imageArchives, imagesLayer } from '../rehearsal/images.mts'
import { hash } from '../rehearsal/layer-cache.mts'
import { missing } from '../tools.mts'

const skip = missing('busybox', 'tar', 'mksquashfs', 'unsquashfs')
const quiet = $({ quiet: true })

/** An image as one unpacks it: manifest and configuration, and its file system in a folder. */
interface Unpacked {
  name: string
  tags: string[]
  config: {
    architecture: string
    os: string
    config: { Entrypoint?: string[]; Cmd?: string[]; User?: string; Env: string[] }
    rootfs: { diff_ids: string[] }
  }
  layer: Buffer
  root: string
}

describe('the images of the rehearsal', { skip }, () => {
  let folder: string
  let archives: string[]
  let images: Unpacked[]
  const image = (name: string) => {
    const found = images.find((each) => each.name === name)
    return found ?? assert.fail(`no image ${name}`)
  }

  before(async () => {
    folder = await mkdtemp(join(tmpdir(), 'images-'))
    const busybox = (await quiet`which busybox`).stdout.trim()
    const made = await imageArchives(loadCluster({ env: {} }).settings, busybox)
    assert.deepEqual(made.missing, [])
    archives = made.archives
    images = await Promise.all(archives.map((path) => unpack(path, join(folder, basename(path)))))
  })
  after(() => rm(folder, { recursive: true }))

  it('have the names that the manifests, cluster.env and containerd ask for', async () => {
    const tags = images.flatMap((each) => each.tags)
    const asked = await imagesOfManifests()
    assert.ok(asked.length >= 4, asked.join())
    for (const name of asked) assert.ok(tags.includes(name), name)
    const worker = await readFile(join(projectRoot, 'configs', 'worker.nix'), 'utf8')
    assert.ok(worker.includes(`sandbox_image = "${image('pause').tags[0]}"`))
  })

  it('say of their layers what these are', () => {
    const architecture = process.arch === 'x64' ? 'amd64' : process.arch
    for (const { name, config, layer } of images) {
      assert.deepEqual(config.rootfs.diff_ids, [`sha256:${hash(layer)}`], name)
      assert.equal(config.architecture, architecture)
      assert.equal(config.os, 'linux')
    }
  })

  it('are for users who are not root, by number', () => {
    for (const { name, config } of images) {
      assert.match(config.config.User ?? '', /^[1-9]\d*:[1-9]\d*$/, name)
    }
  })

  it('hold files of root that all may read and nobody else may write', async () => {
    for (const { name, layer } of images) {
      const list = await $({ quiet: true, input: layer })`tar -tvf - --numeric-owner`
      for (const line of list.stdout.trim().split('\n')) {
        assert.match(line, /^(d|-)r.xr-xr-x 0\/0 |^-rw-r--r-- 0\/0 |^lrwx\S+ 0\/0 /, name)
      }
    }
  })

  it('are the same when they are made anew', async () => {
    const files = { 'bin/sh': { program: '/bin/sh' }, 'etc/motd': { text: 'good day' } }
    const [one, other] = [join(folder, 'one.tar'), join(folder, 'other.tar')]
    for (const path of [one, other]) {
      await writeDockerArchive({ tag: 'a/b:c', files, entrypoint: ['/bin/sh'] }, path)
    }
    assert.deepEqual(await readFile(one), await readFile(other))
  })

  it('go into a layer of the ISO', async () => {
    const layer = await imagesLayer(archives.slice(0, 2))
    const { stdout } = await quiet`unsquashfs -l -d '' ${layer}`
    assert.deepEqual(
      stdout.split('\n').filter((path) => path.endsWith('.tar')),
      ['/images/pause.tar', '/images/web.tar'],
    )
  })

  const withoutRoot = process.getuid?.() !== 0 && 'only root may change the root folder'
  describe('when their programs run, in nothing but the image', { skip: withoutRoot }, () => {
    const entrypoints: Record<string, { args: string[]; says: RegExp }> = {
      coredns: { args: ['-version'], says: /^CoreDNS-/m },
      'metrics-server': { args: ['--version'], says: /^v\d/m },
      'local-path-provisioner': { args: ['--version'], says: /v\d/ },
    }
    for (const [name, { args, says }] of Object.entries(entrypoints)) {
      it(`${name} tells its version`, async () => {
        const { root, config } = image(name)
        const user = `--userspec=${config.config.User}`
        const { stdout } = await quiet`chroot ${user} ${root} ${config.config.Entrypoint} ${args}`
        assert.match(stdout, says)
      })
    }

    it('pause stays until it is ended', async () => {
      const { root, config } = image('pause')
      const user = `--userspec=${config.config.User}`
      const pausing = $({ quiet: true, nothrow: true, detached: true })
      const running = pausing`exec chroot ${user} ${root} ${config.config.Entrypoint}`
      const answer = await Promise.race([running, isSleeping(running.pid)])
      assert.equal(answer, 'sleeping')
      process.kill(running.pid ?? 0, 'SIGKILL')
      await running
    })

    it('the web server answers on port 8080, and ends when it is told to', async () => {
      const { root, config } = image('web')
      // Every container has one.
      await quiet`mkdir ${join(root, 'dev')}`
      await quiet`mknod -m 666 ${join(root, 'dev', 'null')} c 1 3`
      const [port] = await freePorts(1)
      const command = (config.config.Cmd ?? []).map((word) => word.replace('8080', `${port}`))
      assert.match(config.config.Cmd?.join(' ') ?? '', /-p 8080/)
      const server = $({ quiet: true, nothrow: true, detached: true, timeout: '60s' })
      const user = `--userspec=${config.config.User}`
      const running = server`exec chroot ${user} ${root} ${command}`
      try {
        const page = await untilAnswered(`http://127.0.0.1:${port}/`)
        assert.match(page, /Welcome/)
        // Its own wget too, which pods use.
        const own = await quiet`chroot ${root} /bin/wget -q -O - http://127.0.0.1:${port}/`
        assert.equal(own.stdout, page)
      } finally {
        running.kill('SIGTERM')
      }
      const { exitCode, stderr } = await running
      assert.equal(exitCode, 0, stderr)
    })

    it('the web server has the programs that scripts run in pods', async () => {
      const { root } = image('web')
      for (const name of ['sh', 'seq', 'sleep', 'hostname', 'grep', 'mkdir', 'rm', 'nslookup']) {
        assert.ok(existsSync(join(root, 'bin', 'busybox')))
        const { stdout } = await quiet`chroot ${root} /bin/sh -c ${`command -v ${name}`}`
        assert.notEqual(stdout, '', name)
      }
    })
  })
})

async function unpack(archive: string, into: string): Promise<Unpacked> {
  const root = join(into, 'root')
  await mkdir(root, { recursive: true })
  await quiet`tar -xf ${archive} -C ${into}`
  const manifests = JSON.parse(await readFile(join(into, 'manifest.json'), 'utf8'))
  assert.equal(manifests.length, 1)
  const [{ Config, RepoTags, Layers }] = manifests
  assert.equal(Layers.length, 1)
  const layer = join(into, Layers[0])
  await quiet`tar -xpf ${layer} -C ${root}`
  const config = JSON.parse(await readFile(join(into, Config), 'utf8'))
  const name = basename(archive, '.tar')
  return { name, tags: RepoTags, config, layer: await readFile(layer), root }
}

/** Every image that an add-on's manifest or the smoke test names. */
async function imagesOfManifests(): Promise<string[]> {
  const checkout: Checkout = await makeCheckout()
  try {
    await mkdir(checkout.path('tls'))
    await writeFile(checkout.path('tls', 'ca.pem'), 'no matter which')
    const manifests = await Promise.all(
      ['deploy-coredns', 'deploy-metrics-server', 'deploy-local-storage'].map((name) =>
        run(checkout, `bin/${name}.mts`, ['--print']),
      ),
    )
    for (const { exitCode, stderr } of manifests) assert.equal(exitCode, 0, stderr)
    const text = manifests.map(({ stdout }) => stdout).join('\n')
    return [...text.matchAll(/^\s*(?:- )?image: (\S+)$/gm)].map(([, name]) => name ?? '')
  } finally {
    await checkout.remove()
  }
}

/** Comes back when the process is busybox, waiting. */
async function isSleeping(pid: number | undefined): Promise<string> {
  for (;;) {
    const [command, state] = await Promise.all([
      readFile(`/proc/${pid}/cmdline`, 'utf8'),
      readFile(`/proc/${pid}/stat`, 'utf8'),
    ])
    if (command.startsWith('/bin/busybox\0') && / S /.test(state)) return 'sleeping'
    await new Promise((resolve) => setTimeout(resolve, 50))
  }
}

async function untilAnswered(url: string): Promise<string> {
  for (let tries = 0; ; tries += 1) {
    try {
      return await (await fetch(url)).text()
    } catch (error) {
      if (tries === 300) throw error
      await new Promise((resolve) => setTimeout(resolve, 100))
    }
  }
}
