// Files that may be missing.
import { readFile } from 'node:fs/promises'

/**
 * The text of a file; undefined if there is none.
 *
 * @throws the file system's error for a file that is there and cannot be read
 */
export async function readIfThere(path: string): Promise<string | undefined> {
  try {
    return await readFile(path, 'utf8')
  } catch (error) {
    if (error instanceof Error && 'code' in error && error.code === 'ENOENT') return undefined
    throw error
  }
}
