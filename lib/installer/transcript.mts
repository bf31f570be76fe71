// What a program has said: all of it in a file, the end of it at hand for errors.
import { closeSync, openSync, writeSync } from 'node:fs'

const kept = 16 * 1024

export class Transcript {
  /** False: what is added is neither written nor kept (secrets). */
  recording = true
  readonly path: string | undefined
  private readonly unshown: RegExp | undefined
  private file: number | undefined
  private end = ''

  /**
   * @param path of a file to add to, made for the owner's eyes alone: a console may show anything
   * @param unshown lines that `lastLines` leaves out
   */
  constructor(path?: string, unshown?: RegExp) {
    this.path = path
    this.unshown = unshown
    if (path) this.file = openSync(path, 'a', 0o600)
  }

  /** Adds what the program said. Written at once: it is wanted most when this process dies. */
  add(text: string): void {
    if (!this.recording) return
    this.end = (this.end + text).slice(-kept)
    this.note(text)
  }

  /** Adds words of our own, which are not among the last lines. */
  note(text: string): void {
    if (this.file !== undefined) writeSync(this.file, text)
  }

  /** The last lines, oldest first, without blank ones. */
  lastLines(count = 10): string {
    const shown = (line: string) => line.trim() !== '' && !this.unshown?.test(line)
    return this.end.split('\n').filter(shown).slice(-count).join('\n')
  }

  close(): void {
    if (this.file !== undefined) closeSync(this.file)
    this.file = undefined
  }
}
