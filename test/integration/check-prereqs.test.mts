import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import { mkdir, readdir, writeFile } from 'node:fs/promises'
import { createServer } from 'node:net'
import { afterEach, beforeEach, describe, it } from 'node:test'
import { loadCluster } from '../../lib/cluster.mts'
import { spawn } from '../../lib/expect.mts'
import { detectArchitecture, detectSystem } from '../../lib/host.mts'
import { type Checkout, makeCheckout, type Outcome, run } from '../checkout.mts'
import { FakePrograms } from '../fake-programs.mts'

const script = 'bin/check-prereqs.mts'
const os = detectSystem()
const arch = await detectArchitecture(os)
const kubernetes = loadCluster({ env: {} }).settings.KUBERNETES_VERSION

/** What each program says of its version. */
const versions: Record<string, string> = {
  [`qemu-system-${arch}`]: 'QEMU emulator version 10.0.2',
  'qemu-img': 'qemu-img version 10.0.2',
  bsdtar: 'bsdtar 3.7.4 - libarchive 3.7.4',
  ssh: 'OpenSSH_10.0p2, OpenSSL 3.5.1',
  curl: 'curl 8.14.1 (x86_64-pc-linux-gnu) libcurl/8.14.1',
  kubectl: `{"clientVersion": {"gitVersion": "v${kubernetes}"}}`,
  bash: 'GNU bash, version 5.2.37(1)-release',
  make: 'GNU Make 4.4.1',
  helm: 'version.BuildInfo{Version:"v4.3.1", GoVersion:"go1.26"}',
}

/** Which of Debian's packages has which program. */
const programOf: Record<string, string> = {
  [arch === 'x86_64' ? 'qemu-system-x86' : 'qemu-system-arm']: `qemu-system-${arch}`,
  'qemu-utils': 'qemu-img',
  'libarchive-tools': 'bsdtar',
  'openssh-client': 'ssh',
  bash: 'bash',
  make: 'make',
}
const needed = ['QEMU', 'qemu-img', 'bsdtar', 'ssh', 'curl', 'kubectl', 'bash', 'make']

/** Whether another /etc/os-release can be mounted for one process. */
const noMounts = (() => {
  try {
    execFileSync('unshare', ['-m', 'mount', '--bind', '/etc/hosts', '/etc/os-release'], {
      stdio: 'ignore',
    })
    return false
  } catch {
    return 'no other /etc/os-release can be mounted here: it needs root and unshare'
  }
})()

