// The fault suite: brings every fault of the table about and checks what must hold afterwards.
// `npm run test:faults` for the fast part, with words for groups or for words in the names of faults;
// --write puts the table into docs/faults.md, --list prints it.
import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { mkdir, mkdtemp, readFile, realpath, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { describeError } from '../../lib/errors.mts'
import { isGone } from '../../lib/processes.mts'
import { makeCheckout, projectRoot } from '../checkout.mts'
import { closeCluster, clusterFaults, openCluster } from './cluster.mts'
import { type Fault, Place } from './fault.mts'
import { hostFaults } from './host.mts'
import { machineFaults } from './machine.mts'
import { asMarkdown } from './markdown.mts'

/** Groups by what they need. */
interface Group {
  name: string
  /** How many of their faults at a time. */
  atOnce: number
  /** Whether they are tried without being asked for. */
  fast: boolean
  faults: readonly Fault[]
  /** Starts what all of them share, or says why it cannot. @returns what makes their places */
  open?: () => Promise<(() => Place) | string>
  /** Ends that, however far it came. */
  close?: () => Promise<void>
}
const groups: readonly Group[] = [
  { name: 'host', atOnce: 3, fast: true, faults: hostFaults },
  { name: 'machine', atOnce: 2, fast: true, faults: machineFaults },
  {
    ...{ name: 'cluster', atOnce: 1, fast: false, faults: clusterFaults },
    ...{ open: openCluster, close: closeCluster },
  },
]

const { values, positionals: words } = parseArgs({
  allowPositionals: true,
  options: { list: { type: 'boolean' }, write: { type: 'boolean' } },
})
const isGroup = (word: string) => groups.some(({ name }) => name === word)
const isWanted = (group: Group, { name }: Fault) =>
  words.length === 0
    ? group.fast
    : words.some((word) => word === group.name || (!isGroup(word) && name.includes(word)))
const chosen = groups.map((group) => ({
  ...group,
  faults: group.faults.filter((fault) => isWanted(group, fault)),
}))

// What they write goes to a folder of this run, so that what they leave behind is seen.
const folder = await mkdtemp(join(await realpath(tmpdir()), 'faults-'))
process.env.TMPDIR = folder
const took = new Map<string, number>()
const places = new Set<Place>()
let interrupted = false
const counts = { passed: 0, failed: 0, skipped: 0 }
if (values.list) {
  for (const { faults } of chosen) for (const { name } of faults) console.log(name)
} else {
  const neighbour = await makeNeighbour()
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const)
    process.once(signal, () => interrupt(signal))
  const began = performance.now()
  for (const group of chosen) {
    if (group.faults.length === 0 || interrupted) continue
    const opened = await open(group)
    const place = async ({ settings }: Fault) =>
      typeof opened === 'function'
        ? opened()
        : new Place(await makeCheckout(settings ? { settings } : {}))
    const waiting = group.faults.map((fault) =>
      typeof opened === 'string' ? { ...fault, skip: opened } : fault,
    )
    const work = async () => {
      for (let fault = waiting.shift(); fault && !interrupted; fault = waiting.shift()) {
        await tell(fault, place, neighbour)
      }
    }
    if (opened !== false) await Promise.all(Array.from({ length: group.atOnce }, work))
    if (!interrupted) await group.close?.()
  }
  neighbour.end()
  const { passed, failed, skipped } = counts
  console.log(
    `${passed} passed, ${failed} failed, ${skipped} skipped in ${seconds(performance.now() - began)}`,
  )
  if (failed > 0 || passed === 0) process.exitCode = 1
}
if (values.write) {
  const file = join(projectRoot, 'docs', 'faults.md')
  await writeFile(file, asMarkdown(groups, took, await readFile(file, 'utf8').catch(() => '')))
}
await rm(folder, { recursive: true, force: true })

function seconds(ms: number): string {
  return `${(ms / 1000).toFixed(1)} s`
}

/** Starts what a group shares. @returns false if that failed, which then counts for all its faults */
async function open(group: Group): Promise<(() => Place) | string | undefined | false> {
  try {
    return await group.open?.()
  } catch (error) {
    console.log(`✗ ${group.name}: ${describeError(error)}`)
    counts.failed += group.faults.length
    return false
  }
}

/** Ends what is running, and this program. */
async function interrupt(signal: NodeJS.Signals): Promise<void> {
  interrupted = true
  console.log(`interrupted by ${signal}`)
  // A cluster that several rows share is taken away as it is.
  for (const place of places) await (place.kept ? place.powerCut() : place.end()).catch(() => {})
  for (const { faults, close } of chosen) if (faults.length > 0) await close?.().catch(() => {})
  // Rows went on meanwhile.
  for (const place of places) await place.powerCut().catch(() => {})
  await rm(folder, { recursive: true, force: true })
  process.exit(1)
}

