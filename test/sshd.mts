// A real sshd on loopback in the place of a machine: at a node's ssh port, with the host key that
// the checkout's tls/known_hosts pins, and a PATH in which a test can put programs of its own.
import { execFile, spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { existsSync } from 'node:fs'
import { chmod, mkdir, open, readFile, writeFile } from 'node:fs/promises'
import { connect } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import { promisify } from 'node:util'
import { loadCluster } from '../lib/cluster.mts'
import type { Checkout } from './checkout.mts'

const exec = promisify(execFile)
const program = '/usr/sbin/sshd'

/** Why there can be no sshd here; false if there can. */
export const noSshd = whyNot()

function whyNot(): string | false {
  if (process.platform !== 'linux') return 'an sshd for tests needs Linux'
  if (!existsSync(program)) return `${program} is missing (openssh-server)`
  if (process.getuid?.() === 0 || spawnSync('sudo', ['-n', 'true']).status === 0) return false
  return 'an sshd that lets root in needs root, or sudo without a password'
}

export interface Sshd {
  /** Puts an executable script into the PATH of what runs over ssh. */
  program(name: string, text: string): Promise<void>
  stop(): Promise<void>
}

/** Makes the cluster's ssh key, and a host key and its line of known_hosts for each node. */
export async function makeSshKeys(checkout: Checkout): Promise<void> {
  const { nodes } = loadCluster({ root: checkout.root, env: {} })
  await mkdir(checkout.path('tls'), { recursive: true })
  const names = ['ssh_ed25519', ...nodes.map(({ name }) => `ssh_host_${name}_ed25519`)]
  const publicKeys = await Promise.all(
    names.map(async (name) => {
      const file = checkout.path('tls', name)
      await exec('ssh-keygen', ['-q', '-t', 'ed25519', '-N', '', '-C', name, '-f', file])
      return (await exec('ssh-keygen', ['-y', '-f', file])).stdout.trim()
    }),
  )
  const lines = nodes.map(({ sshPort }, index) => `[127.0.0.1]:${sshPort} ${publicKeys[index + 1]}`)
  await writeFile(checkout.path('tls', 'known_hosts'), `${lines.join('\n')}\n`)
  // As generate-certs writes it, which would make all certificates as well.
  const hosts = nodes.map(({ name, sshPort }) => `Host ${name}\n  Port ${sshPort}\n`)
  await writeFile(checkout.path('tls', 'ssh_config'), `${hosts.join('')}Host *\n${sshSettings}`)
}

const sshSettings = `\
  HostName 127.0.0.1
  User root
  IdentityFile tls/ssh_ed25519
  IdentitiesOnly yes
  IdentityAgent none
  UserKnownHostsFile tls/known_hosts
  GlobalKnownHostsFile /dev/null
  StrictHostKeyChecking yes
  BatchMode yes
  LogLevel ERROR
  ConnectTimeout 10
  ServerAliveInterval 10
  ControlMaster no
  ControlPath run/%n.ssh
`

/**
 * Starts sshd at the port of a node, and returns when it listens.
 *
 * @param options.hostKeyOf serve another node's host key
 * @param options.home a folder that is seen there as /var/lib/kubernetes
 */
export async function startSshd(
  checkout: Checkout,
  name: string,
  options: { hostKeyOf?: string; home?: string } = {},
): Promise<Sshd> {
  const node = loadCluster({ root: checkout.root, env: {} }).node(name)
  const folder = checkout.path('..', `sshd-${name}`)
  const path = `${folder}/bin`
  await mkdir(path, { recursive: true })
  const config = [
    `ListenAddress 127.0.0.1:${node.sshPort}`,
    `HostKey "${checkout.path('tls', `ssh_host_${options.hostKeyOf ?? name}_ed25519`)}"`,
    `AuthorizedKeysFile "${checkout.path('tls', 'ssh_ed25519.pub')}"`,
    'StrictModes no',
    // By the bash of our PATH, in which a test can put one of its own. (A session's own shell would
    // be this computer's.)
    `ForceCommand exec bash \${SSH_ORIGINAL_COMMAND+-c "$SSH_ORIGINAL_COMMAND"}`,
    'PidFile none',
    'UsePAM no',
    'PermitRootLogin prohibit-password',
    // Bash would read this computer's .bashrc at every call.
    `SetEnv "PATH=${path}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin" "HOME=${folder}"`,
  ]
  await writeFile(`${folder}/sshd_config`, `${config.join('\n')}\n`)

  // Only root can let root in. The shell ends sshd when our end of the pipe closes, so that none
  // is left whatever becomes of the test.
  const sudo = process.getuid?.() === 0 ? [] : ['sudo', '-n']
  const script = `mkdir -p /run/sshd; ${program} -D -e -f "$1" & read -r _; kill $!; wait`
  const mount = 'mount -t tmpfs none /var/lib && mkdir /var/lib/kubernetes'
  const [file = '', ...args] = [
    ...sudo,
    ...(options.home ? ['unshare', '--mount'] : []),
    ...['sh', '-c'],
    options.home ? `${mount} && mount --bind "$2" /var/lib/kubernetes; ${script}` : script,
    ...['sh', `${folder}/sshd_config`, options.home ?? ''],
  ]
  // To a file: a pipe would stay open as long as the last connection.
  const log = await open(`${folder}/sshd.log`, 'w')
  const child = spawn(file, args, { stdio: ['pipe', 'ignore', log.fd] })
  await log.close()
  for (const deadline = Date.now() + 10_000; !(await listens(node.sshPort)); ) {
    if (child.exitCode !== null || Date.now() > deadline) {
      throw new Error(`sshd: ${await readFile(`${folder}/sshd.log`, 'utf8')}`)
    }
    await sleep(20)
  }
  return {
    async program(name, text) {
      await writeFile(`${path}/${name}`, text)
      await chmod(`${path}/${name}`, 0o755)
    },
    async stop() {
      if (child.exitCode !== null) return
      const ended = once(child, 'exit')
      // The connection that calls share outlives the listener.
      const exit = ['-F', 'tls/ssh_config', '-O', 'exit', name]
      await exec('ssh', exit, { cwd: checkout.root }).catch(() => {})
      child.stdin?.end()
      await ended
    },
  }
}

function listens(port: number): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = connect(port, '127.0.0.1')
    socket.on('connect', () => {
      socket.destroy()
      resolve(true)
    })
    socket.on('error', () => resolve(false))
  })
}
