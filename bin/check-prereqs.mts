#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// Whether this computer can run the machines: programs, firmware, accelerator, memory, disk, ports.
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { createInterface } from 'node:readline/promises'
import { loadCluster } from '../lib/cluster.mts'
import { StepError } from '../lib/errors.mts'
import { formatTable } from '../lib/format.mts'
import type { Finding } from '../lib/prerequisites/finding.mts'
import { installCommands, installContext } from '../lib/prerequisites/package-manager.mts'
import { checkPrerequisites } from '../lib/prerequisites/prerequisite-checks.mts'
import { detectArchitecture, detectSystem } from '../lib/qemu/processor.mts'
import { script } from '../lib/script.mts'

const { flags } = script({
  does: `Checks all that the machines need on this computer, shows it as one table, and names the
commands that install what is missing. Ends with status 1 if something needed is missing;
warnings (no hardware acceleration, little memory) are told and do not count.`,
  reads: ['cluster.env'],
  writes: [],
  flags: {
    install: { help: 'run those commands, after asking, and check again' },
    yes: { help: 'with --install: do not ask' },
    json: { help: 'the findings and the commands as JSON' },
  },
  examples: ['./bin/check-prereqs.mts', './bin/check-prereqs.mts --install'],
})
if (flags.yes && !flags.install) {
  throw new StepError('--yes answers the question of --install', { exitCode: 2 })
}

const cluster = loadCluster()
const os = detectSystem()
const host = { os, arch: await detectArchitecture(os) }

let findings = await checkPrerequisites(cluster, host)
let remedy = await remedyFor(findings)

if (flags.install && remedy.commands.length > 0) {
  if (!flags.json) console.log(`${report(findings)}\n`)
  if (!flags.yes) await confirm(remedy.commands)
  await runAll(remedy.commands)
  findings = await checkPrerequisites(cluster, host)
  remedy = await remedyFor(findings)
}

if (flags.json) {
  const plain = findings.map(({ prerequisite: _, ...finding }) => finding)
  console.log(JSON.stringify({ findings: plain, ...remedy }, null, 2))
} else {
  console.log(report(findings))
  if (remedy.commands.length > 0) {
    console.log('\nTo install what is missing (--install does it):\n')
    for (const command of remedy.commands) console.log(`  ${command}`)
  }
  if (remedy.without.length > 0) {
    console.log(
      `\nNo package manager known here has ${remedy.without.join(', ')}: install by hand.`,
    )
  }
}

const wrong = findings.filter(({ state }) => state === 'missing' || state === 'problem')
if (wrong.length > 0) {
  throw new StepError(`not all is there: ${wrong.map(({ name }) => name).join(', ')}`)
}

/** The table, and below it what there is to say about each line that is not ok. */
function report(all: readonly Finding[]): string {
  const marks = { ok: '✓', warning: '!', missing: '✗', problem: '✗' } as const
  const rows = all.map(({ name, found, wanted, state }) => [
    marks[state],
    name,
    found,
    wanted,
    state,
  ])
  const advice = all.flatMap(({ name, state, advice: text }) =>
    text ? [`${marks[state]} ${name}: ${text.replaceAll('\n', '\n    ')}`] : [],
  )
  const table = formatTable(['', 'tool', 'found', 'wanted', 'state'], rows)
  return [table, ...(advice.length > 0 ? [''] : []), ...advice].join('\n')
}

async function remedyFor(all: readonly Finding[]) {
  const missing = all.flatMap(({ prerequisite }) => prerequisite ?? [])
  return installCommands(missing, await installContext())
}

async function confirm(commands: readonly string[]): Promise<void> {
  if (!process.stdin.isTTY) {
    throw new StepError('--install asks before it runs commands, and here is nobody to ask', {
      output: commands.join('\n'),
      hint: 'add --yes to run them without asking',
    })
  }
  const terminal = createInterface({ input: process.stdin, output: process.stderr })
  const answer = await terminal.question(`Run this?\n\n  ${commands.join('\n  ')}\n\n[y/N] `)
  terminal.close()
  if (!/^y(es)?$/i.test(answer.trim())) throw new StepError('nothing was installed')
}

/** One after the other; a failing one does not keep the others from trying. */
async function runAll(commands: readonly string[]): Promise<void> {
  for (const command of commands) {
    console.error(`$ ${command}`)
    // stdout is for the report alone.
    const child = spawn('sh', ['-c', command], {
      stdio: ['inherit', process.stderr, process.stderr],
    })
    const [status, signal] = await once(child, 'close')
    if (status !== 0) console.error(`! ended with ${signal ?? `status ${status}`}: ${command}`)
  }
}
