// Where secrets must not be seen: the command lines of all programs that are started during a
// rehearsal, the logs and transcripts that it writes, and the journals of the machines. What is
// searched for is the cluster's real keys.
import { spawn } from 'node:child_process'
import { createWriteStream, existsSync } from 'node:fs'
import { mkdtemp, readFile, rm, stat } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { parse } from 'yaml'
import { $, glob } from 'zx'
import type { Cluster } from '../../lib/cluster.mts'
import { StepError } from '../../lib/errors.mts'
import { connect, remote } from '../../lib/ssh.mts'
import { isRunning } from '../../lib/vm.mts'
import { becomes } from '../../lib/wait.mts'
import { CheckList } from './check-list.mts'
import type { Rehearsal } from './rehearsal.mts'

/** Watches the programs that are started, until `end`. */
export class SecretWatch {
  private readonly folder: string
  private watcher: ReturnType<typeof spawn> | undefined
  /** Why command lines are not searched, if so. */
  private blind = ''

  private constructor(folder: string) {
    this.folder = folder
  }

  /** Only root learns of programs that are started; others search logs and journals alone. */
  static async start(): Promise<SecretWatch> {
    const watch = new SecretWatch(await mkdtemp(join(tmpdir(), 'command-lines-')))
    if (process.getuid?.() !== 0) watch.blind = 'only root sees those of others'
    else if (!(await watch.observe())) watch.blind = 'the kernel does not report them here'
    return watch
  }

  /** Records the command lines of programs that are started. @returns whether it can */
  private async observe(): Promise<boolean> {
    const file = join(this.folder, 'command-lines')
    const watcher = spawn('python3', ['-IB', join(import.meta.dirname, 'execs.py')], {
      stdio: ['ignore', 'pipe', 'inherit'],
    })
    this.watcher = watcher
    const lines = createInterface({ input: watcher.stdout })
    const log = createWriteStream(file, { mode: 0o600 })
    lines.on('line', (line) => log.write(`${line}\n`))
    const ended = new Promise<boolean>((resolve) => {
      watcher.once('error', () => resolve(false)).once('exit', () => resolve(false))
    })
    // A container may get no events although it may ask for them.
    const mark = `command lines are recorded ${process.pid}`
    const recorded = becomes(async () => {
      await $({ quiet: true, nothrow: true })`sh -c ${`exit 0 # ${mark}`}`
      return existsSync(file) && (await readFile(file, 'utf8')).includes(mark)
    }, 10)
    return Promise.race([ended, recorded])
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
      if (this.blind) return `not searched: ${this.blind}`
      const text = await readFile(join(this.folder, 'command-lines'), 'utf8')
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
    await list.check('each file that has one can be read by its owner alone', async () => {
      const ignore = ['node_modules/**', 'tools/**', 'images/*.{iso,qcow2}*']
      const files = await glob('**', { cwd: cluster.root, ignore, dot: true, onlyFiles: true })
      const having: string[] = []
      for (const file of files) {
        const text = await readFile(cluster.path(file), 'latin1')
        if ([...secrets.keys()].some((piece) => text.includes(piece))) having.push(file)
      }
      for (const file of having) {
        const mode = (await stat(cluster.path(file))).mode & 0o777
        if (mode & 0o077) throw new StepError(`${file} has mode ${mode.toString(8)}`)
      }
      if (having.length < secrets.size - 1) throw new StepError(`only ${having.length} have one`)
      return `${having.length} of ${files.length} files`
    })
    for (const node of cluster.nodes) {
      if (!(await isRunning(cluster, node))) continue
      await list.check(`nor in the journal and the command lines of ${node.name}`, async () => {
        await connect(cluster, node, { signal })
        // Not in a command line, which would be found.
        const look = `secrets=$(cat) text=$(journalctl --no-pager; ps -A -ww -o args)
          grep -c . <<<"$text"
          grep -cFf <(echo "$secrets") <<<"$text" || [ $? = 1 ]`
        const counts = await remote(node, look, { input: pieces, timeout: 300, signal })
        const [lines = 0, found = Number.NaN] = counts.trim().split('\n').map(Number)
        if (found !== 0) throw new StepError(`${found} lines have one`)
        if (!(lines > 100)) throw new StepError(`there are only ${lines} lines`)
        return `${lines} lines`
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
  // {"alg":"RS256","kid":" in base64: how the API server's tokens begin. No file of ours has one.
  pieces.set('eyJhbGciOiJSUzI1NiIsImtpZCI6I', 'a token of a service account')
  if (pieces.has('')) throw new StepError('a secret has another form than expected')
  return pieces
}
