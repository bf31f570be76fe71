// Several looks at a machine in one ssh call: a process there takes its time where QEMU emulates
// the processor, and a call several.
import { randomBytes } from 'node:crypto'
import type { Machine } from './machine.mts'

/** One look: what to run, and what its output means. */
export interface Probe<T> {
  /** Shell text for bash with `set -euo pipefail`. */
  command: string
  read(output: string): T
}

/**
 * Runs probes one after the other in one call.
 *
 * @param timeout seconds for all of them
 * @returns what they found, by their names
 * @throws NoAnswer if the machine cannot be reached; StepError if a command fails
 */
export async function runProbes<Probes extends Record<string, Probe<unknown>>>(
  machine: Machine,
  probes: Probes,
  timeout: number,
): Promise<{ [Name in keyof Probes]: ReturnType<Probes[Name]['read']> }> {
  const separator = `== ${randomBytes(8).toString('hex')}`
  const entries = Object.entries(probes)
  const commands = entries.map(([, { command }]) => `(\n${command}\n)\necho '${separator}'`)
  const output = await machine.succeed(commands.join('\n'), { timeout })
  const parts = output.split(`${separator}\n`)
  const found = entries.map(([name, { read }], index) => [name, read(parts[index] ?? '')])
  return Object.fromEntries(found)
}
