// Files that are whole or not there: written beside, then renamed over.
import { randomBytes } from 'node:crypto'
import { mkdir, open, rename, rm } from 'node:fs/promises'
import { basename, dirname, join } from 'node:path'

/**
 * Writes a file so that a reader, or an interruption at any moment, sees the former content or
 * the new one and nothing in between. Missing folders are made.
 *
 * @param mode permission bits of the file, in force from its first byte on (0o600 for secrets)
 * @throws the file system's error; the former file is then untouched
 */
export async function writeFileAtomic(
  path: string,
  data: string | Uint8Array,
  mode = 0o644,
): Promise<void> {
  await mkdir(dirname(path), { recursive: true })
  const beside = join(
    dirname(path),
    `.${basename(path)}.tmp-${process.pid}-${randomBytes(4).toString('hex')}`,
  )
  try {
    const file = await open(beside, 'wx', mode)
    try {
      // The umask may have taken bits away from what open() was given.
      await file.chmod(mode)
      await file.writeFile(data)
    } finally {
      await file.close()
    }
    await rename(beside, path)
  } catch (error) {
    await rm(beside, { force: true })
    throw error
  }
}
