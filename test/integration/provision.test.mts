import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync } from 'node:fs'
import { mkdir, readdir, readFile, rm, symlink, truncate, writeFile } from 'node:fs/promises'
import { createServer } from 'node:net'
import { delimiter, join } from 'node:path'
import { after, afterEach, before, beforeEach, describe, it } from 'node:test'
import { which } from 'zx/core'
import { loadCluster } from '../../lib/cluster.mts'
import { filesOf } from '../../lib/qemu/machine-files.mts'
import { isGone } from '../../lib/qemu/processes.mts'
import { isRunning, machineState } from '../../lib/qemu/vm.mts'
import { becomes } from '../../lib/wait.mts'
import { type Checkout, makeCheckout, type Outcome, run } from '../checkout.mts'
import { bootFiles, installerFiles, makeIso, noIso } from '../installer-iso.mts'
import { type LiveSystem, makeLiveSystem, noLiveSystem } from '../live-system.mts'
import { giveDisk, type Machines, makeMachines, noMachines } from '../uefi-machine.mts'

// The machines are shells in namespaces here, started under the name of QEMU: what is tested is
// what stands around the dialogue. (The rehearsal does all of it with the real QEMU.)
describe('provision --iso', { skip: noLiveSystem || noIso || noMachines, timeout: 600_000 }, () => {
  let checkout: Checkout
  let system: LiveSystem
  let iso: string
  before(async () => {
    const settings = { QEMU_ACCEL: 'tcg', DISK_SIZE: 2, BOOT_TIMEOUT: 20 }
    checkout = await makeCheckout({ long: true, settings })
    for (const step of [
      'generate-certs',
      'generate-kubeconfigs',
      'generate-encryption-config',
      'generate-nocloud-iso',
    ]) {
      assert.equal((await run(checkout, `bin/${step}.mts`)).exitCode, 0)
    }
    iso = await makeIso(join(checkout.root, 'installer.iso'), installerFiles)
  })
  beforeEach(async () => {
    system = await makeLiveSystem()
  })
  afterEach(async () => {
    await system.remove()
    for (const folder of ['images', 'run']) {
      await rm(checkout.path(folder), { recursive: true, force: true })
    }
  })
  after(() => checkout.remove())

  const clusterOf = () => loadCluster({ root: checkout.root, env: {} })
  const alphaFiles = () => filesOf(clusterOf(), clusterOf().controlPlane)

  function environment(faults = ''): Record<string, string> {
    const path = `${system.folder}${delimiter}${process.env.PATH}`
    return { ...system.env(faults), PATH: path }
  }

  function provision(args: string[], options: { faults?: string; env?: object } = {}) {
    const env = { ...environment(options.faults), ...options.env }
    return run(checkout, 'bin/provision.mts', args, { env })
  }

  const install = (faults?: string, ...args: string[]) =>
    provision(['--iso', '--iso-file', iso, 'alpha', ...args], faults ? { faults } : {})

  /** Machines that were switched on. */
  const machines = async () =>
    (await system.calls().catch(() => [])).filter((call) => call.startsWith('machine '))

  /** What a failure must leave: its status, no machine, no disk. */
  async function assertUndone(outcome: Outcome, reason: RegExp, status = 1): Promise<void> {
    assert.match(outcome.stderr, reason)
    assert.equal(outcome.exitCode, status)
    const images = await readdir(checkout.path('images')).catch(() => [])
    assert.deepEqual(
      images.filter((name) => !name.endsWith('.log')),
      [],
    )
    await assertNoMachine()
  }

  async function assertNoMachine(): Promise<void> {
    for (const call of await machines()) {
      assert.ok(await becomes(() => isGone(Number(call.split(' ')[1])), 5), `${call} runs still`)
    }
  }

  it('gives a node a disk, and says what it is at', async () => {
    const outcome = await install()
    assert.equal(outcome.exitCode, 0, outcome.stderr)
    assert.ok(existsSync(alphaFiles().disk))
    assert.ok(!existsSync(alphaFiles().partialDisk))
    assert.match(outcome.stderr, /alpha · nixos-install …\n(.*\n)*✓ alpha \(\d/)
    const text = await readFile(alphaFiles().installLog, 'utf8')
    assert.match(text, /Welcome to NixOS(.*\n)*.*installation finished!/)
    await assertNoMachine()
  })

  it('installs several nodes at once, and finishes those that can be', async () => {
    await rm(checkout.path('cloud-init', 'sigma'), { recursive: true })
    const outcome = await provision(['--iso', '--iso-file', iso, 'alpha', 'sigma', 'gamma'])
    assert.equal(outcome.exitCode, 1)
    assert.match(outcome.stderr, /provision: sigma has no staged configuration/)
    assert.match(outcome.stderr, /hint: +\.\/bin\/generate-nocloud-iso\.mts sigma/)
    const disks = (await readdir(checkout.path('images'))).filter((name) => /qcow2/.test(name))
    assert.deepEqual(disks.sort(), ['alpha.qcow2', 'gamma.qcow2'])
    assert.equal((await run(checkout, 'bin/generate-nocloud-iso.mts', ['sigma'])).exitCode, 0)
  })

  it('refuses a node that has a disk, and leaves the disk alone', async () => {
    await giveDisk(clusterOf(), clusterOf().controlPlane)
    const disk = await readFile(alphaFiles().disk)
    const outcome = await install()
    assert.equal(outcome.exitCode, 1)
    assert.match(outcome.stderr, /alpha has a disk already.*\n.*start: .*\n.*--iso --force/)
    assert.ok(disk.equals(await readFile(alphaFiles().disk)))
    assert.deepEqual(await machines(), [])
  })

  it('replaces a disk only when told to', async () => {
    await giveDisk(clusterOf(), clusterOf().controlPlane)
    await writeFile(alphaFiles().disk, 'the former disk')
    assert.equal((await install('', '--force')).exitCode, 0)
    assert.notEqual((await readFile(alphaFiles().disk, 'latin1')).slice(0, 15), 'the former disk')
  })

  it('keeps the former disk when its replacement fails', async () => {
    await giveDisk(clusterOf(), clusterOf().controlPlane)
    await writeFile(alphaFiles().disk, 'the former disk')
    assert.equal((await install('evaluation', '--force')).exitCode, 1)
    assert.equal(await readFile(alphaFiles().disk, 'utf8'), 'the former disk')
    assert.ok(!existsSync(alphaFiles().partialDisk))
  })

  it('needs an ISO', async () => {
    const none = await provision(['--iso', 'alpha'])
    await assertUndone(none, /there is no installer ISO: .*\n.*download-iso\.mts/)
    const missing = await provision(['--iso-file', join(checkout.root, 'none.iso'), 'alpha'])
    await assertUndone(missing, /there is no ISO .*none\.iso/)
  })

  it('refuses an ISO that is cut off, or no installer', async () => {
    const short = await makeIso(join(checkout.root, 'short.iso'), installerFiles)
    await truncate(short, 100_000)
    await assertUndone(await provision(['--iso-file', short]), /short\.iso is cut off/)
    const other = await makeIso(join(checkout.root, 'other.iso'), bootFiles)
    await assertUndone(await provision(['--iso-file', other]), /is no NixOS installer/)
  })

  it('refuses an ISO without the kernel that its boot menu names', async () => {
    const files = Object.entries(installerFiles).filter(([path]) => !path.endsWith('bzImage'))
    const hollow = await makeIso(join(checkout.root, 'hollow.iso'), Object.fromEntries(files))
    const outcome = await provision(['--iso-file', hollow, 'alpha'])
    await assertUndone(outcome, /hollow\.iso is no NixOS installer: boot\/nix.* is not there/)
  })

  it('says what is wrong with the command line, and does nothing', async () => {
    const unknown = await provision(['--iso', 'omega'])
    await assertUndone(unknown, /there is no node "omega"\n.*alpha, sigma, gamma/, 2)
    await assertUndone(await provision(['--force', 'alpha']), /--force is for --iso/, 2)
  })

  it('names the firmware that is missing', async () => {
    const env = {
      QEMU_FIRMWARE_CODE: '/nonexistent/CODE.fd',
      QEMU_FIRMWARE_VARS: '/nonexistent/VARS.fd',
    }
    const outcome = await provision(['--iso-file', iso, 'alpha'], { env })
    await assertUndone(outcome, /\/nonexistent\/CODE\.fd/)
  })

  it('names the QEMU that is missing', async () => {
    const folder = join(system.folder, 'without-qemu')
    await mkdir(folder)
    for (const program of ['node', 'sh', 'dirname', 'readlink']) {
      await symlink(which.sync(program), join(folder, program))
    }
    const outcome = await provision(['--iso-file', iso], { env: { PATH: folder } })
    await assertUndone(outcome, /qemu-system-\w+ is not installed/)
  })

  it('says how much room a disk needs before it begins', async () => {
    const script = `mount -t tmpfs -o size=1m none images && exec ./bin/provision.mts --iso-file "$0"`
    const user = process.getuid?.() === 0 ? [] : ['--user', '--map-root-user']
    await run(checkout, 'mkdir', ['-p', 'images'])
    const outcome = await run(checkout, 'unshare', ['--mount', ...user, 'sh', '-c', script, iso], {
      env: environment(),
    })
    await assertUndone(
      outcome,
      /not enough disk space: alpha, sigma, gamma need 6 GB, 0\.0 GB are free/,
    )
  })

  it('fails with the reason when nixos-install does, and does not try in vain again', async () => {
    const outcome = await install('evaluation')
    await assertUndone(
      outcome,
      /provision: alpha, nixos-install: a command ended with status 1\n(.*\n)*.*`services\.kubelet' does not exist(.*\n)*.*log: .*alpha-install\.log/,
    )
    assert.equal((await machines()).length, 1)
  })

  it('tries again once when the network fails', async () => {
    const outcome = await install('network')
    await assertUndone(outcome, /alpha · once more, as alpha, nixos-install: a command ended/)
    assert.equal((await machines()).length, 2)
    const log = await readFile(alphaFiles().installLog, 'utf8')
    assert.equal(log.match(/unable to download/g)?.length, 2)
  })

  it('does not take a system that would not start for an installed one', async () => {
    await assertUndone(await install('esp'), /alpha, check the boot files: the ESP is not mounted/)
    await assertUndone(await install('kernel'), /kernel or initrd .* is not on the ESP/)
  })

  /** Starts an installation and waits until nixos-install is stuck. */
  async function stuckInstallation(faults = 'stuck', ...others: string[]) {
    const child = spawn(
      checkout.path('bin/provision.mts'),
      ['--iso-file', iso, 'alpha', ...others],
      {
        env: { ...process.env, ...environment(faults) },
        stdio: ['ignore', 'ignore', 'pipe'],
      },
    )
    let stderr = ''
    child.stderr.on('data', (data) => {
      stderr += data
    })
    const ended = once(child, 'close')
    const stuck = await becomes(
      async () =>
        /^stuck here$/m.test(await readFile(alphaFiles().installLog, 'utf8').catch(() => '')),
      60,
    )
    assert.ok(stuck, stderr)
    const state = await machineState(clusterOf(), clusterOf().controlPlane)
    assert.ok(state.state === 'running' && state.mode === 'install')
    return {
      child,
      machine: state.pid,
      async end(): Promise<Outcome> {
        const [status, signal] = await ended
        return { stdout: '', stderr, exitCode: status ?? signal }
      },
    }
  }

  it('makes a second attempt when QEMU is killed in the middle', async () => {
    const { machine, end } = await stuckInstallation('stuck-once')
    process.kill(machine, 'SIGKILL')
    const outcome = await end()
    assert.equal(outcome.exitCode, 0, outcome.stderr)
    assert.match(outcome.stderr, /once more, as alpha, nixos-install: ended by signal 9/)
    assert.ok(existsSync(alphaFiles().disk))
    await assertNoMachine()
  })

  for (const [signal, status] of [
    ['SIGINT', 130],
    ['SIGTERM', 143],
  ] as const) {
    it(`undoes all of it on ${signal}`, async () => {
      const { child, end } = await stuckInstallation('stuck', 'gamma')
      child.kill(signal)
      const outcome = await end()
      await assertUndone(outcome, new RegExp(`^provision: interrupted by ${signal}$`, 'm'), status)
      assert.equal((await machines()).length, 2)
    })
  }

  it('leaves no machine even when it is killed itself, and begins anew the next time', async () => {
    const { child, end } = await stuckInstallation()
    child.kill('SIGKILL')
    await end()
    await assertNoMachine()
    assert.ok(!existsSync(alphaFiles().disk))
    assert.equal((await install()).exitCode, 0)
  })

  it('refuses a second installation of a node, and lets the first go on', async () => {
    const { child, machine, end } = await stuckInstallation()
    const second = await install()
    assert.equal(second.exitCode, 1)
    assert.match(second.stderr, /another process is installing alpha\n.*pid \d+/)
    assert.ok(!(await isGone(machine)))
    assert.ok(existsSync(alphaFiles().partialDisk))
    child.kill('SIGINT')
    await assertUndone(await end(), /interrupted/, 130)
  })
})

describe('provision', { skip: noMachines, timeout: 300_000 }, () => {
  let machines: Machines
  before(async () => {
    machines = await makeMachines()
  })
  after(() => machines.remove())

  it('refuses nodes that are not installed, and starts none', async () => {
    await giveDisk(machines.cluster, machines.cluster.node('gamma'))
    const { stderr, exitCode } = await run(machines.checkout, 'bin/provision.mts')
    assert.equal(exitCode, 1)
    assert.match(stderr, /alpha and sigma have no disks: .*\n.*provision\.mts --iso alpha sigma/)
    assert.equal(await isRunning(machines.cluster, machines.cluster.node('gamma')), false)
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

  it('starts a machine, and says of one that runs that it does', async () => {
    const { cluster, checkout } = machines
    const node = cluster.controlPlane
    await giveDisk(cluster, node)
    const first = await run(checkout, 'bin/provision.mts', ['alpha'])
    assert.equal(first.exitCode, 0, first.stderr)
    const pid = Number(first.stdout.match(/^alpha {2}started \(pid (\d+)\)\n$/)?.[1])
    assert.deepEqual(await machineState(cluster, node), { state: 'running', pid, mode: 'boot' })

    const second = await run(checkout, 'bin/provision.mts', ['alpha'])
    assert.equal(second.exitCode, 0, second.stderr)
    assert.equal(second.stdout, `alpha  runs already (pid ${pid})\n`)
  })

  it('does not install a machine that runs', { skip: noIso }, async () => {
    const { cluster, checkout } = machines
    await machines.start(cluster.controlPlane)
    const iso = await makeIso(join(checkout.root, 'installer.iso'), installerFiles)
    const args = ['--iso-file', iso, '--force', 'alpha']
    const { stderr, exitCode } = await run(checkout, 'bin/provision.mts', args)
    assert.equal(exitCode, 1)
    assert.match(stderr, /alpha is running \(pid \d+\)\n.*shutdown\.mts alpha/)
    assert.ok(await isRunning(cluster, cluster.controlPlane))
    assert.ok(existsSync(filesOf(cluster, cluster.controlPlane).disk))
  })

  it('leaves alone a QEMU that is not ours', async () => {
    const { cluster } = machines
    const [program = ''] = [machines.host.qemu.path]
    const other = spawn(program, ['-machine', 'none', '-nodefaults', '-display', 'none'])
    try {
      await run(machines.checkout, 'bin/provision.mts', ['alpha'])
      await run(machines.checkout, 'bin/shutdown.mts', [])
      assert.equal(await isRunning(cluster, cluster.controlPlane), false)
      assert.equal(other.exitCode, null)
      assert.ok(!(await isGone(other.pid ?? 0)))
    } finally {
      other.kill('SIGKILL')
    }
  })
})
