// Processes and ports of this computer: what a pid file refers to, and who holds a port.
import { execFile } from 'node:child_process'
import { createSocket, type Socket } from 'node:dgram'
import { once } from 'node:events'
import { readdir, readFile } from 'node:fs/promises'
import { createConnection, createServer, type Server } from 'node:net'
import { StepError } from './errors.mts'

// macOS's ps replaces what the locale cannot express, and with LC_ALL=C that is every "ü" of a path.
const unicode = process.platform === 'darwin' ? 'en_US.UTF-8' : 'C.UTF-8'

/** What a system program prints, whatever its status and PATH. No step of ours, so without zx. */
function outputOf(name: string, ...args: string[]): Promise<string> {
  const path = `${process.env.PATH ?? ''}:/usr/sbin:/sbin:/usr/bin:/bin`
  const env = { ...process.env, PATH: path, LC_ALL: unicode }
  return new Promise((resolve) => {
    execFile(name, args, { env }, (_, stdout) => resolve(stdout.trim()))
  })
}

/** A process's arguments, joined by spaces; undefined if there is none, or it is a zombie. */
export async function commandLine(pid: number, os: NodeJS.Platform = process.platform) {
  if (os === 'linux') {
    const text = await readFile(`/proc/${pid}/cmdline`, 'utf8').catch(() => '')
    return text.replace(/\0$/, '').replaceAll('\0', ' ') || undefined
  }
  // Two -o: by POSIX, all that follows a "=" is a heading.
  const line = await outputOf('ps', '-ww', '-o', 'stat=', '-o', 'args=', '-p', `${pid}`)
  return line.match(/^[^Z\s]\S*\s+(.*)$/s)?.[1]
}

/** The arguments of all processes that this user can see, by their pids. */
export async function commandLines(): Promise<Map<number, string>> {
  if (process.platform === 'linux') {
    const pids = (await readdir('/proc')).map(Number).filter((pid) => pid > 0)
    const lines = await Promise.all(pids.map((pid) => commandLine(pid, 'linux')))
    return new Map(pids.map((pid, index) => [pid, lines[index] ?? '']))
  }
  const lines = (await outputOf('ps', '-A', '-ww', '-o', 'pid=', '-o', 'args=')).split('\n')
  return new Map(lines.map((line) => [Number.parseInt(line, 10), line.replace(/^ *\d+ /, '')]))
}

/** The bytes of memory that a process uses. */
export async function memoryOf(pid: number): Promise<number> {
  const status = await readFile(`/proc/${pid}/status`, 'utf8').catch(() => '')
  const found = status.match(/^VmRSS:\s+(\d+) kB$/m)?.[1]
  return 1024 * Number(found ?? (await outputOf('ps', '-o', 'rss=', '-p', `${pid}`)))
}

/** Whether a process has ended completely. Its ports are still open when its arguments disappear. */
export async function isGone(pid: number, os: NodeJS.Platform = process.platform) {
  if (os !== 'linux') return /^(Z|$)/.test(await outputOf('ps', '-o', 'stat=', '-p', `${pid}`))
  const text = await readFile(`/proc/${pid}/stat`, 'utf8').catch(() => undefined)
  if (text === undefined) return true
  // proc(5): the fields after the name, which is in parentheses and may contain anything.
  const fields = text.slice(text.lastIndexOf(')') + 2).split(' ')
  // The first thread may have ended while others still hold what they share.
  return /[ZX]/.test(fields[0] ?? '') && Number(fields[17]) <= 1
}

/**
 * The pid in a file, if all of `marks` are in the command line of its process. The number alone
 * proves nothing: after a crash or a restart of this computer it may be another program's.
 */
export async function pidFrom(file: string, marks: readonly string[]): Promise<number | undefined> {
  const pid = Number((await readFile(file, 'utf8').catch(() => '')).trim())
  if (!Number.isInteger(pid) || pid < 2) return undefined
  const line = await commandLine(pid)
  return line && marks.every((mark) => line.includes(mark)) ? pid : undefined
}

export type Transport = 'tcp' | 'udp'
/** A port, and the variable of cluster.env that it comes from. */
export type Port = { transport: Transport; port: number; variable: string }

const address = '127.0.0.1'

/**
 * Throws a StepError that names each port that is taken, its variable and its holder. QEMU itself
 * would not notice that a UDP port is taken: it would share the traffic with the other program.
 */
export async function assertFree(ports: readonly Port[]): Promise<void> {
  const variables = new Set<string>()
  const reasons: string[] = []
  for (const { transport, port, variable } of ports) {
    if (await isPortFree(transport, port)) continue
    const holder = (await portHolder(transport, port)) ?? 'a process that cannot be identified'
    variables.add(variable)
    reasons.push(`${transport.toUpperCase()} port ${port} (${variable}) is taken by ${holder}`)
  }
  const [first, ...others] = reasons
  if (!first) return
  throw new StepError(others.length === 0 ? first : `${reasons.length} ports are taken`, {
    output: others.length > 0 ? reasons.join('\n') : '',
    hint: `end that process, or set other values in cluster.env: ${[...variables].join(', ')}`,
  })
}

/** Whether a port of 127.0.0.1 could be opened now. */
export async function isPortFree(transport: Transport, port: number): Promise<boolean> {
  const place = { port, exclusive: true }
  if (transport === 'udp') return opens(createSocket('udp4').bind({ ...place, address }))
  // On macOS a listener on 0.0.0.0 does not prevent one on 127.0.0.1, so both are tried.
  const connection = createConnection({ host: address, port })
  const answers = await reaches(connection, 'connect')
  connection.destroy()
  return !answers && opens(createServer().listen({ ...place, host: address }))
}

async function opens(socket: Server | Socket): Promise<boolean> {
  const opened = await reaches(socket, 'listening')
  if (opened) await new Promise<void>((resolve) => socket.close(() => resolve()))
  return opened
}

/** Whether it emits that event, and no error. */
function reaches(socket: NodeJS.EventEmitter, event: string): Promise<boolean> {
  return once(socket, event).then(
    () => true,
    () => false,
  )
}

/** Who holds a port: "sshd (pid 812)". Unknown if it is another user's, or without lsof and ss. */
export async function portHolder(transport: Transport, port: number): Promise<string | undefined> {
  const states = transport === 'tcp' ? ['-sTCP:LISTEN'] : []
  const [lsof, ss] = await Promise.all([
    outputOf('lsof', '-nP', `-i${transport}:${port}`, ...states, '-Fpc'), // p812, csshd
    outputOf('ss', '-Hlnp', `--${transport}`, `sport = :${port}`), // users:(("sshd",pid=812,fd=3))
  ])
  const pid = lsof.match(/^p(\d+)$/m)?.[1] ?? ss.match(/pid=(\d+)/)?.[1]
  const name = lsof.match(/^c(.+)$/m)?.[1] ?? ss.match(/\(\("([^"]+)"/)?.[1]
  return pid && `${name ?? 'a process'} (pid ${pid})`
}
