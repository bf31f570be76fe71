// Runs the tests of the named folders, several files at a time; then says what was skipped and why,
// which files took longest, and what they left behind: `node --import tsx test/run.mts unit`.
import { readdirSync } from 'node:fs'
import { chmod, mkdtemp, readdir, readFile, realpath, rm } from 'node:fs/promises'
import { availableParallelism, tmpdir } from 'node:os'
import { join, relative } from 'node:path'
import { stdout } from 'node:process'
import { run } from 'node:test'
import { spec } from 'node:test/reporters'
import { $ } from 'zx'
import { becomes } from '../lib/wait.mts'
import { projectRoot } from './checkout.mts'

// Those that take minutes start first, so that the end waits for none of them alone.
const longest = ['provision', 'control-plane', 'reconfig', 'add-ons', 'snapshot']

const wanted = process.argv.slice(2)
const files = wanted.flatMap((name) => {
  if (name.endsWith('.test.mts')) return [join(projectRoot, name)]
  const folder = join(projectRoot, 'test', name)
  const inFolder = readdirSync(folder).filter((file) => file.endsWith('.test.mts'))
  return inFolder.map((file) => join(folder, file))
})
if (files.length === 0) throw new Error('Usage: test/run.mts FOLDER-OF-TEST|FILE.test.mts…')
const rank = (file: string) => {
  const place = longest.findIndex((name) => file.endsWith(`integration/${name}.test.mts`))
  return place < 0 ? longest.length : place
}
files.sort((a, b) => rank(a) - rank(b))

// What the tests write goes to a folder of this run, so that what they leave behind is seen.
const folder = await mkdtemp(join(await realpath(tmpdir()), 't-'))
// (As mmdebstrap wants it, whose user for the files in an archive is another.)
await chmod(folder, 0o755)
process.env.TMPDIR = folder
process.env.TEST_KEYS = join(folder, 'keys')
process.env.NODE_OPTIONS = `--import=${new URL('strip-types.mjs', import.meta.url)}`

const took = new Map<string, number>()
const failed = new Set<string>()
const skipped: string[] = []
// (A file that does not end is stopped: 15 minutes.)
const limits = { concurrency: availableParallelism() + 2, timeout: 900_000 }
const tests = run({ files, ...limits })
tests.on('test:fail', (test) => {
  failed.add(relative(projectRoot, test.file ?? ''))
  note(test)
})
tests.on('test:pass', (test) => {
  const { name, file = '', skip } = test
  const reason = typeof skip === 'string' ? `: ${skip}` : ''
  if (skip) skipped.push(`${relative(projectRoot, file)}: ${name}${reason}`)
  note(test)
})
const began = performance.now()
for await (const part of tests.compose(new spec())) stdout.write(String(part))

const seconds = (ms: number) => `${(ms / 1000).toFixed(0)} s`
const slowest = [...took].sort(([, a], [, b]) => b - a).slice(0, 8)
console.log(`\n${files.length} files in ${seconds(performance.now() - began)}; the longest:`)
for (const [path, ms] of slowest) console.log(`  ${seconds(ms).padStart(6)}  ${path}`)

const left = await leftBehind()
report('failed', [...failed])
report('left behind', left)
report('skipped', skipped)
await rm(folder, { recursive: true, force: true })
if (failed.size + left.length > 0) process.exitCode = 1

type Ended = { file?: string; nesting: number; details: { duration_ms: number } }

/** Adds the time of a test to that of its file. */
function note({ file = '', nesting, details }: Ended): void {
  if (nesting > 0) return
  const path = relative(projectRoot, file)
  took.set(path, (took.get(path) ?? 0) + details.duration_ms)
}

function report(what: string, lines: readonly string[]): void {
  console.log(`${what} ${lines.length}`)
  for (const line of lines) console.log(`  ${line}`)
}

/** Files and processes of the run that are still there; those that are just ending get time. */
async function leftBehind(): Promise<string[]> {
  await becomes(async () => (await processesOfRun()).length === 0, 10)
  const names = await readdir(folder)
  // Caches of Node, of what reads TypeScript, and of keys are no test's.
  const kept = names.filter((name) => !/^(tsx|strip-types)-|^(node-compile-cache|keys)$/.test(name))
  return [...kept.map((name) => join(folder, name)), ...(await processesOfRun())]
}

async function processesOfRun(): Promise<string[]> {
  const lines = (await $`ps -A -o pid=,args=`).stdout.split('\n')
  const found: string[] = []
  for (const line of lines) {
    const [pid = ''] = line.trim().split(' ')
    if (!pid || Number(pid) === process.pid) continue
    // (Only Linux shows the environment, in which each of them has the folder.)
    const environment = await readFile(`/proc/${pid}/environ`, 'utf8').catch(() => '')
    const ours = line.includes(folder) || environment.includes(`TMPDIR=${folder}`)
    if (ours) found.push(`process ${line.trim().slice(0, 200)}`)
  }
  return found
}
