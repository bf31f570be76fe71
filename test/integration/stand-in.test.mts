// The rehearsal's nixos-install and switch, in a folder instead of on a disk: they must refuse what
// NixOS refuses, or a rehearsal proves nothing.
import assert from 'node:assert/strict'
import { existsSync } from 'node:fs'
import {
  chmod,
  cp,
  lstat,
  mkdir,
  mkdtemp,
  readdir,
  readFile,
  readlink,
  rm,
  symlink,
  writeFile,
} from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { basename, join } from 'node:path'
import { after, before, beforeEach, describe, it } from 'node:test'
import { $ } from 'zx'
import type { Checkout } from '../checkout.mts'
import { makeStagedCheckout } from '../kubernetes/prepared.mts'
import { ownTree } from '../rehearsal/own-tree.mts'
import { missing } from '../tools.mts'

const skip = missing('python3', 'nix-instantiate')

describe('the simulated nixos-install', { skip }, () => {
  let checkout: Checkout
  let folder: string
  let root: string
  const inRoot = (...parts: string[]) => join(root, ...parts)

  before(async () => {
    folder = await mkdtemp(join(tmpdir(), 'stand-in-'))
    checkout = (await makeStagedCheckout()).checkout
    // nixos-install requires this of every folder above the system.
    await chmod(folder, 0o755)
    await ownTree(join(folder, 'own'), '26.05')
    await fakeDebian(join(folder, 'layers'))
    await fakeCd(join(folder, 'cd'))
  })
  after(async () => {
    await checkout.remove()
    await rm(folder, { recursive: true })
  })

  beforeEach(async () => {
    root = await mkdtemp(join(folder, 'root-'))
    await chmod(root, 0o755)
    await mkdir(inRoot('boot'))
    await configure('alpha')
  })
  const configure = (name: string) =>
    cp(checkout.path('cloud-init', name, 'nixos/etc/nixos'), inRoot('etc/nixos'), {
      recursive: true,
    })

  /** Runs lines of Python with the modules of the simulated NixOS. */
  async function python(lines: string, ...args: string[]) {
    const start = `import json, sys; sys.path.insert(0, ${JSON.stringify(join(folder, 'own/nixos'))})\n`
    const env = { ...process.env, STAND_IN_LAYERS: join(folder, 'layers') }
    const { exitCode, stdout, stderr } = await $({
      env,
      quiet: true,
      nothrow: true,
    })`python3 -IBc ${start + lines} ${args}`
    return { exitCode, stdout, stderr }
  }

  /** nixos-install as on the CD, but that a folder counts as a mount point, and /boot as an ESP. */
  const install = ({ esp = true, mounted = true, args = [] as string[] } = {}) =>
    python(
      `import bootloader, install
from command import run
from pathlib import Path
${esp ? 'bootloader.check_esp = lambda boot: None' : ''}
run(lambda words: install.nixos_install(words, Path(${JSON.stringify(join(folder, 'cd'))}), ${mounted ? 'False' : 'True'}))`,
      '--root',
      root,
      '--no-root-passwd',
      ...args,
    )

  const edit = async (file: string, from: string | RegExp, to: string) => {
    const path = inRoot('etc/nixos', file)
    const text = await readFile(path, 'utf8')
    assert.match(text, from instanceof RegExp ? from : new RegExp(escapeRegExp(from)))
    await writeFile(path, text.replace(from, to))
  }

  const system = async () => inRoot(await readlink(inRoot('nix/var/nix/profiles/system-1-link')))

  it('makes units, users, keys and a boot entry from the configuration', async () => {
    const { exitCode, stderr } = await install()
    assert.equal(exitCode, 0, stderr)
    assert.match(stderr, /installing the boot loader\.\.\.[\s\S]*installation finished!\n$/)

    const etc = inRoot(await readlink(inRoot('etc/static')))
    const unit = await readFile(join(etc, 'systemd/system/etcd.service'), 'utf8')
    assert.match(unit, /^ExecStart=\/nix\/store\/\S+-stand-in-etcd_3_6\/bin\/etcd /m)
    const wanted = await readdir(join(etc, 'systemd/system/multi-user.target.wants'))
    assert.ok(wanted.includes('etcd.service') && wanted.includes('sshd.service'))
    assert.match(await readFile(inRoot('etc/passwd'), 'utf8'), /^etcd:x:\d{3}:\d{3}:/m)
    assert.match(await readFile(inRoot('etc/shadow'), 'utf8'), /^root:!:/m)
    const keys = join(etc, 'ssh/authorized_keys.d/root')
    const login = await readFile(checkout.path('tls/ssh_ed25519.pub'), 'utf8')
    assert.equal((await readFile(keys, 'utf8')).trim(), login.trim())

    const entry = await readFile(inRoot('boot/loader/entries/nixos-generation-1.conf'), 'utf8')
    assert.match(entry, /^options init=\/nix\/store\/\S+\/init .*console=ttyS0,115200n8$/m)
    for (const [, path] of entry.matchAll(/^(?:linux|initrd) \/(\S+)$/gm)) {
      assert.ok((await lstat(inRoot('boot', path ?? ''))).size > 0)
    }
    const efi = process.arch === 'arm64' ? 'BOOTAA64.EFI' : 'BOOTX64.EFI'
    assert.ok((await lstat(inRoot('boot/EFI/BOOT', efi))).size > 0)
  })

  it('has programs of an additional layer before those of Debian', async () => {
    await install()
    const [etcd] = (await readdir(inRoot('nix/store'))).filter((name) => name.endsWith('-etcd_3_6'))
    const program = (name: string) => readlink(inRoot('nix/store', etcd ?? '', 'bin', name))
    assert.equal(await program('etcd'), join(folder, 'layers/kubernetes/bin/etcd'))
    assert.equal(await program('etcdctl'), join(folder, 'layers/debian/usr/bin/etcdctl'))
  })

  it('has container images on workers only', async () => {
    const ofImages = inRoot('var/lib/containerd/meta.db')
    await install()
    assert.ok(!existsSync(ofImages))

    await rm(inRoot('etc'), { recursive: true })
    await configure('sigma')
    const { exitCode, stderr } = await install()
    assert.equal(exitCode, 0, stderr)
    assert.equal(await readFile(ofImages, 'utf8'), 'unpacked')
    assert.deepEqual(await readdir(inRoot('nix/.images')), ['debian.squashfs'])
  })

  it('builds the same system from the same configuration, and keeps user ids', async () => {
    await install()
    const [passwd, first] = [await readFile(inRoot('etc/passwd'), 'utf8'), await system()]
    await install()
    assert.deepEqual(await readdir(inRoot('boot/loader/entries')), ['nixos-generation-1.conf'])
    assert.equal(await system(), first)

    await edit(
      'control-plane.nix',
      'users.groups.etcd = { };',
      'users.groups.etcd = { };\n  users.groups.aaa = { };',
    )
    await install()
    assert.deepEqual((await readdir(inRoot('boot/loader/entries'))).length, 2)
    assert.equal(await readFile(inRoot('etc/passwd'), 'utf8'), passwd)
  })

  it('removes files of former configurations from /etc, and keeps those of the machine', async () => {
    const line = 'environment.etc."former/file".text = "x";'
    await edit(
      'nixos-base.nix',
      'environment.defaultPackages',
      `${line}\n  environment.defaultPackages`,
    )
    await install()
    await writeFile(inRoot('etc/former/own'), 'kept')
    assert.equal(await readlink(inRoot('etc/former/file')), '/etc/static/former/file')
    await edit('nixos-base.nix', line, '')
    await install()
    assert.deepEqual(await readdir(inRoot('etc/former')), ['own'])
  })

  const broken: [what: string, file: string, from: string | RegExp, to: string, error: RegExp][] = [
    ['a syntax error', 'nixos-base.nix', 'in\n{', 'in\n{{', /syntax error/],
    [
      'an option that NixOS lacks',
      'nixos-base.nix',
      'networking.useDHCP',
      'networking.useDCHP',
      /The option `networking\.useDCHP' does not exist/,
    ],
    [
      'a value of the wrong type',
      'nixos-base.nix',
      'useNetworkd = true',
      'useNetworkd = "yes"',
      /networking\.useNetworkd.*not of type/,
    ],
    ['a package that nixpkgs lacks', 'control-plane.nix', 'pkgs.etcd_3_6', 'pkgs.etcd_9', /etcd_9/],
    [
      'a program where only other systems have it',
      'control-plane.nix',
      /\$\{pkgs\.etcd_3_6\}\/bin\/etcd/,
      '/usr/bin/etcd',
      /a place that NixOS does not have/,
    ],
    ['a missing file', 'configuration.nix', './nixos-base.nix', './no-base.nix', /no-base\.nix/],
  ]
  for (const [what, file, from, to, error] of broken) {
    it(`refuses ${what}, and installs nothing`, async () => {
      await edit(file, from, to)
      const { exitCode, stderr } = await install()
      assert.equal(exitCode, 1)
      assert.match(stderr, error)
      assert.deepEqual((await readdir(root)).sort(), ['boot', 'etc'])
    })
  }

  it('fails without a configuration, and with an option that nixos-install lacks', async () => {
    await rm(inRoot('etc/nixos/configuration.nix'))
    const { exitCode, stderr } = await install()
    assert.equal(exitCode, 1)
    assert.match(stderr, /configuration file \S+configuration\.nix doesn't exist/)
    const other = await install({ args: ['--no-such-option'] })
    assert.equal(other.exitCode, 1)
    assert.match(other.stderr, /unknown option `--no-such-option'/)
  })

  it('fails when the ESP is not mounted', async () => {
    const { exitCode, stderr } = await install({ esp: false })
    assert.equal(exitCode, 1)
    assert.match(stderr, /Couldn't find EFI system partition: "\S+boot" is not a mount point/)
    assert.doesNotMatch(stderr, /installation finished/)
    assert.deepEqual(await readdir(inRoot('boot')), [])
  })

  it('fails when nothing is mounted, or others may not enter the mount point', async () => {
    assert.match((await install({ mounted: true })).stderr, /installation finished/)
    await rm(inRoot('nix'), { recursive: true })
    const unmounted = await install({ mounted: false })
    assert.equal(unmounted.exitCode, 1)
    assert.match(unmounted.stderr, /is not a mount point/)
    await chmod(root, 0o700)
    const closed = await install()
    assert.equal(closed.exitCode, 1)
    assert.match(closed.stderr, /should have permissions 755, but had permissions 700/)
  })

  it('rolls back to the previous generation, and not beyond the first', async () => {
    await install()
    await edit('control-plane.nix', 'startLimitIntervalSec = 0;', 'startLimitIntervalSec = 9;')
    await install()
    const roll = `
from pathlib import Path
from command import run
import generations
run(lambda words: print(generations.roll_back(Path(words[0])), generations.current(Path(words[0]))))`
    assert.match((await python(roll, root)).stdout, /from version 2 to 1\n\S+ 1\n$/)
    const again = await python(roll, root)
    assert.equal(again.exitCode, 1)
    assert.match(again.stderr, /no generation older than the current \(1\) exists/)
  })

  describe('another release', () => {
    const channel = (...words: string[]) =>
      python(
        `from pathlib import Path
from channel import nix_channel, release_of
from command import run
root = Path(sys.argv.pop(1))
run(lambda words: (nix_channel(words, root), print(release_of(root))))`,
        root,
        ...words,
      )
    const address = (release: string) => `https://channels.nixos.org/nixos-${release}`
    const profile = () => readlink(inRoot('nix/var/nix/profiles/per-user/root/channels'))

    it('comes from another channel, and can be rolled back', async () => {
      await install()
      assert.equal((await channel('--list')).stdout, `nixos ${address('26.05')}\n26.05\n`)
      assert.equal(await profile(), 'channels-1-link')
      assert.equal((await channel('--add', address('26.11'), 'nixos')).stdout, '26.05\n')
      assert.match((await channel('--update', 'nixos')).stdout, /\n26\.11\n$/)
      assert.equal(await profile(), 'channels-2-link')
      assert.match((await channel('--update', 'nixos')).stdout, /\n26\.11\n$/)
      assert.equal(await profile(), 'channels-2-link', 'the same again is no generation')
      assert.match((await channel('--rollback', '1')).stdout, /\n26\.05\n$/)
      assert.equal(await profile(), 'channels-1-link')
    })

    it('is not available from a channel that does not exist', async () => {
      await install()
      await channel('--add', address('31.05'), 'nixos')
      const { exitCode, stderr } = await channel('--update', 'nixos')
      assert.equal(exitCode, 1)
      assert.match(
        stderr,
        /unable to download '\S+nixos-31\.05\/nixexprs\.tar\.xz': HTTP error 404/,
      )
      assert.equal(await profile(), 'channels-1-link')
    })

    it('is another system with another kernel, and the former kernel is kept', async () => {
      await install()
      const { stdout, stderr } = await python(
        `from pathlib import Path
from evaluation import evaluate
from generations import add, generations
from rebuild import boot_files
from store import below
from system import build
root = Path(sys.argv[1])
spec = evaluate(root / "etc/nixos/configuration.nix")
first = below(root, generations(root)[1])
system = build(spec, root, "26.11", *boot_files("26.11", first, root), lambda text: None)
add(system, root)
new = below(root, system)
kernels = [folder.joinpath("kernel").readlink() for folder in (first, new)]
import switch
switch.CURRENT = first
print(json.dumps({
  "refused": [switch.switch_to_configuration(new, action) for action in ("switch", "test")],
  "kernels": [str(path) for path in kernels],
  "contents": [below(root, path).read_text() for path in kernels],
  "releases": [folder.joinpath("nixos-version").read_text() for folder in (first, new)],
  "again": [str(boot_files(release, new, root)[0]) for release in ("26.05", "26.11")],
}))`,
        root,
      )
      assert.notEqual(stdout, '', stderr)
      const { kernels, contents, releases, again, refused } = JSON.parse(stdout)
      assert.deepEqual(refused, [1, 1], 'another D-Bus needs a restart')
      assert.match(stderr, /^Pre-switch check 'switchInhibitors' failed$/m)
      assert.notEqual(kernels[0], kernels[1])
      assert.deepEqual(contents, ['bzImage', 'bzImage'])
      assert.deepEqual(releases, ['26.05.stand-in', '26.11.stand-in'])
      assert.deepEqual(again, kernels)
    })
  })

  describe('a switch', () => {
    const service = (text: string) => `[Unit]\nDescription=x\n${text}\n[Service]\nExecStart=/x\n`
    const cases: [what: string, before: string | null, after: string | null, plan: object][] = [
      ['does not touch a unit that has not changed', service(''), service(''), {}],
      [
        'stops and starts a unit that has changed',
        service(''),
        service('After=a'),
        { stop: ['u.service'], start: ['u.service'] },
      ],
      [
        'restarts one that must not be stopped first',
        service(''),
        service('X-StopIfChanged=false'),
        { restart: ['u.service'] },
      ],
      [
        'reloads one whose files to reload have changed',
        service('X-Reload-Triggers=/a'),
        service('X-Reload-Triggers=/b'),
        { reload: ['u.service'] },
      ],
      [
        'stops and starts one whose files have changed',
        service('X-Restart-Triggers=/a'),
        service('X-Restart-Triggers=/b'),
        { stop: ['u.service'], start: ['u.service'] },
      ],
      [
        'does not restart a unit that forbids it',
        service(''),
        service('X-RestartIfChanged=false'),
        { skip: ['u.service'] },
      ],
      ['stops a unit that is gone', service(''), null, { stop: ['u.service'] }],
      ["ignores a unit's new description", service(''), service('').replace('=x', '=y'), {}],
    ]
    for (const [what, old, now, expected] of cases) {
      it(what, async () => {
        for (const [name, text] of [
          ['old', old],
          ['new', now],
        ] as const) {
          await mkdir(inRoot(name), { recursive: true })
          if (text !== null) await writeFile(inRoot(name, 'u.service'), text)
        }
        const { stdout, stderr } = await python(
          `from pathlib import Path
from dataclasses import asdict
from switch import plan
todo = asdict(plan(Path(sys.argv[1]), Path(sys.argv[2]), ["u.service", "other.service"]))
print(json.dumps({key: names for key, names in todo.items() if names}))`,
          inRoot('old'),
          inRoot('new'),
        )
        assert.deepEqual(JSON.parse(stdout || stderr), expected)
      })
    }
  })
})

/** Layers as on a machine, of which only the names matter here. */
async function fakeDebian(layers: string): Promise<void> {
  const efi = join(layers, 'debian/usr/lib/systemd/boot/efi')
  const bin = join(layers, 'debian/usr/bin')
  const newer = join(layers, 'kubernetes/bin')
  for (const each of [efi, bin, newer]) await mkdir(each, { recursive: true })
  for (const arch of ['x64', 'aa64']) await writeFile(join(efi, `systemd-boot${arch}.efi`), 'MZ')
  for (const name of ['bash', 'etcd', 'etcdctl', 'sshd']) await symlink('x', join(bin, name))
  await symlink('x', join(newer, 'etcd'))
  await symlink('/bin/cp', join(bin, 'cp'))
  await mkdir(join(layers, 'images/store'), { recursive: true })
  await writeFile(join(layers, 'images/store/meta.db'), 'unpacked')
}

/** The files of the CD that an installation copies. */
async function fakeCd(cd: string): Promise<void> {
  for (const path of [
    'boot/nix/store/k-linux/bzImage',
    'boot/nix/store/i-initrd/initrd',
    'layers/debian.squashfs',
    'layers/images.squashfs',
  ]) {
    await mkdir(join(cd, path, '..'), { recursive: true })
    await writeFile(join(cd, path), basename(path))
  }
}

function escapeRegExp(text: string): string {
  return text.replaceAll(/[.*+?^${}()|[\]\\]/g, '\\$&')
}
