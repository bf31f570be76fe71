// Programs that a test puts on PATH in place of the system's: shell scripts in a folder.
import { execFileSync } from 'node:child_process'
import { chmodSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

export class FakePrograms {
  /** The folder: PATH of the test. */
  readonly path = mkdtempSync(join(tmpdir(), 'programs-'))
  private readonly record = join(this.path, '.calls')

  /**
   * Adds a program that notes its calls.
   *
   * @param body what it does then, in shell; `$BIN` is the folder
   */
  add(name: string, body = ''): void {
    const lines = ['#!/bin/sh', `BIN='${this.path}'`, `echo "${name} $*" >>'${this.record}'`, body]
    writeFileSync(join(this.path, name), `${lines.join('\n')}\n`)
    chmodSync(join(this.path, name), 0o755)
  }

  /** A program that prints one line, whatever it is asked. */
  say(name: string, line: string): void {
    this.add(name, `echo '${line}'`)
  }

  /** Lets programs of the system be found. */
  link(...names: string[]): void {
    for (const name of names) {
      const path = execFileSync('sh', ['-c', 'command -v "$0"', name], { encoding: 'utf8' }).trim()
      symlinkSync(path, join(this.path, name))
    }
  }

  /** The command lines of all calls so far, in order. */
  calls(): string[] {
    try {
      return readFileSync(this.record, 'utf8').trimEnd().split('\n')
    } catch {
      return []
    }
  }

  remove(): void {
    rmSync(this.path, { recursive: true, force: true })
  }
}
