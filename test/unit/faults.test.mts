import assert from 'node:assert/strict'
import { existsSync } from 'node:fs'
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { describe, it } from 'node:test'
import { projectRoot } from '../checkout.mts'
import { clusterFaults } from '../faults/cluster.mts'
import { hostFaults } from '../faults/host.mts'
import { machineFaults } from '../faults/machine.mts'
import { asMarkdown } from '../faults/markdown.mts'

describe('the fault table', () => {
  const groups = { host: hostFaults, machine: machineFaults, cluster: clusterFaults }
  const faults = Object.values(groups).flat()

  it('names each fault once, and says what the script prints unless it is killed or succeeds', () => {
    assert.equal(new Set(faults.map(({ name }) => name)).size, faults.length)
    for (const { name, exit, says = [] } of faults) {
      if (exit !== 137 && exit !== 0) assert.ok(says.length > 0, name)
    }
  })

  it('is the one of docs/faults.md', async () => {
    const page = await readFile(join(projectRoot, 'docs', 'faults.md'), 'utf8')
    const all = Object.entries(groups).map(([name, faults]) => ({ name, faults }))
    const hint = 'npm run test:faults -- --list --write'
    assert.equal(page, asMarkdown(all, new Map(), page), hint)
  })

  it('names integration tests that are there', () => {
    for (const { shortFormOf, name } of faults) {
      const file = join(projectRoot, 'test', 'integration', `${shortFormOf}.test.mts`)
      assert.ok(shortFormOf === undefined || existsSync(file), `${name}: ${shortFormOf}`)
    }
  })
})
