// The file system of a machine for what comes over ssh: a mount namespace in which /etc can be
// written and /var/lib is empty, while all else is this computer's.
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdir } from 'node:fs/promises'
import { createInterface } from 'node:readline'
import type { Sshd } from './sshd.mts'

// Only root can mount, as only root can let root in over ssh.
const sudo = process.getuid?.() === 0 ? [] : ['sudo', '-n']

const script = `
mount --make-rprivate /
cd "$1"
mkdir -p etc etc-work var-lib
mount -t overlay overlay -o "lowerdir=/etc,upperdir=$1/etc,workdir=$1/etc-work" /etc
mount --bind var-lib /var/lib
echo first-boot >boot_id
mount --bind boot_id /proc/sys/kernel/random/boot_id
echo $$
read -r _
cd /
rm -rf "$1"`

export interface MachineNamespace {
  stop(): Promise<void>
}

/**
 * Makes a namespace, and has all that runs over ssh run in it.
 *
 * @param folder that is not there yet, for what is written there
 * @throws what unshare or mount says where there can be none
 */
export async function enterNamespace(sshd: Sshd, folder: string): Promise<MachineNamespace> {
  await mkdir(folder, { recursive: true })
  const [file = '', ...args] = [...sudo, 'unshare', '--mount', 'sh', '-euc', script, 'sh', folder]
  const holder = spawn(file, args, { stdio: ['pipe', 'pipe', 'inherit'] })
  const lines = createInterface({ input: holder.stdout })
  const first = await Promise.race([once(lines, 'line'), once(holder, 'exit')])
  if (typeof first[0] !== 'string') throw new Error('no mount namespace could be made')
  // Entering leads to the root folder. (sh, as bash would take itself for the session's first shell
  // and read .bashrc again and again, if that starts another one.)
  const enter = `nsenter --mount --target ${first[0]} /bin/sh -c 'cd "$0" && exec /bin/bash "$@"'`
  await sshd.program('bash', `#!/bin/sh\nexec ${enter} "$PWD" "$@"\n`)
  return {
    stop: async () => {
      if (holder.exitCode !== null) return
      const ended = once(holder, 'exit')
      holder.stdin.end()
      await ended
    },
  }
}
