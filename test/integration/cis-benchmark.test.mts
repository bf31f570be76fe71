// The configuration of the control plane machine against the CIS Kubernetes Benchmark.
import assert from 'node:assert/strict'
import { existsSync, readFileSync } from 'node:fs'
import { readdir } from 'node:fs/promises'
import { join, relative } from 'node:path'
import { after, before, describe, it } from 'node:test'
import type { Checkout } from '../checkout.mts'
import { type AuditedRequest, type Facts, points } from '../kubernetes/cis-benchmark.mts'
import { makeStagedCheckout, missingTool } from '../kubernetes/prepared.mts'
import { evaluate, type Machine } from '../nixos/evaluate.mts'

const skip = await missingTool('nix-instantiate')
// A skipped suite is counted nowhere; a skipped test is.
it('what this needs is there', { skip }, () => {})

describe('the CIS benchmark, on the control plane', { skip }, () => {
  let checkout: Checkout
  let facts: Facts
  before(async () => {
    const { checkout: made, cluster } = await makeStagedCheckout()
    checkout = made
    const folder = checkout.path('cloud-init', cluster.controlPlane.name, 'nixos')
    const machine = await evaluate(join(folder, 'etc/nixos/configuration.nix'))
    const entries = await readdir(folder, { recursive: true, withFileTypes: true })
    const files = entries.filter((entry) => entry.isFile())
    const policy = JSON.parse(textOf(machine, '/etc/kubernetes/audit-policy.json'))
    facts = {
      flag: (service, name) => flagOf(machine, service, name),
      unit: (service, setting) => machine.units[service]?.serviceConfig[setting],
      owned: ownersOf(textOf(machine, '/etc/tmpfiles.d/00-nixos.conf')),
      staged: files.map(({ parentPath, path = parentPath, name }) => {
        return `/${relative(folder, join(path, name))}`
      }),
      text(path) {
        const staged = join(folder, path)
        return existsSync(staged) ? readFileSync(staged, 'utf8') : textOf(machine, path)
      },
      auditLevel: (request) => levelOf(policy, request),
    }
  })
  after(() => checkout?.remove())

  for (const { ids, title, met, why } of points) {
    const name = `${ids.join(', ')} ${title}`
    if (!why) it(name, () => assert.ok(met(facts)))
    // A reason that no longer holds has to be removed.
    else it(`${name}: not met, as ${why}`, () => assert.ok(!met(facts)))
  }
})

function textOf(machine: Machine, path: string): string {
  const file = machine.files[path]
  assert.ok(file && 'text' in file, `the configuration has no text ${path}`)
  return file.text
}

function flagOf(machine: Machine, service: string, name: string): string | undefined {
  const { command } = machine.units[service] ?? { command: [] }
  const word = command.find((candidate) => candidate.startsWith(`--${name}=`))
  return word?.slice(`--${name}=`.length)
}

/** What lines of tmpfiles.d(5) "z PATH MODE USER GROUP -" set. */
function ownersOf(rules: string): Facts['owned'] {
  const owners = new Map(
    rules.split('\n').map((rule) => {
      const [, path = '', ...owner] = rule.split(/\s+/)
      return [path, owner.slice(0, 3).join(' ')]
    }),
  )
  return (path) => owners.get(path)
}

interface Rule {
  level: string
  verbs?: string[]
  userGroups?: string[]
  nonResourceURLs?: string[]
  resources?: { group: string; resources?: string[] }[]
}

/** The first rule that fits, as in the API server: what a rule does not name, it takes all of. */
function levelOf({ rules }: { rules: Rule[] }, request: AuditedRequest): string {
  const { verb, resource, group = '', userGroup = 'system:masters' } = request
  const rule = rules.find(
    ({ verbs, userGroups, nonResourceURLs, resources }) =>
      !nonResourceURLs &&
      (verbs?.includes(verb) ?? true) &&
      (userGroups?.includes(userGroup) ?? true) &&
      (resources?.some(
        (each) => each.group === group && (each.resources?.includes(resource) ?? true),
      ) ??
        true),
  )
  return rule?.level ?? 'None'
}
