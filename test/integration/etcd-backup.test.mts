// etcd-backup with the real programs of etcd, and the real control plane.
import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { existsSync } from 'node:fs'
import { chmod, copyFile, readdir, readFile, stat, truncate, writeFile } from 'node:fs/promises'
import { request } from 'node:https'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import type { Cluster } from '../../lib/cluster.mts'
import { timestamp } from '../../lib/format.mts'
import { withLock } from '../../lib/lock.mts'
import { becomes } from '../../lib/wait.mts'
import { type Checkout, type Outcome, run } from '../checkout.mts'
import { noQemu } from '../idle-qemu.mts'
import { AlphaOverSsh } from '../kubernetes/alpha-over-ssh.mts'
import type { ControlPlane } from '../kubernetes/control-plane.mts'
import { findTools } from '../kubernetes/prepared.mts'
import { noSshd } from '../sshd.mts'

const tools = await findTools()
const skip = (typeof tools === 'string' && tools) || noSshd || noQemu
// A skipped suite is counted nowhere, a skipped test is.
it('what this needs is there', { skip }, () => {})

describe('etcd-backup', { skip, timeout: 900_000 }, () => {
  let alpha: AlphaOverSsh
  let checkout: Checkout
  let cluster: Cluster
  let controlPlane: ControlPlane
  let data: string

  before(async () => {
    if (typeof tools === 'string') return
    alpha = await AlphaOverSsh.start(tools)
    ;({ checkout, cluster, controlPlane, data } = alpha)
  })
  after(() => alpha?.stop())

  const backup = (...args: string[]): Promise<Outcome> =>
    run(checkout, 'bin/etcd-backup.mts', args, { timeout: 300_000, env: { PATH: alpha.path } })
  const admin = (...args: string[]) => controlPlane.kubectl('admin', args)
  const namespaces = async () => (await admin('get', 'namespaces', '-o=name')).stdout
  const files = async () => (await readdir(checkout.path('backups'))).toSorted()
  async function save(): Promise<string> {
    const { stdout, stderr, exitCode } = await backup('snapshot')
    assert.equal(exitCode, 0, stderr)
    return stdout.match(/^backups\/etcd-\S+\.db/m)?.[0] ?? ''
  }
  const changes = () => alpha.changes()

  it('saves a snapshot that is named by the time, readable by its owner only', async () => {
    await admin('create', 'namespace', 'before')
    await admin('create', 'secret', 'generic', 'kept', '--from-literal=word=swordfish')
    const { stdout, stderr, exitCode } = await backup('snapshot')
    assert.equal(exitCode, 0, stderr)
    assert.match(
      stdout,
      /^backups\/etcd-\d{4}-\d\d-\d\d-\d{6}\.db: \d+ keys at revision \d+, [\d.]+ [kM]B$/m,
    )
    const [name = ''] = await files()
    assert.equal((await stat(checkout.path('backups', name))).mode & 0o777, 0o600)
    assert.equal((await stat(checkout.path('backups'))).mode & 0o777, 0o700)
    const { stdout: status } = await controlPlane.run('etcdutl', [
      'snapshot',
      'status',
      checkout.path('backups', name),
    ])
    assert.match(status, /^[0-9a-f]+, \d+, \d+,/)
    assert.deepEqual(
      await readdir(join(data, '..')),
      ['etcd', 'kubernetes'],
      'nothing is left there',
    )
    assert.deepEqual(changes(), [])
  })

  it('keeps as many as wanted, and files that are not its own', async () => {
    await writeFile(checkout.path('backups', 'etcd-mine.db'), '')
    for (const day of ['01', '02', '03']) {
      await writeFile(checkout.path('backups', `etcd-2020-01-${day}-000000.db`), '')
    }
    // A backup is named by the second.
    const names = await files()
    assert.ok(await becomes(() => !names.includes(`etcd-${timestamp()}.db`), 10))
    const { stdout } = await backup('snapshot', '--keep', '2')
    assert.match(stdout, /removed backups\/etcd-2020-01-01-000000\.db: 2 are kept/)
    const left = await files()
    assert.equal(left.length, 3, left.join(' '))
    assert.ok(left.includes('etcd-mine.db'))
    assert.ok(!left.some((name) => name.includes('2020')))
  })

  it('restores what was deleted since, and nothing newer is left', async () => {
    const { stdout: before } = await admin(
      'get',
      'namespace',
      'before',
      '-o=jsonpath={.metadata.resourceVersion}',
    )
    await admin('delete', 'namespace', 'before')
    await admin('create', 'namespace', 'later')
    await run({ root: '/' }, 'chown', ['-R', '12345:12346', data])
    await chmod(data, 0o700)

    const { stdout, stderr, exitCode } = await backup('restore')
    assert.equal(exitCode, 0, stderr)
    assert.match(await namespaces(), /namespace\/before/)
    assert.doesNotMatch(await namespaces(), /namespace\/later/)
    const secret = await admin('get', 'secret', 'kept', '-o=jsonpath={.data.word}')
    assert.equal(Buffer.from(secret.stdout, 'base64').toString(), 'swordfish')

    assert.match(stdout, /restored in \d/)
    // No kubelet has registered here.
    assert.match(stderr, /^! sigma joined after the backup and has to register again/m)
    const former = stdout.match(/kept on alpha: (\S+)/)?.[1] ?? ''
    assert.ok((await stat(`${former}/member`)).isDirectory())
    for (const path of [data, `${data}/member/snap/db`]) {
      const { uid, gid } = await stat(path)
      assert.deepEqual([uid, gid], [12345, 12346], path)
    }
    assert.equal((await stat(data)).mode & 0o777, 0o700)

    // Clients that watch from before learn that they have to list again.
    const old = await watchFrom(before)
    assert.match(old, /"code":410/)
    assert.ok((await revision()) > 1_000_000_000)
  })

  /** What a client knows that has just listed something. */
  async function revision(): Promise<number> {
    const { stdout } = await admin('get', '--raw', '/api/v1/namespaces')
    return Number(JSON.parse(stdout).metadata.resourceVersion)
  }

  /** The first event of a watch on namespaces from a resource version on. */
  async function watchFrom(version: string): Promise<string> {
    const [ca, cert, key] = await Promise.all(
      ['ca', 'admin', 'admin-key'].map((name) => readFile(checkout.path('tls', `${name}.pem`))),
    )
    const path = `/api/v1/namespaces?watch=1&resourceVersion=${version}&timeoutSeconds=5`
    const port = cluster.settings.API_PORT
    return new Promise((resolve, reject) => {
      const sent = request(
        { host: '127.0.0.1', port, path, ca, cert, key, agent: false },
        (answer) => {
          answer.once('data', (chunk) => {
            resolve(String(chunk))
            answer.destroy()
          })
          answer.once('end', () => resolve(''))
        },
      )
      sent.on('error', reject).end()
    })
  }

  it('restores the older file after a newer one, to a revision above all earlier ones', async () => {
    const [older = ''] = (await files()).filter((name) => /^etcd-2\d{3}-/.test(name))
    const newer = checkout.path(await save())
    assert.equal((await backup('restore', newer)).exitCode, 0)
    await admin('create', 'namespace', 'since')
    const known = await revision()
    const { exitCode, stderr } = await backup('restore', checkout.path('backups', older))
    assert.equal(exitCode, 0, stderr)
    assert.doesNotMatch(await namespaces(), /namespace\/since/)
    assert.ok((await revision()) > known)
    assert.match(await watchFrom(`${known}`), /"code":410/)
  })

  it('keeps only the last previous data on the machine', async () => {
    const folders = await readdir(join(data, '..'))
    assert.equal(folders.filter((name) => /^etcd($|\.former)/.test(name)).length, 2, `${folders}`)
  })

  describe('refuses, before it changes anything,', () => {
    const scratch = (name: string) => checkout.path(name)
    let good: string
    before(async () => {
      good = checkout.path(await save())
    })
    async function assertRefused(args: string[], reason: RegExp, status = 1): Promise<void> {
      const before = changes().length
      const { stderr, exitCode } = await backup(...args)
      assert.match(stderr, reason)
      assert.equal(exitCode, status, stderr)
      assert.equal(changes().length, before)
      assert.equal(await controlPlane.trouble('etcd'), undefined)
      // A command whose connection was cut may be at its end a moment later.
      const tidy = async () => !(await readdir(join(data, '..'))).includes('etcd.new')
      assert.ok(await becomes(tidy, 10))
    }

    it('a snapshot whose end is missing', async () => {
      const { size } = await stat(good)
      for (const length of [size - 1, size - 32, 20, 0]) {
        await copyFile(good, scratch('short.db'))
        await truncate(scratch('short.db'), length)
        await assertRefused(['restore', 'short.db'], /short\.db is not a complete etcd snapshot/)
      }
    })

    it('a snapshot with a byte changed, and what is none', async () => {
      const bytes = await readFile(good)
      bytes[100_000] = (bytes[100_000] ?? 0) ^ 1
      await writeFile(scratch('changed.db'), bytes)
      await assertRefused(['restore', 'changed.db'], /its checksum does not match/)
      await writeFile(scratch('none.db'), randomBytes(8192))
      await assertRefused(['restore', 'none.db'], /does not begin like a database of etcd/)
      await assertRefused(['restore', 'nowhere.db'], /there is no file .*nowhere\.db/)
      await assertRefused(['restore', 'tls'], /there is no file .*tls/)
    })

    it('a snapshot of another cluster', async () => {
      const ca = checkout.path('tls', 'ca.pem')
      const own = await readFile(ca, 'utf8')
      // Of another key's certificate at least the signature differs, which is at its end.
      await writeFile(ca, own.replace(/.{64}(?=\n.*\n-----END)/, 'A'.repeat(64)))
      await assertRefused(['restore', good], /is of another cluster: the certificate tls\/ca\.pem/)
      await writeFile(ca, own)
    })

    it('when etcd on the machine cannot make data of it', async () => {
      await alpha.sshd.program('etcdutl', '#!/bin/sh\necho "no space left on device" >&2\nexit 1\n')
      await assertRefused(
        ['restore', good],
        /a command on alpha failed \(exit status 1\)\n.*no space left/,
      )
      await alpha.useReal('etcdutl')
    })

    it('when the connection is cut in the middle', async () => {
      // The parent of the shell that runs there is the session's sshd.
      const cut =
        '#!/bin/bash\npid=$PPID\nwhile [ "$(cat /proc/$pid/comm)" != sshd ]; do pid=$(cut -d" " -f4 /proc/$pid/stat); done\nkill -9 $pid\nsleep 1\nexit 1\n'
      await alpha.sshd.program('etcdutl', cut)
      await assertRefused(['restore', good], /alpha does not answer ssh/)
      const before = await files()
      await assertRefused(['snapshot'], /alpha does not answer ssh/)
      assert.deepEqual(await files(), before, 'nothing incomplete is left')
      await alpha.useReal('etcdutl')
    })

    it('when it is interrupted while the machine makes data of it', async () => {
      const calls = join(data, '..', '..', 'calls')
      await alpha.sshd.program('etcdutl', `#!/bin/sh\necho >${calls}\nsleep 2\nexit 1\n`)
      const child = spawn(checkout.path('bin/etcd-backup.mts'), ['restore', good], {
        env: { ...process.env, PATH: alpha.path },
        stdio: 'ignore',
      })
      const ended = once(child, 'exit')
      assert.ok(await becomes(() => existsSync(calls), 20))
      const before = changes().length
      child.kill('SIGINT')
      assert.deepEqual(await ended, [130, null])
      assert.equal(changes().length, before)
      assert.ok(!(await readdir(join(data, '..'))).includes('etcd.new'))
      await alpha.useReal('etcdutl')
    })

    it('wrong arguments', async () => {
      await assertRefused([], /snapshot or restore, not nothing/, 2)
      await assertRefused(['save'], /snapshot or restore, not save/, 2)
      await assertRefused(['snapshot', 'x.db'], /it is named by the current time/, 2)
      await assertRefused(['snapshot', '--timeout', '3'], /--timeout is for restore/, 2)
      await assertRefused(['restore', '--keep', '3'], /--keep is for snapshot/, 2)
      await assertRefused(['snapshot', '--keep', '0'], /--keep is at least 1/, 2)
    })

    it('while another script works', async () => {
      await withLock(checkout.path('run', 'bootstrap.lock'), 'taking a snapshot', () =>
        assertRefused(['restore', good], /another process is taking a snapshot/),
      )
    })

    it('when the machine is not running', async () => {
      await alpha.setRunning(false)
      for (const args of [['snapshot'], ['restore', good]]) {
        await assertRefused(args, /alpha is not running\n.*make boot-alpha/)
      }
      await alpha.setRunning(true)
    })
  })

  it('puts the previous data back when the API server cannot read the Secrets of the snapshot', async () => {
    const path = await save()
    const { root } = controlPlane.place
    const configuration = join(root, 'var/lib/kubernetes/encryption-config.yaml')
    const key = await readFile(configuration, 'utf8')
    // As after a change of the key, with all Secrets written anew.
    await admin('delete', 'secret', 'kept')
    await controlPlane.stop()
    await writeFile(
      configuration,
      key.replace(/secret: .*/, `secret: ${randomBytes(32).toString('base64')}`),
    )
    await controlPlane.start()
    await admin('create', 'namespace', 'newer')

    const { stderr, exitCode } = await backup('restore', path)
    assert.equal(exitCode, 1)
    assert.match(stderr, /etcd was not restored: alpha has its previous data back/)
    assert.match(stderr, /cannot decrypt the Secrets of the snapshot/)
    assert.match(await namespaces(), /namespace\/newer/)
    assert.ok(!(await readdir(join(data, '..'))).includes('etcd.new'))
    await controlPlane.stop()
    await writeFile(configuration, key)
    await controlPlane.start()
  })
})
