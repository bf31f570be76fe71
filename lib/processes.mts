// Processes and ports of this computer: what a pid file refers to, and who holds a port.
import { execFile } from 'node:child_process'
import { createSocket } from 'node:dgram'
import { readFile } from 'node:fs/promises'
import { createConnection, createServer } from 'node:net'
import { which } from 'zx/core'
import { StepError } from './errors.mts'

// macOS's ps replaces what the locale cannot express, and with LC_ALL=C that is every "ü" of a path.
const unicode = process.platform === 'darwin' ? 'en_US.UTF-8' : 'C.UTF-8'

/** A program of the system, where it usually is if PATH does not have its folder (sysctl, lsof). */
export async function systemProgram(name: string): Promise<string> {
  const path = `${process.env.PATH ?? ''}:/usr/sbin:/sbin:/usr/bin:/bin`
  return (await which(name, { nothrow: true, path })) ?? name
}

/** Standard output of a system program, whatever its status. No step of ours, so without zx. */
async function outputOf(name: string, args: string[]): Promise<string> {
  const program = await systemProgram(name)
  const env = { ...process.env, LC_ALL: unicode }
  return new Promise((resolve) => {
    execFile(program, args, { env }, (_, stdout) => resolve(stdout.trim()))
  })
}

/** Columns of `ps`, named as in its manual; empty if there is no such process. */
function ps(pid: number, columns: string): Promise<string> {
  return outputOf('ps', ['-ww', '-o', columns, '-p', `${pid}`])
}

/**
 * The arguments a process was started with, joined by single spaces.
 *
 * @returns undefined if there is no such process, or it is a zombie
 */
export async function commandLine(
  pid: number,
  os: NodeJS.Platform = process.platform,
): Promise<string | undefined> {
  if (os === 'linux') {
    const text = await readFile(`/proc/${pid}/cmdline`, 'utf8').catch(() => '')
    return text.replace(/\0$/, '').replaceAll('\0', ' ') || undefined
  }
  const [, state, args] = (await ps(pid, 'stat=,args=')).match(/^(\S+)\s+(.*)$/s) ?? []
  return state && !state.startsWith('Z') ? args : undefined
}

/**
 * Whether a process has ended completely. Its arguments disappear a moment earlier, when its ports
 * and files are still open.
 */
export async function isGone(
  pid: number,
  os: NodeJS.Platform = process.platform,
): Promise<boolean> {
  if (os !== 'linux') return /^(Z|$)/.test(await ps(pid, 'stat='))
  const text = await readFile(`/proc/${pid}/stat`, 'utf8').catch(() => undefined)
  if (text === undefined) return true
  // proc(5): the fields after the name, which is in parentheses and may contain anything.
  const fields = text.slice(text.lastIndexOf(')') + 2).split(' ')
  const [state, threads] = [fields[0], Number(fields[17])]
  // The first thread may have ended while others still hold what they share.
  return (state === 'Z' || state === 'X') && threads <= 1
}

/**
 * The process that a pid file refers to. The number alone proves nothing: after a crash or a
 * restart of this computer it may be another program's.
 *
 * @param marks texts that its command line must contain, all of them
 * @returns its pid; undefined if there is no file, no process, or another program's
 */
export async function pidFrom(file: string, marks: readonly string[]): Promise<number | undefined> {
  const pid = Number((await readFile(file, 'utf8').catch(() => '')).trim())
  if (!Number.isInteger(pid) || pid < 2) return undefined
  const line = await commandLine(pid)
  return line && marks.every((mark) => line.includes(mark)) ? pid : undefined
}

export type Transport = 'tcp' | 'udp'

export interface Port {
  transport: Transport
  port: number
  /** The variable of cluster.env that it comes from. */
  variable: string
}

const address = '127.0.0.1'

/**
 * Checks that ports can be opened. QEMU itself would not notice that a UDP port is taken: it would
 * share the traffic with the other program.
 *
 * @throws StepError with every port that is taken, its variable and its holder
 */
export async function assertFree(ports: readonly Port[]): Promise<void> {
  const taken: Port[] = []
  for (const port of ports) if (!(await isPortFree(port.transport, port.port))) taken.push(port)
  if (taken.length === 0) return
  const reasons = await Promise.all(
    taken.map(async ({ transport, port, variable }) => {
      const holder = (await portHolder(transport, port)) ?? 'a process that cannot be identified'
      return `${transport.toUpperCase()} port ${port} (${variable}) is taken by ${holder}`
    }),
  )
  const variables = [...new Set(taken.map(({ variable }) => variable))].join(', ')
  const [first = '', ...others] = reasons
  throw new StepError(others.length === 0 ? first : `${taken.length} ports are taken`, {
    ...(others.length > 0 ? { output: reasons.join('\n') } : {}),
    hint: `end that process, or set other values in cluster.env: ${variables}`,
  })
}

/** Whether a port of 127.0.0.1 could be opened now. */
export async function isPortFree(transport: Transport, port: number): Promise<boolean> {
  if (transport === 'udp') {
    return new Promise((resolve) => {
      const socket = createSocket('udp4')
      socket.once('error', () => resolve(false))
      socket.bind({ address, port, exclusive: true }, () => socket.close(() => resolve(true)))
    })
  }
  // On macOS a listener on 0.0.0.0 does not prevent one on 127.0.0.1, so both are tried.
  const answers = await new Promise<boolean>((resolve) => {
    const socket = createConnection({ host: address, port })
    socket.once('connect', () => {
      socket.destroy()
      resolve(true)
    })
    socket.once('error', () => resolve(false))
  })
  if (answers) return false
  return new Promise((resolve) => {
    const server = createServer()
    server.once('error', () => resolve(false))
    server.listen({ host: address, port, exclusive: true }, () => server.close(() => resolve(true)))
  })
}

/**
 * Who holds a port: "sshd (pid 812)".
 *
 * @returns undefined if it is not known: another user's process, or neither lsof nor ss is installed
 */
export async function portHolder(transport: Transport, port: number): Promise<string | undefined> {
  const [states, table] = transport === 'tcp' ? [['-sTCP:LISTEN'], '-t'] : [[], '-u']
  const [lsof, ss] = await Promise.all([
    outputOf('lsof', ['-nP', `-i${transport}:${port}`, ...states, '-Fpc']), // p812, csshd
    outputOf('ss', ['-Hlnp', table, `sport = :${port}`]), // users:(("sshd",pid=812,fd=3))
  ])
  const pid = lsof.match(/^p(\d+)$/m)?.[1] ?? ss.match(/pid=(\d+)/)?.[1]
  const name = lsof.match(/^c(.+)$/m)?.[1] ?? ss.match(/\(\("([^"]+)"/)?.[1]
  return pid && `${name ?? 'a process'} (pid ${pid})`
}
