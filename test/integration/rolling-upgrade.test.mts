// rolling-upgrade against machines in name only: a real sshd each, in a file system of its own, with
// nixos-rebuild, nix-channel and kubectl of the test, which note in what order they are called.
import assert from 'node:assert/strict'
import { copyFile, readFile, rm, writeFile } from 'node:fs/promises'
import { after, afterEach, before, beforeEach, describe, it } from 'node:test'
import type { Cluster } from '../../lib/cluster.mts'
import { Machine } from '../../lib/machine/machine.mts'
import { stagedArchive } from '../../lib/staging/staging.mts'
import { type ChangeableCluster, startChangeableCluster } from '../changeable-cluster.mts'
import { type Checkout, type Outcome, run } from '../checkout.mts'
import { FakePrograms } from '../fake-programs.mts'
import type { HollowMachines } from '../hollow-machines.mts'
import { noQemu } from '../idle-qemu.mts'
import { noSshd } from '../sshd.mts'

// A system is a folder: its kernel, its version, and the units with their programs. The one to be
// built is described in the file "next": NixOS, Kubernetes, kernel.
const nixosRebuild = `#!/bin/bash -e
echo "$NAME nixos-rebuild $*" >>"$CALLS"
if [ -e "$STATE/fails-$1" ]; then echo 'error: no such attribute'; exit 1; fi
case $1 in
  build)
    read -r nixos kubernetes kernel <"$STATE/next"
    system=$STATE/system-$nixos
    mkdir -p "$system/etc/systemd/system"
    echo "$nixos" >"$system/nixos-version"
    echo "$kernel" >"$STATE/$kernel"
    ln -sfn "$STATE/$kernel" "$system/kernel"
    printf '#!/bin/sh\\necho Kubernetes %s\\n' "$kubernetes" >"$system/program"
    chmod +x "$system/program"
    for unit in kubelet kube-apiserver; do
      printf '[Service]\\nExecStart=%s --config=x \\\\\\n  --v=2\\n' "$system/program" >"$system/etc/systemd/system/$unit.service"
    done
    ln -sfn "$system" result;;
  switch)
    if [ -e "$STATE/breaks" ]; then touch "$STATE/broken-kubelet"; fi
    ln -sfn "$(readlink /var/lib/reconfig/result)" /run/current-system
    echo 'restarting the following units: kubelet.service';;
esac
`
const nixChannel = `#!/bin/sh
echo "$NAME nix-channel $*" >>"$CALLS"
if [ "$1" = --list ]; then echo 'nixos https://channels.nixos.org/nixos-26.05'; fi
`
const systemctl = `#!/bin/sh
if [ "$1" != reboot ]; then exec "$HOLLOW" "$@"; fi
echo "$NAME reboot" >>"$CALLS"
echo "boot $$" >"$SPACE/boot_id"
ln -sfn "$(readlink /run/current-system)" /run/booted-system
`
// Of Nix on this computer nothing is asked.
const readlink = `#!/bin/sh
case $1 in /nix/*) echo channels-3-link;; *) exec /usr/bin/readlink "$@";; esac
`

const skip = noSshd || noQemu
// A skipped suite is counted nowhere; a skipped test is.
it('what this needs is there', { skip }, () => {})

