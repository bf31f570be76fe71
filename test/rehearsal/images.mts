// The container images of the rehearsed cluster, made on the spot, as no registry may be in reach:
// busybox stands in for the pause container and for the web server, and the add-ons' programs are
// the real ones. As a script it makes them and prints the archives' paths.
import { mkdir, readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { $ } from 'zx'
import { loadCluster } from '../../lib/cluster.mts'
import { describeError, StepError } from '../../lib/errors.mts'
import { projectRoot } from '../checkout.mts'
import { goPrograms } from '../kubernetes/programs.mts'
import { type DebianLayer, debianLayer } from './debian-layer.mts'
import { type Image, writeDockerArchive } from './docker-archive.mts'
import { cached, contentOf } from './layer-cache.mts'

/** What the images' names depend on. */
export type ImageSettings = Pick<
  ReturnType<typeof loadCluster>['settings'],
  'SMOKE_IMAGE' | 'COREDNS_VERSION' | 'METRICS_SERVER_VERSION' | 'LOCAL_PATH_VERSION'
>

export interface ImageArchives {
  /** Docker archives, one image each, in the order in which they are needed. */
  archives: string[]
  /** Why an add-on's image is not among them; empty if all are. */
  missing: string[]
}

/**
 * Makes the images of pods: pause, SMOKE_IMAGE and, where their programs can be had, CoreDNS,
 * metrics-server and local-path-provisioner.
 *
 * @param busybox a statically linked one, with the applets that Debian's has
 */
export async function imageArchives(
  settings: ImageSettings,
  busybox: string,
): Promise<ImageArchives> {
  const archives = [
    await archiveOf('pause', await pause(busybox)),
    await archiveOf('web', await web(busybox, settings.SMOKE_IMAGE)),
  ]
  const missing: string[] = []
  for (const { name, tag, path, ...own } of addOns(settings)) {
    const { folder, reason } = await goPrograms(name)
    if (!folder) {
      missing.push(reason ?? name)
      continue
    }
    const files = { [path]: { program: join(folder, name), ...own } }
    archives.push(await archiveOf(name, { tag, files, entrypoint: [`/${path}`], user: 65532 }))
  }
  return { archives, missing }
}

/** The add-ons whose programs are built here: their images, and where in them the programs are. */
function addOns(settings: ImageSettings) {
  const { COREDNS_VERSION, METRICS_SERVER_VERSION, LOCAL_PATH_VERSION } = settings
  return [
    {
      name: 'coredns',
      tag: `registry.k8s.io/coredns/coredns:v${COREDNS_VERSION}`,
      path: 'coredns',
      // The Dockerfile of CoreDNS sets it, and a container without it cannot run the program.
      capabilities: 'cap_net_bind_service=+ep',
    },
    {
      name: 'metrics-server',
      tag: `registry.k8s.io/metrics-server/metrics-server:v${METRICS_SERVER_VERSION}`,
      path: 'metrics-server',
    },
    {
      name: 'local-path-provisioner',
      tag: `docker.io/rancher/local-path-provisioner:v${LOCAL_PATH_VERSION}`,
      path: 'usr/bin/local-path-provisioner',
    },
  ] as const
}

/** Keeps a pod's namespaces alive until SIGTERM. containerd's configuration names this image. */
async function pause(busybox: string): Promise<Image> {
  const file = join(projectRoot, 'configs', 'worker.nix')
  const tag = (await readFile(file, 'utf8')).match(/sandbox_image = "(.+)"/)?.[1]
  if (!tag) throw new StepError(`${file} names no sandbox_image`)
  const files = { 'bin/busybox': { program: busybox } }
  // The first process of a container gets no signal that it does not ask for.
  const wait = 'trap exit TERM INT; /bin/busybox sleep infinity & wait'
  return { tag, files, entrypoint: ['/bin/busybox', 'sh', '-c', wait], user: 65535 }
}

/** A web server on port 8080 that ends when it is told to, and a shell to look around with. */
async function web(busybox: string, tag: string): Promise<Image> {
  const applets = (await $({ quiet: true })`${busybox} --list`).stdout.trim().split('\n')
  const links = applets.map((name) => [`bin/${name}`, { link: 'busybox' }])
  // The first process of a container gets no signal that it does not ask for.
  const serve = 'httpd -f -p 8080 -h /usr/share/nginx/html & trap "kill $!; exit 0" TERM QUIT; wait'
  return {
    tag,
    files: {
      ...Object.fromEntries(links),
      'bin/busybox': { program: busybox },
      'etc/passwd': { text: 'root:x:0:0::/root:/bin/sh\nnginx:x:101:101::/:/bin/sh\n' },
      'etc/group': { text: 'root:x:0:\nnginx:x:101:\n' },
      'usr/share/nginx/html/index.html': { text: '<h1>Welcome to the stand-in for nginx!</h1>\n' },
    },
    command: ['/bin/sh', '-c', serve],
    user: 101,
  }
}

const unpack = join(import.meta.dirname, 'image-store.sh')

/**
 * A copy of /var/lib/containerd with the images already unpacked, because unpacking them takes minutes
 * on an emulated processor. Needs root, which owns its files.
 */
export async function imageStore(
  debian: DebianLayer,
  archives: readonly string[],
): Promise<string> {
  // An entry of the cache never changes, so its name stands for what is in it.
  const inputs = [debian.image, ...archives, await contentOf(unpack)]
  const folder = await cached('image-store', inputs, (into) => {
    return unpackImages(join(into, 'store'), debian, archives)
  })
  return join(folder, 'store')
}

/** A squashfs with that folder as store/. Uses sudo unless the user is root. */
export async function imagesLayer(
  debian: DebianLayer,
  archives: readonly string[],
): Promise<string> {
  const inputs = [debian.image, ...archives, await contentOf(unpack)]
  const folder = await cached('images', inputs, async (into) => {
    const [store, image] = [join(into, 'store'), join(into, 'images.squashfs')]
    await unpackImages(store, debian, archives)
    const options = ['-quiet', '-no-progress', '-comp', 'lz4', '-keep-as-directory']
    const run = $({ quiet: true, stdio: ['inherit', 'pipe', 'pipe'] })
    await run`${sudo} mksquashfs ${store} ${image} ${options}`
    await run`${sudo} rm -rf ${store}`
  })
  return join(folder, 'images.squashfs')
}

const sudo = process.getuid?.() === 0 ? [] : ['sudo']

async function unpackImages(
  store: string,
  debian: DebianLayer,
  archives: readonly string[],
): Promise<void> {
  await mkdir(store)
  const command = ['sh', unpack, store, debian.image, ...archives]
  const run = $({ quiet: true, stdio: ['inherit', 'pipe', 'pipe'] })
  try {
    await run`${sudo} unshare --mount --pid --fork --kill-child ${command}`
  } catch (error) {
    // Root owns these files: the caller could not remove them.
    await run`${sudo} rm -rf ${store}`
    throw error
  } finally {
    await run`${sudo} rm -rf --one-file-system ${store}.root`
  }
}

async function archiveOf(name: string, image: Image): Promise<string> {
  const programs = Object.values(image.files).flatMap((file) =>
    'program' in file ? [file.program] : [],
  )
  const inputs = [
    JSON.stringify(image),
    ...(await Promise.all(programs.map((program) => contentOf(program)))),
    await contentOf(join(import.meta.dirname, 'docker-archive.mts')),
  ]
  const folder = await cached(`image-${name}`, inputs, (into) =>
    writeDockerArchive(image, join(into, `${name}.tar`)),
  )
  return join(folder, `${name}.tar`)
}

if (process.argv[1] === import.meta.filename) {
  try {
    const { busybox } = await debianLayer()
    const { archives, missing } = await imageArchives(loadCluster().settings, busybox)
    for (const reason of missing) console.error(`images: ${reason}`)
    console.log(archives.join('\n'))
  } catch (error) {
    console.error(`images: ${describeError(error)}`)
    process.exitCode = 1
  }
}
