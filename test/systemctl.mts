// systemctl on a machine that is an sshd of this computer: calls come to the test as functions.
import { once } from 'node:events'
import { createServer } from 'node:http'
import { text } from 'node:stream/consumers'
import type { Sshd } from './sshd.mts'

export interface Systemctl {
  /** All calls so far, as they were typed. */
  calls: string[]
  stop(): Promise<void>
}

/**
 * Puts a systemctl into the PATH of an sshd.
 *
 * @param answer what a call prints; if it throws, the call fails with that message
 */
export async function fakeSystemctl(
  sshd: Sshd,
  answer: (args: string) => Promise<string> | string,
): Promise<Systemctl> {
  const calls: string[] = []
  const server = createServer(async (request, response) => {
    const args = await text(request)
    calls.push(args)
    try {
      response.end(await answer(args))
    } catch (error) {
      response.statusCode = 500
      response.end(String(error))
    }
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  const address = server.address()
  const port = typeof address === 'object' && address ? address.port : 0
  const curl = `/usr/bin/curl -sS --fail-with-body --data-binary "$*" http://127.0.0.1:${port}/`
  await sshd.program('systemctl', `#!/bin/sh\nexec ${curl}\n`)
  return {
    calls,
    stop: async () => {
      server.closeAllConnections()
      server.close()
      await once(server, 'close')
    },
  }
}
