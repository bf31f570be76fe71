// Which process a pid file means. A pid alone says little: after a crash or a restart of this
// computer the number may be anyone's. Only what a process was started with tells whose it is.
import { readFile } from 'node:fs/promises'
import { $ } from 'zx/core'

/**
 * What a process was started with, its arguments with single spaces between.
 *
 * @returns undefined if there is no such process, or it has ended and waits to be collected
 */
export async function commandLine(pid: number): Promise<string | undefined> {
  if (process.platform === 'linux') {
    const text = await readFile(`/proc/${pid}/cmdline`, 'utf8').catch(() => '')
    return text.replace(/\0$/, '').replaceAll('\0', ' ') || undefined
  }
  const ps = await $({ quiet: true, nothrow: true })`ps -ww -o stat=,args= -p ${pid}`
  const [, state, args] = ps.stdout.trim().match(/^(\S+)\s+(.*)$/s) ?? []
  return state && !state.startsWith('Z') ? args : undefined
}

/**
 * Whether a process has ended for good. It shows no arguments any more a moment before that, when
 * its ports and files are open still.
 */
export async function isGone(pid: number): Promise<boolean> {
  if (process.platform !== 'linux') {
    const { stdout } = await $({ quiet: true, nothrow: true })`ps -o stat= -p ${pid}`
    return /^(Z|$)/.test(stdout.trim())
  }
  const text = await readFile(`/proc/${pid}/stat`, 'utf8').catch(() => undefined)
  if (text === undefined) return true
  // proc(5): the fields after the name, which stands in parentheses and may hold anything.
  const fields = text.slice(text.lastIndexOf(')') + 2).split(' ')
  const [state, threads] = [fields[0], Number(fields[17])]
  // The first thread may have ended while others still hold what they share.
  return (state === 'Z' || state === 'X') && threads <= 1
}

/**
 * The process that a pid file names, if it is still the one that the file was written for.
 *
 * @param marks texts that its command line must hold, all of them
 * @returns its pid; undefined if there is no file, no process, or another's
 */
export async function pidFrom(file: string, marks: readonly string[]): Promise<number | undefined> {
  const text = await readFile(file, 'utf8').catch(() => '')
  const pid = Number(text.trim())
  if (!Number.isInteger(pid) || pid < 2) return undefined
  const line = await commandLine(pid)
  return line && marks.every((mark) => line.includes(mark)) ? pid : undefined
}
