import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { mkdir, mkdtemp, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, it } from 'node:test'
import { setTimeout as wait } from 'node:timers/promises'
import { privateFolder, writeFileAtomic } from '../../lib/files.mts'
import { projectRoot } from '../checkout.mts'

describe('a file written atomically', () => {
  let folder: string
  let path: string
  beforeEach(async () => {
    folder = await mkdtemp(join(tmpdir(), 'atomic-'))
    path = join(folder, 'file')
  })
  afterEach(() => rm(folder, { recursive: true, force: true }))

  it('has the new content, text or bytes', async () => {
    await writeFile(path, 'a long former content')
    await writeFileAtomic(path, 'ü')
    assert.equal(await readFile(path, 'utf8'), 'ü')
    await writeFileAtomic(path, Uint8Array.of(0, 255))
    assert.deepEqual([...(await readFile(path))], [0, 255])
    assert.deepEqual(await readdir(folder), ['file'])
  })

  it('has the mode that was asked for, whatever the umask and the former mode', async () => {
    for (const umask of [0o077, 0]) {
      const former = process.umask(umask)
      await writeFileAtomic(path, 'public', 0o644)
      assert.equal((await stat(path)).mode & 0o777, 0o644)
      await writeFileAtomic(path, 'secret', 0o600)
      assert.equal((await stat(path)).mode & 0o777, 0o600)
      process.umask(former)
    }
  })

  it('gets the folders it needs', async () => {
    await writeFileAtomic(join(folder, 'a', 'b', 'file'), 'deep')
    assert.equal(await readFile(join(folder, 'a', 'b', 'file'), 'utf8'), 'deep')
  })

  it('is whole for whoever reads it meanwhile', async () => {
    const contents = ['a', 'b'].map((letter) => letter.repeat(1_000_000))
    await writeFileAtomic(path, contents[0] ?? '')
    let writing = true
    const write = async () => {
      for (let turn = 1; turn <= 40; turn += 1)
        await writeFileAtomic(path, contents[turn % 2] ?? '')
      writing = false
    }
    const read = async () => {
      const seen = new Set<string>()
      while (writing) {
        const text = await readFile(path, 'utf8')
        assert.ok(contents.includes(text), `${text.length} bytes`)
        seen.add(text.charAt(0))
      }
      return seen
    }
    const [, seen] = await Promise.all([write(), read()])
    assert.equal(seen.size, 2)
  })

  it('is whole when the writer is killed', async () => {
    const program = `
      const { writeFileAtomic } = await import(${JSON.stringify(join(projectRoot, 'lib/files.mts'))})
      for (let turn = 0; ; turn += 1) await writeFileAtomic(${JSON.stringify(path)}, 'ab'[turn % 2].repeat(5e6))
    `
    for (const delay of [0, 5, 10, 20]) {
      await rm(path, { force: true })
      const args = ['--import', 'tsx', '--input-type=module', '--eval', program]
      const child = spawn(process.execPath, args, { cwd: projectRoot, stdio: 'ignore' })
      const ended = new Promise((resolve) => child.on('exit', resolve))
      while ((await readFile(path, 'utf8').catch(() => '')) === '') {
        assert.equal(child.exitCode, null)
        await wait(5)
      }
      await wait(delay)
      child.kill('SIGKILL')
      await ended
      assert.match(await readFile(path, 'utf8'), /^(a{5000000}|b{5000000})$/)
    }
  })

  it('that cannot be written leaves the former one, and nothing beside it', async () => {
    await mkdir(path)
    await writeFile(join(path, 'inside'), 'kept')
    await assert.rejects(writeFileAtomic(path, 'text'), { code: /EISDIR|ENOTEMPTY|EEXIST/ })
    assert.equal(await readFile(join(path, 'inside'), 'utf8'), 'kept')
    assert.deepEqual(await readdir(folder), ['file'])
  })
})

it('a folder for secrets is 0700 whatever the umask, also if it was open before', async () => {
  const folder = await mkdtemp(join(tmpdir(), 'private-'))
  const before = process.umask(0)
  try {
    await mkdir(join(folder, 'open'), { mode: 0o777 })
    for (const name of ['open', 'new']) {
      await privateFolder(join(folder, name))
      assert.equal((await stat(join(folder, name))).mode & 0o777, 0o700)
    }
  } finally {
    process.umask(before)
    await rm(folder, { recursive: true })
  }
})
