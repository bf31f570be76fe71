// Every flag in the units of every machine, as the program itself lists it in --help: the next
// release may drop what this one calls deprecated.
import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { basename, join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import type { Cluster } from '../../lib/cluster.mts'
import { stagingFolder } from '../../lib/staging/staging.mts'
import type { Checkout } from '../checkout.mts'
import { findTools, makeStagedCheckout } from '../kubernetes/prepared.mts'
import { evaluate } from '../nixos/evaluate.mts'

const tools = await findTools()
const skip = typeof tools === 'string' && tools
// A skipped suite is counted nowhere; a skipped test is.
it('what this needs is there', { skip }, () => {})

const machines = {
  alpha: ['etcd', 'kube-apiserver', 'kube-controller-manager', 'kube-scheduler'],
  sigma: ['kube-proxy', 'kubelet'],
}

describe('flags', { skip }, () => {
  let checkout: Checkout
  let cluster: Cluster
  before(async () => {
    // Cilium would leave no kube-proxy to look at.
    ;({ checkout, cluster } = await makeStagedCheckout({ KUBE_PROXY_MODE: 'nftables' }))
  })
  after(() => checkout?.remove())

  for (const [node, programs] of Object.entries(machines)) {
    it(`of ${programs.join(', ')} on ${node} are known and not deprecated`, async () => {
      if (typeof tools === 'string') return
      const folder = stagingFolder(cluster, cluster.node(node))
      const { units } = await evaluate(join(folder, 'configuration.nix'))
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
    if (typeof tools === 'string') return
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
