// One script of bin/ run by another, in this terminal, as one would type it.
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import type { Cluster } from './cluster.mts'
import { StepError } from './errors.mts'
import { locksForChildren } from './lock.mts'

/**
 * Runs a script to its end. It tells its own errors.
 *
 * @param args as one would type them
 * @param options.signal as `interruption` gives it
 * @param options.failure completes "generate-certs did not succeed, …"
 * @throws StepError if it fails; the signal's reason
 */
export async function runScript(
  cluster: Cluster,
  name: string,
  args: readonly string[],
  { signal, failure, hint }: { signal: AbortSignal; failure: string; hint: string },
): Promise<void> {
  signal.throwIfAborted()
  const command = [`./bin/${name}.mts`, ...args].join(' ')
  console.error(`\n$ ${command}`)
  const child = spawn(cluster.path('bin', `${name}.mts`), args, {
    stdio: 'inherit',
    env: { ...process.env, ...locksForChildren() },
  })
  // Ctrl-C reaches both of us; what is sent to this process alone has to be passed on.
  const forward = () => child.kill('SIGTERM')
  process.once('SIGTERM', forward)
  const [status] = await once(child, 'exit')
  process.off('SIGTERM', forward)
  signal.throwIfAborted()
  if (status === 0) return
  throw new StepError(`${name} did not succeed, ${failure}`, {
    command,
    hint,
    exitCode: status ?? 1,
  })
}
