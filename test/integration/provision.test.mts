import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync } from 'node:fs'
import { mkdir, readdir, readFile, rm, stat, symlink, truncate, writeFile } from 'node:fs/promises'
import { createServer } from 'node:net'
import { delimiter, join } from 'node:path'
import { after, afterEach, before, beforeEach, describe, it } from 'node:test'
import { which } from 'zx/core'
import { loadCluster } from '../../lib/cluster.mts'
import { spawn as spawnInTerminal } from '../../lib/expect.mts'
import { isGone } from '../../lib/processes.mts'
import { plainText } from '../../lib/terminal.mts'
import { filesOf, isRunning, machineState } from '../../lib/vm.mts'
import { becomes } from '../../lib/wait.mts'
import { type Checkout, makeCheckout, type Outcome, run } from '../checkout.mts'
import { type IdleQemu, startIdleQemu } from '../idle-qemu.mts'
import { bootFiles, installerFiles, makeIso, noIso } from '../installer-iso.mts'
import { type LiveSystem, makeLiveSystem, noLiveSystem } from '../live-system.mts'
import { noSshd, type Sshd, startSshd } from '../sshd.mts'
import { giveDisk, type Machines, makeMachines, noMachines } from '../uefi-machine.mts'

const staging = [
  'generate-certs',
  'generate-kubeconfigs',
  'generate-encryption-config',
  'generate-nocloud-iso',
]

