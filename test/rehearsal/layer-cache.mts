// What the rehearsal builds, kept under the user's cache folder by the hash of what it is made
// from: the same inputs are built once, and a build that broke off is never taken for a whole one.
import { createHash } from 'node:crypto'
import { existsSync } from 'node:fs'
import { mkdtemp, readdir, readFile, rename, rm, stat, utimes } from 'node:fs/promises'
import { homedir } from 'node:os'
import { join } from 'node:path'
import { withLock } from '../../lib/lock.mts'
import { step } from '../../lib/steps.mts'

/** Of each name, so many entries stay; others are deleted when no build has used them for a day. */
const kept = 2

/** The folder of all entries. */
export function cacheFolder(env: NodeJS.ProcessEnv = process.env): string {
  const cache = env.XDG_CACHE_HOME || join(env.HOME || homedir(), '.cache')
  return join(cache, 'kubernetes-the-hardest-way', 'stand-in')
}

/**
 * The cache entry of these inputs, built if it is not there yet.
 *
 * @param name the first part of its folder's name
 * @param inputs everything that decides what comes out; order counts
 * @param build puts files into the empty folder it is given
 * @returns the entry's folder, whole and not to be changed
 * @throws what `build` throws; nothing of its work is kept then
 */
export async function cached(
  name: string,
  inputs: readonly string[],
  build: (folder: string, detail: (text: string) => void) => Promise<void>,
): Promise<string> {
  const key = hash(JSON.stringify(inputs)).slice(0, 16)
  const entry = join(cacheFolder(), `${name}-${key}`)
  if (existsSync(entry)) {
    await utimes(entry, new Date(), new Date())
    return entry
  }
  const make = () =>
    step(`build ${name}`, async (detail) => {
      // Whoever was first has made it while we waited.
      if (existsSync(entry)) return
      const partial = await mkdtemp(join(cacheFolder(), `.partial-${name}-`))
      try {
        await build(partial, detail)
        await rename(partial, entry)
      } finally {
        await rm(partial, { recursive: true, force: true })
      }
    })
  await withLock(`${entry}.lock`, `building ${entry}`, make, { wait: 1200 })
  return entry
}

/** Takes away entries of former inputs, and what a killed build has left. */
export async function forgetOld(now = Date.now()): Promise<void> {
  const seen = new Map<string, number>()
  const names = await readdir(cacheFolder()).catch(() => [])
  const used = await Promise.all(names.map(async (name) => (await stat(path(name))).mtimeMs))
  const newestFirst = names
    .map((name, index) => ({ name, used: used[index] ?? 0 }))
    .sort((one, other) => other.used - one.used)
  for (const { name, used } of newestFirst) {
    const kind = name.slice(0, name.lastIndexOf('-'))
    const newer = seen.get(kind) ?? 0
    seen.set(kind, newer + 1)
    const spared = newer < kept && !kind.startsWith('.partial')
    if (!spared && now - used > 86_400_000) await rm(path(name), { recursive: true, force: true })
  }

  function path(name: string): string {
    return join(cacheFolder(), name)
  }
}

/**
 * Every file below a folder (or a file itself) as one input: names, modes and contents.
 *
 * @param ending of the names that count, in the folder
 */
export async function contentOf(path: string, ending = ''): Promise<string> {
  const info = await stat(path)
  if (info.isFile()) return `${info.mode & 0o111} ${hash(await readFile(path))}`
  const names = (await readdir(path))
    .filter((name) => name.endsWith(ending) && name !== '__pycache__')
    .sort()
  const parts = await Promise.all(
    names.map(async (name) => `${name}: ${await contentOf(join(path, name))}`),
  )
  return hash(parts.join('\n'))
}

export function hash(data: string | Uint8Array): string {
  return createHash('sha256').update(data).digest('hex')
}