describe('rolling-upgrade', { skip, timeout: 1_800_000 }, () => {
  let checkout: Checkout
  let cluster: Cluster
  let machines: HollowMachines
  let whole: ChangeableCluster
  const programs = new FakePrograms()
  const names = ['alpha', 'sigma', 'gamma']

  before(async () => {
    whole = await startChangeableCluster({ BOOT_TIMEOUT: 60 })
    ;({ checkout, cluster, machines } = whole)
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
      // What runs at first: a system that was built as the others are.
      await writeFile(checkout.path('state', name, 'next'), '26.05.1 v1.36.3 kernel-6.12\n')
      await on(name).succeed(`mkdir /var/lib/run /var/lib/first
        mount --bind /var/lib/run /run
        cd /var/lib/first; nixos-rebuild build
        ln -sfn "$(readlink result)" /run/current-system
        ln -sfn "$(readlink result)" /run/booted-system`)
    }
    programs.add(
      'kubectl',
      `case "$*" in
  *--raw*) echo '{"gitVersion": "'"$(cat "${checkout.path('version')}")"'"}'; exit;;
  get*) echo '{"spec": {}}'; exit;;
esac
echo "kubectl $*" | sed 's/ --.*//' >>"${checkout.path('calls')}"
if [ "$1" = drain ] && [ -e "${checkout.path('budget')}" ]; then
  echo "error when evicting pod: Cannot evict pod as it would violate the pod's disruption budget." >&2; exit 1
fi`,
    )
  })
  after(async () => {
    programs.remove()
    await whole?.remove()
  })

  const on = (name: string) => new Machine(cluster, cluster.node(name))
  const upgrade = (...args: string[]): Promise<Outcome> =>
    run(checkout, 'bin/rolling-upgrade.mts', args, {
      env: { PATH: `${programs.path}:${process.env.PATH}`, NIXOS_VERSION: '26.11' },
      timeout: 300_000,
    })
  const next = (system: string, ...which: string[]) =>
    Promise.all(which.map((name) => writeFile(checkout.path('state', name, 'next'), system)))
  const calls = async () =>
    (await readFile(checkout.path('calls'), 'utf8'))
      .trim()
      .split('\n')
      .filter((call) => !/nix-channel --(list|add)/.test(call))
  const stateOf = (name: string) =>
    on(name).succeed(
      'cd /etc/nixos; sha256sum *; ls /var/lib/reconfig | grep -E "unfinished|former-|result|new|back" || true; readlink /run/*-system',
    )

  beforeEach(async () => {
    await writeFile(checkout.path('version'), 'v1.36.3')
    await run(checkout, 'bin/generate-nocloud-iso.mts')
    await Promise.all(
      cluster.nodes.map(async (node) => {
        const wiped = 'rm -rf /var/lib/reconfig; mkdir /var/lib/reconfig; tar -xzpf - -C /'
        await on(node.name).succeed(wiped, { input: await stagedArchive(cluster, node) })
      }),
    )
    await writeFile(checkout.path('calls'), '')
  })
  afterEach(async () => {
    await rm(checkout.path('budget'), { force: true })
    for (const name of names) {
      for (const what of ['breaks', 'broken-kubelet', 'fails-build']) {
        await machines.unset(name, what)
      }
    }
  })

  async function assertRefused(args: string[], reason: RegExp, status = 1): Promise<void> {
    const before = await Promise.all(names.map(stateOf))
    const { stderr, exitCode } = await upgrade(...args)
    assert.match(stderr, reason)
    assert.equal(exitCode, status, stderr)
    assert.deepEqual(await Promise.all(names.map(stateOf)), before)
    assert.ok(!(await calls()).some((call) => /switch|reboot/.test(call)), String(await calls()))
  }

  it('asks for a node', async () => {
    await assertRefused([], /missing argument: NODE\|all/, 2)
    await assertRefused(['omega'], /there is no node "omega"/, 2)
  })

  it('refuses a kubelet that is newer than the API server, and goes back', async () => {
    await next('26.11.1 v1.37.0 kernel-7.2\n', 'sigma')
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

  it('leaves a machine that cannot build the new system as it was', async () => {
    await machines.set('alpha', 'fails-build')
    await assertRefused(
      ['all'],
      /alpha could not build NixOS 26\.11; sigma, gamma were not touched/,
    )
    assert.match(await readFile(checkout.path('calls'), 'utf8'), /alpha nix-channel --rollback 3/)
  })

  it('takes no pod away that a disruption budget keeps, and lets the node go on', async () => {
    await next('26.05.2 v1.36.4 kernel-6.12\n', 'sigma')
    await writeFile(checkout.path('version'), 'v1.36.4')
    await writeFile(checkout.path('budget'), '')
    await assertRefused(['sigma'], /a disruption budget keeps pods on sigma/)
    assert.deepEqual((await calls()).slice(2), [
      'kubectl cordon sigma',
      'kubectl drain sigma',
      'sigma nix-channel --rollback 3',
      'kubectl uncordon sigma',
    ])
  })

  it('brings a release to the control plane, then to one worker after another without its pods', async () => {
    await next('26.11.1 v1.37.0 kernel-7.2\n', 'alpha')
    // The API server is the new one by then; nothing else of the control plane is asked for.
    await next('26.11.1 v1.36.3 kernel-7.2\n', 'sigma')
    await next('26.11.1 v1.36.3 kernel-6.12\n', 'gamma')
    const { stdout, stderr, exitCode } = await upgrade('all')
    assert.equal(exitCode, 0, stderr)
    const built = (name: string) => [
      `${name} nix-channel --update nixos`,
      `${name} nixos-rebuild build`,
    ]
    assert.deepEqual(await calls(), [
      ...built('alpha'),
      'alpha nixos-rebuild switch',
      'alpha reboot',
      ...built('sigma'),
      'kubectl cordon sigma',
      'kubectl drain sigma',
      'sigma nixos-rebuild switch',
      'sigma reboot',
      'kubectl uncordon sigma',
      ...built('gamma'),
      'kubectl cordon gamma',
      'kubectl drain gamma',
      // Its kernel is the same.
      'gamma nixos-rebuild switch',
      'kubectl uncordon gamma',
    ])
    assert.match(
      stdout,
      /^alpha: NixOS 26\.05\.1, Kubernetes v1\.36\.3 → NixOS 26\.11\.1, Kubernetes v1\.37\.0, with another kernel$/m,
    )
    assert.match(stdout, /^gamma: .* → NixOS 26\.11\.1, Kubernetes v1\.36\.3$/m)
    for (const name of names) assert.doesNotMatch(await stateOf(name), /unfinished|channel|result/)
  })

  it('stops at the first node that does not come back, which stays cordoned', async () => {
    await next('26.11.2 v1.37.1 kernel-7.2\n', 'alpha')
    await next('26.11.2 v1.36.3 kernel-7.2\n', 'sigma')
    await machines.set('sigma', 'breaks')
    const { stderr, exitCode } = await upgrade('all', '--timeout', '3')
    assert.equal(exitCode, 1)
    assert.match(
      stderr,
      /sigma has not come back from its upgrade and stays cordoned; gamma was not touched/,
    )
    assert.match(stderr, /sigma is not well after 3 s/)
    assert.match(stderr, /nixos-rebuild switch --rollback goes back/)
    const done = await calls()
    assert.deepEqual(done.slice(-3), [
      'kubectl cordon sigma',
      'kubectl drain sigma',
      'sigma nixos-rebuild switch',
    ])
  })

  it('changes no machine that is still at work on its last change', async () => {
    const held = 'exec 9>/var/lib/reconfig/lock; flock 9'
    await on('gamma').succeed(`${held}; setsid --fork sleep 600 >/dev/null 2>&1; echo`)
    await assertRefused(['gamma'], /gamma is still at work on its last change/)
    await on('gamma').succeed('fuser --kill /var/lib/reconfig/lock || true')
  })

  it('leaves it to reconfig to finish what that has begun', async () => {
    await on('gamma').succeed('touch /var/lib/reconfig/unfinished')
    await assertRefused(['gamma'], /gamma has not come to its end\n.*reconfig\.mts --node gamma/)
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
