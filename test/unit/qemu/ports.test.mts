import assert from 'node:assert/strict'
import { createSocket } from 'node:dgram'
import { once } from 'node:events'
import { createServer } from 'node:net'
import { describe, it } from 'node:test'
import { loadCluster } from '../../../lib/cluster.mts'
import type { StepError } from '../../../lib/errors.mts'
import { assertFree, isPortFree, portHolder, portsOf } from '../../../lib/qemu/ports.mts'
import { freePorts } from '../../checkout.mts'

const me = new RegExp(`\\(pid ${process.pid}\\)$`)

/** Listens while something is looked at. */
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
  it('is free when nobody has it', async () => {
    const [port = 0] = await freePorts(1)
    assert.equal(await isPortFree('tcp', port), true)
    assert.equal(await isPortFree('udp', port), true)
    assert.equal(await portHolder('tcp', port), undefined)
  })

  for (const host of ['127.0.0.1', '0.0.0.0', '::']) {
    it(`is taken by whoever listens on ${host}, and that is told`, async () => {
      await listening(host, async (port) => {
        assert.equal(await isPortFree('tcp', port), false)
        assert.match((await portHolder('tcp', port)) ?? '', me)
      })
    })
  }

  it('of UDP is taken also by one who would share it, and that is told', async () => {
    const socket = createSocket({ type: 'udp4', reuseAddr: true })
    socket.bind(0, '127.0.0.1')
    await once(socket, 'listening')
    const { port } = socket.address()
    assert.equal(await isPortFree('udp', port), false)
    assert.match((await portHolder('udp', port)) ?? '', me)
    assert.equal(await isPortFree('tcp', port), true, 'TCP is another matter')
    socket.close()
  })

  it('that is taken is told with its variable, its holder and what to do', async () => {
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

  it('is not the only one told when several are taken', async () => {
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

  it('is listed for each machine: ssh and lan for all, the API for the control plane', () => {
    const cluster = loadCluster({ env: {} })
    const variables = cluster.nodes.map((node) =>
      portsOf(cluster, node).map(({ variable, port }) => `${variable} ${port}`),
    )
    assert.deepEqual(variables, [
      ['SSH_PORT_alpha 2222', 'LAN_SWITCH_PORT 24110', 'API_PORT 6443'],
      ['SSH_PORT_sigma 2223', 'LAN_SWITCH_PORT 24111'],
      ['SSH_PORT_gamma 2224', 'LAN_SWITCH_PORT 24112'],
    ])
  })
})
