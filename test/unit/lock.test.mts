import assert from 'node:assert/strict'
import { existsSync, promises } from 'node:fs'
import { mkdtemp, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { syncBuiltinESMExports } from 'node:module'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, it } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import type { StepError } from '../../lib/errors.mts'
import { locksForChildren, withLock } from '../../lib/lock.mts'
import { commandLine } from '../../lib/processes.mts'
import { projectRoot, run } from '../checkout.mts'

describe('a lock', () => {
  let folder: string
  let path: string
  beforeEach(async () => {
    folder = await mkdtemp(join(tmpdir(), 'lock-'))
    path = join(folder, 'run/alpha.lock')
  })
  afterEach(() => rm(folder, { recursive: true }))

  it('is there while the work is done, for its owner alone, and gone afterwards', async () => {
    const result = await withLock(path, 'starting alpha', async () => {
      assert.equal((await stat(path)).mode & 0o777, 0o600)
      return 'done'
    })
    assert.equal(result, 'done')
    assert.deepEqual(await readdir(join(folder, 'run')), [])
  })

  it('is given back when the work fails', async () => {
    const failing = withLock(path, 'starting alpha', () => Promise.reject(new Error('no disk')))
    await assert.rejects(failing, /no disk/)
    assert.ok(!existsSync(path))
  })

  it('refuses a second holder, and names the purpose, pid and command of the first', async () => {
    await withLock(path, 'starting alpha', async () => {
      const second = withLock(path, 'stopping alpha', async () => 'never')
      await assert.rejects(second, ({ message, explanation }: StepError) => {
        assert.equal(message, 'another process is starting alpha')
        assert.match(explanation.output ?? '', new RegExp(`node .*\\(pid ${process.pid}\\)`))
        return true
      })
    })
  })

  it('lets a second one wait until the first is done', async () => {
    const order: string[] = []
    await Promise.all([
      withLock(path, 'first', async () => {
        await sleep(200)
        order.push('first')
      }),
      sleep(50).then(() =>
        withLock(path, 'second', async () => order.push('second'), { wait: 10 }),
      ),
    ])
    assert.deepEqual(order, ['first', 'second'])
  })

  it('is held by one at a time, however many want it', async () => {
    let inside = 0
    const work = async () => {
      inside += 1
      assert.equal(inside, 1)
      await sleep(5)
      inside -= 1
    }
    await Promise.all(
      Array.from({ length: 8 }, () => withLock(path, 'working', work, { wait: 20 })),
    )
  })

  it('is taken over from a process that has ended, without waiting', async () => {
    await withLock(path, 'starting alpha', async () => {
      const holder = JSON.parse(await readFile(path, 'utf8'))
      await writeFile(path, JSON.stringify({ ...holder, pid: 4194305, nonce: 'gone' }))
      assert.equal(await withLock(path, 'stopping alpha', async () => 'taken over'), 'taken over')
    })
  })

  it('is taken over when its holder’s number is another process’s by now', async () => {
    const other = { pid: process.ppid, command: 'make down', purpose: 'x', nonce: 'gone' }
    await withLock(path, 'making the folder', async () => {})
    await writeFile(path, JSON.stringify(other))
    assert.notEqual(await commandLine(process.ppid), other.command)
    assert.equal(await withLock(path, 'starting alpha', async () => 'taken over'), 'taken over')
  })

  it('is taken on a full disk as well, so that machines can still be stopped', async (context) => {
    const full = Object.assign(new Error('no space left on device'), { code: 'ENOSPC' })
    const { writeFile } = promises
    context.mock.method(promises, 'writeFile', async (file: string) => {
      await writeFile(file, '')
      throw full
    })
    syncBuiltinESMExports()
    try {
      assert.equal(await withLock(path, 'stopping alpha', async () => 'stopped'), 'stopped')
    } finally {
      context.mock.restoreAll()
      syncBuiltinESMExports()
    }
    assert.equal(await withLock(path, 'starting alpha', async () => 'free'), 'free')
  })

  it('that cannot be read is not taken over', async (context) => {
    const denied = Object.assign(new Error('permission denied'), { code: 'EACCES' })
    await withLock(path, 'taking a snapshot', async () => {
      context.mock.method(promises, 'readFile', () => Promise.reject(denied))
      syncBuiltinESMExports()
      try {
        await assert.rejects(
          withLock(path, 'restoring', async () => 'never'),
          /permission denied/,
        )
      } finally {
        context.mock.restoreAll()
        syncBuiltinESMExports()
      }
    })
  })

  it('is taken on a file system without hard links as well', async (context) => {
    const refused = Object.assign(new Error('operation not permitted'), { code: 'EPERM' })
    context.mock.method(promises, 'link', () => Promise.reject(refused))
    syncBuiltinESMExports()
    try {
      await withLock(path, 'starting alpha', async () => {
        assert.deepEqual(await readdir(join(folder, 'run')), ['alpha.lock'])
        const second = withLock(path, 'stopping alpha', async () => 'never')
        await assert.rejects(second, /another process is starting alpha/)
      })
      assert.deepEqual(await readdir(join(folder, 'run')), [])
    } finally {
      context.mock.restoreAll()
      syncBuiltinESMExports()
    }
  })

  it('lets in the scripts that its holder runs, and no others', async () => {
    const other = `
      const { withLock } = await import(${JSON.stringify(join(projectRoot, 'lib/lock.mts'))})
      await withLock(${JSON.stringify(path)}, 'working', async () => console.log('let in'))`
    const enter = (env: Record<string, string>) => {
      const args = ['--import', 'tsx', '--input-type=module', '--eval', other]
      return run({ root: '/' }, process.execPath, args, { cwd: projectRoot, env })
    }
    await withLock(path, 'restoring', async () => {
      const child = await enter(locksForChildren())
      assert.equal(child.stdout, 'let in\n', child.stderr)
      assert.ok(existsSync(path), 'it is still held')
      const stranger = await enter({})
      assert.equal(stranger.stdout, '')
      assert.match(stranger.stderr, /another process is restoring/)
    })
  })
})
