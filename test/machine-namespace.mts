// The file system of a machine for what comes over ssh: a mount namespace in which /etc can be
// written and /run, /var/lib and /var/log are empty. Everything else is this computer's.
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
mkdir -p etc etc-work run var-lib var-log
mount -t overlay overlay -o "lowerdir=/etc,upperdir=$1/etc,workdir=$1/etc-work" /etc
touch /etc/set-environment
mount --bind var-lib /var/lib
mount --bind var-log /var/log
mount --bind run /run
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
 * Creates a namespace, in which from then on everything runs that comes over ssh.
 *
 * @param folder that does not exist yet, for what is written there; while it has a file
 *   "unreachable", ssh fails
 * @throws Error where mount namespaces cannot be created
 */
export async function enterNamespace(sshd: Sshd, folder: string): Promise<MachineNamespace> {
  await mkdir(folder, { recursive: true })
  const [file = '', ...args] = [...sudo, 'unshare', '--mount', 'sh', '-euc', script, 'sh', folder]
  const holder = spawn(file, args, { stdio: ['pipe', 'pipe', 'inherit'] })
  const lines = createInterface({ input: holder.stdout })
  const first = await Promise.race([once(lines, 'line'), once(holder, 'exit')])
  if (typeof first[0] !== 'string') throw new Error('no mount namespace could be created')
  // nsenter changes to the root folder. (sh, because bash would take itself for the session's first
  // shell and read .bashrc.)
  const enter = `nsenter --mount --target ${first[0]} /bin/sh -c 'cd "$0" && exec /bin/bash "$@"'`
  const bash = `#!/bin/sh
if [ -n "$IN_MACHINE" ]; then exec /bin/bash "$@"; fi
if [ -e '${folder}/unreachable' ]; then exit 255; fi
export IN_MACHINE=yes
exec ${enter} "$PWD" "$@"
`
  await sshd.program('bash', bash)
  return {
    stop: async () => {
      if (holder.exitCode !== null) return
      const ended = once(holder, 'exit')
      holder.stdin.end()
      await ended
    },
  }
}
