import assert from 'node:assert/strict'
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import { commandLine, isGone, pidFrom } from '../../../lib/qemu/processes.mts'
import { becomes } from '../../../lib/wait.mts'

describe('a pid file', () => {
  let folder: string
  let file: string
  let child: ChildProcess
  let pid: number
  before(async () => {
    folder = await mkdtemp(join(tmpdir(), 'pid-'))
    file = join(folder, 'x.pid')
    child = spawn('sleep', ['1000'], { stdio: 'ignore' })
    await once(child, 'spawn')
    pid = child.pid ?? 0
  })
  after(async () => {
    child.kill('SIGKILL')
    await rm(folder, { recursive: true })
  })

  it('means a process that was started with what it should have been started with', async () => {
    await writeFile(file, `${pid}\n`)
    assert.equal(await commandLine(pid), 'sleep 1000')
    assert.equal(await pidFrom(file, ['sleep', '1000']), pid)
  })

  it('does not mean another process that has its number by now', async () => {
    await writeFile(file, `${pid}\n`)
    assert.equal(await pidFrom(file, ['qemu-system-']), undefined)
  })

  for (const content of ['', 'no number', '-1', '0', '1', '4194305']) {
    it(`means nothing when it holds ${JSON.stringify(content)}`, async () => {
      await writeFile(file, content)
      assert.equal(await pidFrom(file, []), undefined)
    })
  }

  it('means nothing when it is not there', async () => {
    assert.equal(await pidFrom(join(folder, 'none'), []), undefined)
  })

  it('means nothing when its process has ended and nobody has collected it yet', async () => {
    // The shell becomes a sleep, which never asks how its child ended.
    const parent = spawn('sh', ['-c', 'sleep 0 & echo $!; exec sleep 1000'])
    const [output] = (await once(parent.stdout, 'data')) as [Buffer]
    const zombie = Number(output.toString())
    await writeFile(file, String(zombie))
    assert.ok(await becomes(async () => (await pidFrom(file, ['sleep'])) === undefined, 10))
    assert.ok(process.kill(zombie, 0), 'the number is still taken')
    assert.ok(await becomes(() => isGone(zombie), 10))
    assert.equal(await isGone(parent.pid ?? 0), false)
    parent.kill('SIGKILL')
  })
})

describe('waiting for a condition', () => {
  it('tells whether it came to hold', async () => {
    let looks = 0
    assert.equal(await becomes(() => ++looks === 3, 10), true)
    assert.equal(await becomes(() => false, 0.2), false)
  })

  it('ends when it is interrupted', async () => {
    const controller = new AbortController()
    const waiting = becomes(() => false, 10, controller.signal)
    controller.abort(new Error('interrupted'))
    await assert.rejects(waiting, /interrupted/)
  })
})
