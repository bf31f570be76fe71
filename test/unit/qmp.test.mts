import assert from 'node:assert/strict'
import { once } from 'node:events'
import { mkdir, mkdtemp, rm } from 'node:fs/promises'
import { createServer, type Server, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import { connectUnixSocket, Qmp } from '../../lib/qmp.mts'

// The server does the negotiation as QEMU does; each test says how it answers other commands.
describe('the QMP client', () => {
  let folder: string
  let path: string
  let server: Server
  let silent = false
  type Command = { execute: string; id: number; arguments?: Record<string, string> }
  let answer: (command: Command, socket: Socket) => void = () => {}
  before(async () => {
    folder = await mkdtemp(join(tmpdir(), 'qmp-'))
    path = join(folder, 'alpha.qmp')
    server = createServer((socket) => {
      if (silent) return
      socket.write('{"QMP": {"version": {}, "capabilities": ["oob"]}}\r\n')
      socket.on('data', (text) => {
        for (const line of String(text).trim().split('\n')) {
          const command = JSON.parse(line)
          if (command.execute === 'qmp_capabilities') {
            socket.write(`{"return": {}, "id": ${command.id}}\r\n`)
          } else answer(command, socket)
        }
      })
    })
    server.listen(path)
    await once(server, 'listening')
  })
  after(async () => {
    server.close()
    await rm(folder, { recursive: true })
  })

  it('reads answers that arrive in pieces, in another order and with events between', async () => {
    const qmp = await Qmp.connect(path)
    const ids: number[] = []
    answer = ({ id }, socket) => {
      ids.push(id)
      if (ids.length < 2) return
      const text = `{"return": "two", "id": ${ids[1]}}\r\n{"event": "STOP"}\r\n{"return": "one", "id": ${ids[0]}}\r\n`
      for (const character of text) socket.write(character)
    }
    const both = await Promise.all([qmp.execute('first'), qmp.execute('second')])
    assert.deepEqual(both, ['one', 'two'])
    qmp.close()
  })

  it('reports a refusal with the command and QEMU’s reason', async () => {
    const qmp = await Qmp.connect(path)
    answer = ({ id }, socket) =>
      socket.write(`{"error": {"class": "GenericError", "desc": "no such device"}, "id": ${id}}\n`)
    await assert.rejects(qmp.execute('eject'), /QEMU refused eject: no such device/)
    qmp.close()
  })

  it('runs a job until it is concluded, dismisses it, and reports its error', async () => {
    const qmp = await Qmp.connect(path)
    const jobs = new Map<string, { id: string; status: string; error?: string }>()
    answer = ({ id, execute, arguments: given = {} }, socket) => {
      if (execute === 'query-jobs') {
        socket.write(`${JSON.stringify({ return: [...jobs.values()], id })}\n`)
        for (const job of jobs.values()) job.status = 'concluded'
        return
      }
      const { 'job-id': job = '', tag: error, id: dismissed = '' } = given
      if (execute === 'snapshot-save') jobs.set(job, { id: job, status: 'running', error })
      else assert.ok(execute === 'job-dismiss' && jobs.delete(dismissed))
      socket.write(`{"return": {}, "id": ${id}}\n`)
    }
    await qmp.job('snapshot-save', {})
    const failing = qmp.job('snapshot-save', { tag: 'no space' })
    await assert.rejects(failing, /QEMU failed at snapshot-save: no space/)
    assert.equal(jobs.size, 0)
    qmp.close()
  })

  it('cancels a job that does not end, and says so', async () => {
    const qmp = await Qmp.connect(path)
    const jobs = new Map<string, { id: string; status: string }>()
    answer = ({ id, execute, arguments: given = {} }, socket) => {
      const { 'job-id': job = '', id: cancelled = '' } = given
      if (execute === 'snapshot-save') jobs.set(job, { id: job, status: 'running' })
      if (execute === 'job-cancel') jobs.delete(cancelled)
      const returned = execute === 'query-jobs' ? [...jobs.values()] : {}
      socket.write(`${JSON.stringify({ return: returned, id })}\n`)
    }
    const endless = qmp.job('snapshot-save', {}, { timeout: 0.3 })
    await assert.rejects(endless, /QEMU did not finish snapshot-save within 0.3 s/)
    assert.equal(jobs.size, 0)
    qmp.close()
  })

  it('notices that QEMU ends in the middle of a command', async () => {
    const qmp = await Qmp.connect(path)
    answer = (_, socket) => socket.destroy()
    await assert.rejects(qmp.execute('quit'), /QEMU closed its control connection/)
    await assert.rejects(qmp.execute('stop'), /QEMU closed its control connection/)
  })

  it('does not wait forever for an answer or a greeting', async () => {
    const qmp = await Qmp.connect(path)
    answer = () => {}
    const slow = qmp.execute('stop', undefined, { timeout: 0.1 })
    await assert.rejects(slow, /QEMU did not answer stop within 0\.1 s/)
    qmp.close()
    silent = true
    await assert.rejects(
      Qmp.connect(path, { timeout: 0.1 }),
      /QEMU does not answer on .*alpha\.qmp/,
    )
  })

  it('reports that QEMU does not listen', async () => {
    await assert.rejects(Qmp.connect(join(folder, 'none')), /QEMU does not answer on .*none/)
  })
})
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

  it('fails as usual when nothing listens', async () => {
    const socket = connectUnixSocket(join(tmpdir(), 'none.socket'))
    await assert.rejects(once(socket, 'connect'), /ENOENT/)
  })
})
