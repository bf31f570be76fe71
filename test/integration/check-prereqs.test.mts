import assert from 'node:assert/strict'
import { readdir, writeFile } from 'node:fs/promises'
import { createServer } from 'node:net'
import { afterEach, beforeEach, describe, it } from 'node:test'
import { loadCluster } from '../../lib/cluster.mts'
import { spawn } from '../../lib/installer/expect.mts'
import { prerequisites } from '../../lib/prerequisites/prerequisites.mts'
import { detectArchitecture, detectSystem } from '../../lib/qemu/processor.mts'
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
  kubectl: `{"clientVersion": {"gitVersion": "v${kubernetes}"}}`,
  bash: 'GNU bash, version 5.2.37(1)-release',
  make: 'GNU Make 4.4.1',
}

describe('check-prereqs', () => {
  let checkout: Checkout
  let programs: FakePrograms

  beforeEach(async () => {
    checkout = await makeCheckout({ settings: { QEMU_ACCEL: 'tcg' } })
    const firmware = [checkout.path('code.fd'), checkout.path('vars.fd')]
    for (const path of firmware) await writeFile(path, 'UEFI')
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
    const brings = prerequisites({ os, arch }, kubernetes).flatMap(
      ({ packages, programs: names }) =>
        names.slice(0, 1).map((name) => {
          const lines = `'#!/bin/sh' 'echo '"'"'${versions[name]}'"'"`
          return `${packages.apt}) printf '%s\\n' ${lines} >"$BIN/${name}"; chmod 755 "$BIN/${name}";;`
        }),
    )
    programs.link('chmod')
    programs.add('apt-get', `for package; do case $package in\n${brings.join('\n')}\nesac; done`)
  }

  const installations = () => programs.calls().filter((line) => /^(apt-get|sudo) /.test(line))

  it('shows all in one table and is content', async () => {
    haveAllBut()
    const { exitCode, stdout } = await call()
    assert.equal(exitCode, 0, stdout)
    const lines = stdout.split('\n')
    assert.match(lines[0] ?? '', /^ +tool +found +wanted +state$/)
    const named = lines.slice(1, 14).map((line) => line.slice(3).split('  ')[0])
    const names = [
      'Node',
      'QEMU',
      'qemu-img',
      'UEFI firmware',
      'bsdtar',
      'ssh',
      'kubectl',
      'bash',
      'make',
    ]
    assert.deepEqual(named, [...names, 'accelerator', 'free memory', 'free disk', 'ports'])
    assert.match(stdout, /^✓ {2}QEMU +10\.0\.2 +7\.2 or newer +ok$/m)
  })

  it('warns of slow emulation and does not fail for it', async () => {
    haveAllBut()
    const { exitCode, stdout } = await call()
    assert.equal(exitCode, 0)
    assert.match(stdout, /^! {2}accelerator +tcg +\w+ +warning$/m)
    assert.match(stdout, /^! accelerator: QEMU_ACCEL=tcg: QEMU emulates the processor/m)
  })

  it('runs all checks, names what is missing and the commands for it, and runs none', async () => {
    programs.add('apt-get')
    const { exitCode, stdout, stderr } = await call()
    assert.equal(exitCode, 1)
    for (const name of ['QEMU', 'qemu-img', 'bsdtar', 'ssh', 'kubectl', 'bash', 'make']) {
      assert.match(stdout, new RegExp(`^✗ {2}${name} +- .*missing$`, 'm'))
    }
    assert.match(stdout, /^✗ QEMU: it runs the machines$/m)
    const sudo = process.getuid?.() === 0 ? '' : 'sudo '
    const system = arch === 'x86_64' ? 'x86' : 'arm'
    const packages = `qemu-system-${system} qemu-utils libarchive-tools openssh-client bash make curl`
    assert.ok(stdout.includes(`\n  ${sudo}apt-get install --yes ${packages}\n`), stdout)
    assert.match(
      stderr,
      /check-prereqs: not all is there: QEMU, qemu-img, bsdtar, ssh, kubectl, bash, make/,
    )
    assert.deepEqual(installations(), [])
  })

  it('says so where it knows no package manager', async () => {
    const { exitCode, stdout } = await call()
    assert.equal(exitCode, 1)
    assert.match(stdout, /No package manager known here has QEMU, qemu-img, .*: install by hand/)
  })

  it('tells a port that is taken, and a wrong setting, beside what is missing', async () => {
    haveAllBut('make')
    programs.add('apt-get')
    await checkout.set({ QEMU_FIRMWARE_CODE: '/nowhere/code.fd' })
    const server = createServer()
    const { API_PORT } = loadCluster({ root: checkout.root, env: {} }).settings
    await new Promise<void>((resolve) => server.listen(API_PORT, '127.0.0.1', resolve))
    const { exitCode, stdout, stderr } = await call()
    server.close()
    assert.equal(exitCode, 1)
    assert.match(stdout, /^✗ UEFI firmware: QEMU_FIRMWARE_CODE names a file that is not there/m)
    assert.match(
      stdout,
      new RegExp(`^✗ ports: TCP port ${API_PORT} \\(API_PORT\\) is taken by`, 'm'),
    )
    assert.match(stderr, /not all is there: UEFI firmware, make, ports/)
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

  it('does not run a command when there is nobody to ask', async () => {
    addAptGet()
    haveAllBut('make')
    const { exitCode, stderr } = await call('--install')
    assert.equal(exitCode, 1)
    assert.match(stderr, /--install asks .* nobody to ask\n.*apt-get.*\n.*\n +hint: +add --yes/)
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
      const dialogue = spawn(checkout.path(script), ['--install'], { env, columns: 200 })
      await dialogue.expect(/Run this\?[\s\S]*apt-get install --yes make[\s\S]*\[y\/N\] /, {
        timeout: 30_000,
      })
      assert.deepEqual(installations(), [])
      dialogue.send(`${answer}\n`)
      assert.equal((await dialogue.exit).exitCode, exitCode)
      assert.equal(installations().length > 0, installed)
    })
  }

  it('tells which command failed, and what is still missing', async () => {
    haveAllBut('make')
    programs.add('sudo', 'exec "$@"')
    programs.add('apt-get', 'echo "E: Unable to locate package"; exit 100')
    const { exitCode, stdout, stderr } = await call('--install', '--yes')
    assert.equal(exitCode, 1)
    assert.match(
      stderr,
      /E: Unable to locate package\n! ended with status 100: .*install --yes make/,
    )
    assert.match(stderr, /not all is there: make/)
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

  it('changes nothing in the checkout', async () => {
    haveAllBut()
    const before = await readdir(checkout.root)
    await call()
    assert.deepEqual(await readdir(checkout.root), before)
  })

  it('refuses what it does not know', async () => {
    addAptGet()
    for (const args of [['--yes'], ['--instal'], ['QEMU'], ['--json=yes']]) {
      const { exitCode, stderr } = await call(...args)
      assert.equal(exitCode, 2, args.join(' '))
      assert.match(stderr, /^check-prereqs: /)
    }
    assert.deepEqual(installations(), [])
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
