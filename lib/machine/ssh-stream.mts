// Files to and from commands on a machine, of any size: ssh reads and writes them itself.
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { open } from 'node:fs/promises'
import { text } from 'node:stream/consumers'
import { StepError } from '../errors.mts'
import type { Machine } from './machine.mts'
import { NoAnswer, quoteForShell, sshArguments, sshFolder } from './ssh.mts'

/**
 * Runs shell text on a machine as Machine.succeed does, with its standard input from a file, or
 * its standard output to a new one.
 *
 * @returns what it said on stderr
 * @throws NoAnswer if the connection ends before the command does; StepError if its status is not 0
 */
export async function stream(
  machine: Machine,
  command: string,
  files: { from?: string; to?: string; signal?: AbortSignal },
): Promise<string> {
  const { cluster, node } = machine
  // The connection that both calls share; and if there is none, the better words for it.
  await machine.succeed('true')
  const [input, output] = await Promise.all([
    files.from === undefined ? undefined : open(files.from, 'r'),
    files.to === undefined ? undefined : open(files.to, 'wx', 0o600),
  ])
  try {
    const remote = `bash -euo pipefail -c ${quoteForShell(command)} || exit $(($? == 255 ? 254 : $?))`
    const ssh = spawn('ssh', [...sshArguments(node), remote], {
      cwd: await sshFolder(cluster),
      detached: true,
      stdio: [input?.fd ?? 'ignore', output?.fd ?? 'ignore', 'pipe'],
    })
    // Not spawn's own: it would throw where nobody catches.
    const end = () => ssh.kill()
    files.signal?.addEventListener('abort', end)
    const [said, [status]] = await Promise.all([
      ssh.stderr ? text(ssh.stderr) : '',
      once(ssh, 'exit') as Promise<[number | null]>,
    ])
    files.signal?.removeEventListener('abort', end)
    files.signal?.throwIfAborted()
    if (status === 0) return said
    const lines = said.trim().split('\n').slice(-15).join('\n')
    if (status === null || status === 255) {
      throw new NoAnswer(`the connection to ${node.name} was cut`, { output: lines })
    }
    throw new StepError(`a command on ${node.name} ended with status ${status}`, { output: lines })
  } finally {
    await Promise.all([input?.close(), output?.close()])
  }
}
