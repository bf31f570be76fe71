// The layer of the stand-in's own, with the system of the installer's CD, and the ramdisk that
// mounts all layers.
import { chmod, cp, mkdir, readdir, readFile, rm, symlink, writeFile } from 'node:fs/promises'
import { basename, join } from 'node:path'
import { $ } from 'zx'
import type { DebianLayer } from './debian-layer.mts'
import { cached, contentOf, hash } from './layer-cache.mts'
import { evaluator, machine, mounted, ownTree } from './own-tree.mts'

export interface OwnLayer {
  /** squashfs. */
  image: string
  ramdisk: string
  /** init= of the installer's CD. */
  init: string
  /** Label of the CD. */
  label: string
}

/**
 * @param release of NixOS that it stands in for: "26.05"
 * @throws Error when a program of machine/tools is in no package
 */
export async function ownLayer(debian: DebianLayer, release: string): Promise<OwnLayer> {
  const inputs = [
    'own 1',
    release,
    await contentOf(machine),
    await contentOf(evaluator, '.nix'),
    debian.programs.join(' '),
    await contentOf(debian.modules),
    await contentOf(import.meta.filename),
    await contentOf(join(import.meta.dirname, 'own-tree.mts')),
  ]
  const label = `nixos-minimal-${release}-${process.arch === 'arm64' ? 'aarch64' : 'x86_64'}`
  const live = storePath(`nixos-system-nixos-minimal-${release}`, inputs.join())
  const folder = await cached('own', inputs, async (into) => {
    const tree = join(into, 'tree')
    await ownTree(tree, release)
    await liveSystem(join(tree, 'live'), debian, release, live)
    const options = ['-quiet', '-no-progress', '-all-root', '-comp', 'lz4']
    await $({ quiet: true })`mksquashfs ${tree} ${join(into, 'stand-in.squashfs')} ${options}`
    await rm(tree, { recursive: true })
    await ramdisk(debian, into)
  })
  return {
    image: join(folder, 'stand-in.squashfs'),
    ramdisk: join(folder, 'initrd'),
    init: `${live}/init`,
    label,
  }
}

/** A path that looks like one of Nix' store; the same name and content give the same one. */
export function storePath(name: string, content: string): string {
  return `/nix/store/${hash(`${name}\n${content}`).slice(0, 32)}-stand-in-${name}`
}

/** The system on the installer's CD: its /etc, and in its store init and the programs on the PATH. */
async function liveSystem(
  folder: string,
  debian: DebianLayer,
  release: string,
  system: string,
): Promise<void> {
  await cp(join(machine, 'live', 'etc'), join(folder, 'etc'), { recursive: true })
  const issue = join(folder, 'etc', 'issue')
  await writeFile(issue, (await readFile(issue, 'utf8')).replace('@release@', release))

  const root = join(folder, 'store', basename(system))
  const programs = join(root, 'sw', 'bin')
  await mkdir(programs, { recursive: true })
  await cp(join(machine, 'live', 'init'), join(root, 'init'))
  await chmod(join(root, 'init'), 0o755)
  await writeFile(join(root, 'nixos-version'), `${release}.stand-in`)
  const own = (await readdir(join(machine, 'bin'))).filter((name) => name.startsWith('nixos-'))
  for (const name of own) {
    await symlink(`${mounted.own}/bin/${name}`, join(programs, name))
  }
  const lists = await Promise.all(
    ['required.list', 'installer.list'].map((name) =>
      readFile(join(machine, 'tools', name), 'utf8'),
    ),
  )
  const wanted = lists.join('\n').replaceAll(/#.*/g, '').split(/\s+/).filter(Boolean)
  const paths = new Map(debian.programs.map((path) => [basename(path), path]))
  const missing = wanted.filter((name) => !paths.has(name))
  if (missing.length > 0) throw new Error(`machine/tools: no package has ${missing.join(', ')}`)
  for (const name of wanted) {
    await symlink(`${mounted.debian}/${paths.get(name)}`, join(programs, name))
  }
}

/** An uncompressed cpio archive: the kernel unpacks it fastest, and it is small. */
async function ramdisk(debian: DebianLayer, into: string): Promise<void> {
  const tree = join(into, 'ramdisk')
  await mkdir(join(tree, 'bin'), { recursive: true })
  await cp(debian.modules, join(tree, 'modules'), { recursive: true })
  await cp(debian.busybox, join(tree, 'bin', 'busybox'))
  await cp(join(machine, 'boot', 'stage-1.sh'), join(tree, 'init'))
  await chmod(join(tree, 'init'), 0o755)
  const applets = ['sh', 'mkdir', 'mount', 'insmod', 'cat', 'findfs', 'sleep', 'dd', 'ln', 'chmod']
  for (const applet of [...applets, '[', 'switch_root']) {
    await symlink('busybox', join(tree, 'bin', applet))
  }
  const owner = ['--uid', '0', '--gid', '0']
  await $({ quiet: true })`bsdtar --format newc ${owner} -cf ${join(into, 'initrd')} -C ${tree} .`
  await rm(tree, { recursive: true })
}
