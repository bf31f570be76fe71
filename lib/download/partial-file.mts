// A file that is still arriving, and the note beside it of what it will become.
import { readFile, rename, rm, stat } from 'node:fs/promises'
import { writeFileAtomic } from '../files.mts'

/** What the bytes are a part of. */
export interface PartialNote {
  url: string
  /** The whole file's SHA-256, where it is known. */
  sha256?: string | undefined
  /** ETag or Last-Modified: with it the server tells whether its file is still the same. */
  validator?: string | undefined
}

/** PATH.partial and PATH.partial.json, which outlive the process that began them. */
export class PartialFile {
  readonly path: string
  private readonly target: string
  private readonly notePath: string

  constructor(target: string) {
    this.target = target
    this.path = `${target}.partial`
    this.notePath = `${this.path}.json`
  }

  /** Bytes that are here; 0 if there is no such file. */
  async size(): Promise<number> {
    return await stat(this.path).then(
      ({ size }) => size,
      () => 0,
    )
  }

  /** The note; undefined where there is none to go by, and the bytes are of no use. */
  async note(): Promise<PartialNote | undefined> {
    try {
      return JSON.parse(await readFile(this.notePath, 'utf8'))
    } catch {
      return undefined
    }
  }

  async writeNote(note: PartialNote): Promise<void> {
    await writeFileAtomic(this.notePath, `${JSON.stringify(note)}\n`)
  }

  async discard(): Promise<void> {
    await rm(this.path, { force: true })
    await rm(this.notePath, { force: true })
  }

  /** Gives the file its name, in place of a former one. */
  async finish(): Promise<void> {
    await rename(this.path, this.target)
    await rm(this.notePath, { force: true })
  }
}