// The machines are shells in namespaces, started under the name of QEMU: real commands with real
// files, but without a disk and without NixOS. (The rehearsal does all of it with a real QEMU.)
describe('provision --iso', { skip: noLiveSystem || noIso || noMachines, timeout: 600_000 }, () => {
  let checkout: Checkout
  let system: LiveSystem
  let iso: string
  before(async () => {
    const settings = { QEMU_ACCEL: 'tcg', DISK_SIZE: 2, BOOT_TIMEOUT: 20 }
    checkout = await makeCheckout({ long: true, settings, keys: true })
    for (const step of staging) {
      const { exitCode, stderr } = await run(checkout, `bin/${step}.mts`)
      assert.equal(exitCode, 0, stderr)
    }
    iso = await makeIso(checkout.path('installer.iso'), installerFiles)
  })
  after(() => checkout.remove())

  const clusterOf = () => loadCluster({ root: checkout.root, env: {} })
  const alphaFiles = () => filesOf(clusterOf(), clusterOf().controlPlane)

  async function start(): Promise<void> {
    system = await makeLiveSystem()
    await mkdir(checkout.path('images'), { recursive: true })
  }
  async function cleanUp(): Promise<void> {
    await system.remove()
    for (const folder of ['images', 'run']) {
      await rm(checkout.path(folder), { recursive: true, force: true })
    }
  }

  function environment(faults = ''): Record<string, string> {
    const path = `${system.folder}${delimiter}${process.env.PATH}`
    return { ...system.env(faults), PATH: path, http_proxy: '', NIX_SSL_CERT_FILE: '' }
  }
  function provision(args: string[], options: { faults?: string; env?: object } = {}) {
    const env = { ...environment(options.faults), ...options.env }
    return run(checkout, 'bin/provision.mts', args, { env })
  }
  const install = (faults: string, ...args: string[]) =>
    provision(['--iso', '--iso-file', iso, ...args], { faults })

  /** "machine PID" of each machine that was powered on. */
  const machines = async () =>
    (await system.calls().catch(() => [])).filter((call) => call.startsWith('machine '))
  const disks = async () =>
    (await readdir(checkout.path('images')).catch(() => [])).filter((name) => !/\.log$/.test(name))

  async function assertNoMachine(): Promise<void> {
    for (const call of await machines()) {
      assert.ok(await becomes(() => isGone(Number(call.split(' ')[1])), 5), `${call} still runs`)
    }
  }

  /** What a failure must leave: its status, no machine, no disk. */
  async function assertUndone(outcome: Outcome, reason: RegExp, status = 1): Promise<void> {
    assert.match(outcome.stderr, reason)
    assert.equal(outcome.exitCode, status)
    assert.deepEqual(await disks(), [])
    await assertNoMachine()
  }

  describe('one of three nodes can be installed, and another one is', () => {
    let outcome: Outcome
    let log: string
    before(async () => {
      await start()
      await rm(checkout.path('cloud-init', 'sigma'), { recursive: true })
      await giveDisk(clusterOf(), clusterOf().node('gamma'))
      outcome = await install('')
      log = await readFile(alphaFiles().installLog, 'utf8')
    })
    after(async () => {
      await cleanUp()
      const { exitCode } = await run(checkout, 'bin/generate-nocloud-iso.mts', ['sigma'])
      assert.equal(exitCode, 0)
    })

    it('installs that one, and names what the other one lacks', async () => {
      assert.equal(outcome.exitCode, 1)
      assert.match(outcome.stderr, /provision: sigma has no staged configuration/)
      assert.match(outcome.stderr, /hint: +\.\/bin\/generate-nocloud-iso\.mts sigma/)
      const made = (await disks()).filter((name) => !name.startsWith('gamma'))
      assert.deepEqual(made.sort(), ['alpha.efivars.qcow2', 'alpha.qcow2'])
      // It holds keys.
      assert.equal((await stat(alphaFiles().disk)).mode & 0o777, 0o600)
      await assertNoMachine()
    })

    it('types what a person would, in this order', async () => {
      assert.deepEqual((await system.calls()).slice(1), [
        'sudo -i',
        'dmesg -n 1',
        'nixos-version ',
        'parted --script /dev/vda -- mklabel gpt mkpart ESP fat32 1MiB 513MiB set 1 esp on',
        'parted --script /dev/vda -- mkpart nixos ext4 513MiB 100%',
        'udevadm settle',
        'mkfs.fat -F 32 -n ESP /dev/vda1',
        'mkfs.ext4 -q -F -L nixos /dev/vda2',
        'mount /dev/vda2 /mnt',
        'mount -o umask=0077 /dev/vda1 /mnt/boot',
        'nixos-install --root /mnt --no-root-passwd',
        'findmnt -n -o FSTYPE -M /mnt/boot',
        'umount -R /mnt',
        'poweroff',
      ])
    })

    it('shows each step', () => {
      const steps = [...outcome.stderr.matchAll(/^• alpha · (.*) …$/gm)].map(([, step]) => step)
      assert.deepEqual(steps, [
        'boot the installer',
        'partition the disk',
        'copy the configuration',
        'nixos-install',
        'check the boot files',
        'power off',
      ])
      assert.match(outcome.stderr, /^✓ alpha \(\d/m)
    })

    it("copies the node's files, with their modes, as root's", async () => {
      const key = system.installed('alpha', 'var/lib/kubernetes/pki/ca-key.pem')
      assert.deepEqual(await readFile(key), await readFile(checkout.path('tls', 'ca-key.pem')))
      const { mode, uid } = await stat(key)
      assert.equal(mode & 0o777, 0o600)
      assert.equal(uid, process.getuid?.())
      for (const [path, expected] of [
        ['etc/nixos/configuration.nix', 0o644],
        ['etc/nixos', 0o755],
        ['var/lib/kubernetes/pki', 0o755],
        ['etc/ssh/ssh_host_ed25519_key', 0o600],
      ] as const) {
        assert.equal((await stat(system.installed('alpha', path))).mode & 0o777, expected, path)
      }
    })

    it('logs the whole dialogue, mode 0600, but no part of the files', async () => {
      for (const line of [
        '<<< Welcome to NixOS 26.05 (x86_64) - ttyS0 >>>',
        '── partition the disk',
        '# mkfs.ext4 -q -F -L nixos /dev/vda2',
        "copying path '/nix/store/0123456789-kubernetes' from 'https://cache.nixos.org'...",
        'installation finished!',
        'reboot: Power down',
      ]) {
        assert.ok(log.includes(`\n${line}\n`), `"${line}" is missing`)
      }
      assert.equal((await stat(alphaFiles().installLog)).mode & 0o777, 0o600)
      const pack = 'tar -czf - -C cloud-init/alpha/nixos . | base64 -w 0'
      const { stdout: archive } = await run(checkout, 'bash', ['-c', pack])
      assert.ok(archive.length > 10_000)
      for (let at = 0; at < archive.length; at += 100) {
        assert.ok(!log.includes(archive.slice(at, at + 40)))
      }
    })

    it('sets no proxy where there is none', async () => {
      assert.doesNotMatch(await system.environment(), /^(http_proxy|NIX_SSL_CERT_FILE)=./m)
    })
  })

  describe('behind a proxy, with a kernel that floods the console, in a terminal', () => {
    let screen: string
    let log: string
    before(async () => {
      await start()
      const proxy = {
        PROXY_HTTP: 'http://me:hunter2@10.0.2.2:3128',
        PROXY_NO: `git.example.com,${'long-name.'.repeat(120)}example.com`,
        PROXY_CA_FILE: checkout.path('tls', 'ca.pem'),
      }
      const args = ['gamma']
      await run(checkout, 'bin/generate-nocloud-iso.mts', args, { env: proxy })
      const env = { ...process.env, ...environment('noise'), ...proxy, TERM: 'xterm' }
      const program = checkout.path('bin/provision.mts')
      const terminal = spawnInTerminal(program, ['--iso-file', iso, 'gamma'], { env })
      const lines: string[] = []
      terminal.transcript.add = (text) => lines.push(text)
      const { exitCode } = await terminal.expectExit({ timeout: 60 })
      screen = plainText(lines.join(''))
      assert.equal(exitCode, 0, screen)
      log = await readFile(filesOf(clusterOf(), clusterOf().node('gamma')).installLog, 'utf8')
    })
    after(cleanUp)

    it('installs in spite of kernel messages in every line', () => {
      assert.match(log, /audit: type=1400/)
    })

    it('makes nixos-install use the proxy and its CA, without writing its password anywhere', async () => {
      const environment = await system.environment()
      assert.match(environment, /^http_proxy=http:\/\/me:hunter2@10\.0\.2\.2:3128$/m)
      assert.match(environment, /^https_proxy=http:\/\/me:hunter2@10\.0\.2\.2:3128$/m)
      assert.match(environment, /^no_proxy=localhost,.*10\.32\.0\.0\/24.*,git\.example\.com,/m)
      assert.match(environment, /^NIX_SSL_CERT_FILE=\/tmp\/ca\.pem$/m)
      assert.doesNotMatch(log + screen, /hunter2/)
    })

    it('shows what nixos-install is doing', () => {
      assert.match(screen, /⠋|⠙|⠹/)
      assert.match(screen, /gamma · nixos-install · (copying|building|installation)/)
    })
  })

  describe('something is wrong', () => {
    beforeEach(start)
    afterEach(cleanUp)

    it('names node, step, command and log; keeps the former disk; and does not try again', async () => {
      await giveDisk(clusterOf(), clusterOf().controlPlane)
      await writeFile(alphaFiles().disk, 'the former disk')
      const { stderr, exitCode } = await install('evaluation', '--force', 'alpha')
      assert.equal(exitCode, 1)
      assert.match(
        stderr,
        /^provision: alpha, nixos-install: a command failed \(exit status 1\)\n(.*\n)*.*The option `services\.kubelet' does not exist(.*\n)*.*worker\.nix'\n {2}command: nixos-install --root \/mnt --no-root-passwd\n {2}log: .*alpha-install\.log/m,
      )
      assert.equal((await machines()).length, 1)
      assert.ok(!(await system.calls()).includes('poweroff'))
      assert.equal(await readFile(alphaFiles().disk, 'utf8'), 'the former disk')
      assert.ok(!existsSync(alphaFiles().partialDisk))
    })

    it('does not take a system that would not boot for an installed one', async () => {
      const first = await install('alpha:esp sigma:loader gamma:entry', 'alpha', 'sigma', 'gamma')
      assert.match(first.stderr, /alpha, check the boot files: the ESP is not mounted/)
      assert.match(first.stderr, /sigma, check the boot files: there is no boot loader where UEFI/)
      assert.match(first.stderr, /gamma, check the boot files: the boot loader has no entry/)
      await assertUndone(first, /provision: alpha and sigma and gamma failed/)
      const second = await install(
        'alpha:kernel sigma:disk gamma:release',
        'alpha',
        'sigma',
        'gamma',
      )
      assert.match(
        second.stderr,
        /alpha, check the boot files: a kernel or initrd .* is not on the/,
      )
      assert.match(second.stderr, /✗ sigma · sigma, partition the disk: a command failed/)
      assert.match(second.stderr, /gamma, boot .*: the ISO is NixOS 25\.11\.1\.abc .* says 26\.05/)
      await assertUndone(second, /provision: alpha and sigma and gamma failed/)
      assert.ok(!(await system.calls()).includes('poweroff'))
      assert.equal((await machines()).length, 6)
    })

    it('sees a failed boot at once, and gives up on machines that are silent or stuck', async () => {
      const outcome = await provision(['--iso-file', iso], {
        faults: 'alpha:emergency sigma:silence gamma:stuck',
        env: { BOOT_TIMEOUT: '2', INSTALL_TIMEOUT: '4' },
      })
      for (const reason of [
        /alpha, boot the installer: the boot failed while waiting for the installer's prompt/,
        /sigma, boot the installer: timed out after 4\.0s waiting for the installer's prompt/,
        /gamma, nixos-install: timed out after [0-3]\.\ds waiting for the end of "nixos-install/,
      ]) {
        assert.match(outcome.stderr, reason)
      }
      await assertUndone(outcome, /provision: alpha and sigma and gamma failed/)
    })

    it('makes a second attempt when the network fails, and shows the last lines', async () => {
      const outcome = await install('network sigma:panic', 'alpha', 'sigma')
      assert.match(
        outcome.stderr,
        /alpha · second attempt, because: alpha, nixos-install: a command/,
      )
      assert.match(outcome.stderr, /sigma, boot the installer: the kernel panicked/)
      await assertUndone(outcome, /provision: alpha and sigma failed/)
      assert.equal((await machines()).length, 4)
      const log = await readFile(alphaFiles().installLog, 'utf8')
      assert.equal(log.match(/unable to download/g)?.length, 2)
    })

    it('refuses a node that has a disk, and does not touch the disk', async () => {
      await giveDisk(clusterOf(), clusterOf().controlPlane)
      const disk = await readFile(alphaFiles().disk)
      const { stderr, exitCode } = await install('', 'alpha')
      assert.equal(exitCode, 1)
      assert.match(stderr, /installed already: alpha\n.*start: .*\n.*--iso --force/)
      assert.ok(disk.equals(await readFile(alphaFiles().disk)))

      // Where none is named, there may be nothing left to do.
      for (const { name } of clusterOf().workers)
        await giveDisk(clusterOf(), clusterOf().node(name))
      const all = await install('')
      assert.equal(all.exitCode, 0, all.stderr)
      assert.equal(all.stderr, '! installed already: alpha, sigma, gamma\n')
      assert.deepEqual(await machines(), [])
    })

    it('refuses a missing ISO, one that is cut off, and one that is not an installer', async () => {
      const cutOff = await makeIso(checkout.path('short.iso'), installerFiles)
      await truncate(cutOff, 100_000)
      const files = Object.entries(installerFiles).filter(([path]) => !path.endsWith('bzImage'))
      await makeIso(checkout.path('hollow.iso'), Object.fromEntries(files))
      await makeIso(checkout.path('other.iso'), bootFiles)
      const cases: [args: string[], reason: RegExp][] = [
        [['--iso'], /there is no installer ISO: .*\n.*download-iso\.mts/],
        [['--iso-file', 'none.iso'], /there is no ISO .*none\.iso/],
        [['--iso-file', 'short.iso'], /short\.iso is cut off/],
        [['--iso-file', 'other.iso'], /other\.iso is not a NixOS installer/],
        [['--iso-file', 'hollow.iso'], /hollow\.iso is not .*: boot\/nix.*bzImage.* is missing/],
      ]
      const outcomes = await Promise.all(cases.map(([args]) => provision([...args, 'alpha'])))
      for (const [index, outcome] of outcomes.entries()) {
        await assertUndone(outcome, cases[index]?.[1] ?? /never/)
      }
    })

    it('refuses a wrong command line, missing firmware, missing QEMU, a full disk', async () => {
      const folder = join(system.folder, 'without-qemu')
      await mkdir(folder)
      for (const program of ['node', 'sh', 'bash', 'dirname', 'readlink']) {
        await symlink(which.sync(program), join(folder, program))
      }
      const firmware = { QEMU_FIRMWARE_CODE: '/no/CODE.fd', QEMU_FIRMWARE_VARS: '/no/VARS.fd' }
      const full = `mount -t tmpfs -o size=1m none images && exec ./bin/provision.mts --iso-file "$0"`
      const user = process.getuid?.() === 0 ? [] : ['--user', '--map-root-user']
      const env = environment()
      const [unknown, force, wait, noFirmware, noQemu, noSpace] = await Promise.all([
        provision(['--iso', 'omega']),
        provision(['--force', 'alpha']),
        provision(['--iso', '--wait', 'alpha']),
        provision(['--iso-file', iso, 'alpha'], { env: firmware }),
        provision(['--iso-file', iso], { env: { PATH: folder } }),
        run(checkout, 'unshare', ['--mount', ...user, 'sh', '-c', full, iso], { env }),
      ])
      await assertUndone(unknown, /there is no node "omega"\n.*alpha, sigma, gamma/, 2)
      await assertUndone(force, /--force is for --iso/, 2)
      await assertUndone(wait, /--wait and --disks-only cannot be combined with --iso/, 2)
      await assertUndone(noFirmware, /\/no\/CODE\.fd/)
      await assertUndone(noQemu, /qemu-system-\w+ is not installed/)
      const space = /not enough disk space for alpha, sigma, gamma: 6\.4 GB are needed, .* are free/
      await assertUndone(noSpace, space)
    })
  })

  describe('an installation is interrupted', () => {
    beforeEach(start)
    afterEach(cleanUp)

    /** Starts an installation and waits until nixos-install is stuck. */
    async function stuckInstallation(faults: string, ...args: string[]) {
      const program = checkout.path('bin/provision.mts')
      const child = spawn(program, ['--iso-file', iso, 'alpha', ...args], {
        env: { ...process.env, ...environment(faults) },
        stdio: ['ignore', 'ignore', 'pipe'],
      })
      let stderr = ''
      child.stderr.on('data', (data) => {
        stderr += data
      })
      const ended = once(child, 'close')
      const log = () => readFile(alphaFiles().installLog, 'utf8').catch(() => '')
      const stuck = await becomes(async () => /^stuck here$/m.test(await log()), 60)
      assert.ok(stuck, stderr)
      const state = await machineState(clusterOf(), clusterOf().controlPlane)
      assert.ok(state.state === 'installing')
      return {
        child,
        machine: state.pid,
        async end(): Promise<Outcome> {
          const [status, signal] = await ended
          return { stdout: '', stderr, exitCode: status ?? signal }
        },
      }
    }

    it('undoes everything on SIGTERM, on several nodes', async () => {
      const { child, end } = await stuckInstallation('stuck', 'gamma')
      child.kill('SIGTERM')
      await assertUndone(await end(), /^provision: interrupted by SIGTERM$/m, 143)
      assert.equal((await machines()).length, 2)
    })

    it('refuses a second one of the same node, and undoes the first on SIGINT', async () => {
      const { child, machine, end } = await stuckInstallation('stuck')
      const second = await install('', 'alpha')
      assert.equal(second.exitCode, 1)
      assert.match(second.stderr, /another process is installing alpha\n.*pid \d+/)
      assert.ok(!(await isGone(machine)))
      assert.ok(existsSync(alphaFiles().partialDisk))
      child.kill('SIGINT')
      await assertUndone(await end(), /^provision: interrupted by SIGINT$/m, 130)
    })

    it('leaves no machine and the former disk on kill -9; the next one replaces the disk, although its QEMU is killed once', async () => {
      await giveDisk(clusterOf(), clusterOf().controlPlane)
      await writeFile(alphaFiles().disk, 'the former disk')
      const first = await stuckInstallation('stuck', '--force')
      first.child.kill('SIGKILL')
      await first.end()
      await assertNoMachine()
      assert.equal(await readFile(alphaFiles().disk, 'utf8'), 'the former disk')

      await rm(alphaFiles().installLog)
      const second = await stuckInstallation('stuck-once', '--force')
      process.kill(second.machine, 'SIGKILL')
      const { exitCode, stderr } = await second.end()
      assert.equal(exitCode, 0, stderr)
      assert.match(
        stderr,
        /second attempt, because: alpha, nixos-install: ended by signal 9 while waiting/,
      )
      assert.notEqual((await readFile(alphaFiles().disk, 'latin1')).slice(0, 15), 'the former disk')
      await assertNoMachine()
    })
  })
})

describe('provision', { skip: noMachines, timeout: 300_000 }, () => {
  let machines: Machines
  before(async () => {
    machines = await makeMachines()
  })
  after(() => machines.remove())

  it('refuses nodes that are not installed, and starts none', async () => {
    const all = await run(machines.checkout, 'bin/provision.mts')
    assert.equal(all.exitCode, 1)
    assert.match(all.stderr, /not installed yet: alpha, sigma, gamma\n/)
    await giveDisk(machines.cluster, machines.cluster.node('gamma'))
    const named = await run(machines.checkout, 'bin/provision.mts', ['sigma', 'gamma'])
    assert.equal(named.exitCode, 1)
    assert.match(named.stderr, /not installed yet: sigma\n.*provision\.mts --iso sigma/)
    assert.equal(await isRunning(machines.cluster, machines.cluster.node('gamma')), false)
  })

  it('starts those that are installed, where none are named', async () => {
    const { stdout, stderr, exitCode } = await run(machines.checkout, 'bin/provision.mts')
    assert.equal(exitCode, 0, stderr)
    assert.match(
      stderr,
      /^! not installed yet: alpha, sigma; install: .*provision\.mts --iso alpha sigma$/m,
    )
    assert.match(stdout, /^gamma {2}started \(pid \d+\)\n$/)
    const stopped = await run(machines.checkout, 'bin/shutdown.mts', ['--now', 'gamma'])
    assert.equal(stopped.exitCode, 0, stopped.stderr)
  })

  it('names the holder of a port that is taken, and starts nothing', async () => {
    const { cluster, checkout } = machines
    const node = cluster.node('sigma')
    await giveDisk(cluster, node)
    const server = createServer().listen(node.sshPort, '127.0.0.1')
    await once(server, 'listening')
    try {
      const { stderr, exitCode } = await run(checkout, 'bin/provision.mts', ['sigma'])
      assert.equal(exitCode, 1)
      assert.match(stderr, new RegExp(`${node.sshPort}.*\\b${process.pid}\\b`, 's'))
      assert.equal(await isRunning(cluster, node), false)
    } finally {
      server.close()
    }
  })

  it('starts a machine; reports one that runs; and does not install over it', async () => {
    const { cluster, checkout } = machines
    const node = cluster.controlPlane
    await giveDisk(cluster, node)
    const first = await run(checkout, 'bin/provision.mts', ['alpha'])
    assert.equal(first.exitCode, 0, first.stderr)
    const pid = Number(first.stdout.match(/^alpha {2}started \(pid (\d+)\)\n$/)?.[1])
    assert.deepEqual(await machineState(cluster, node), { state: 'running', pid })

    const second = await run(checkout, 'bin/provision.mts', ['alpha'])
    assert.equal(second.exitCode, 0, second.stderr)
    assert.equal(second.stdout, `alpha  runs already (pid ${pid})\n`)

    if (noIso) return
    const iso = await makeIso(join(checkout.root, 'installer.iso'), installerFiles)
    const args = ['--iso-file', iso, '--force', 'alpha']
    const { stderr, exitCode } = await run(checkout, 'bin/provision.mts', args)
    assert.equal(exitCode, 1)
    assert.match(stderr, /alpha is running \(pid \d+\)\n.*shutdown\.mts alpha/)
    assert.ok(await isRunning(cluster, node))
    assert.ok(existsSync(filesOf(cluster, node).disk))
  })

  it('starts nothing after a restore that was killed halfway', async () => {
    const { checkout } = machines
    await mkdir(checkout.path('snapshots'), { recursive: true })
    await writeFile(checkout.path('snapshots', '.restoring'), 'before-restore-1\n')
    const { stderr, exitCode } = await run(checkout, 'bin/provision.mts', ['sigma'])
    assert.match(
      stderr,
      /a restore was interrupted halfway\n +hint: +make restore NAME=before-restore-1\n +if all disks are new: rm /,
    )
    assert.equal(exitCode, 1)
    await rm(checkout.path('snapshots'), { recursive: true })
  })

  it('does not touch a QEMU that is not ours', async () => {
    const { cluster } = machines
    const program = machines.host.qemu.path
    const other = spawn(program, ['-machine', 'none', '-nodefaults', '-display', 'none'])
    try {
      await run(machines.checkout, 'bin/shutdown.mts', [])
      assert.equal(await isRunning(cluster, cluster.controlPlane), false)
      assert.ok(!(await isGone(other.pid ?? 0)))
    } finally {
      other.kill('SIGKILL')
    }
  })
})

describe('provision --wait', { skip: noMachines || noSshd, timeout: 120_000 }, () => {
  let checkout: Checkout
  let qemu: IdleQemu
  let sshd: Sshd
  before(async () => {
    checkout = await makeCheckout({ settings: { BOOT_TIMEOUT: 20 }, keys: true })
    assert.equal((await run(checkout, 'bin/generate-certs.mts')).exitCode, 0)
    await mkdir(checkout.path('images'))
    await writeFile(checkout.path('images', 'sigma.qcow2'), 'the disk of sigma')
    qemu = await startIdleQemu(checkout, 'sigma')
    sshd = await startSshd(checkout, 'sigma')
  })
  after(async () => {
    await sshd.stop()
    await qemu.stop()
    await checkout.remove()
  })
  const wait = async (systemctl: string) => {
    await sshd.program('systemctl', `#!/bin/sh\n${systemctl}`)
    return run(checkout, 'bin/provision.mts', ['--wait', 'sigma'])
  }

  it('ends when systemd has started everything', async () => {
    const { stdout, stderr, exitCode } = await wait(`[ "$1" != is-system-running ] || echo running`)
    assert.equal(exitCode, 0, stderr)
    assert.equal(stdout, 'sigma  running\n')
    assert.match(stderr, /sigma · power on …\n(.*\n)*.*waiting for ssh …\n(.*\n)*.*for systemd …/)
  })

  it('names the units that failed on a machine that is up', async () => {
    const { stdout, exitCode } = await wait(`
case $1 in
  is-system-running) echo degraded; exit 1;;
  list-units) echo 'kubelet.service loaded failed failed The kubelet';;
esac
`)
    assert.equal(exitCode, 0)
    assert.equal(stdout, 'sigma  degraded: kubelet.service failed\n')
  })
})
