// Files that are complete or absent: written next to their place, then renamed over it.
import { createHash, randomBytes } from 'node:crypto'
import { chmod, mkdir, readFile, rename, rm, writeFile } from 'node:fs/promises'
import { basename, dirname, join } from 'node:path'

/**
 * Writes a file so that a reader, or an interruption at any moment, sees either the previous or
 * the new content. Missing folders are created.
 * @param mode permission bits from the first byte on, whatever the umask (0o600 for secrets)
 * @throws the file system's error; the previous file is then unchanged
 */
export async function writeFileAtomic(path: string, data: string | Uint8Array, mode = 0o644) {
  await mkdir(dirname(path), { recursive: true })
  const suffix = `${process.pid}-${randomBytes(4).toString('hex')}`
  const temporary = join(dirname(path), `.${basename(path)}.tmp-${suffix}`)
  try {
    await writeFile(temporary, data, { mode, flag: 'wx' })
    await chmod(temporary, mode)
    await rename(temporary, path)
  } catch (error) {
    await rm(temporary, { force: true })
    throw error
  }
}

/** The text of a file; undefined if it does not exist. One that cannot be read is an error. */
export async function readIfThere(path: string): Promise<string | undefined> {
  return readFile(path, 'utf8').catch((error) => {
    if (error.code === 'ENOENT') return undefined
    throw error
  })
}

/** The SHA-256 of data in memory, in hexadecimal. */
export function sha256(data: string | Uint8Array): string {
  return createHash('sha256').update(data).digest('hex')
}

/** Creates a folder for secrets: mode 0700 whatever the umask, also if it exists already. */
export async function privateFolder(path: string): Promise<void> {
  await mkdir(path, { recursive: true, mode: 0o700 })
  await chmod(path, 0o700)
}
