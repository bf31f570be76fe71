// One process at a time: a lock file, complete from the start (a hard link), that names its holder.
import { randomBytes } from 'node:crypto'
import { link, mkdir, readFile, rename, rm, writeFile } from 'node:fs/promises'
import { dirname } from 'node:path'
import type { Cluster, Node } from './cluster.mts'
import { StepError } from './errors.mts'
import { commandLine } from './processes.mts'
import { becomes } from './wait.mts'

interface Holder {
  pid: number
  command: string // its pid alone may belong to another process by now
  purpose: string
  nonce: string // tells two holders in one process apart
}

// Locks of the scripts that started this one, which are open to it, and our own for our children.
const variable = 'CLUSTER_LOCKS'
const inherited = (process.env[variable] ?? '').split(' ').filter(Boolean)
const held = new Set<string>()
/** Whether this process holds a lock now. */
export const isHolding = () => held.size > 0

/** The environment variable by which a script that this one runs is let into its locks. */
export function locksForChildren(): Record<string, string> {
  return { [variable]: [...inherited, ...held].join(' ') }
}

/**
 * Does something that only one process may do at a time. A lock that a parent script holds is
 * entered as well. The second process waits for the first as many seconds as `wait` says.
 * @param path of the lock file; its folder is created
 * @param purpose what is being done, for the error of the second: "another process is starting alpha"
 * @throws StepError that names the holder's purpose, pid and command; what `work` throws
 */
export async function withLock<T>(
  path: string,
  purpose: string,
  work: () => Promise<T>,
  { wait = 0, signal }: { wait?: number; signal?: AbortSignal } = {},
): Promise<T> {
  const { pid } = process
  const [command = '', nonce] = [await commandLine(pid), randomBytes(8).toString('hex')]
  const mine: Holder = { pid, command, purpose, nonce }
  const parent = await holderOf(path)
  if (parent && inherited.includes(parent.nonce)) return work()
  await mkdir(dirname(path), { recursive: true, mode: 0o700 })
  if (!(await becomes(() => take(path, mine), wait, signal))) {
    const other = await holderOf(path)
    throw new StepError(`another process is ${other?.purpose ?? purpose}`, {
      output: other && `${other.command} (pid ${other.pid})`,
      hint: 'wait until it has finished, then try again',
    })
  }
  held.add(mine.nonce)
  try {
    return await work()
  } finally {
    held.delete(mine.nonce)
    if (((await holderOf(path)) ?? mine).nonce === mine.nonce) await rm(path, { force: true })
  }
}

/** The lock of scripts that change the cluster as a whole: snapshot, restore, reconfig, bootstrap, … */
export function withClusterLock<T>(cluster: Cluster, purpose: string, work: () => Promise<T>) {
  return withLock(cluster.path('run', 'bootstrap.lock'), purpose, work)
}

/** The locks of machines: none of these is started or stopped meanwhile, not even by us. */
export function withMachineLocks<T>(
  cluster: Cluster,
  nodes: readonly Node[],
  purpose: string,
  work: () => Promise<T>,
): Promise<T> {
  const [first, ...rest] = nodes
  if (!first) return work()
  const others = () => withMachineLocks(cluster, rest, purpose, work)
  const path = cluster.path('run', `${first.name}.lock`)
  // Long enough for another script to finish starting or stopping the machine.
  return withLock(path, `${purpose} (${first.name})`, others, { wait: 60 })
}

async function take(path: string, mine: Holder): Promise<boolean> {
  const [ours, text] = [path.replace(/[^/]+$/, `.$&.tmp-${mine.nonce}`), JSON.stringify(mine)]
  try {
    await writeFile(ours, text, { mode: 0o600 }).catch((error) => {
      // A full disk: nothing is excluded then, but stopping and deleting must remain possible.
      if (!/^(ENOSPC|EDQUOT)$/.test(error.code)) throw error
    })
    await link(ours, path).catch((error) => {
      // A file system without hard links (exFAT, some shares); or make clean has removed ours.
      if (!/^(EPERM|ENOTSUP|EOPNOTSUPP|ENOSYS|ENOENT)$/.test(error.code)) throw error
      return writeFile(path, text, { mode: 0o600, flag: 'wx' })
    })
    return true
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'EEXIST') throw error
  } finally {
    await rm(ours, { force: true })
  }
  return (await removeIfStale(path, `${ours}.stale`)) && take(path, mine)
}

/**
 * Removes a lock whose holder has ended without releasing it: whether it seems free now. It is
 * renamed first and read again, as another process may have done the same and taken the lock.
 */
async function removeIfStale(path: string, stale: string): Promise<boolean> {
  const holder = await holderOf(path)
  if (holder && (await commandLine(holder.pid)) === holder.command) return false
  await rename(path, stale).catch(() => {})
  const moved = await holderOf(stale)
  const isAnothers = moved !== undefined && moved.nonce !== holder?.nonce
  if (isAnothers) await link(stale, path).catch(() => {})
  await rm(stale, { force: true })
  return !isAnothers
}

async function holderOf(path: string): Promise<Holder | undefined> {
  try {
    return JSON.parse(await readFile(path, 'utf8')) as Holder
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'EACCES') throw error
    return undefined
  }
}
