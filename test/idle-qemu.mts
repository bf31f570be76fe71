// A real QEMU that emulates nothing, with the pid file of a node: a machine that runs and never
// says a word.
import { type ChildProcess, execFile, spawn } from 'node:child_process'
import { once } from 'node:events'
import { readFile } from 'node:fs/promises'
import { setTimeout as sleep } from 'node:timers/promises'
import { promisify } from 'node:util'
import { loadCluster } from '../lib/cluster.mts'
import { filesOf, prepareFolders } from '../lib/vm.mts'
import type { Checkout } from './checkout.mts'

const program = 'qemu-system-x86_64'

/** Why there can be none here; false if there can. */
export const noQemu = await promisify(execFile)(program, ['--version']).then(
  () => false as const,
  () => `${program} is missing`,
)

const running = new Set<ChildProcess>()
// Should the test be ended from outside.
process.once('exit', () => {
  for (const child of running) child.kill('SIGKILL')
})

export interface IdleQemu {
  pid: number
  /** Ends it as a crash would. */
  stop(): Promise<void>
}

/** Starts it, and returns when the pid file is there. */
export async function startIdleQemu(checkout: Checkout, name: string): Promise<IdleQemu> {
  const cluster = loadCluster({ root: checkout.root, env: {} })
  const files = filesOf(cluster, cluster.node(name))
  await prepareFolders(cluster)
  const child = spawn(
    program,
    [
      ...['-machine', 'none', '-nodefaults', '-display', 'none', '-pidfile', files.pid],
      ...['-qmp', `unix:${name}.qmp,server=on,wait=off`],
    ],
    { cwd: cluster.path('run'), stdio: 'ignore' },
  )
  running.add(child)
  while ((await readFile(files.pid, 'utf8').catch(() => '')).trim() !== String(child.pid)) {
    if (child.exitCode !== null) throw new Error(`${program} ended with status ${child.exitCode}`)
    await sleep(20)
  }
  return {
    pid: child.pid ?? 0,
    async stop() {
      running.delete(child)
      if (child.exitCode !== null || child.signalCode !== null) return
      const ended = once(child, 'exit')
      child.kill('SIGKILL')
      await ended
    },
  }
}
