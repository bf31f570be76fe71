// reconfig with simulated machines: a real sshd each, with a file system of its own and a
// nixos-rebuild of the test. What NixOS does with a changed configuration is nixos.test.mts's.
import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import { readFile, writeFile } from 'node:fs/promises'
import { after, afterEach, before, beforeEach, describe, it } from 'node:test'
import { withLock } from '../../lib/lock.mts'
import { becomes } from '../../lib/wait.mts'
import { type FakeApiServer, nodeList } from '../api-server.mts'
import { type ChangeableCluster, startChangeableCluster } from '../changeable-cluster.mts'
import { type Checkout, type Outcome, run } from '../checkout.mts'
import type { HollowMachines } from '../hollow-machines.mts'
import { noQemu } from '../idle-qemu.mts'
import { noSshd } from '../sshd.mts'
import { missing } from '../tools.mts'

// A kubelet with the flag --broken does not start; a file "rebuild" says what else happens.
const nixosRebuild = `#!/bin/bash
echo "$NAME $*" >>"$CALLS"
if grep -qs -- --broken /etc/nixos/worker.nix; then touch "$STATE/broken-kubelet"; else rm -f "$STATE/broken-kubelet"; fi
echo 'building the system configuration...'
if [ -e "$STATE/rebuild" ]; then . "$STATE/rebuild"; fi
echo 'stopping the following units: kubelet.service'
echo 'restarting the following units: systemd-tmpfiles-resetup.service'
echo 'starting the following units: kubelet.service'
`
// Kills the session's sshd, an ancestor of the shell, as if the connection were cut.
const cut = `pid=$PPID
while [ "$(cat /proc/$pid/comm)" != sshd ]; do pid=$(cut -d' ' -f4 /proc/$pid/stat); done
kill -9 $pid
`

const skip = noSshd || noQemu || missing('kubectl')
// A skipped suite is counted nowhere; a skipped test is.
it('what this needs is there', { skip }, () => {})

