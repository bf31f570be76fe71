// Every flag in the units of every machine, as the program itself lists it in --help: the next
// release may drop what this one calls deprecated.
import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { basename, join } from 'node:path'
import { before, describe, it } from 'node:test'
import { type Checkout, run } from '../../checkout.mts'
import { evaluate } from '../../nixos/evaluate.mts'
import type { Shared } from './shared.mts'

const machines = {
  alpha: ['etcd', 'kube-apiserver', 'kube-controller-manager', 'kube-scheduler'],
  sigma: ['kube-proxy', 'kubelet'],
}

export const flags = (shared: Shared) =>
  describe('flags', () => {
    let checkout: Checkout
    let tools: Shared['tools']
    before(async () => {
      ;({ checkout, tools } = shared)
      // With Cilium there would be no kube-proxy.
      const env = { KUBE_PROXY_MODE: 'nftables' }
      const { exitCode, stderr } = await run(checkout, 'bin/generate-nocloud-iso.mts', [], { env })
      assert.equal(exitCode, 0, stderr)
    })

    for (const [node, programs] of Object.entries(machines)) {
      it(`of ${programs.join(', ')} on ${node} are known and not deprecated`, async () => {
        const configuration = 'nixos/etc/nixos/configuration.nix'
        const { units } = await evaluate(checkout.path('cloud-init', node, configuration))
        const seen: string[] = []
        for (const { command } of Object.values(units)) {
          const program = basename(command[0] ?? '')
          if (!programs.includes(program)) continue
          seen.push(program)
          const path = join(program === 'etcd' ? tools.etcd : tools.kubernetes, program)
          const known = flagsIn(execFileSync(path, ['--help'], { encoding: 'utf8', stdio: 'pipe' }))
          for (const word of command.slice(1)) {
            const [flag = ''] = word.split('=')
            assert.ok(known.has(flag), `${program} does not list ${flag}`)
            assert.doesNotMatch(known.get(flag) ?? '', /deprecated/i, `${program} ${flag}`)
          }
        }
        assert.deepEqual(seen.sort(), programs)
      })
    }

    it('that are deprecated would be noticed', () => {
      const path = join(tools.kubernetes, 'kubelet')
      const known = flagsIn(execFileSync(path, ['--help'], { encoding: 'utf8' }))
      assert.match(known.get('--cluster-dns') ?? '', /DEPRECATED/)
      assert.doesNotMatch(known.get('--config') ?? '', /DEPRECATED/)
    })
  })

/** Flag to what --help says about it, down to the next flag. */
function flagsIn(help: string): Map<string, string> {
  const entries = help.split(/^(?=\s+(?:-\w, )?--[a-z])/m)
  return new Map(
    entries.map((entry) => [entry.match(/^\s+(?:-\w, )?(--[\w-]+)/)?.[1] ?? '', entry]),
  )
}
