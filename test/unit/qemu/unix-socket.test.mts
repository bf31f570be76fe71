import assert from 'node:assert/strict'
import { once } from 'node:events'
import { mkdir, mkdtemp, rm } from 'node:fs/promises'
import { createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { describe, it } from 'node:test'
import { connectUnixSocket } from '../../../lib/qemu/unix-socket.mts'

describe('connecting to a unix socket', () => {
  for (const [name, length] of [
    ['short', 0],
    ['far too long for a socket address', 150],
  ] as const) {
    it(`works at a path that is ${name}`, async () => {
      const top = await mkdtemp(join(tmpdir(), 'unix-'))
      const folder = join(top, 'with space', 'x'.repeat(length))
      await mkdir(folder, { recursive: true })
      const before = process.cwd()
      process.chdir(folder)
      const server = createServer((socket) => socket.end('hello')).listen('s')
      process.chdir(before)
      await once(server, 'listening')

      const socket = connectUnixSocket(join(folder, 's'))
      assert.equal(process.cwd(), before)
      assert.equal(String((await once(socket, 'data'))[0]), 'hello')
      server.close()
      await rm(top, { recursive: true })
    })
  }

  it('fails as usual when nobody is there', async () => {
    const socket = connectUnixSocket(join(tmpdir(), 'nobody.socket'))
    await assert.rejects(once(socket, 'connect'), /ENOENT/)
  })
})
