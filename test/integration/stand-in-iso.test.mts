// The ISO of the rehearsal, in miniature: the real recipe with a Debian layer of empty programs. It
// must not be easier to install from than the real one. (The rehearsal itself shows that it boots.)
import assert from 'node:assert/strict'
import { mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import { $ } from 'zx'
import { extractKernel } from '../../lib/iso.mts'
import { projectRoot } from '../checkout.mts'
import type { DebianLayer } from '../rehearsal/debian-layer.mts'
import { isoImage } from '../rehearsal/iso.mts'
import { kubernetesLayer } from '../rehearsal/kubernetes-layer.mts'
import { ownLayer } from '../rehearsal/own-layer.mts'
import { machine } from '../rehearsal/own-tree.mts'
import { missing } from '../tools.mts'

const tools = ['mksquashfs', 'unsquashfs', 'xorriso', 'grub-mkimage', 'mcopy', 'bsdtar']
const skip = missing(...tools)
const run = $({ quiet: true })

let folder: string
const formerCache = process.env.XDG_CACHE_HOME
before(async () => {
  folder = await mkdtemp(join(tmpdir(), 'stand-in-iso-'))
  process.env.XDG_CACHE_HOME = join(folder, 'cache')
})
after(async () => {
  if (formerCache === undefined) delete process.env.XDG_CACHE_HOME
  else process.env.XDG_CACHE_HOME = formerCache
  await rm(folder, { recursive: true })
})

describe('the simulated installer ISO', { skip }, () => {
  let iso: string
  let files: string[]
  let menu: string
  let own: string[]

  before(async () => {
    const debian = await smallDebian(join(folder, 'debian'))
    const layer = await ownLayer(debian, '26.05')
    own = (await run`unsquashfs -ll -d / ${layer.image}`).stdout.split('\n')
    const programs = join(folder, 'programs')
    await mkdir(programs)
    await writeFile(join(programs, 'kubelet'), '#!/bin/sh\n', { mode: 0o755 })
    const kubernetes = await kubernetesLayer([programs])
    iso = await isoImage(debian, layer, [kubernetes], '26.05')
    files = (await run`bsdtar -tf ${iso}`).stdout.split('\n')
    menu = (await run`bsdtar -xOf ${iso} EFI/BOOT/grub.cfg`).stdout
  })

  it('boots like the real one: UEFI, GRUB, and a menu of the same form', async () => {
    const efi = process.arch === 'arm64' ? 'BOOTAA64.EFI' : 'BOOTX64.EFI'
    assert.ok(files.some((path) => path.endsWith(`EFI/BOOT/${efi}`)))
    const report = (await run`xorriso -indev ${iso} -report_el_torito plain`).stdout
    assert.match(report, /El Torito boot img :\s+\d+\s+UEFI/)
    assert.match(
      menu,
      /^ {2}linux \/boot\/\/nix\/store\/\S+-linux-\S+\/bzImage \$\{isoboot\} init=\/nix\/store\/\S+\/init /m,
    )
  })

  it('has no serial console in its default entry, only in another one', () => {
    const [first = '', ...others] = menu.match(/^\s*linux .*$/gm) ?? []
    assert.doesNotMatch(first, /console=/)
    assert.ok(others.some((line) => line.endsWith(' console=ttyS0,115200n8')))
  })

  it('has kernel and initrd for direct boot', async () => {
    const into = join(folder, 'kernel')
    await mkdir(into)
    const { kernel, initrd, append } = await extractKernel(iso, into, 'x86_64')
    assert.equal(await readFile(kernel, 'utf8'), 'vmlinuz')
    const label = (await run`bsdtar -tf ${initrd}`).stdout
    assert.match(label, /^\.\/init$/m)
    assert.match(append, /root=LABEL=nixos-minimal-26\.05-/)
    assert.doesNotMatch(append, /isoboot/)
  })

  it('has in /usr only what NixOS has there', () => {
    const usr = own.filter((line) => line.includes('/session/usr/'))
    const names = usr.map((line) => line.match(/\/session\/usr\/(\S+)/)?.[1])
    assert.deepEqual(names.sort(), [
      ...['bin', 'bin/env', 'lib', 'lib64', 'libexec', 'sbin', 'sbin/unix_chkpwd', 'share'],
    ])
  })

  it('has on its PATH no program that the real one lacks', () => {
    const path = own.flatMap((line) => line.match(/\/live\/store\/\S+\/sw\/bin\/(\S+)/)?.[1] ?? [])
    assert.ok(path.includes('parted') && path.includes('nixos-install'))
    const foreign = ['apt', 'apt-get', 'dpkg', 'python3', 'perl', 'jq', 'etcd', 'containerd']
    for (const name of foreign) assert.ok(!path.includes(name), name)
  })

  it('fails if a program of its lists is in no package', async () => {
    const debian = await smallDebian(join(folder, 'without'))
    const programs = debian.programs.filter((path) => !path.endsWith('/parted'))
    await assert.rejects(ownLayer({ ...debian, programs }, '26.05'), /no package has parted$/)
  })
})

describe('make rehearse', () => {
  const rehearse = (env: Record<string, string>) =>
    $({
      env: { ...process.env, YES: '', NODES: '', ...env },
      quiet: true,
      nothrow: true,
    })`${process.execPath} --import tsx ${join(projectRoot, 'test/rehearsal/rehearse.mts')}`

  it('names the packages that are missing and the command for them, and stops', async () => {
    const { exitCode, stderr } = await rehearse({ PATH: folder })
    assert.equal(exitCode, 1)
    assert.match(
      stderr,
      /needs packages that are not installed\n(?: {2}\| .*\n)* {2}\| mmdebstrap /,
    )
    assert.match(stderr, /command: .*apt-get install --no-install-recommends .*mmdebstrap/)
    assert.match(stderr, /make rehearse YES=1/)
  })

  it('accepts only nodes of cluster.env', async () => {
    const { exitCode, stderr } = await rehearse({ NODES: 'alpha,nobody' })
    assert.notEqual(exitCode, 0)
    assert.match(stderr, /nobody/)
  })
})

/** A Debian layer of the right names and next to no content. */
async function smallDebian(into: string): Promise<DebianLayer> {
  const path = (name: string) => join(into, name)
  await mkdir(path('modules'), { recursive: true })
  await mkdir(path('root'))
  for (const name of ['vmlinuz', 'busybox', 'modules/01-loop.ko']) await writeFile(path(name), name)
  await run`mksquashfs ${path('root')} ${path('debian.squashfs')} -quiet -no-progress`
  const lists = await Promise.all(
    ['required.list', 'installer.list'].map((name) =>
      readFile(join(machine, 'tools', name), 'utf8'),
    ),
  )
  const names = lists.join('\n').replaceAll(/#.*/g, '').split(/\s+/).filter(Boolean)
  return {
    image: path('debian.squashfs'),
    kernel: path('vmlinuz'),
    kernelVersion: '6.12.0',
    modules: path('modules'),
    busybox: path('busybox'),
    programs: names.map((name) => `usr/bin/${name}`),
  }
}
