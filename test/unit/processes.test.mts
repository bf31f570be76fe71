import assert from 'node:assert/strict'
import { type ChildProcess, spawn } from 'node:child_process'
import { createSocket } from 'node:dgram'
import { once } from 'node:events'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import type { StepError } from '../../lib/errors.mts'
import {
  assertFree,
  commandLine,
  isGone,
  isPortFree,
  pidFrom,
  portHolder,
} from '../../lib/processes.mts'
import { becomes } from '../../lib/wait.mts'
import { freePorts } from '../ports.mts'
import { missing } from '../tools.mts'

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

  it('refers to a process with the expected arguments', async () => {
    await writeFile(file, `${pid}\n`)
    assert.equal(await commandLine(pid), 'sleep 1000')
    assert.equal(await pidFrom(file, ['sleep', '1000']), pid)
  })

  it('does not refer to another process that now has its number', async () => {
    await writeFile(file, `${pid}\n`)
    assert.equal(await pidFrom(file, ['qemu-system-']), undefined)
  })

  for (const content of ['', 'no number', '-1', '0', '1', '4194305']) {
    it(`refers to nothing when it contains ${JSON.stringify(content)}`, async () => {
      await writeFile(file, content)
      assert.equal(await pidFrom(file, []), undefined)
    })
  }

  it('refers to nothing when it does not exist', async () => {
    assert.equal(await pidFrom(join(folder, 'none'), []), undefined)
  })

  it('refers to nothing when its process is a zombie', async () => {
    // Before its child ends the shell becomes a sleep, which waits for none.
    const parent = spawn('sh', ['-c', 'sleep 1 & echo $!; exec sleep 1000'])
    try {
      const [output] = (await once(parent.stdout, 'data')) as [Buffer]
      const zombie = Number(output.toString())
      await writeFile(file, String(zombie))
      assert.ok(await becomes(async () => (await pidFrom(file, ['sleep'])) === undefined, 10))
      assert.ok(process.kill(zombie, 0), 'the number is still taken')
      assert.ok(await becomes(() => isGone(zombie), 10))
      assert.equal(await isGone(parent.pid ?? 0), false)
    } finally {
      parent.kill('SIGKILL')
    }
  })
})

const me = new RegExp(`\\(pid ${process.pid}\\)$`)

/** Runs a check while something listens. */
async function listening<T>(host: string, look: (port: number) => Promise<T>): Promise<T> {
  const server = createServer().listen(0, host)
  await once(server, 'listening')
  const address = server.address()
  try {
    return await look(typeof address === 'object' && address ? address.port : 0)
  } finally {
    server.close()
  }
}

describe('a port', () => {
  it('is free when nothing has it', async () => {
    const [port = 0] = await freePorts(1)
    assert.equal(await isPortFree('tcp', port), true)
    assert.equal(await isPortFree('udp', port), true)
    assert.equal(await portHolder('tcp', port), undefined)
  })

  for (const host of ['127.0.0.1', '0.0.0.0', '::']) {
    it(`is taken when a process listens on ${host}, which is named`, async () => {
      await listening(host, async (port) => {
        assert.equal(await isPortFree('tcp', port), false)
        assert.match((await portHolder('tcp', port)) ?? '', me)
      })
    })
  }

  it('of UDP is also taken when its holder would share it', async () => {
    const socket = createSocket({ type: 'udp4', reuseAddr: true })
    socket.bind(0, '127.0.0.1')
    await once(socket, 'listening')
    const { port } = socket.address()
    try {
      assert.equal(await isPortFree('udp', port), false)
      assert.match((await portHolder('udp', port)) ?? '', me)
      assert.equal(await isPortFree('tcp', port), true, 'TCP has its own ports')
    } finally {
      socket.close()
    }
  })

  it('that is taken is reported with its variable, its holder and a hint', async () => {
    await listening('127.0.0.1', async (port) => {
      const wanted = [{ transport: 'tcp', port, variable: 'SSH_PORT_alpha' } as const]
      await assert.rejects(assertFree(wanted), ({ message, explanation }: StepError) => {
        assert.match(message, new RegExp(`^TCP port ${port} \\(SSH_PORT_alpha\\) is taken by`))
        assert.match(message, me)
        assert.match(explanation.hint ?? '', /cluster\.env: SSH_PORT_alpha/)
        return true
      })
    })
  })

  it('is reported together with all others that are taken', async () => {
    await listening('127.0.0.1', (first) =>
      listening('127.0.0.1', async (second) => {
        const wanted = [
          { transport: 'tcp', port: first, variable: 'SSH_PORT_alpha' },
          { transport: 'tcp', port: second, variable: 'API_PORT' },
        ] as const
        await assert.rejects(assertFree(wanted), ({ message, explanation }: StepError) => {
          assert.equal(message, '2 ports are taken')
          assert.match(explanation.output ?? '', /SSH_PORT_alpha[\s\S]*API_PORT/)
          return true
        })
      }),
    )
  })
})

// macOS has no /proc: there `ps` and `lsof` are asked, which Linux has as well.
describe('a process, as on macOS', { skip: missing('ps') }, () => {
  let child: ChildProcess
  before(async () => {
    // (It waits by itself: a process of its own would outlive it.)
    child = spawn('sh', ['-c', 'read line # /Users/müller/run/alpha.pid'])
    await once(child, 'spawn')
  })
  after(() => child.kill('SIGKILL'))

  it('shows non-ASCII characters of its arguments whatever the locale of the caller', async () => {
    const previous = process.env.LC_ALL
    process.env.LC_ALL = 'C'
    try {
      assert.match((await commandLine(child.pid ?? 0, 'darwin')) ?? '', /müller\/run\/alpha\.pid/)
    } finally {
      if (previous === undefined) delete process.env.LC_ALL
      else process.env.LC_ALL = previous
    }
  })

  it('is gone when it has ended', async () => {
    assert.equal(await isGone(child.pid ?? 0, 'darwin'), false)
    assert.equal(await isGone(4194305, 'darwin'), true)
    assert.equal(await commandLine(4194305, 'darwin'), undefined)
  })

  it('is found by the port it holds, with a PATH without the folder of lsof', {
    skip: missing('lsof'),
  }, async () => {
    const previous = process.env.PATH
    process.env.PATH = '/nonexistent'
    try {
      await listening('127.0.0.1', async (port) => {
        assert.match((await portHolder('tcp', port)) ?? '', me)
      })
    } finally {
      process.env.PATH = previous
    }
  })
})
