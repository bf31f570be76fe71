// rolling-upgrade with simulated machines: a real sshd each, with a file system of its own, and
// nixos-rebuild, nix-channel and kubectl of the test, which note the order of their calls.
import assert from 'node:assert/strict'
import { copyFile, readFile, rm, writeFile } from 'node:fs/promises'
import { after, afterEach, before, beforeEach, describe, it } from 'node:test'
import { which } from 'zx/core'
import { type FakeApiServer, nodeList } from '../api-server.mts'
import { type ChangeableCluster, startChangeableCluster } from '../changeable-cluster.mts'
import { type Checkout, type Outcome, run } from '../checkout.mts'
import { FakePrograms } from '../fake-programs.mts'
import type { HollowMachines } from '../hollow-machines.mts'
import { noQemu } from '../idle-qemu.mts'
import { noSshd } from '../sshd.mts'
import { missing } from '../tools.mts'

// A system is a folder with its version and the units with their programs. The one to be built is
// described in the file "next": NixOS, Kubernetes.
const nixosRebuild = `#!/bin/bash -e
echo "$NAME nixos-rebuild $*" >>"$CALLS"
if [ -e "$STATE/fails-$1" ]; then echo 'error: no such attribute'; exit 1; fi
read -r nixos kubernetes <"$STATE/next"
system=$STATE/system-$nixos-$kubernetes
case $1 in
  build)
    mkdir -p "$system/etc/systemd/system"
    echo "$nixos" >"$system/nixos-version"
    printf '#!/bin/sh\\necho Kubernetes %s\\n' "$kubernetes" >"$system/program"
    chmod +x "$system/program"
    for unit in kubelet kube-apiserver; do
      printf '[Service]\\nExecStart=%s --config=x \\\\\\n  --v=2\\n' "$system/program" >"$system/etc/systemd/system/$unit.service"
    done
    ln -sfn "$system" result;;
  boot) ln -sfn "$system" "$STATE/boots";;
  *) exit 1;;
esac
`
const nixChannel = `#!/bin/sh
echo "$NAME nix-channel $*" >>"$CALLS"
if [ "$1" = --list ]; then echo 'nixos https://channels.nixos.org/nixos-26.05'; fi
`
const systemctl = `#!/bin/sh
if [ "$1" != reboot ]; then exec "$HOLLOW" "$@"; fi
echo "$NAME reboot" >>"$CALLS"
if [ -e "$STATE/breaks" ]; then touch "$STATE/broken-kubelet"; fi
if [ ! -e "$STATE/boots-another" ]; then ln -sfn "$(readlink "$STATE/boots")" /run/current-system; fi
echo "boot $$" >"$SPACE/boot_id"
`
// There is no Nix on this computer.
const readlink = `#!/bin/sh
case $1 in /nix/*) echo channels-3-link;; *) exec /usr/bin/readlink "$@";; esac
`

const skip = noSshd || noQemu || missing('kubectl')
// A skipped suite is counted nowhere; a skipped test is.
it('what this needs is there', { skip }, () => {})

