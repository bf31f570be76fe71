// One at a time, among processes: a file that names its holder. Its content is put there in one
// step, by a hard link, so nobody ever reads half of it.
import { randomBytes } from 'node:crypto'
import { link, mkdir, readFile, rename, rm, writeFile } from 'node:fs/promises'
import { dirname } from 'node:path'
import { becomes, commandLine } from './qemu/processes.mts'
import { StepError } from './step-error.mts'

interface Holder {
  pid: number
  /** What that process was started with: its number alone may be another's by now. */
  command: string
  /** What it holds the lock for. */
  purpose: string
  /** Tells two holders in one process apart. */
  nonce: string
}

/**
 * Does something that only one process may do at a time.
 *
 * @param path of the lock file; its folder is made
 * @param purpose what is being done, for whoever comes second: "another process is starting alpha"
 * @param options.wait seconds to wait for another holder; none unless said
 * @throws StepError that names the other's purpose, pid and command; what `work` throws
 */
export async function withLock<T>(
  path: string,
  purpose: string,
  work: () => Promise<T>,
  options: { wait?: number; signal?: AbortSignal } = {},
): Promise<T> {
  const mine: Holder = {
    pid: process.pid,
    command: (await commandLine(process.pid)) ?? '',
    purpose,
    nonce: randomBytes(8).toString('hex'),
  }
  await mkdir(dirname(path), { recursive: true, mode: 0o700 })
  const taken = await becomes(() => take(path, mine), options.wait ?? 0, options.signal)
  if (!taken) {
    const other = await holderOf(path)
    throw new StepError(`another process is ${other?.purpose ?? purpose}`, {
      ...(other ? { command: `${other.command} (pid ${other.pid})` } : {}),
      hint: 'let it finish, then try again',
    })
  }
  try {
    return await work()
  } finally {
    if ((await holderOf(path))?.nonce === mine.nonce) await rm(path, { force: true })
  }
}

async function take(path: string, mine: Holder): Promise<boolean> {
  const beside = `${path}.${mine.nonce}`
  await writeFile(beside, JSON.stringify(mine), { mode: 0o600 })
  try {
    await link(beside, path)
    return true
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'EEXIST') throw error
  } finally {
    await rm(beside, { force: true })
  }
  return (await removeIfStale(path, `${beside}.stale`)) && take(path, mine)
}

/**
 * Removes a lock whose holder has ended without giving it back. It is moved aside first and looked
 * at again there: in between, someone else may have done the same and taken the lock.
 *
 * @returns whether the lock is free now, as far as one can tell
 */
async function removeIfStale(path: string, aside: string): Promise<boolean> {
  const holder = await holderOf(path)
  if (holder && (await commandLine(holder.pid)) === holder.command) return false
  await rename(path, aside).catch(() => {})
  const moved = await holderOf(aside)
  const isAnothers = moved !== undefined && moved.nonce !== holder?.nonce
  if (isAnothers) await link(aside, path).catch(() => {})
  await rm(aside, { force: true })
  return !isAnothers
}

async function holderOf(path: string): Promise<Holder | undefined> {
  try {
    return JSON.parse(await readFile(path, 'utf8')) as Holder
  } catch {
    return undefined
  }
}
