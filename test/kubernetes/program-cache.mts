// Programs kept by version under the user's cache folder, each whole or not there.
import { existsSync } from 'node:fs'
import { chmod, mkdir, rename, rm } from 'node:fs/promises'
import { homedir } from 'node:os'
import { join } from 'node:path'
import { withLock } from '../../lib/lock.mts'

/** GOARCH of this computer, as the download site and Go call it. */
export const architecture = process.arch === 'x64' ? 'amd64' : process.arch

/** A plain line of progress on stderr. */
export function say(line: string): void {
  console.error(`programs: ${line}`)
}

/**
 * The cache folder that holds `names`, after creating those that are missing. If another process is
 * creating some, this waits for it.
 *
 * @param set such as "kubernetes-v1.36.3"
 * @param make puts the missing programs, by their names, into a folder
 * @throws what `make` throws; nothing of its work is kept then
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
  const makeMissing = async () => {
    const wanted = missing()
    if (wanted.length === 0) return
    // An interrupted process may have left it behind.
    const into = `${folder}.partial`
    await rm(into, { recursive: true, force: true })
    await mkdir(into)
    try {
      await make(wanted, into)
      for (const name of wanted) {
        await chmod(join(into, name), 0o755)
        await rename(join(into, name), join(folder, name))
      }
    } finally {
      await rm(into, { recursive: true, force: true })
    }
  }
  const lock = `${folder}.lock`
  if (existsSync(lock)) say(`waiting for another process that is making ${set}`)
  // An hour is more than a build takes on a slow computer.
  await withLock(lock, `making ${set}`, makeMissing, { wait: 3600 })
  return folder
}