describe('rolling-upgrade', { skip, timeout: 1_800_000 }, () => {
  let checkout: Checkout
  let machines: HollowMachines
  let api: FakeApiServer
  let whole: ChangeableCluster
  const programs = new FakePrograms()
  const names = ['alpha', 'sigma', 'gamma']

  before(async () => {
    whole = await startChangeableCluster({ BOOT_TIMEOUT: 60 })
    ;({ checkout, machines, api } = whole)
    for (const name of names) {
      const bin = checkout.path('..', `sshd-${name}`, 'bin')
      await copyFile(`${bin}/systemctl`, `${bin}/systemctl-hollow`)
      const texts = {
        'nixos-rebuild': nixosRebuild,
        'nix-channel': nixChannel,
        systemctl: systemctl
          .replaceAll('$SPACE', whole.space(name))
          .replaceAll('$HOLLOW', `${bin}/systemctl-hollow`),
        readlink,
      }
      for (const [program, text] of Object.entries(texts)) {
        await whole.program(name, program, text)
      }
      // The system that runs at first, built as the others are.
      await next('26.05.1 v1.36.3', name)
      await whole.on(
        name,
        `mkdir /var/lib/first; cd /var/lib/first; nixos-rebuild build
        ln -sfn "$(readlink result)" /run/current-system`,
      )
    }
    programs.add(
      'kubectl',
      `case "$*" in
  'get node '*) cat "${checkout.path('cordoned')}" 2>/dev/null || echo '{"spec": {}}'; exit;;
  drain*|uncordon*) ;;
  *) exec ${await which('kubectl')} "$@";;
esac
echo "kubectl $*" | sed 's/ --.*//' >>"${checkout.path('calls')}"
if [ "$1" = drain ] && [ -e "${checkout.path('budget')}" ]; then
  echo "error when evicting pod: Cannot evict pod as it would violate the pod's disruption budget." >&2
  echo "error: unable to drain node \\"$2\\" due to error: [global timeout reached]" >&2; exit 1
fi`,
    )
  })
  after(async () => {
    programs.remove()
    await whole?.remove()
  })

  const upgrade = (...args: string[]): Promise<Outcome> =>
    run(checkout, 'bin/rolling-upgrade.mts', args, {
      env: { PATH: `${programs.path}:${process.env.PATH}`, NIXOS_VERSION: '26.11' },
      timeout: 300_000,
    })
  const next = (system: string, ...which: string[]) =>
    Promise.all(which.map((name) => writeFile(checkout.path('state', name, 'next'), `${system}\n`)))
  const apiVersion = (version: string) => {
    api.answers['/version'] = { body: JSON.stringify({ gitVersion: version }) }
  }
  const calls = async () =>
    (await readFile(checkout.path('calls'), 'utf8'))
      .trim()
      .split('\n')
      .filter((call) => !/nix-channel --(list|add)/.test(call))
  const stateOf = (name: string) =>
    whole.on(
      name,
      'cd /etc/nixos; sha256sum *; ls /var/lib/reconfig | grep -E "unfinished|former-channel|result|new|back" || true; readlink /run/current-system',
    )

  before(() => whole.install(...names))
  beforeEach(async () => {
    apiVersion('v1.36.3')
    await whole.reset(...names)
    await writeFile(checkout.path('calls'), '')
  })
  afterEach(async () => {
    await rm(checkout.path('budget'), { force: true })
    await checkout.set({ KUBE_LOG_LEVEL: 2 })
    for (const name of names) {
      for (const what of ['breaks', 'broken-kubelet', 'fails-build', 'boots-another']) {
        await machines.unset(name, what)
      }
    }
  })

  /** Also with a configuration that has changed: what was pushed is put back. */
  async function assertRefused(args: string[], reason: RegExp, status = 1): Promise<void> {
    await checkout.set({ KUBE_LOG_LEVEL: 4 })
    const before = await Promise.all(names.map(stateOf))
    const { stderr, exitCode } = await upgrade(...args)
    assert.match(stderr, reason)
    assert.equal(exitCode, status, stderr)
    assert.deepEqual(await Promise.all(names.map(stateOf)), before)
    assert.ok(!(await calls()).some((call) => / boot|reboot/.test(call)), String(await calls()))
  }

  it('asks for a node', async () => {
    await assertRefused([], /missing argument: NODE\|all/, 2)
    await assertRefused(['omega'], /there is no node "omega"/, 2)
  })

  it('refuses a kubelet that is newer than the API server, and goes back', async () => {
    await next('26.11.1 v1.37.0', 'sigma')
    await assertRefused(['sigma'], /its kubelet would be v1\.37\.0, newer than the API server/)
    assert.deepEqual(await calls(), [
      'sigma nix-channel --update nixos',
      'sigma nixos-rebuild build',
      'sigma nix-channel --rollback 3',
    ])
    const all = await readFile(checkout.path('calls'), 'utf8')
    assert.match(all, /--add https:\/\/channels\.nixos\.org\/nixos-26\.11 nixos\n/)
    assert.match(all, /--add https:\/\/channels\.nixos\.org\/nixos-26\.05 nixos\n.*--rollback 3/)
  })

  it('refuses a control plane that skips a minor version, or goes back to one', async () => {
    await next('26.11.1 v1.38.0', 'alpha')
    await assertRefused(['alpha'], /from v1\.36\.3 to v1\.38\.0 skips 1 minor version$/m)
    await next('26.11.1 v1.35.9', 'alpha')
    await assertRefused(['alpha'], /Kubernetes would go back from v1\.36\.3 to v1\.35\.9/)
  })

  it('refuses a control plane that is too new for a kubelet, which it names', async () => {
    await next('26.11.1 v1.37.0', 'alpha')
    const { body } = api.answers['/api/v1/nodes'] ?? { body: '' }
    const ready = { ready: true }
    const old = nodeList({ sigma: ready, gamma: ready }).replace(
      /v1\.36\.3(?!.*v1\.36\.3)/,
      'v1.33.5',
    )
    api.answers['/api/v1/nodes'] = { body: old }
    await assertRefused(['alpha'], /with v1\.37\.0 the API server is too new for gamma v1\.33\.5$/m)
    api.answers['/api/v1/nodes'] = { body }
  })

  it('leaves a machine that cannot build the new system as it was', async () => {
    await machines.set('alpha', 'fails-build')
    await assertRefused(
      ['all'],
      /the build of NixOS 26\.11 failed on alpha[\s\S]*not touched: sigma, gamma/,
    )
    assert.match(await readFile(checkout.path('calls'), 'utf8'), /alpha nix-channel --rollback 3/)
  })

  it('leaves the pods that a disruption budget keeps, and the node schedulable', async () => {
    await next('26.05.2 v1.36.4', 'sigma')
    apiVersion('v1.36.4')
    await writeFile(checkout.path('budget'), '')
    await assertRefused(['sigma'], /a disruption budget keeps pods on sigma/)
    assert.deepEqual((await calls()).slice(2), [
      'kubectl drain sigma',
      'sigma nix-channel --rollback 3',
      'kubectl uncordon sigma',
    ])
  })

  it('upgrades the control plane, then one worker after another without its pods, by a restart', async () => {
    await next('26.11.1 v1.37.0', 'alpha')
    // The API server of the test stays the old one.
    await next('26.11.1 v1.36.3', 'sigma', 'gamma')
    const { stdout, stderr, exitCode } = await upgrade('all')
    assert.equal(exitCode, 0, stderr)
    const built = (name: string) => [
      `${name} nix-channel --update nixos`,
      `${name} nixos-rebuild build`,
    ]
    const restarted = (name: string) => [`${name} nixos-rebuild boot`, `${name} reboot`]
    const drained = (name: string) => [
      ...built(name),
      `kubectl drain ${name}`,
      ...restarted(name),
      `kubectl uncordon ${name}`,
    ]
    const all = [...built('alpha'), ...restarted('alpha'), ...drained('sigma'), ...drained('gamma')]
    assert.deepEqual(await calls(), all)
    assert.match(
      stdout,
      /^alpha: NixOS 26\.05\.1, Kubernetes v1\.36\.3 → NixOS 26\.11\.1, Kubernetes v1\.37\.0$/m,
    )
    assert.match(stdout, /^gamma: .* → NixOS 26\.11\.1, Kubernetes v1\.36\.3$/m)
    for (const name of names) assert.doesNotMatch(await stateOf(name), /unfinished|channel|result/)
  })

  it('neither drains nor restarts a node that has the release already', async () => {
    const { stdout, stderr, exitCode } = await upgrade('sigma')
    assert.equal(exitCode, 0, stderr)
    assert.match(stdout, /^sigma: has NixOS 26\.11\.1, Kubernetes v1\.36\.3 already$/m)
    assert.deepEqual(await calls(), [
      'sigma nix-channel --update nixos',
      'sigma nixos-rebuild build',
    ])
    assert.doesNotMatch(await stateOf('sigma'), /unfinished|channel|result/)
  })

  it('leaves a node cordoned that was cordoned before', async () => {
    await next('26.11.15 v1.36.3', 'gamma')
    await writeFile(checkout.path('cordoned'), '{"spec": {"unschedulable": true}}')
    const { stderr, exitCode } = await upgrade('gamma')
    await rm(checkout.path('cordoned'))
    assert.equal(exitCode, 0, stderr)
    assert.deepEqual((await calls()).slice(-3), [
      'kubectl drain gamma',
      'gamma nixos-rebuild boot',
      'gamma reboot',
    ])
  })

  it('stops at the first node that does not come back, which stays cordoned', async () => {
    await next('26.11.2 v1.37.1', 'alpha')
    await next('26.11.2 v1.36.3', 'sigma')
    await machines.set('sigma', 'breaks')
    const { stderr, exitCode } = await upgrade('all', '--timeout', '3')
    assert.equal(exitCode, 1)
    assert.match(stderr, /not touched: gamma/)
    assert.match(stderr, /sigma has not come back from its upgrade and stays cordoned/)
    assert.match(stderr, /sigma is not healthy after 3 s/)
    // The system that ran before, by its path, and what else an upgrade has changed.
    assert.match(
      stderr,
      /former-channel\)\n.*nix-env .* --set \$former\n.*switch-to-configuration boot/,
    )
    assert.match(stderr, /--take-back --node sigma\n.*kubectl uncordon sigma && .*rm .*\/cordoned/)
    assert.deepEqual((await calls()).slice(-3), [
      'kubectl drain sigma',
      'sigma nixos-rebuild boot',
      'sigma reboot',
    ])

    // Repaired, the same command finishes it.
    await machines.unset('sigma', 'breaks')
    await machines.unset('sigma', 'broken-kubelet')
    await whole.on('sigma', 'touch /var/lib/reconfig/former-channel')
    const again = await upgrade('sigma')
    assert.equal(again.exitCode, 0, again.stderr)
    assert.equal((await calls()).at(-1), 'kubectl uncordon sigma')
  })

  it('notices a machine that starts another system than the new one', async () => {
    await next('26.11.3 v1.36.3', 'gamma')
    await machines.set('gamma', 'boots-another')
    const { stderr, exitCode } = await upgrade('gamma')
    assert.equal(exitCode, 1)
    assert.match(stderr, /gamma has booted another system than the one that was built/)
  })

  it('does not change a machine whose last change is still running', async () => {
    const held = 'exec 9>/var/lib/reconfig/lock; flock 9'
    await whole.on(
      'gamma',
      `mkdir -p /var/lib/reconfig; ${held}; setsid --fork sleep 600 >/dev/null 2>&1; echo`,
    )
    await assertRefused(['gamma'], /the last change on gamma is still running/)
    await whole.on('gamma', 'fuser --kill /var/lib/reconfig/lock || true')
  })

  it('leaves it to reconfig to finish what that has begun', async () => {
    await whole.on('gamma', 'mkdir -p /var/lib/reconfig; touch /var/lib/reconfig/unfinished')
    await assertRefused(['gamma'], /gamma has not finished\n.*reconfig\.mts --node gamma/)
  })

  it('changes no machine while one of them is down', async () => {
    await machines.sshd('gamma').stop()
    await machines.stop('gamma')
    const { stderr, exitCode } = await upgrade('all')
    assert.match(stderr, /gamma is not running, so no machine was upgraded/)
    assert.equal(exitCode, 1)
    assert.deepEqual(await calls(), [''])
    await machines.start('gamma')
  })
})
