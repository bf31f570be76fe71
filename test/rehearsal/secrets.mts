// Where secrets must not be seen: the command lines of all programs that are started during a
// rehearsal, the logs and transcripts that it writes, and the journals of the machines. What is
// searched for is the cluster's real keys.
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { createWriteStream, existsSync } from 'node:fs'
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { parse } from 'yaml'
import { glob } from 'zx'
import type { Cluster } from '../../lib/cluster.mts'
import { StepError } from '../../lib/errors.mts'
import { connect, remote } from '../../lib/ssh.mts'
import { isRunning } from '../../lib/vm.mts'
import { CheckList } from './check-list.mts'
import type { Rehearsal } from './rehearsal.mts'

/** Watches the programs that are started, until `end`. */
export class SecretWatch {
  private readonly folder: string
  private readonly watcher: ReturnType<typeof spawn> | undefined

  private constructor(folder: string, watcher?: ReturnType<typeof spawn>) {
    this.folder = folder
    this.watcher = watcher
  }

  /** Only root learns of programs that are started; others search logs and journals alone. */
  static async start(): Promise<SecretWatch> {
    const folder = await mkdtemp(join(tmpdir(), 'command-lines-'))
    if (process.getuid?.() !== 0) return new SecretWatch(folder)
    const watcher = spawn('python3', ['-IB', join(import.meta.dirname, 'execs.py')], {
      stdio: ['ignore', 'pipe', 'inherit'],
    })
    const lines = createInterface({ input: watcher.stdout })
    await once(lines, 'line')
    const log = createWriteStream(join(folder, 'command-lines'), { mode: 0o600 })
    lines.on('line', (line) => log.write(`${line}\n`))
    return new SecretWatch(folder, watcher)
  }

  /**
   * A check for each of the places, with the secrets that the cluster has now.
   *
   * @throws StepError with the places where one was found
   */
  async check({ cluster, signal }: Rehearsal): Promise<void> {
    const secrets = await secretsOf(cluster)
    const pieces = [...secrets.keys()].join('\n')
    const list = new CheckList(signal)
    const search = async (text: string, where: string) => {
      for (const [piece, file] of secrets) {
        if (text.includes(piece)) throw new StepError(`a part of ${file} stands in ${where}`)
      }
    }
    await list.check(`${secrets.size} secrets are in no command line`, async () => {
      const file = join(this.folder, 'command-lines')
      if (!existsSync(file)) return 'not looked for: only root sees those of others'
      const text = await readFile(file, 'utf8')
      await search(text, 'a command line')
      const count = text.split('\n').length
      if (!text.includes('ssh -F ')) throw new StepError(`no ssh among ${count} programs`)
      return `${count} programs`
    })
    await list.check('nor in a log or a transcript', async () => {
      const paths = ['logs/*', 'images/*.log*', 'run/kube-cache/**']
      const files = await glob(paths, { cwd: cluster.root })
      for (const file of files) await search(await readFile(cluster.path(file), 'utf8'), file)
      if (files.length === 0) throw new StepError('there are no logs')
      return `${files.length} files`
    })
    for (const node of cluster.nodes) {
      if (!(await isRunning(cluster, node))) continue
      await list.check(`nor in the journal and the command lines of ${node.name}`, async () => {
        await connect(cluster, node, { signal })
        // Not in a command line, which would be found.
        const look = `secrets=$(cat)
          { journalctl --no-pager; ps -A -ww -o args; } | grep -cFf <(echo "$secrets") || true`
        const found = Number(await remote(node, look, { input: pieces, timeout: 300, signal }))
        if (found > 0) throw new StepError(`${found} lines have one`)
        return undefined
      })
    }
    list.assertPassed()
  }

  async end(): Promise<void> {
    this.watcher?.kill()
    await rm(this.folder, { recursive: true, force: true })
  }
}

/** A piece of each secret, and the file that it is from. */
async function secretsOf(cluster: Cluster): Promise<Map<string, string>> {
  const pieces = new Map<string, string>()
  const keys = ['tls/*-key.pem', 'tls/ssh_ed25519', 'tls/ssh_host_*_ed25519']
  for (const file of await glob(keys, { cwd: cluster.root })) {
    // Not from the beginning, where the public key may stand.
    const lines = (await readFile(cluster.path(file), 'utf8')).trim().split('\n')
    pieces.set(lines.at(-3) ?? '', file)
  }
  for (const file of await glob('configs/*.kubeconfig', { cwd: cluster.root })) {
    const { users } = parse(await readFile(cluster.path(file), 'utf8'))
    const key: string = users[0].user['client-key-data']
    const middle = Math.floor(key.length / 2)
    pieces.set(key.slice(middle, middle + 60), file)
  }
  const encryption = 'configs/encryption-config.yaml'
  const secret = (await readFile(cluster.path(encryption), 'utf8')).match(/secret: (\S+)/)?.[1]
  pieces.set(secret ?? '', encryption)
  if (pieces.has('')) throw new StepError('a secret has another form than expected')
  return pieces
}
