// One ssh call to a machine: its key, its pinned host key, its forwarded port, and a connection
// that later calls share (a handshake takes a second where QEMU emulates the processor).
import { spawn } from 'node:child_process'
import { access, mkdir } from 'node:fs/promises'
import { $ } from 'zx/core'
import type { Cluster, Node } from '../cluster.mts'
import { StepError } from '../errors.mts'

/** What a command on a machine answered. */
export interface Answer {
  /** Its exit status; 255 is told as 254, since ssh keeps that for itself. */
  status: number
  stdout: string
  stderr: string
}

/** The machine gave no answer, which may be different a moment later. */
export class NoAnswer extends StepError {}

/** How ssh ends when trying again would not help, and why that is. */
const refusals = [
  {
    pattern: /Host key verification failed|No .* host key is known/,
    reason: (node: Node) =>
      `what answers on 127.0.0.1:${node.sshPort} does not have ${node.name}'s host key`,
    hint: (node: Node) =>
      `another program may hold the port (SSH_PORT_${node.name.replaceAll('-', '_')}), or tls/ was made anew after the machine was installed`,
  },
  {
    pattern: /Permission denied \(/,
    reason: (node: Node) => `${node.name} does not accept the key tls/ssh_ed25519`,
    hint: (node: Node) =>
      `it was installed with another key; install it anew: remove images/${node.name}.qcow2, then make all`,
  },
]

/**
 * The arguments of ssh up to the command. All paths are relative to run/, where ssh has to be
 * started: a unix socket's path has no more than some 100 bytes, and the checkout's may be long.
 */
export function sshArguments(node: Node): string[] {
  const options = {
    BatchMode: 'yes',
    ConnectTimeout: 10,
    ControlMaster: 'auto',
    ControlPath: `${node.name}.ssh`,
    ControlPersist: 60,
    GlobalKnownHostsFile: '/dev/null',
    HostKeyAlgorithms: 'ssh-ed25519',
    IdentitiesOnly: 'yes',
    IdentityAgent: 'none',
    IdentityFile: '../tls/ssh_ed25519',
    LogLevel: 'ERROR',
    ServerAliveInterval: 10,
    StrictHostKeyChecking: 'yes',
    UpdateHostKeys: 'no',
    UserKnownHostsFile: '../tls/known_hosts',
  }
  const settings = Object.entries(options).flatMap(([name, value]) => ['-o', `${name}=${value}`])
  return ['-F', 'none', ...settings, '-p', String(node.sshPort), 'root@127.0.0.1']
}

/**
 * Makes sure that ssh has its key and its list of host keys.
 *
 * @returns the folder to start ssh in
 * @throws StepError if they have not been made yet
 */
export async function sshFolder(cluster: Cluster): Promise<string> {
  for (const name of ['ssh_ed25519', 'known_hosts']) {
    await access(cluster.path('tls', name)).catch((cause) => {
      throw new StepError(`tls/${name} is missing`, { hint: 'make certs', cause })
    })
  }
  await mkdir(cluster.path('run'), { recursive: true, mode: 0o700 })
  return cluster.path('run')
}

/**
 * Runs shell text on a machine, as root, in bash with `set -euo pipefail`.
 *
 * @param options.input what the command reads from its standard input; nothing if left out
 * @param options.timeout seconds
 * @throws NoAnswer if the machine cannot be reached or is too slow (the command may then still run
 *   there); StepError if it is another machine or does not let us in; the signal's reason
 */
export async function runOverSsh(
  cluster: Cluster,
  node: Node,
  command: string,
  options: { input?: string | Buffer; timeout: number; signal?: AbortSignal | undefined },
): Promise<Answer> {
  const { input = '', timeout, signal } = options
  const cwd = await sshFolder(cluster)
  signal?.throwIfAborted()
  const remote = `bash -euo pipefail -c ${quoteForShell(command)} || exit $(($? == 255 ? 254 : $?))`
  if ($.verbose) console.error(`[${node.name}] $ ${command}`)

  const { status, stdout, stderr } = await new Promise<Answer>((resolve, reject) => {
    // In a process group of its own: a Ctrl-C in the terminal is for us, who know whether a command
    // may be cut off. Not zx: the shared connection holds the pipes of a call that was ended, and zx
    // would wait for their end.
    const child = spawn('ssh', [...sshArguments(node), remote], { cwd, detached: true })
    const said = { stdout: '', stderr: '' }
    for (const name of ['stdout', 'stderr'] as const) {
      child[name].setEncoding('utf8').on('data', (text: string) => {
        said[name] += text
      })
    }
    const giveUp = (reason: unknown) => {
      child.kill()
      child.stdout.destroy()
      child.stderr.destroy()
      settle(() => reject(reason))
    }
    const tooSlow = () => giveUp(new NoAnswer(`${node.name} did not answer within ${timeout} s`))
    const aborted = () => giveUp(signal?.reason)
    const timer = setTimeout(tooSlow, timeout * 1000)
    signal?.addEventListener('abort', aborted)
    const settle = (tell: () => void) => {
      clearTimeout(timer)
      signal?.removeEventListener('abort', aborted)
      tell()
    }
    child.once('error', (error) => settle(() => reject(error)))
    // Ended by somebody else's signal, it has no status: as if the connection had been cut.
    child.once('close', (code) => settle(() => resolve({ status: code ?? 255, ...said })))
    // A command need not read what it is given.
    child.stdin.on('error', () => {})
    child.stdin.end(input)
  })
  if (status !== 255) return { status, stdout, stderr }
  for (const { pattern, reason, hint } of refusals) {
    if (pattern.test(stderr)) {
      throw new StepError(reason(node), { output: lastLine(stderr), hint: hint(node) })
    }
  }
  throw new NoAnswer(`${node.name} does not answer ssh: ${lastLine(stderr) || 'no reason given'}`)
}

/** A word that any POSIX shell reads back as this text. */
export function quoteForShell(text: string): string {
  return `'${text.replaceAll("'", `'\\''`)}'`
}

function lastLine(text: string): string {
  return text.trim().split('\n').at(-1)?.trim() ?? ''
}
