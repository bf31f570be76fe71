import assert from 'node:assert/strict'
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync } from 'node:fs'
import { mkdir, readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import { setTimeout as wait } from 'node:timers/promises'
import { type Checkout, makeCheckout } from '../checkout.mts'

/** Waits for the signal, then cleans up, as slowly as its arguments say. Half a minute takes 0.3 s. */
const sample = `
import { writeFile } from 'node:fs/promises'
import { setTimeout as wait } from 'node:timers/promises'
import { interruption, takingTime } from '../lib/interrupt.mts'
import { script } from '../lib/script.mts'

const repeat = globalThis.setInterval
globalThis.setInterval = (work, time) => repeat(work, time === 30_000 ? 300 : time)
const { args } = script({ does: '', reads: [], writes: [], args: 'MILLISECONDS HOW', examples: [] })
const signal = interruption()
if (signal !== interruption()) throw new Error('there is one signal only')
console.log('ready')
if (args[1] === 'ticking') repeat(() => console.error('tick'), 20)
await wait(60_000, undefined, { signal }).catch(() => {})
console.log('cleaning up')
const clean = () => wait(Number(args[0]))
await (args[1] === 'undoing' ? takingTime(clean) : clean())
if (args[1] === 'ticking') await writeFile('cleaned', '')
console.log('clean')
signal.throwIfAborted()
`

describe('an interruption', () => {
  let checkout: Checkout
  before(async () => {
    checkout = await makeCheckout()
    await writeFile(checkout.path('bin', 'sample.mts'), sample)
  })
  after(() => checkout.remove())

  function start(
    cleaning: number,
    how = 'undoing',
    env: NodeJS.ProcessEnv = process.env,
  ): {
    child: ChildProcess
    said: (text: string) => Promise<void>
    end: Promise<unknown[]>
  } {
    const [launch, sample] = [checkout.path('lib/launch.mjs'), checkout.path('bin/sample.mts')]
    const args = [launch, sample, `${cleaning}`, how]
    const child = spawn(process.execPath, args, { env, cwd: checkout.root })
    let output = ''
    const listeners = new Set<() => void>()
    for (const stream of [child.stdout, child.stderr]) {
      stream.on('data', (chunk) => {
        output += chunk
        for (const listener of listeners) listener()
      })
    }
    const said = (text: string) =>
      new Promise<void>((resolve, reject) => {
        const look = () => {
          if (output.includes(text)) resolve()
        }
        listeners.add(look)
        child.once('close', () => reject(new Error(`"${text}" was not said: ${output}`)))
        look()
      })
    const end = new Promise<unknown[]>((resolve) => {
      child.on('close', (status, signal) => resolve([status, signal, output]))
    })
    return { child, said, end }
  }

  for (const [signal, status] of [
    ['SIGINT', 130],
    ['SIGTERM', 143],
    // The terminal was closed.
    ['SIGHUP', 129],
  ] as const) {
    it(`by ${signal} lets the step clean up, and ends it with status ${status}`, async () => {
      const { child, said, end } = start(50)
      await said('ready')
      child.kill(signal)
      assert.deepEqual(await end, [
        status,
        null,
        `ready\ncleaning up\nclean\nsample: interrupted by ${signal}\n`,
      ])
    })
  }

  it('by a reader that has seen enough (| head) lets the step clean up as well', async () => {
    const { child, said } = start(50, 'ticking')
    await said('tick')
    const ended = once(child, 'exit')
    for (const stream of [child.stdout, child.stderr]) stream?.destroy()
    assert.deepEqual(await ended, [129, null])
    assert.ok(existsSync(checkout.path('cleaned')))
  })

  it('lets what undoes something take more than half a minute', async () => {
    const { child, said, end } = start(800)
    await said('ready')
    child.kill('SIGINT')
    const [status, , output] = await end
    assert.equal(status, 130)
    assert.match(String(output), /^clean$/m)
  })

  it('ends a step that does not stop within half a minute', async () => {
    const { child, said, end } = start(60_000, 'stuck')
    await said('ready')
    child.kill('SIGINT')
    assert.deepEqual(await end, [130, null, 'ready\ncleaning up\n'])
  })

  it('goes with a computer that is kept awake, once for a script and those that it runs', async () => {
    const folder = checkout.path('awake')
    await mkdir(folder)
    for (const name of ['caffeinate', 'systemd-inhibit']) {
      await writeFile(join(folder, name), `#!/bin/sh\necho "$*" >>'${folder}/calls'\n`, {
        mode: 0o755,
      })
    }
    const calls = () => readFile(join(folder, 'calls'), 'utf8').catch(() => '')
    const env = { ...process.env, PATH: `${folder}:${process.env.PATH}` }
    const child = start(50, 'stuck', { ...env, CLUSTER_LOCKS: '' })
    const parent = start(50, 'stuck', env)
    await parent.said('ready')
    while ((await calls()) === '') await wait(20)
    for (const { child: process } of [child, parent]) process.kill('SIGINT')
    await Promise.all([child.end, parent.end])
    assert.match(await calls(), new RegExp(`^[^\n]*\\b${parent.child.pid}\n$`))
  })

  it('is only one, however many signals a closed terminal sends', async () => {
    const { child, said, end } = start(300)
    await said('ready')
    child.kill('SIGHUP')
    await said('cleaning up')
    child.kill('SIGHUP')
    child.kill('SIGTERM')
    const [status, , output] = await end
    assert.equal(status, 129)
    assert.match(String(output), /^clean$/m)
  })

  it('a second time by Ctrl-C ends it at once', async () => {
    const { child, said, end } = start(60_000)
    await said('ready')
    child.kill('SIGINT')
    await said('cleaning up')
    child.kill('SIGINT')
    assert.deepEqual(await end, [130, null, 'ready\ncleaning up\n'])
  })
})