/** Tries one, and prints its line. */
async function tell(
  fault: Fault,
  placeFor: (fault: Fault) => Promise<Place>,
  neighbour: Neighbour,
): Promise<void> {
  if (fault.skip) {
    counts.skipped += 1
    return console.log(`- ${fault.name}: skipped, ${fault.skip}`)
  }
  const began = performance.now()
  try {
    await prove(fault, await placeFor(fault), neighbour)
    const time = performance.now() - began
    took.set(fault.name, time)
    counts.passed += 1
    console.log(`✓ ${fault.name} (${seconds(time)})`)
  } catch (error) {
    counts.failed += 1
    const reason = error instanceof Error ? (error.stack ?? error.message) : String(error)
    console.log(`✗ ${fault.name} (${seconds(performance.now() - began)})`)
    console.log(reason.replace(/^/gm, '    '))
  }
}

async function prove(fault: Fault, place: Place, neighbour: Neighbour): Promise<void> {
  const own = [place.path('notes'), place.path('images', 'own.txt')]
  places.add(place)
  let passed = false
  try {
    await mkdir(place.path('images'), { recursive: true })
    for (const file of own) await writeFile(file, 'of the user')
    if (fault.keys) await place.makeKeys()
    await place.checkout.set(fault.settings ?? {})

    const { exitCode, stdout, stderr } = await fault.inject(place)
    const said = stdout + stderr
    assert.equal(exitCode, fault.exit, `its exit status; it printed:\n${said}`)
    for (const part of fault.says ?? []) assert.ok(said.includes(part), `no "${part}" in:\n${said}`)
    const machines = fault.runs !== undefined || place.kept
    if (fault.exit !== 137) {
      const left = await place.leftovers({ files: fault.leaves, machines })
      assert.deepEqual(left, [], 'left by the fault')
    }
    await fault.repair?.(place)
    if (fault.again) {
      const again = await place.run(fault.again)
      assert.equal(again.exitCode, 0, `the second run failed:\n${again.stdout}${again.stderr}`)
    }
    if (fault.runs) {
      for (const name of fault.runs) assert.ok((await place.running()).includes(name), name)
    }
    await fault.check?.(place)
    // Of a file that was being written when the script was killed; clean removes it.
    const files = fault.exit === 137 ? /\.tmp-/ : undefined
    const left = await place.leftovers({ files, machines })
    assert.deepEqual(left, [], 'left after the second run')
    if (fault.runs) {
      const off = await place.run(['bin/shutdown.mts', '--now'])
      assert.equal(off.exitCode, 0, off.stderr)
      assert.deepEqual(await place.leftovers({ files }), [], 'left by the machines')
    }
    for (const file of own) assert.equal(await readFile(file, 'utf8'), 'of the user', file)
    await neighbour.assertUntouched()
    passed = true
  } finally {
    if (!interrupted) {
      const failed = await place.end()
      places.delete(place)
      for (const reason of failed) console.error(`at the end of the row: ${reason}`)
      if (passed) assert.deepEqual(failed, [], 'at the end')
    }
  }
}

interface Neighbour {
  /** @throws if its machine does not run any more, or a file of it has changed */
  assertUntouched(): Promise<void>
  end(): void
}

/** Another cluster on this computer: its files, and a process that has the arguments of its QEMU. */
async function makeNeighbour(): Promise<Neighbour> {
  const root = join(folder, 'neighbour')
  const files = ['images/alpha.qcow2', 'images/nixos.iso.partial', 'tls/ca-key.pem', 'cluster.env']
  for (const file of files) {
    await mkdir(join(root, file, '..'), { recursive: true })
    await writeFile(join(root, file), `${file} of the neighbour`)
  }
  const args = ['-c', 'read -r _', '-name', 'alpha', '-pidfile', join(root, 'run/alpha.pid')]
  const qemu = spawn('sh', args, {
    argv0: 'qemu-system-x86_64',
    stdio: ['pipe', 'ignore', 'ignore'],
  })
  return {
    async assertUntouched() {
      assert.equal(
        await isGone(qemu.pid ?? 0),
        false,
        "the neighbour's machine does not run any more",
      )
      for (const file of files) {
        assert.equal(await readFile(join(root, file), 'utf8'), `${file} of the neighbour`)
      }
    },
    end: () => qemu.kill('SIGKILL'),
  }
}
