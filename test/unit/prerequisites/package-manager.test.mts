import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import { createHash } from 'node:crypto'
import { afterEach, beforeEach, describe, it } from 'node:test'
import { promisify } from 'node:util'
import {
  detectPackageManager,
  type InstallContext,
  installCommands,
  packageManagers,
} from '../../../lib/prerequisites/package-manager.mts'
import { prerequisites } from '../../../lib/prerequisites/prerequisites.mts'
import { FakePrograms } from '../../fake-programs.mts'

const all = prerequisites({ os: 'linux', arch: 'x86_64' }, '1.36.3')
const some = (...names: string[]) => all.filter(({ name }) => names.includes(name))

function context(name: string, changes: Partial<InstallContext> = {}): InstallContext {
  const manager = packageManagers.find((candidate) => candidate.name === name)
  return { manager, root: false, curl: true, ...changes }
}

describe('the package manager', () => {
  let programs: FakePrograms
  const path = process.env.PATH
  beforeEach(() => {
    programs = new FakePrograms()
    process.env.PATH = programs.path
  })
  afterEach(() => {
    process.env.PATH = path
    programs.remove()
  })

  const releases: [system: string, release: string, manager: string][] = [
    ['Debian', 'PRETTY_NAME="Debian GNU/Linux 13"\nID=debian\n', 'apt'],
    ['Mint', 'ID=linuxmint\nID_LIKE="ubuntu debian"\n', 'apt'],
    ['Fedora', 'NAME="Fedora Linux"\nID=fedora\nVERSION_ID=44\n', 'dnf'],
    ['Arch on ARM', 'ID=archarm\nID_LIKE=arch\n', 'pacman'],
    ['openSUSE', 'ID="opensuse-tumbleweed"\nID_LIKE="opensuse suse"\n', 'zypper'],
    ['NixOS', 'ID=nixos\nID_LIKE=""\n', 'nix'],
  ]
  for (const [system, release, manager] of releases) {
    it(`of ${system} is ${manager}, whatever else is installed`, async () => {
      for (const { program } of packageManagers) programs.add(program)
      assert.equal((await detectPackageManager('linux', release))?.name, manager)
    })
  }

  it('of macOS is Homebrew', async () => {
    for (const { program } of packageManagers) programs.add(program)
    assert.equal((await detectPackageManager('darwin', ''))?.name, 'brew')
  })

  it('of an unknown system is the one that is there', async () => {
    programs.add('nix')
    assert.equal((await detectPackageManager('linux', 'ID=void\n'))?.name, 'nix')
    assert.equal((await detectPackageManager('darwin', ''))?.name, 'nix')
  })

  it('may be missing', async () => {
    assert.equal(await detectPackageManager('linux', 'ID=debian\n'), undefined)
  })
})

describe('the commands that install what is missing', () => {
  it('name every package once', () => {
    const { commands } = installCommands(some('QEMU', 'qemu-img', 'UEFI firmware'), context('nix'))
    assert.deepEqual(commands, [
      "nix --extra-experimental-features 'nix-command flakes' profile install nixpkgs#qemu",
    ])
  })

  it('are those of the system', () => {
    const missing = some('QEMU', 'UEFI firmware', 'bsdtar')
    const lines = Object.fromEntries(
      packageManagers.map(({ name }) => [name, installCommands(missing, context(name)).commands]),
    )
    assert.deepEqual(lines, {
      brew: ['brew install qemu libarchive'],
      apt: [
        'sudo apt-get update',
        'sudo apt-get install --yes qemu-system-x86 ovmf libarchive-tools',
      ],
      dnf: ['sudo dnf install --assumeyes qemu-system-x86 edk2-ovmf bsdtar'],
      pacman: ['sudo pacman -S --needed --noconfirm qemu-system-x86 edk2-ovmf libarchive'],
      zypper: ['sudo zypper --non-interactive install qemu-x86 qemu-ovmf-x86_64 bsdtar'],
      nix: [
        "nix --extra-experimental-features 'nix-command flakes' profile install nixpkgs#qemu nixpkgs#libarchive",
      ],
    })
  })

  it('need no sudo as root', () => {
    const { commands } = installCommands(some('make'), context('apt', { root: true }))
    assert.deepEqual(commands, ['apt-get update', 'apt-get install --yes make'])
  })

  it('download what has no package, and install curl for that', () => {
    const { commands, without } = installCommands(some('kubectl'), context('apt', { curl: false }))
    assert.deepEqual(commands.slice(0, 2), [
      'sudo apt-get update',
      'sudo apt-get install --yes curl',
    ])
    assert.match(
      commands[2] ?? '',
      /curl -fLO .*kubectl.*sha256sum -c.*sudo install -m 755 kubectl/,
    )
    assert.deepEqual(without, [])
    assert.equal(installCommands(some('kubectl'), context('apt')).commands.length, 1)
  })

  it('are none without a package manager, and what is missing is named', () => {
    const { commands, without } = installCommands(some('QEMU', 'kubectl'), context('none'))
    assert.deepEqual(commands, [])
    assert.deepEqual(without, ['QEMU', 'kubectl'])
  })

  it('are none when nothing is missing', () => {
    assert.deepEqual(installCommands([], context('apt')), { commands: [], without: [] })
  })
})

describe('the download of kubectl', () => {
  it('is put on PATH only when its checksum is right', async () => {
    const programs = new FakePrograms()
    const content = 'a kubectl\n'
    const checksum = createHash('sha256').update(content).digest('hex')
    programs.link('sh', 'mktemp', 'sha256sum')
    programs.add('install')
    const { commands } = installCommands(some('kubectl'), context('apt', { root: true }))
    const run = (sum: string) => {
      programs.add(
        'curl',
        `case "$*" in *.sha256) echo ${sum};; *) printf '${content.trim()}\\n' >kubectl;; esac`,
      )
      const env = { PATH: programs.path, TMPDIR: programs.path }
      return promisify(execFile)('sh', ['-c', commands.join('\n')], { env })
    }
    await assert.rejects(run('0'.repeat(64)))
    assert.ok(!programs.calls().some((call) => call.startsWith('install')))
    await run(checksum)
    assert.equal(programs.calls().at(-1), 'install -m 755 kubectl /usr/local/bin/kubectl')
    programs.remove()
  })
})