describe('reconfig', { skip, timeout: 1_800_000 }, () => {
  let checkout: Checkout
  let machines: HollowMachines
  let api: FakeApiServer
  let whole: ChangeableCluster
  const names = ['alpha', 'sigma', 'gamma']

  before(async () => {
    whole = await startChangeableCluster({ BOOT_TIMEOUT: 20, WAIT_TIMEOUT: 60 })
    ;({ checkout, machines, api } = whole)
    for (const name of names) {
      await machines.set(name, 'made')
      await whole.program(name, 'nixos-rebuild', nixosRebuild)
    }
  })
  after(() => whole?.remove())

  let worker: string
  beforeEach(async () => {
    worker = await readFile(checkout.path('configs', 'worker.nix'), 'utf8')
    await writeFile(checkout.path('calls'), '')
  })
  // Each test starts with machines that have what is staged for them.
  afterEach(async () => {
    await writeFile(checkout.path('configs', 'worker.nix'), worker)
    await checkout.set({ KUBE_LOG_LEVEL: 2, PROXY_HTTP: '' })
    for (const name of names) {
      await machines.reset(name)
      await machines.set(name, 'made')
    }
    await whole.reset(...names)
  })
  before(() => whole.install(...names))

  const on = (name: string, command: string) => whole.on(name, command)
  const reconfig = (...args: string[]): Promise<Outcome> =>
    run(checkout, 'bin/reconfig.mts', args, { timeout: 300_000 })
  const calls = async () => (await readFile(checkout.path('calls'), 'utf8')).trim().split('\n')
  const inSpace = (name: string, path: string) => on(name, `cat ${path}`)
  /** Every file with owner, mode and content, as text to compare. */
  const stateOf = (name: string) =>
    on(
      name,
      'find /etc/nixos /var/lib/kubernetes /etc/ssh/ssh_host_ed25519_key* -type f -printf "%p %U:%G %m " -exec sha256sum {} \\; | sort',
    )
  const breakKubelet = () =>
    writeFile(checkout.path('configs', 'worker.nix'), `# --broken\n${worker}`)

  it('changes nothing where nothing differs', async () => {
    const { stdout, stderr, exitCode } = await reconfig()
    assert.equal(exitCode, 0, stderr)
    for (const name of names) assert.match(stdout, new RegExp(`^${name}: no file changes$`, 'm'))
    assert.deepEqual(await calls(), [''])
  })

  it('shows what changes as a unified diff, and with --dry-run changes nothing', async () => {
    await checkout.set({ KUBE_LOG_LEVEL: 4 })
    const before = await stateOf('sigma')
    const { stdout, stderr, exitCode } = await reconfig('--dry-run', '--node', 'sigma')
    assert.equal(exitCode, 0, stderr)
    assert.match(stdout, /^sigma: 1 file changes$/m)
    assert.match(
      stdout,
      /^--- \/etc\/nixos\/cluster\.json \(on the machine\)\n\+\+\+ \/etc\/nixos\/cluster\.json \(staged\)\n@@ /m,
    )
    assert.match(stdout, /^- {2}"logLevel": 2,\n\+ {2}"logLevel": 4,$/m)
    assert.equal(await stateOf('sigma'), before)
    assert.deepEqual(await calls(), [''])
  })

  it('applies a change to the control plane first, then to one worker after another', async () => {
    await checkout.set({ KUBE_LOG_LEVEL: 4 })
    const { stdout, stderr, exitCode } = await reconfig('--node', 'gamma,sigma,alpha')
    assert.equal(exitCode, 0, stderr)
    assert.deepEqual(await calls(), ['alpha switch', 'sigma switch', 'gamma switch'])
    assert.match(stdout, /^sigma: restarted kubelet, systemd-tmpfiles-resetup$/m)
    for (const name of names) {
      assert.match(await inSpace(name, '/etc/nixos/cluster.json'), /"logLevel": 4/)
    }
    const again = await reconfig()
    assert.match(again.stdout, /^sigma: no file changes$/m)
    assert.equal((await calls()).length, 3)
  })

  it('copies a renewed certificate to its machine alone, and keeps the owners of files', async () => {
    await on('sigma', 'chown 12345:12346 /var/lib/kubernetes/pki/sigma-key.pem')
    const others = await Promise.all(['alpha', 'gamma'].map(stateOf))
    const renewed = await run(checkout, 'bin/generate-certs.mts', ['--renew', 'sigma'])
    assert.equal(renewed.exitCode, 0, renewed.stderr)

    const { stdout, stderr, exitCode } = await reconfig()
    assert.equal(exitCode, 0, stderr)
    assert.match(stdout, /^sigma: 4 files change$/m)
    assert.match(
      stdout,
      /sigma\.pem changes: certificate of system:node:sigma, valid until \d{4}-\d\d-\d\d$/m,
    )
    assert.match(stdout, /sigma-key\.pem changes \(secret\)$/m)
    assert.match(stdout, /sigma\.kubeconfig changes \(secret\)$/m)
    assert.doesNotMatch(stdout + stderr, /BEGIN|client-key-data/)
    assert.deepEqual(await calls(), ['sigma switch'])
    assert.deepEqual(await Promise.all(['alpha', 'gamma'].map(stateOf)), others)
    const there = await stateOf('sigma')
    assert.match(there, /sigma-key\.pem 12345:12346 600 /)
    assert.match(there, /sigma\.pem 0:0 644 /)
    for (const file of ['sigma.pem', 'sigma-key.pem']) {
      const own = await readFile(checkout.path('tls', file), 'utf8')
      assert.equal(await inSpace('sigma', `/var/lib/kubernetes/pki/${file}`), own)
    }
    await whole.install('sigma')
  })

  it('removes what a machine no longer needs, and shows no password of a proxy', async () => {
    // Without a scheme, too.
    await checkout.set({ PROXY_HTTP: 'me:swordfish@proxy.test:3128' })
    await on('sigma', 'echo >/var/lib/kubernetes/kube-proxy.kubeconfig')
    const { stdout, stderr, exitCode } = await reconfig('--node', 'sigma')
    assert.equal(exitCode, 0, stderr)
    assert.match(stdout, /^\/var\/lib\/kubernetes\/kube-proxy\.kubeconfig is not needed any more$/m)
    assert.match(stdout, /…@proxy\.test:3128/)
    assert.doesNotMatch(stdout + stderr, /swordfish/)
    assert.doesNotMatch(await stateOf('sigma'), /kube-proxy/)
  })

  describe('touches no machine', () => {
    beforeEach(() => checkout.set({ KUBE_LOG_LEVEL: 4 }))
    async function assertUntouched(args: string[], reason: RegExp, status = 1): Promise<void> {
      const before = await stateOf('alpha')
      const { stderr, exitCode } = await reconfig(...args)
      assert.match(stderr, reason)
      assert.equal(exitCode, status, stderr)
      assert.equal(await stateOf('alpha'), before)
      assert.deepEqual(await calls(), [''])
    }

    it('when one of them is down, which is named', async () => {
      await machines.stop('gamma')
      await assertUntouched(
        [],
        /not all machines can be changed, so none was\n.*gamma is not running/,
      )
      await checkout.set({ KUBE_LOG_LEVEL: 2 })
      await whole.start('gamma')
      await whole.install('gamma')
    })

    it('when one of them does not answer', async () => {
      await machines.sshd('sigma').stop()
      await assertUntouched([], /so none was\n.*sigma does not answer ssh/)
      await machines.stop('sigma')
      await checkout.set({ KUBE_LOG_LEVEL: 2 })
      await whole.start('sigma')
      await whole.install('sigma')
    })

    it('while another script is at work', async () => {
      await withLock(checkout.path('run', 'bootstrap.lock'), 'taking a snapshot', () =>
        assertUntouched([], /another process is taking a snapshot/),
      )
    })

    it('while the last change of a machine is still running', async () => {
      const held = 'mkdir -p /var/lib/reconfig; exec 9>/var/lib/reconfig/lock; flock 9'
      await on('gamma', `${held}; setsid --fork sleep 600 >/dev/null 2>&1; echo`)
      await assertUntouched([], /the last change on gamma is still running/)
      await on('gamma', 'fuser --kill /var/lib/reconfig/lock || true')
    })

    it('while an upgrade of one has not finished', async () => {
      await on('gamma', 'mkdir -p /var/lib/reconfig; touch /var/lib/reconfig/former-channel')
      await assertUntouched(
        [],
        /an upgrade of gamma has not finished\n.*hint: +make upgrade NAME=gamma/,
      )
    })

    it('with two modes at a time, or to restart it without a build', async () => {
      for (const mode of ['--restart', '--take-back']) {
        await assertUntouched(['--dry-run', mode], /only one of --dry-run, .* at a time/, 2)
      }
      const reason = /nothing was built on gamma.*\n.*hint: +.*--build --node gamma/
      await assertUntouched(['--restart', '--node', 'gamma'], reason)
    })

    it('that does not exist', () => assertUntouched(['--node', 'omega'], /no node "omega"/, 2))
  })

  describe('rolls a machine back to its previous configuration', () => {
    /** The files on sigma are those of before, and nothing is left to finish. */
    async function assertBack(change: () => Promise<Outcome>, reason: RegExp): Promise<string> {
      const before = await stateOf('sigma')
      const { stderr, exitCode } = await change()
      assert.match(stderr, reason)
      assert.equal(exitCode, 1, stderr)
      assert.equal(await stateOf('sigma'), before)
      assert.doesNotMatch(await on('sigma', 'ls /var/lib/reconfig'), /unfinished|back/)
      return stderr
    }

    it('when a service does not start, and does not touch the machines after it', async () => {
      await breakKubelet()
      const gamma = await stateOf('gamma')
      const stderr = await assertBack(
        () => reconfig('--timeout', '3'),
        /the change of sigma failed, and it was rolled back to its previous configuration/,
      )
      assert.match(stderr, /sigma is not healthy after 3 s/)
      assert.match(stderr, /not touched: gamma/)
      assert.match(stderr, /kubelet is activating/)
      assert.deepEqual(await calls(), ['sigma switch', 'sigma switch'])
      assert.equal(await stateOf('gamma'), gamma)
    })

    it('when NixOS refuses the configuration', async () => {
      await checkout.set({ KUBE_LOG_LEVEL: 4 })
      const again = checkout.path('state', 'sigma', 'rebuild')
      await writeFile(again, `rm "${again}"; echo 'error: no such option'; exit 1\n`)
      const stderr = await assertBack(
        () => reconfig('--node', 'sigma'),
        /rolled back to its previous configuration/,
      )
      assert.match(stderr, /nixos-rebuild switch failed on sigma \(exit status 1\)/)
      assert.match(stderr, /error: no such option/)
    })

    it('when the machine is restarted during the switch', async () => {
      await checkout.set({ KUBE_LOG_LEVEL: 4 })
      // In the namespace the boot id is a file of ours.
      const reset = `rm "${checkout.path('state', 'sigma', 'rebuild')}"; echo second >${whole.space('sigma')}/boot_id; kill -9 0`
      await writeFile(checkout.path('state', 'sigma', 'rebuild'), `${reset}\n`)
      const stderr = await assertBack(
        () => reconfig('--node', 'sigma'),
        /rolled back to its previous configuration/,
      )
      assert.match(stderr, /sigma was restarted during a change/)
    })

    it('never, if the switch was confirmed while the machine prepared to', async () => {
      await checkout.set({ KUBE_LOG_LEVEL: 4 })
      await whole.program('sigma', 'nix-env', '#!/bin/sh\necho "$NAME nix-env $*" >>"$CALLS"\n')
      const program = (await on('sigma', 'command -v systemd-run')).trim()
      // The timer of the undo is armed after the confirmation, and expires at once.
      await on(
        'sigma',
        `mv ${program} ${program}.former; cat >${program} <<'END'
#!/bin/bash
[ "$1" = --unit=reconfig-undo ] || exec "$0.former" "$@"
rm /var/lib/reconfig/guarded
while [[ $1 == --* ]]; do shift; done
"$@"
END
        chmod +x ${program}`,
      )
      const { stderr, exitCode } = await reconfig('--node', 'sigma')
      await on('sigma', `mv ${program}.former ${program}`)
      assert.equal(exitCode, 0, stderr)
      assert.deepEqual(await calls(), ['sigma switch'])
    })

    it('when it can no longer be reached: the machine does it itself', async () => {
      await checkout.set({ KUBE_LOG_LEVEL: 4 })
      // No session can be opened from the switch on, until the former system is switched to.
      const cutOff = `${whole.space('sigma')}/unreachable`
      const again = checkout.path('state', 'sigma', 'rebuild')
      await writeFile(again, `rm "${again}"; touch ${cutOff}\n`)
      await machines.set('sigma', 'short-timers')
      await whole.program('sigma', 'nix-env', '#!/bin/sh\necho "$NAME nix-env $*" >>"$CALLS"\n')
      const former = '/run/former-system'
      await on(
        'sigma',
        `mkdir -p ${former}/bin; ln -sfn ${former} /run/current-system
        printf '#!/bin/sh\\nrm -f ${cutOff}\\n' >${former}/bin/switch-to-configuration
        chmod +x ${former}/bin/switch-to-configuration`,
      )
      const stderr = await assertBack(
        () => reconfig('--node', 'sigma'),
        /rolled back to its previous configuration/,
      )
      assert.match(stderr, /sigma could not be reached after the switch and undid it/)
      assert.deepEqual(await calls(), [
        'sigma switch',
        `sigma nix-env --profile /nix/var/nix/profiles/system --set ${former}`,
        'sigma switch',
      ])
    })

    for (const [what, end] of [
      ['a pre-switch check', 'echo "Pre-switch check \'switchInhibitors\' failed"; exit 1'],
      ['one with any status', 'echo "Pre-switch check \'switchInhibitors\' failed"; exit 4'],
      ['another init', 'exit 100'],
    ] as const) {
      it(`when NixOS demands a restart because of ${what}, and says how to do it`, async () => {
        await checkout.set({ KUBE_LOG_LEVEL: 4 })
        const again = checkout.path('state', 'sigma', 'rebuild')
        await writeFile(again, `rm "${again}"; ${end}\n`)
        const stderr = await assertBack(
          () => reconfig('--node', 'sigma'),
          /rolled back to its previous configuration/,
        )
        assert.match(stderr, /this change of sigma needs a restart/)
        assert.match(stderr, /reconfig\.mts --node sigma --push-only$/m)
        assert.match(stderr, /nixos-rebuild boot && reboot/)
      })
    }

    it('when the node is not Ready with the new one', async () => {
      await checkout.set({ KUBE_LOG_LEVEL: 4 })
      const lost = async () => {
        const body = (ready: boolean) => nodeList({ sigma: { ready }, gamma: { ready: true } })
        const switched = becomes(async () => (await calls())[0] === 'sigma switch', 60)
        const outcome = reconfig('--node', 'sigma', '--timeout', '3')
        await switched
        api.answers['/api/v1/nodes'] = { body: body(false) }
        const done = await outcome
        api.answers['/api/v1/nodes'] = { body: body(true) }
        return done
      }
      const stderr = await assertBack(
        lost,
        /the change of sigma failed, and it was rolled back to its previous configuration/,
      )
      assert.match(stderr, /sigma is not Ready after 3 s/)
    })
  })

  it('for a switch by hand copies the files, keeps the former ones, and puts them back', async () => {
    await checkout.set({ KUBE_LOG_LEVEL: 4 })
    const before = await stateOf('sigma')
    const pushed = await reconfig('--node', 'sigma', '--push-only')
    assert.equal(pushed.exitCode, 0, pushed.stderr)
    assert.match(pushed.stdout, /^\+ {2}"logLevel": 4,$/m)
    assert.match(await inSpace('sigma', '/etc/nixos/cluster.json'), /"logLevel": 4/)

    const back = await reconfig('--node', 'sigma', '--take-back')
    assert.equal(back.exitCode, 0, back.stderr)
    assert.equal(await stateOf('sigma'), before)
    assert.deepEqual(await calls(), [''])
    const again = await reconfig('--dry-run', '--node', 'sigma')
    assert.match(again.stdout, /^sigma: 1 file changes$/m)
  })

  it('checks and finishes a switch that was made by hand', async () => {
    await checkout.set({ KUBE_LOG_LEVEL: 4 })
    await reconfig('--node', 'sigma', '--push-only')
    await on('sigma', 'nixos-rebuild switch')
    const { stdout, stderr, exitCode } = await reconfig('--node', 'sigma')
    assert.equal(exitCode, 0, stderr)
    assert.match(stdout, /sigma: no file changes; the last change did not finish/)
    assert.match((await reconfig('--node', 'sigma')).stdout, /^sigma: no file changes$/m)
  })

  it('finds the restarted units in lines with the prefix of a journal', async () => {
    await checkout.set({ KUBE_LOG_LEVEL: 4 })
    await writeFile(
      checkout.path('state', 'sigma', 'rebuild'),
      `echo 'NOT restarting the following units: sshd.service'
      echo 'Nov 25 sigma nixos[1]: restarting the following units: containerd.service'; exit 0\n`,
    )
    const { stdout, stderr } = await reconfig('--node', 'sigma')
    assert.match(stdout, /^sigma: restarted containerd$/m, stderr)
  })

  it('waits for a unit that is between two attempts to start', async () => {
    await checkout.set({ KUBE_LOG_LEVEL: 4 })
    await writeFile(
      checkout.path('state', 'sigma', 'rebuild'),
      'echo "warning: the following units failed: kubelet.service"; exit 4\n',
    )
    const { stderr, exitCode } = await reconfig('--node', 'sigma')
    assert.equal(exitCode, 0, stderr)
    assert.match(await inSpace('sigma', '/etc/nixos/cluster.json'), /"logLevel": 4/)
  })

  describe('a push arrives as a whole or not at all', () => {
    beforeEach(() => checkout.set({ KUBE_LOG_LEVEL: 4 }))
    async function assertNothingPushed(reason: RegExp): Promise<void> {
      const before = await stateOf('sigma')
      const { stderr, exitCode } = await reconfig('--node', 'sigma')
      assert.match(stderr, /the configuration did not get to sigma; nothing was changed there/)
      assert.match(stderr, reason)
      assert.equal(exitCode, 1)
      assert.equal(await stateOf('sigma'), before)
      assert.deepEqual(await calls(), [''])
      const left = await on('sigma', 'ls /var/lib/reconfig')
      assert.doesNotMatch(left, /^(new|archive|back)$/m)
    }
    const program = (name: string, text: string) => machines.sshd('sigma').program(name, text)
    afterEach(async () => {
      await program('tar', '#!/bin/sh\nexec /bin/tar "$@"\n')
      await program('comm', '#!/bin/sh\nexec /usr/bin/comm "$@"\n')
    })

    it('when the connection is cut before all of it has come', async () => {
      await program('tar', `#!/bin/bash\n${cut}sleep 1\nexit 1\n`)
      await assertNothingPushed(/sigma does not answer ssh/)
    })

    it('when the connection is cut while the files are moved to their places', async () => {
      const once = checkout.path('state', 'sigma', 'cut')
      const text = `#!/bin/bash\nif [ ! -e ${once} ]; then touch ${once}; ${cut}sleep 1; fi\nexec /usr/bin/comm "$@"\n`
      await program('comm', text)
      await assertNothingPushed(/sigma does not answer ssh/)
    })

    it('when the disk of the machine is full', async () => {
      await on(
        'sigma',
        'mkdir -p /var/lib/reconfig; mount -t tmpfs -o size=40k none /var/lib/reconfig',
      )
      await assertNothingPushed(/No space left on device/)
      await on('sigma', 'umount /var/lib/reconfig')
    })
  })

  it('leaves an interrupted switch running, and finishes it the next time', async () => {
    await checkout.set({ KUBE_LOG_LEVEL: 4 })
    const go = checkout.path('state', 'sigma', 'go')
    await writeFile(
      checkout.path('state', 'sigma', 'rebuild'),
      `until [ -e ${go} ]; do sleep 0.1; done\n`,
    )
    const child = execFile(checkout.path('bin', 'reconfig.mts'), ['--node', 'sigma'])
    let said = ''
    child.stderr?.on('data', (text) => {
      said += text
    })
    const ended = new Promise<number | null>((resolve) => child.once('exit', resolve))
    assert.ok(await becomes(async () => (await calls())[0] === 'sigma switch', 120), said)
    child.kill('SIGINT')
    assert.equal(await ended, 130)
    assert.match(said, /interrupted: the change on sigma continues in the background/)
    await machines.set('sigma', 'go')
    const busy = 'flock --nonblock /var/lib/reconfig/lock true || echo busy'
    assert.ok(await becomes(async () => (await on('sigma', busy)) === '', 30))

    const { stdout, stderr, exitCode } = await reconfig('--node', 'sigma')
    assert.equal(exitCode, 0, stderr)
    assert.match(stdout, /sigma: no file changes; the last change did not finish and is made again/)
    assert.deepEqual(await calls(), ['sigma switch', 'sigma switch'])
    assert.match((await reconfig('--node', 'sigma')).stdout, /^sigma: no file changes$/m)
  })
})