describe('check-prereqs', () => {
  let checkout: Checkout
  let programs: FakePrograms

  beforeEach(async () => {
    checkout = await makeCheckout({ settings: { QEMU_ACCEL: 'tcg' } })
    const firmware = [checkout.path('code.fd'), checkout.path('vars.fd')]
    // The signature of a firmware volume, and where its type is.
    const volume = `${'\0'.repeat(16)}\x78\xe5\x8c\x8c${'\0'.repeat(20)}_FVH`
    for (const path of firmware) await writeFile(path, volume, 'latin1')
    await checkout.set({
      QEMU_FIRMWARE_CODE: firmware[0] ?? '',
      QEMU_FIRMWARE_VARS: firmware[1] ?? '',
    })
    programs = new FakePrograms()
    // What the first line of a script needs.
    programs.link('sh', 'dirname', 'readlink')
    programs.add('node', `exec '${process.execPath}' "$@"`)
  })

  afterEach(async () => {
    programs.remove()
    await checkout.remove()
  })

  const call = (...args: string[]): Promise<Outcome> =>
    run(checkout, script, args, { env: { PATH: programs.path } })

  function haveAllBut(...missing: string[]): void {
    for (const [name, line] of Object.entries(versions)) {
      if (!missing.includes(name)) programs.say(name, line)
    }
  }

  /** An apt-get whose packages bring the programs that the table says they bring. */
  function addAptGet(): void {
    const brings = Object.entries(programOf).map(([name, program]) => {
      const lines = `'#!/bin/sh' 'echo '"'"'${versions[program]}'"'"`
      return `${name}) printf '%s\\n' ${lines} >"$BIN/${program}"; chmod 755 "$BIN/${program}";;`
    })
    programs.link('chmod')
    programs.add('apt-get', `for package; do case $package in\n${brings.join('\n')}\nesac; done`)
  }

  const installations = () => programs.calls().filter((line) => /^(apt-get|sudo) /.test(line))

  it('shows everything in one table, only warns of slow emulation, and changes nothing', async () => {
    haveAllBut()
    const before = await readdir(checkout.root)
    const { exitCode, stdout } = await call()
    assert.equal(exitCode, 0, stdout)
    const lines = stdout.split('\n')
    assert.match(lines[0] ?? '', /^ +tool +found +wanted +state$/)
    const named = lines.slice(1, 16).map((line) => line.slice(3).split('  ')[0])
    const names = ['QEMU', 'qemu-img', 'UEFI firmware', 'bsdtar', 'ssh', 'curl', 'kubectl']
    const rest = ['helm', 'bash', 'make', 'accelerator', 'free memory', 'free disk', 'ports']
    assert.deepEqual(named, ['Node', ...names, ...rest])
    assert.match(stdout, /^✓ {2}QEMU +10\.0\.2 +7\.2 or newer +ok$/m)
    assert.match(stdout, /^! {2}accelerator +tcg +\w+ +warning$/m)
    assert.match(stdout, /^! accelerator: QEMU_ACCEL=tcg: QEMU emulates the processor/m)
    assert.deepEqual(await readdir(checkout.root), before)
  })

  it('runs all checks, names what is missing and the commands for it, and runs none', async () => {
    programs.add('apt-get')
    const { exitCode, stdout, stderr } = await call()
    assert.equal(exitCode, 1)
    for (const name of needed) {
      assert.match(stdout, new RegExp(`^✗ {2}${name} +- .*missing$`, 'm'))
    }
    assert.match(stdout, /^✗ QEMU: it runs the machines$/m)
    const sudo = process.getuid?.() === 0 ? '' : 'sudo '
    const system = arch === 'x86_64' ? 'x86' : 'arm'
    const packages = `qemu-system-${system} qemu-utils libarchive-tools openssh-client curl bash make`
    assert.ok(stdout.includes(`\n  ${sudo}apt-get install --yes ${packages}\n`), stdout)
    assert.ok(stderr.includes(`check-prereqs: missing prerequisites: ${needed.join(', ')}\n`))
    assert.match(stdout, /^- {2}helm +- +3\.14 or newer +optional$/m)
    assert.match(stdout, /^- helm: the scripts that need it download Helm \d.* to tools\/$/m)
    assert.deepEqual(installations(), [])
  })

  it('says so where it knows no package manager', async () => {
    const { exitCode, stdout } = await call()
    assert.equal(exitCode, 1)
    assert.match(stdout, /No known package manager here has QEMU, qemu-img, .*: install by hand/)
  })

  it('reports a port that is taken, and a wrong setting, next to what is missing', async () => {
    haveAllBut('make')
    programs.add('apt-get')
    await checkout.set({ QEMU_FIRMWARE_CODE: '/nowhere/code.fd' })
    const server = createServer()
    const { API_PORT } = loadCluster({ root: checkout.root, env: {} }).settings
    await new Promise<void>((resolve) => server.listen(API_PORT, '127.0.0.1', resolve))
    const { exitCode, stdout, stderr } = await call()
    server.close()
    assert.equal(exitCode, 1)
    assert.match(stdout, /^✗ UEFI firmware: QEMU_FIRMWARE_CODE .*\/nowhere\/code\.fd/m)
    assert.match(
      stdout,
      new RegExp(`^✗ ports: TCP port ${API_PORT} \\(API_PORT\\) is taken by`, 'm'),
    )
    assert.match(stderr, /missing prerequisites: UEFI firmware, make, ports/)
    assert.match(stdout, /apt-get install --yes make$/m)
  })

  it('installs with --install --yes, and checks again', async () => {
    if (process.getuid?.() !== 0) programs.add('sudo', 'exec "$@"')
    addAptGet()
    haveAllBut('qemu-img', 'bsdtar', 'make')
    const { exitCode, stdout, stderr } = await call('--install', '--yes')
    assert.equal(exitCode, 0, stdout + stderr)
    assert.deepEqual(
      installations().filter((line) => line.startsWith('apt-get')),
      ['apt-get update', 'apt-get install --yes qemu-utils libarchive-tools make'],
    )
    const [before = '', after = ''] = stdout.split('\n\n   tool')
    assert.match(before, /✗ {2}bsdtar/)
    assert.match(after, /✓ {2}bsdtar +3\.7\.4/)
  })

  it('installs nothing when nothing is missing', async () => {
    addAptGet()
    haveAllBut()
    const { exitCode } = await call('--install', '--yes')
    assert.equal(exitCode, 0)
    assert.deepEqual(installations(), [])
  })

  it('does not run a command when there is no terminal to ask on', async () => {
    addAptGet()
    haveAllBut('make')
    const { exitCode, stderr } = await call('--install')
    assert.equal(exitCode, 1)
    assert.match(
      stderr,
      /--install asks .* there is no terminal\n.*apt-get.*\n.*\n +hint: +add --yes/,
    )
    assert.deepEqual(installations(), [])
  })

  for (const { answer, exitCode, installed } of [
    { answer: 'y', exitCode: 0, installed: true },
    { answer: '', exitCode: 1, installed: false },
  ]) {
    it(`asks on a terminal, and takes "${answer}" for ${installed ? 'yes' : 'no'}`, async () => {
      if (process.getuid?.() !== 0) programs.add('sudo', 'exec "$@"')
      addAptGet()
      haveAllBut('make')
      const env = { ...process.env, PATH: programs.path }
      const dialogue = spawn(checkout.path(script), ['--install'], { env })
      await dialogue.expect(/Run this\?[\s\S]*apt-get install --yes make[\s\S]*\[y\/N\] /, {
        timeout: 30_000,
      })
      assert.deepEqual(installations(), [])
      dialogue.send(`${answer}\n`)
      assert.equal((await dialogue.exit).exitCode, exitCode)
      assert.equal(installations().length > 0, installed)
    })
  }

  it('says which command failed, and what is still missing', async () => {
    haveAllBut('make')
    programs.add('sudo', 'exec "$@"')
    programs.add('apt-get', 'echo "E: Unable to locate package"; exit 100')
    const { exitCode, stdout, stderr } = await call('--install', '--yes')
    assert.equal(exitCode, 1)
    assert.match(
      stderr,
      /E: Unable to locate package\n! ended with status 100: .*install --yes make/,
    )
    assert.match(stderr, /missing prerequisites: make/)
    assert.doesNotMatch(stdout, /E: Unable/)
  })

  it('prints pure JSON with --json, also while it installs', async () => {
    if (process.getuid?.() !== 0) programs.add('sudo', 'exec "$@"')
    programs.add('apt-get', 'echo "Reading package lists..."')
    haveAllBut('make')
    for (const args of [['--json'], ['--json', '--install', '--yes']]) {
      const { exitCode, stdout } = await call(...args)
      assert.equal(exitCode, 1)
      const { findings, commands, without } = JSON.parse(stdout)
      const make = { name: 'make', found: '-', wanted: 'any', state: 'missing' }
      const found = findings.find(({ name }: { name: string }) => name === 'make')
      assert.deepEqual(found, { ...make, advice: "it runs the Makefile's targets" })
      assert.match(commands[1], /apt-get install --yes make$/)
      assert.deepEqual(without, [])
    }
  })

  it('refuses what it does not know', async () => {
    addAptGet()
    for (const args of [['--yes'], ['QEMU'], ['--json=yes']]) {
      const { exitCode, stderr } = await call(...args)
      assert.equal(exitCode, 2, args.join(' '))
      assert.match(stderr, /^check-prereqs: /)
    }
    assert.deepEqual(installations(), [])
  })

  type Found = { name: string; found: string; state: string; advice?: string }
  async function findings(): Promise<Map<string, Found>> {
    const { stdout } = await call('--json')
    const { findings } = JSON.parse(stdout) as { findings: Found[] }
    return new Map(findings.map((finding) => [finding.name, finding]))
  }

  it('rejects programs that are too old, broken, or others of the same name', async () => {
    haveAllBut('make')
    programs.say(`qemu-system-${arch}`, 'QEMU emulator version 7.1.9 (Debian 1:x)')
    programs.add('qemu-img', 'echo "error while loading shared libraries" >&2; exit 127')
    programs.say('bsdtar', 'tar (GNU tar) 1.34')
    programs.add('ssh', 'echo OpenSSH_for_Windows_9.5p1, LibreSSL 3.8.2 >&2')
    programs.say('helm', 'v3.13.3+gc8b9489')
    const all = await findings()
    const states = ['QEMU', 'qemu-img', 'bsdtar', 'ssh', 'helm'].map((name) => all.get(name)?.state)
    assert.deepEqual(states, ['missing', 'missing', 'missing', 'ok', 'optional'])
    assert.match(all.get('QEMU')?.advice ?? '', /qemu-system-\w+ 7\.1\.9 is too old/)
    assert.equal(all.get('ssh')?.found, '9.5')
    assert.match(all.get('helm')?.advice ?? '', /helm 3\.13\.3 is too old; .*download Helm/)
  })

  it('rejects a QEMU that was built without the user network', async () => {
    haveAllBut()
    const backends = 'Available netdev backend types:\\nsocket\\ndgram'
    const version = 'QEMU emulator version 10.0.2'
    const body = `case "$*" in *netdev*) printf '${backends}\\n';; *) echo ${version};; esac`
    programs.add(`qemu-system-${arch}`, body)
    const qemu = (await findings()).get('QEMU')
    assert.deepEqual([qemu?.state, qemu?.found], ['problem', '10.0.2'])
    assert.match(qemu?.advice ?? '', /built without the user network/)
  })

  it('warns of a kubectl more than one minor version away from the cluster', async () => {
    haveAllBut()
    const minor = Number(kubernetes.split('.')[1])
    for (const [step, state] of [
      [-2, 'warning'],
      [-1, 'ok'],
      [2, 'warning'],
    ] as const) {
      const version = `v1.${minor + step}.4-dispatcher`
      programs.say('kubectl', `{"clientVersion": {"gitVersion": "${version}"}}`)
      const kubectl = (await findings()).get('kubectl')
      assert.equal(kubectl?.state, state, version)
      if (state === 'warning')
        assert.match(kubectl?.advice ?? '', /one minor version older or newer/)
    }
  })

  it('refuses firmware for secure boot, and a folder as firmware, with the reason', async () => {
    haveAllBut()
    await mkdir(checkout.path('firmware'))
    await writeFile(checkout.path('OVMF_CODE_4M.secboot.fd'), 'UEFI')
    for (const [code, reason] of [
      ['OVMF_CODE_4M.secboot.fd', /secure.?boot/i],
      ['firmware', /folder|not a file/],
    ] as const) {
      await checkout.set({ QEMU_FIRMWARE_CODE: checkout.path(code) })
      const firmware = (await findings()).get('UEFI firmware')
      assert.equal(firmware?.state, 'problem', code)
      assert.match(firmware?.advice ?? '', reason)
    }
  })

  it('compares memory and disk with what the machines need', async () => {
    haveAllBut()
    await checkout.set({ CONTROL_PLANE_MEM: 4_194_304 })
    const all = await findings()
    assert.equal(all.get('free memory')?.state, 'warning')
    assert.match(all.get('free memory')?.advice ?? '', /lower CONTROL_PLANE_MEM and WORKER_MEM/)
    assert.match(all.get('free disk')?.found ?? '', /^\d.* [GT]B$/)
  })

  it('refuses a checkout on a Windows drive in WSL 2', { skip: os !== 'linux' }, async () => {
    haveAllBut()
    programs.say('uname', '5.15.167.4-microsoft-standard-WSL2')
    programs.say('stat', 'v9fs')
    const found = (await findings()).get('checkout')
    assert.equal(found?.state, 'problem')
    assert.match(found?.advice ?? '', /on a Windows drive[\s\S]*cp -r "\/.*" ~\//)
    programs.say('stat', 'ext2/ext3')
    assert.equal((await findings()).get('checkout'), undefined)
  })

  describe('on other distributions', { skip: noMounts }, () => {
    const managers = ['brew', 'apt-get', 'dnf', 'pacman', 'zypper', 'nix']
    /** What it would run on a system with this /etc/os-release and without most programs. */
    async function remedyOn(release: string): Promise<{ commands: string[]; without: string[] }> {
      haveAllBut(`qemu-system-${arch}`, 'bsdtar', 'kubectl')
      await writeFile(checkout.path('os-release'), release)
      const line =
        'mount --bind os-release /etc/os-release && PATH="$0" exec ./bin/check-prereqs.mts --json'
      const { stdout } = await run(checkout, 'unshare', ['-m', 'sh', '-c', line, programs.path])
      return JSON.parse(stdout)
    }
    const cpu = arch === 'x86_64' ? 'x86' : 'aarch64'
    const nix = "nix --extra-experimental-features 'nix-command flakes' profile install"
    const systems: [system: string, release: string, install: string][] = [
      ['Mint', 'ID=linuxmint\nID_LIKE="ubuntu debian"\n', 'apt-get update'],
      [
        'Fedora',
        'NAME="Fedora Linux"\nID=fedora\nVERSION_ID=44\n',
        `dnf install --assumeyes qemu-system-${cpu} bsdtar`,
      ],
      [
        'Arch on ARM',
        'ID=archarm\nID_LIKE=arch\n',
        `pacman -S --needed --noconfirm qemu-system-${cpu} libarchive kubectl`,
      ],
      [
        'openSUSE',
        'ID="opensuse-tumbleweed"\nID_LIKE="opensuse suse"\n',
        `zypper --non-interactive install qemu-${arch === 'x86_64' ? 'x86' : 'arm'} bsdtar`,
      ],
      ['NixOS', 'ID=nixos\nID_LIKE=""\n', `${nix} nixpkgs#qemu nixpkgs#libarchive nixpkgs#kubectl`],
    ]
    for (const [system, release, install] of systems) {
      it(`uses the package manager of ${system}, whatever else is installed`, async () => {
        for (const name of managers) programs.add(name)
        const { commands, without } = await remedyOn(release)
        assert.equal(commands[0]?.replace(/^sudo /, ''), install)
        assert.deepEqual(without, [])
      })
    }

    it('uses what is installed on an unknown system', async () => {
      programs.add('nix')
      assert.match((await remedyOn('ID=void\n')).commands[0] ?? '', /^nix /)
    })

    it('names no package for QEMU on Red Hat Enterprise Linux, which has none', async () => {
      programs.add('dnf')
      const release = 'NAME="Rocky Linux"\nID="rocky"\nID_LIKE="rhel centos fedora"\n'
      const { commands, without } = await remedyOn(release)
      assert.match(commands[0] ?? '', /dnf install --assumeyes bsdtar$/)
      assert.deepEqual(without, ['QEMU'])
    })
  })

  it('puts a downloaded kubectl on the PATH only if its checksum is right', async () => {
    haveAllBut('kubectl', 'curl', 'bash')
    programs.add('apt-get')
    const content = 'a kubectl'
    const checksum = createHash('sha256').update(`${content}\n`).digest('hex')
    programs.link('mktemp', 'sha256sum', 'bash', 'rm')
    if (process.getuid?.() !== 0) programs.add('sudo', 'exec "$@"')
    programs.add('install')
    const installWith = async (sum: string) => {
      const answers = `*.sha256) echo ${sum};; --version) echo 'curl 8.14.1 ';;`
      programs.add('curl', `case "$*" in ${answers} *) echo '${content}' >kubectl;; esac`)
      return call('--install', '--yes')
    }
    const copied = () => programs.calls().filter((line) => line.startsWith('install '))
    await installWith('0'.repeat(64))
    assert.deepEqual(copied(), [])
    await installWith(checksum)
    assert.deepEqual(copied(), ['install -m 755 kubectl /usr/local/bin/kubectl'])
  })

  it('reads the version of the real QEMU', async (t) => {
    const { stdout: banner, exitCode } = await run(checkout, `qemu-system-${arch}`, ['--version'])
    if (exitCode !== 0) return t.skip('QEMU is not installed')
    const { stdout } = await run(checkout, script, ['--json'])
    const { findings } = JSON.parse(stdout) as { findings: { name: string; found: string }[] }
    const qemu = findings.find(({ name }) => name === 'QEMU')
    assert.ok(qemu && banner.includes(`version ${qemu.found}`), `${qemu?.found} of ${banner}`)
  })
})
