// Shell texts that run on a machine: files in on-machine/, sent over ssh with their variables
// in front. They run in bash with `set -euo pipefail`, as root.
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { quoteForShell } from './ssh.mts'

/** The text of on-machine/NAME.sh with assignments of these variables before it. */
export function onMachine(name: string, variables: Readonly<Record<string, string>>): string {
  const text = readFileSync(join(import.meta.dirname, 'on-machine', `${name}.sh`), 'utf8')
  const assignments = Object.entries(variables).map(
    ([variable, value]) => `${variable}=${quoteForShell(value)}`,
  )
  return [...assignments, text].join('\n')
}
