// Programs kept by version under the user's cache folder, each whole or not there.
import { existsSync } from 'node:fs'
import { chmod, mkdir, mkdtemp, rename, rm, rmdir, stat, utimes } from 'node:fs/promises'
import { homedir } from 'node:os'
import { dirname, join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'

const heartbeat = 2_000
const silence = 10_000

/** GOARCH of this computer, as the download site and Go call it. */
export const architecture = process.arch === 'x64' ? 'amd64' : process.arch

/** A plain line of progress on stderr. */
export function say(line: string): void {
  console.error(`programs: ${line}`)
}

/**
 * The cache folder that holds `names`, after making those that are missing. Whoever comes while
 * another process makes some waits for it and then finds them.
 *
 * @param set such as "kubernetes-v1.36.3"
 * @param make puts the missing programs, by their names, into the folder it is given
 * @throws what `make` throws; no part of its work is kept then
 */
export async function cachedPrograms(
  set: string,
  names: readonly string[],
  env: NodeJS.ProcessEnv,
  make: (missing: readonly string[], into: string) => Promise<void>,
): Promise<string> {
  const cache = join(env.XDG_CACHE_HOME || join(homedir(), '.cache'), 'kubernetes-the-hardest-way')
  const folder = join(cache, `${set}-linux-${architecture}`)
  const missing = () => names.filter((name) => !existsSync(join(folder, name)))
  if (missing().length === 0) return folder

  await mkdir(folder, { recursive: true })
  await oneAtATime(`${folder}.lock`, async () => {
    const wanted = missing()
    if (wanted.length === 0) return
    const into = await mkdtemp(join(cache, '.partial-'))
    try {
      await make(wanted, into)
      for (const name of wanted) {
        await chmod(join(into, name), 0o755)
        await rename(join(into, name), join(folder, name))
      }
    } finally {
      await rm(into, { recursive: true, force: true })
    }
  })
  return folder
}

/**
 * One process at a time does `work`. The lock is a folder that its holder touches; one that was
 * left untouched belongs to a process that died. Only double work is at stake, as programs
 * are renamed into place.
 */
async function oneAtATime(lock: string, work: () => Promise<void>): Promise<void> {
  let told = false
  while (!(await taken(lock))) {
    const age = Date.now() - (await stat(lock).then(({ mtimeMs }) => mtimeMs, Date.now))
    if (age > silence) {
      await rmdir(lock).catch(() => {})
      continue
    }
    if (!told) say(`another process makes ${lock.replace(/\.lock$/, '')}, waiting for it`)
    told = true
    await sleep(250)
  }
  const beat = setInterval(() => {
    utimes(lock, new Date(), new Date()).catch(() => {})
  }, heartbeat)
  try {
    await work()
  } finally {
    clearInterval(beat)
    await rmdir(lock).catch(() => {})
  }
}

async function taken(lock: string): Promise<boolean> {
  await mkdir(dirname(lock), { recursive: true })
  return mkdir(lock).then(
    () => true,
    (error: NodeJS.ErrnoException) => {
      if (error.code === 'EEXIST') return false
      throw error
    },
  )
}
