// A worker is upgraded to the next release of NixOS, with a kernel that requires a restart.
import assert from 'node:assert/strict'
import { kubectlJson } from '../../lib/kubectl.mts'
import { releaseAfter } from './own-tree.mts'
import type { Rehearsal } from './rehearsal.mts'
import { whileWriting } from './while-writing.mts'

const look = `
  cut -c -5 /run/current-system/nixos-version
  readlink -f /run/booted-system/kernel
  cat /proc/sys/kernel/random/boot_id
  readlink /nix/var/nix/profiles/per-user/root/channels`

export async function upgradeCheck(rehearsal: Rehearsal): Promise<void> {
  const { cluster } = rehearsal
  const worker = cluster.workers.at(-1)
  assert.ok(worker, 'an upgrade needs a worker')
  const { name } = worker
  const state = async () => (await rehearsal.on(worker, look)).trim().split('\n')
  const before = await state()
  const release = releaseAfter(cluster.settings.NIXOS_VERSION)

  const { NIXOS_VERSION } = process.env
  process.env.NIXOS_VERSION = release
  try {
    // The control plane works all the while.
    await whileWriting(rehearsal, () => rehearsal.script('rolling-upgrade', name), 20)
  } finally {
    if (NIXOS_VERSION === undefined) delete process.env.NIXOS_VERSION
    else process.env.NIXOS_VERSION = NIXOS_VERSION
  }

  const after = await state()
  assert.equal(after[0], release)
  for (const [index, what] of ['release', 'kernel', 'boot', 'channel'].entries()) {
    assert.notEqual(after[index], before[index], `the ${what} is the same`)
  }
  const { spec } = await kubectlJson<{ spec: { unschedulable?: boolean } }>('get', 'node', name)
  assert.equal(spec.unschedulable, undefined)
  await rehearsal.script('wait-for-cluster', '--ready')
}
