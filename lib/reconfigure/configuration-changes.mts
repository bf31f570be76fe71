// What a staged configuration changes on its machine, file by file, and how that is shown: texts
// as a unified diff, of secrets only that they change.
import { createHash, X509Certificate } from 'node:crypto'
import { mkdtemp, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join, relative } from 'node:path'
import { $ } from 'zx/core'
import { StepError } from '../errors.mts'
import type { Machine } from '../machine/machine.mts'
import { onMachine } from '../machine/on-machine.mts'
import { targetOf } from '../staging/staged-files.mts'
import { stagingFolder } from '../staging/staging.mts'
import { pushFolder } from './push.mts'

/** A file that is not on the machine as it is staged. */
export interface Change {
  /** On the machine. */
  path: string
  /** Both contents, of a file that may be shown; empty where there is none. */
  texts?: { before: string; after: string }
  /** Else, in words. */
  words?: string
}

/** What is on a machine, beside what is staged for it. */
export interface Comparison {
  changes: Change[]
  /** An earlier change has not come to its end: it has to be done again, whatever the files say. */
  unfinished: boolean
}

interface Staged {
  path: string
  data: Buffer
  secret: boolean
}

/**
 * Compares the staged configuration with what the machine has.
 *
 * @throws StepError if the node is not staged, or the machine has a change or an upgrade before it
 */
export async function compare(machine: Machine): Promise<Comparison> {
  const staged = await readStaged(machine)
  const shown = staged.filter(({ path }) => isShown(path)).map(({ path }) => path)
  const look = { HOME_FOLDER: pushFolder, TEXTS: shown.join('\n') }
  const lines = (await machine.succeed(onMachine('push-look', look))).split('\n')
  if (lines.includes('switching')) {
    throw new StepError(`${machine.node.name} is still at work on the last change`, {
      hint: 'let it finish, then try again',
    })
  }
  // A switch would bring the release of its channel, unasked.
  if (lines.includes('upgrading')) {
    throw new StepError(`an upgrade of ${machine.node.name} has not come to its end`, {
      hint: `make upgrade NAME=${machine.node.name} finishes it`,
    })
  }
  const digests = new Map<string, string>()
  const texts = new Map<string, string>()
  for (const line of lines) {
    const [, kind, first = '', second = ''] = line.match(/^(file|text) (\S+) (.*)$/) ?? []
    if (kind === 'file') digests.set(second, first)
    if (kind === 'text') texts.set(first, Buffer.from(second, 'base64').toString())
  }

  const changes = staged
    .filter(({ path, data }) => digests.get(path) !== sha256(data))
    .map((file) => changeOf(file, digests.has(file.path), texts.get(file.path) ?? ''))
  const gone = [...digests.keys()].filter((path) => staged.every((file) => file.path !== path))
  return {
    changes: [...changes, ...gone.map((path) => ({ path, words: 'is not needed any more' }))],
    unfinished: lines.includes('unfinished'),
  }
}

async function readStaged({ cluster, node }: Machine): Promise<Staged[]> {
  const folder = stagingFolder(cluster, node)
  const entries = await readdir(folder, { recursive: true, withFileTypes: true }).catch((cause) => {
    throw new StepError(`${node.name} has no staged configuration`, { cause })
  })
  const files = entries
    .filter((entry) => entry.isFile())
    .map(async (entry) => {
      const source = join(entry.parentPath ?? entry.path, entry.name)
      const [data, { mode }] = await Promise.all([readFile(source), stat(source)])
      return { path: targetOf(relative(folder, source)), data, secret: (mode & 0o077) === 0 }
    })
  return (await Promise.all(files)).sort((one, other) => (one.path < other.path ? -1 : 1))
}

/** The configuration; all else are keys, certificates and kubeconfigs. */
function isShown(path: string): boolean {
  return path.startsWith('/etc/nixos/')
}

function changeOf({ path, data, secret }: Staged, known: boolean, before: string): Change {
  if (isShown(path)) {
    return { path, texts: { before: redacted(before), after: redacted(data.toString()) } }
  }
  const what = known ? 'changes' : 'is new'
  if (secret) return { path, words: `${what} (secret)` }
  return { path, words: path.endsWith('.pem') ? `${what}: ${describe(data)}` : what }
}

function describe(pem: Buffer): string {
  try {
    const { subject, validTo } = new X509Certificate(pem)
    const name = subject.match(/^CN=(.*)$/m)?.[1]
    return `certificate of ${name}, valid until ${new Date(validTo).toISOString().slice(0, 10)}`
  } catch {
    return 'certificate'
  }
}

/** Without the password that a proxy's URL may hold. */
function redacted(text: string): string {
  return text.replace(/(?<=:\/\/)[^/\s"@]*@/g, '…@')
}

/** The changes as one reads them; texts as a unified diff (POSIX diff -u). */
export async function formatChanges(changes: readonly Change[]): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'diff-'))
  try {
    const parts: string[] = []
    for (const { path, texts, words } of changes) {
      if (!texts) parts.push(`${path} ${words}\n`)
      else parts.push(await unifiedDiff(folder, path, texts))
    }
    return parts.join('')
  } finally {
    await rm(folder, { recursive: true })
  }
}

async function unifiedDiff(
  folder: string,
  path: string,
  { before, after }: { before: string; after: string },
): Promise<string> {
  const files = [join(folder, 'before'), join(folder, 'after')]
  await writeFile(files[0] ?? '', before)
  await writeFile(files[1] ?? '', after)
  const labels = [`--label=${path} (on the machine)`, `--label=${path} (staged)`]
  const done = await $({ quiet: true, nothrow: true })`diff -u ${labels} ${files}`
  if (done.exitCode !== null && done.exitCode <= 1) return done.stdout
  throw new StepError('diff failed', { output: done.stderr.trim() })
}

function sha256(data: Buffer): string {
  return createHash('sha256').update(data).digest('hex')
}
