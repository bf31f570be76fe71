import assert from 'node:assert/strict'
import { mkdtemp, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, it } from 'node:test'
import { promisify } from 'node:util'
import { gzip } from 'node:zlib'
import { loadCluster } from '../../lib/cluster.mts'
import { describeError } from '../../lib/errors.mts'
import { type Dialogue, ExpectError, spawn } from '../../lib/installer/expect.mts'
import { install } from '../../lib/installer/installer.mts'
import { markers } from '../../lib/installer/installer-shell.mts'
import { type TarEntry, tar } from '../../lib/staging/tar.mts'
import { type LiveSystem, makeLiveSystem, noLiveSystem } from '../live-system.mts'

// A real shell with real files, in a mount namespace: what it lacks is a disk, and NixOS.
describe('the installer dialogue', { skip: noLiveSystem, timeout: 300_000 }, () => {
  let system: LiveSystem
  let folder: string
  let transcript: string
  let machine: Dialogue | undefined
  let steps: string[]
  let details: string[]
  beforeEach(async () => {
    system = await makeLiveSystem()
    folder = await mkdtemp(join(tmpdir(), 'installer-'))
    transcript = join(folder, 'alpha-install.log')
    steps = []
    details = []
  })
  afterEach(async () => {
    await machine?.close()
    await system.remove()
    await rm(folder, { recursive: true })
  })

  const key = `${'-----BEGIN RSA PRIVATE KEY-----\n'.repeat(500)}`
  const staged: TarEntry[] = [
    { path: 'etc/nixos/', mode: 0o755 },
    { path: 'etc/nixos/configuration.nix', mode: 0o644, data: Buffer.from('{ }\n') },
    { path: 'etc/nixos/proxy-ca.pem', mode: 0o644, data: Buffer.from('the CA of the proxy\n') },
    { path: 'var/lib/kubernetes/pki/ca-key.pem', mode: 0o600, data: Buffer.from(key) },
  ]

  /** Starts a machine and installs it. */
  async function installation(
    options: {
      faults?: string
      env?: Record<string, string>
      settings?: Record<string, string>
      signal?: AbortSignal
      onDetail?: (text: string) => void
    } = {},
  ): Promise<void> {
    const cluster = loadCluster({ env: { BOOT_TIMEOUT: '20', ...options.settings } })
    machine = spawn(system.qemu, [], {
      name: 'alpha',
      env: { ...process.env, ...system.env(options.faults), ...options.env },
      transcript,
      unshown: markers,
      alarms: [{ pattern: /Kernel panic.*\n/, reason: 'the kernel panicked' }],
    })
    await install(machine, {
      cluster,
      node: cluster.controlPlane,
      archive: await promisify(gzip)(tar(staged, 0)),
      row: {
        name: 'alpha',
        step: (text) => steps.push(text),
        detail: (text) => {
          details.push(text)
          options.onDetail?.(text)
        },
      },
      signal: options.signal,
    })
  }

  async function failure(options: Parameters<typeof installation>[0]): Promise<unknown> {
    return await installation(options).then(
      () => assert.fail('the installation succeeded'),
      (error: unknown) => error,
    )
  }

  it('types what a person would, in this order', async () => {
    await installation()
    const calls = await system.calls()
    assert.deepEqual(calls.slice(1), [
      'sudo -i',
      'dmesg -n 1',
      'nixos-version ',
      'parted --script /dev/vda -- mklabel gpt mkpart ESP fat32 1MiB 513MiB set 1 esp on mkpart nixos ext4 513MiB 100%',
      'udevadm settle',
      'mkfs.fat -F 32 -n ESP /dev/vda1',
      'mkfs.ext4 -q -F -L nixos /dev/vda2',
      'mount /dev/vda2 /mnt',
      'mount -o umask=0077 /dev/vda1 /mnt/boot',
      'nixos-install --root /mnt --no-root-passwd',
      'findmnt --noheadings --output FSTYPE --mountpoint /mnt/boot',
      'umount -R /mnt',
      'poweroff',
    ])
  })

  it('shows each step, and what nixos-install is at', async () => {
    await installation()
    assert.deepEqual(steps, [
      'boot the installer',
      'partition the disk',
      'copy the configuration',
      'nixos-install',
      'check the boot files',
      'power off',
    ])
    assert.ok(details.includes('100 %'))
    assert.ok(details.some((text) => text.startsWith("copying path '/nix/store/")))
    assert.equal(details.at(-1), 'installation finished!')
  })

  it("puts the node's files in place, with their modes, and leaves no copy behind", async () => {
    await installation()
    const path = system.installed('var/lib/kubernetes/pki/ca-key.pem')
    assert.equal(await readFile(path, 'utf8'), key)
    assert.equal((await stat(path)).mode & 0o777, 0o600)
    assert.equal(await readFile(system.installed('etc/nixos/configuration.nix'), 'utf8'), '{ }\n')
  })

  it('writes down all that was said, but nothing of the files', async () => {
    await installation()
    const text = await readFile(transcript, 'utf8')
    for (const line of [
      '<<< Welcome to NixOS 26.05 (x86_64) - ttyS0 >>>',
      '── partition the disk',
      '# mkfs.ext4 -q -F -L nixos /dev/vda2',
      "copying path '/nix/store/0123456789-kubernetes' from 'https://cache.nixos.org'...",
      'reboot: Power down',
    ]) {
      assert.ok(text.includes(`\n${line}\n`), `"${line}" is missing`)
    }
    assert.equal((await stat(transcript)).mode & 0o777, 0o600)
    const encoded = (await promisify(gzip)(tar(staged, 0))).toString('base64')
    for (let at = 0; at < encoded.length; at += 100) {
      assert.ok(!text.includes(encoded.slice(at, at + 40)))
    }
  })

  it('gets through while the kernel floods the console', async () => {
    await installation({ faults: 'noise' })
    assert.match(await readFile(transcript, 'utf8'), /audit: type=1400/)
  })

  it('has nixos-install use the proxy and its CA, and tells nobody its password', async () => {
    const ca = join(folder, 'ca.pem')
    await writeFile(ca, '-----BEGIN CERTIFICATE-----\n')
    await installation({
      settings: {
        PROXY_HTTP: 'http://me:hunter2@10.0.2.2:3128',
        PROXY_NO: 'git.example.com',
        PROXY_CA_FILE: ca,
      },
    })
    const environment = await system.environment()
    assert.match(environment, /^http_proxy=http:\/\/me:hunter2@10\.0\.2\.2:3128$/m)
    assert.match(environment, /^https_proxy=http:\/\/me:hunter2@10\.0\.2\.2:3128$/m)
    assert.match(environment, /^no_proxy=localhost,.*10\.32\.0\.0\/24.*,git\.example\.com$/m)
    assert.match(environment, /^NIX_SSL_CERT_FILE=\/tmp\/certificates\.pem$/m)
    assert.doesNotMatch(await readFile(transcript, 'utf8'), /hunter2/)
  })

  it('sets no proxy where there is none', async () => {
    await installation({ env: { http_proxy: '', NIX_SSL_CERT_FILE: '' } })
    assert.doesNotMatch(await system.environment(), /^(http_proxy|NIX_SSL_CERT_FILE)=./m)
  })

  for (const [faults, what, step, reason] of [
    [
      'disk',
      'no disk',
      'partition the disk',
      /status 1\n {2}\| Error: Could not stat .*\n {2}command: parted --script/,
    ],
    [
      'evaluation',
      'an error in the configuration',
      'nixos-install',
      /status 1\n(.*\n)*.*The option `services\.kubelet' does not exist(.*\n)*.*worker\.nix'\n {2}command: nixos-install --root \/mnt --no-root-passwd\n/,
    ],
    ['esp', 'an ESP that is not mounted', 'check the boot files', /the ESP is not mounted/],
    [
      'loader',
      'no boot loader',
      'check the boot files',
      /there is no boot loader where UEFI looks/,
    ],
    ['entry', 'no boot entry', 'check the boot files', /the boot loader has no entry/],
    ['kernel', 'no kernel', 'check the boot files', /a kernel or initrd .* is not on the ESP/],
  ] as const) {
    it(`fails with the step, the command and the log: ${what}`, async () => {
      const error = await failure({ faults })
      assert.match(describeError(error), reason)
      assert.ok(describeError(error).startsWith(`alpha, ${step}: `), describeError(error))
      assert.ok(describeError(error).includes(`\n  log:     ${transcript}`))
      assert.ok(!(await system.calls()).includes('poweroff'))
    })
  }

  it('refuses an ISO of another release', async () => {
    const error = await failure({ env: { LIVE_RELEASE: '25.11.1.abc (Xantusia)' } })
    assert.match(String(error), /the ISO is NixOS 25\.11\.1\.abc \(Xantusia\), .* says 26\.05/)
    assert.ok(!(await system.calls()).some((call) => call.startsWith('parted')))
  })

  it('sees a kernel panic at once', async () => {
    const started = performance.now()
    const error = await failure({ faults: 'panic', settings: { BOOT_TIMEOUT: '100' } })
    assert.ok(performance.now() - started < 20_000)
    assert.ok(error instanceof ExpectError && error.kind === 'alarm')
    assert.match(
      describeError(error),
      /alpha, boot the installer: the kernel panicked .*\n(.*\n)*.*no root/,
    )
  })

  it('gives up on a machine that shows no prompt, with the last it said', async () => {
    const error = await failure({ faults: 'silence', settings: { BOOT_TIMEOUT: '1' } })
    assert.match(
      describeError(error),
      /waited 2\.0s in vain for the installer's prompt\n(.*\n)*.*Linux version 6\.12\.0/,
    )
  })

  it('gives nixos-install what is left of INSTALL_TIMEOUT', async () => {
    const error = await failure({ faults: 'stuck', settings: { INSTALL_TIMEOUT: '3' } })
    assert.match(
      describeError(error),
      /alpha, nixos-install: waited [12]\.\ds in vain for the end of "nixos-install .*"\n(.*\n)*.*stuck here/,
    )
  })

  it('stops in the middle of nixos-install when told to', async () => {
    const controller = new AbortController()
    const reason = new Error('interrupted')
    const onDetail = (text: string) => text === 'stuck here' && controller.abort(reason)
    const error = await failure({ faults: 'stuck', signal: controller.signal, onDetail })
    assert.equal(error, reason)
  })

  it('fails at once when the machine is killed in the middle', async () => {
    const onDetail = (text: string) =>
      text === 'stuck here' && process.kill(machine?.pid ?? 0, 'SIGKILL')
    const error = await failure({ faults: 'stuck', onDetail })
    assert.ok(error instanceof ExpectError, describeError(error, true))
    assert.match(
      describeError(error),
      /alpha, nixos-install: ended by signal 9 while waiting for .*\n(.*\n)*.*stuck here/,
    )
  })
})
