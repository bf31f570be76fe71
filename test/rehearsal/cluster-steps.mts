// From machines that answer ssh to a cluster that has passed its checks: the steps of a rehearsal.
import { existsSync } from 'node:fs'
import { $ } from 'zx'
import { describeError, StepError } from '../../lib/errors.mts'
import { formatDuration, formatTable } from '../../lib/format.mts'
import { addOnChecks } from './add-on-checks.mts'
import { dayTwoChecks } from './day-two-checks.mts'
import { networkChecks } from './network-checks.mts'
import type { Rehearsal, Step } from './rehearsal.mts'
import { ciliumValues } from './rehearsal-folder.mts'
import { upgradeCheck } from './upgrade-check.mts'
import { workerCheck } from './worker-checks.mts'

export const clusterSteps: readonly Step[] = [
  ['make network', installCilium],
  ['make wait, until pods can run', (rehearsal) => rehearsal.script('wait-for-cluster', '--ready')],
  ['network checks', networkChecks],
  ['make all, which continues from there', (rehearsal) => rehearsal.script('bootstrap-cluster')],
  ['add-on checks', addOnChecks],
  ['make smoke', (rehearsal) => rehearsal.script('smoke')],
  ['make test', (rehearsal) => rehearsal.script('test-cluster')],
  ['make smoke, deleted again', (rehearsal) => rehearsal.script('smoke', '--cleanup')],
  ['make status', (rehearsal) => rehearsal.script('cluster-status', '--timeout=60')],
  [
    'make status FLAGS=--boot',
    (rehearsal) => rehearsal.script('cluster-status', '--boot', '--timeout=60'),
  ],
]

/** Operations on a running cluster; each step continues with the result of the previous one. */
const dayTwoSteps: readonly Step[] = [
  ...dayTwoChecks,
  ['a worker is added and removed', (rehearsal) => workerCheck(rehearsal)],
  ['make upgrade of one worker', upgradeCheck],
  ['make status, at the end', (rehearsal) => rehearsal.script('cluster-status', '--timeout=60')],
]

/**
 * @param words separated by blanks: only the steps that have one of them in their names
 * @throws StepError if no step has one of the words
 */
export function dayTwo(words = ''): Step[] {
  const wanted = words.split(' ').filter(Boolean)
  for (const word of wanted) {
    if (dayTwoSteps.some(([what]) => what.includes(word))) continue
    const output = dayTwoSteps.map(([what]) => what).join('\n')
    throw new StepError(`no step of day two has "${word}" in its name`, { output, exitCode: 2 })
  }
  const has = (what: string) => wanted.some((word) => what.includes(word))
  return dayTwoSteps.filter(([what]) => wanted.length === 0 || has(what))
}

function installCilium(rehearsal: Rehearsal): Promise<void> {
  const values = rehearsal.cluster.path(ciliumValues)
  return rehearsal.script('install-cilium', ...(existsSync(values) ? ['--values', values] : []))
}

/** Runs all steps. If one fails, the state of the cluster is shown. */
export async function rehearseSteps(rehearsal: Rehearsal, steps: readonly Step[]): Promise<void> {
  try {
    for (const [what, work] of steps) {
      console.error(`\n── ${what}`)
      await rehearsal.timed(what, () => work(rehearsal))
    }
  } catch (error) {
    rehearsal.signal.throwIfAborted()
    await showState(rehearsal)
    throw error
  }
}

/** Runs the dashboard until the machines' components are active, and shows when each was. */
export async function waitForComponents(rehearsal: Rehearsal): Promise<void> {
  const { names, nodes } = rehearsal
  const all = nodes.length === rehearsal.cluster.nodes.length
  const report = await rehearsal.timed('make wait', () =>
    rehearsal.output('wait-for-cluster', '--json', ...(all ? [] : names)),
  )
  const { components } = JSON.parse(report) as {
    components: { name: string; state: string; seconds: number }[]
  }
  const [first] = nodes
  const on = first ? await rehearsal.poweredOn(first) : 0
  const rows = components.map(({ name, state, seconds }) => [
    name,
    state,
    formatDuration(Date.now() - on - seconds * 1000),
  ])
  console.log(`\n${formatTable(['component', 'state', 'seen after power-on'], rows)}`)
}

/** What a person would type after a failure. */
async function showState(rehearsal: Rehearsal): Promise<void> {
  const commands = [
    ['get', 'pods', '--all-namespaces', '--output=wide'],
    ['get', 'events', '--all-namespaces', '--sort-by=.lastTimestamp'],
  ]
  for (const command of commands) {
    console.error(`\n$ kubectl ${command.join(' ')}`)
    const { stdall } = await $({ nothrow: true, timeout: '60s' })`kubectl ${command}`
    console.error(stdall.trimEnd().split('\n').slice(-40).join('\n'))
  }
  await rehearsal
    .script('cluster-status', '--timeout=60')
    .catch((error) => console.error(describeError(error)))
}
