import assert from 'node:assert/strict'
import { execFile, execFileSync } from 'node:child_process'
import { mkdtemp, readFile, rm, stat } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import { tar } from '../../../lib/staging/tar.mts'

const time = Date.UTC(2026, 4, 30) / 1000
const long = Buffer.from('Ω'.repeat(700))
const archive = tar(
  [
    { path: 'var/lib/kubernetes/', mode: 0o755 },
    { path: 'var/lib/kubernetes/key.pem', mode: 0o600, data: Buffer.from('secret\n') },
    { path: 'var/lib/kubernetes/long.txt', mode: 0o644, data: long },
    { path: 'var/lib/kubernetes/empty', mode: 0o644, data: Buffer.alloc(0) },
    { path: 'block', mode: 0o644, data: Buffer.alloc(512, 'x') },
  ],
  time,
)

const programs = [
  { name: 'GNU tar', program: 'tar', list: ['--numeric-owner', '-tvf', '-'] },
  { name: 'bsdtar', program: 'bsdtar', list: ['--numeric-owner', '-tvf', '-'] },
]

for (const { name, program, list } of programs) {
  const skip = isThere(program) ? false : `${program} is not installed`

  describe(`an archive, read by ${name}`, { skip }, () => {
    let folder: string
    before(async () => {
      folder = await mkdtemp(join(tmpdir(), 'tar-'))
    })
    after(() => rm(folder, { recursive: true }))

    it('lists each entry with its mode, as of root', async () => {
      const lines = (await runWith(program, list, archive)).trim().split('\n')
      const modes = lines.map((line) => line.split(/\s+/)[0])
      assert.deepEqual(modes, [
        'drwxr-xr-x',
        '-rw-------',
        '-rw-r--r--',
        '-rw-r--r--',
        '-rw-r--r--',
      ])
      for (const line of lines) assert.match(line, /^\S+\s+(0\/0|\d\s+0\s+0)\s/)
    })

    it('unpacks to the same bytes, modes and time', async () => {
      await runWith(program, ['-xpf', '-', '-C', folder], archive)
      const key = join(folder, 'var/lib/kubernetes/key.pem')
      assert.equal(await readFile(key, 'utf8'), 'secret\n')
      assert.deepEqual(await readFile(join(folder, 'var/lib/kubernetes/long.txt')), long)
      assert.equal((await readFile(join(folder, 'var/lib/kubernetes/empty'))).length, 0)
      assert.equal((await readFile(join(folder, 'block'))).length, 512)
      const { mode, mtimeMs } = await stat(key)
      assert.equal(mode & 0o777, 0o600)
      assert.equal(mtimeMs, time * 1000)
    })
  })
}

describe('an archive', () => {
  it('refuses a path that the format cannot hold', () => {
    assert.throws(() => tar([{ path: 'x'.repeat(101), mode: 0o644 }], time), /path too long/)
  })
})

function isThere(program: string): boolean {
  try {
    execFileSync(program, ['--version'], { stdio: 'ignore' })
    return true
  } catch {
    return false
  }
}

function runWith(program: string, args: string[], input: Buffer): Promise<string> {
  return new Promise((resolve, reject) => {
    const child = execFile(program, args, (error, stdout) => {
      if (error) reject(error)
      else resolve(stdout)
    })
    child.stdin?.end(input)
  })
}
