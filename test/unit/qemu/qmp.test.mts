import assert from 'node:assert/strict'
import { once } from 'node:events'
import { mkdtemp, rm } from 'node:fs/promises'
import { createServer, type Server, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import { Qmp, QmpClosed } from '../../../lib/qemu/qmp.mts'

/** Speaks QEMU's side; what it answers beside the negotiation is up to each test. */
describe('the QMP client', () => {
  let folder: string
  let path: string
  let server: Server
  let silent = false
  let answer: (command: { execute: string; id: number }, socket: Socket) => void = () => {}
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

  it('reads answers that come in pieces and in another order, and events between', async () => {
    const qmp = await Qmp.connect(path)
    const ids: number[] = []
    answer = ({ id }, socket) => {
      ids.push(id)
      if (ids.length < 2) return
      const text = `{"return": "two", "id": ${ids[1]}}\r\n{"event": "STOP"}\r\n{"return": "one", "id": ${ids[0]}}\r\n`
      for (const character of text) socket.write(character)
    }
    const stop = qmp.waitForEvent('STOP')
    const both = await Promise.all([qmp.execute('first'), qmp.execute('second')])
    assert.deepEqual(both, ['one', 'two'])
    assert.equal((await stop).event, 'STOP')
    qmp.close()
  })

  it('tells a refusal in QEMU’s words, with the command', async () => {
    const qmp = await Qmp.connect(path)
    answer = ({ id }, socket) =>
      socket.write(`{"error": {"class": "GenericError", "desc": "no such device"}, "id": ${id}}\n`)
    await assert.rejects(qmp.execute('eject'), /QEMU refused eject: no such device/)
    qmp.close()
  })

  it('notices that QEMU has ended in the middle of a command', async () => {
    const qmp = await Qmp.connect(path)
    answer = (_, socket) => socket.destroy()
    await assert.rejects(qmp.execute('quit'), QmpClosed)
    await qmp.closed
    await assert.rejects(qmp.execute('stop'), QmpClosed)
  })

  it('does not wait for ever for an answer, an event or a greeting', async () => {
    const qmp = await Qmp.connect(path)
    answer = () => {}
    const slow = qmp.execute('stop', undefined, { timeout: 0.1 })
    await assert.rejects(slow, /QEMU did not answer stop within 0\.1 s/)
    await assert.rejects(qmp.waitForEvent('STOP', { timeout: 0.1 }), /sent no event STOP/)
    qmp.close()
    silent = true
    await assert.rejects(
      Qmp.connect(path, { timeout: 0.1 }),
      /QEMU does not answer on .*alpha\.qmp/,
    )
  })

  it('says so when nobody listens', async () => {
    await assert.rejects(Qmp.connect(join(folder, 'none')), /QEMU does not answer on .*none/)
  })
})
