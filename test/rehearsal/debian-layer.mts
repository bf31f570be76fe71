// The layer that is a Debian (or Ubuntu) root file system, trimmed to what a rehearsal uses, and
// what belongs to its kernel. A minute to build, so it is kept apart from everything that changes.
import { createReadStream } from 'node:fs'
import {
  access,
  chmod,
  constants,
  mkdir,
  mkdtemp,
  readFile,
  rm,
  statfs,
  writeFile,
} from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { $ } from 'zx'
import { StepError } from '../../lib/errors.mts'
import { findSource } from './distribution.mts'
import { cached, contentOf } from './layer-cache.mts'

const asRoot = process.getuid?.() === 0
const recipe = join(import.meta.dirname, 'debian')

export interface DebianLayer {
  /** squashfs of the root file system. */
  image: string
  kernel: string
  kernelVersion: string
  /** Folder of kernel modules for the ramdisk, named in the order in which they load. */
  modules: string
  /** Statically linked. */
  busybox: string
  /** Its programs, as paths from the root: "usr/bin/cat". */
  programs: string[]
}

/**
 * The layer, from the cache or built with mmdebstrap: as root, or without rights where user
 * namespaces allow it.
 *
 * @throws StepError with the end of mmdebstrap's output
 */
export async function debianLayer(): Promise<DebianLayer> {
  const source = await findSource()
  const packages = await readFile(join(recipe, 'packages.list'), 'utf8')
  const include = packages
    .replaceAll(/#.*/g, '')
    .split(/\s+/)
    .filter(Boolean)
    .concat(source.kernelPackage)
  const { sources, settings } = source

  const inputs = [sources, include.join(' '), await contentOf(recipe)]
  const folder = await cached('debian', inputs, async (into, detail) => {
    const scratch = await mkdtemp(join(await roomyFolder(), 'stand-in-'))
    try {
      // Without rights, mmdebstrap's root is another user, who has to get through here.
      await chmod(scratch, 0o755)
      const aptSettings = join(scratch, 'apt.conf')
      const text = `APT::Install-Recommends "false";\n${settings}\n`
      await writeFile(aptSettings, text, { mode: asRoot ? 0o600 : 0o644 })
      await mkdir(join(into, 'boot'))
      const root = join(scratch, 'root.tar')
      const unwanted = ['man', 'doc', 'info', 'locale'].map((kind) => `/usr/share/${kind}/*`)
      const recipeFiles = ['trim.sh', 'kernel-modules.list', 'ramdisk-modules.list']
      const mmdebstrap = $({
        quiet: true,
        // The hook of the kernel's package would build a ramdisk, and throw away half a minute.
        env: {
          ...process.env,
          TMPDIR: scratch,
          INITRD: 'No',
          PATH: `${process.env.PATH}:/usr/sbin:/sbin`,
        },
      })`mmdebstrap --variant=essential --format=tar --include=${include.join(',')} ${[
        `--aptopt=${aptSettings}`,
        '--dpkgopt=force-unsafe-io',
        ...unwanted.map((path) => `--dpkgopt=path-exclude=${path}`),
        '--customize-hook=mkdir "$1/trim"',
        `--customize-hook=copy-in ${recipeFiles.map((name) => quoted(join(recipe, name))).join(' ')} /trim`,
        '--customize-hook=chroot "$1" sh /trim/trim.sh',
        `--customize-hook=sync-out /boot ${quoted(join(into, 'boot'))}`,
        '--customize-hook=rm -rf "$1"/boot/* "$1"/tmp/*',
        // It would look for what trim.sh has taken away.
        '--skip=cleanup',
      ]} ${source.release} ${root} ${sources}`
      const phase = /^I: (.*)/m
      mmdebstrap.stderr.on('data', (chunk: Buffer) => {
        const text = chunk.toString().match(phase)?.[1]
        if (text) detail(text)
      })
      await mmdebstrap.catch((cause) => {
        const output = String(cause.stderr).trim().split('\n').slice(-15).join('\n')
        throw new StepError(`mmdebstrap could not build a ${source.release} root`, {
          output,
          hint: asRoot ? undefined : withoutRights,
          cause,
        })
      })
      detail('compressing')
      const pack = $({
        quiet: true,
      })`sqfstar -quiet -no-progress -comp lz4 ${join(into, 'debian.squashfs')}`
      createReadStream(root).pipe(pack.stdin)
      await pack
    } finally {
      await rm(scratch, { recursive: true, force: true })
    }
  })
  const boot = join(folder, 'boot')
  return {
    image: join(folder, 'debian.squashfs'),
    kernel: join(boot, 'vmlinuz'),
    kernelVersion: (await readFile(join(boot, 'kernel-version'), 'utf8')).trim(),
    modules: join(boot, 'modules'),
    busybox: join(boot, 'busybox'),
    programs: (await readFile(join(boot, 'programs'), 'utf8')).trim().split('\n'),
  }
}

const withoutRights =
  'without root, mmdebstrap needs newuidmap (package uidmap), a line for you in /etc/subuid, ' +
  'and user namespaces; or run this as root'

/** A folder in memory where there is enough of it, as dpkg writes ten thousand small files. */
async function roomyFolder(): Promise<string> {
  const shm = '/dev/shm'
  try {
    await access(shm, constants.W_OK)
    const { bavail, bsize } = await statfs(shm)
    const free = Number(
      (await readFile('/proc/meminfo', 'utf8')).match(/MemAvailable: +(\d+)/)?.[1],
    )
    if (bavail * bsize > 3e9 && free * 1024 > 6e9 && !process.env.TMPDIR) return shm
  } catch {
    // No such folder: the usual one.
  }
  return tmpdir()
}

/** One word for mmdebstrap's own splitting of special hooks and for sh. */
function quoted(path: string): string {
  return `'${path.replaceAll("'", `'\\''`)}'`
}
