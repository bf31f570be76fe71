import assert from 'node:assert/strict'
import { afterEach, beforeEach, describe, it, mock } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { $ } from 'zx/core'
import type { StepError } from '../../lib/errors.mts'
import { prepareCommands } from '../../lib/script.mts'
import { becomes, waitFor } from '../../lib/wait.mts'

describe('a wait', () => {
  it('ends when nothing is missing any more, and shows the first line of what is missing', async () => {
    const missing = ['two pods\nweb-1\nweb-2', 'one pod', undefined]
    const shown: string[] = []
    await waitFor(
      { failure: 'no pods', timeout: 60, every: 1, detail: (text) => shown.push(text) },
      async () => missing.shift(),
    )
    assert.deepEqual(shown, ['two pods', 'one pod'])
  })

  it('gives up with what was missing last', async () => {
    const failing = waitFor({ failure: 'no pods', timeout: 0.05, every: 10 }, async () => 'web-1')
    await assert.rejects(failing, ({ message, explanation }: StepError) => {
      assert.equal(message, 'no pods after 0.05 s')
      assert.equal(explanation.output, 'web-1')
      return true
    })
  })

  it('goes on while the API server is too busy to answer, and ends when nothing listens', async () => {
    prepareCommands(false)
    const says = [
      'Unable to connect to the server: net/http: TLS handshake timeout',
      'The connection to the server 127.0.0.1:6443 was refused - did you specify the right host?',
    ]
    const shown: string[] = []
    const waiting = waitFor(
      { failure: 'no pods', timeout: 60, every: 1, detail: (text) => shown.push(text) },
      async () => (await $`kubectl() { echo ${says.shift()} >&2; false; }; kubectl`).stdout,
    )
    await assert.rejects(waiting, (error) => /refused/.test(String(error)))
    assert.deepEqual(shown, ['the API server does not answer in time'])
  })

  it('looks for at most half of the time', async () => {
    let looks = 0
    const waiting = waitFor({ failure: 'no pods', timeout: 1, every: 1 }, async () => {
      looks += 1
      await sleep(100)
      return 'web-1'
    })
    await assert.rejects(waiting, /no pods after 1 s/)
    // Ten without a pause.
    assert.ok(looks <= 7, `${looks} looks`)
  })

  it('ends at once with the reason of an interruption', async () => {
    const abort = new AbortController()
    const began = performance.now()
    const waiting = waitFor(
      { failure: 'no pods', timeout: 60, every: 30_000, signal: abort.signal },
      async () => {
        setTimeout(() => abort.abort(new Error('interrupted')), 20)
        return 'web-1'
      },
    )
    await assert.rejects(waiting, /^Error: interrupted$/)
    assert.ok(performance.now() - began < 10_000)
  })

  describe('of a computer that is asleep meanwhile', () => {
    const real = performance.now.bind(performance)
    let offset = 0
    beforeEach(() => {
      offset = 0
      mock.method(performance, 'now', () => real() + offset)
    })
    afterEach(() => mock.restoreAll())
    const anHourPasses = () => {
      offset = 3_600_000
    }

    it('does not count an hour between two looks', async () => {
      let looks = 0
      await waitFor({ failure: 'no pods', timeout: 100, every: 20 }, async () => {
        looks += 1
        if (looks === 1) setTimeout(anHourPasses, 1)
        return looks < 4 ? 'web-1' : undefined
      })
      assert.equal(looks, 4)
    })

    it('does not count an hour during a look, nor pause for another one', async () => {
      let looks = 0
      const began = real()
      await waitFor({ failure: 'no pods', timeout: 100, every: 20 }, async () => {
        looks += 1
        if (looks === 1) anHourPasses()
        return looks < 3 ? 'web-1' : undefined
      })
      assert.equal(looks, 3)
      assert.ok(real() - began < 30_000)
    })

    it('gives up after the time that it was awake', async () => {
      setTimeout(anHourPasses, 1)
      const began = real()
      const waiting = waitFor({ failure: 'no pods', timeout: 3, every: 20 }, async () => 'web-1')
      await assert.rejects(waiting, /no pods after 3 s/)
      assert.ok(real() - began > 900, 'an hour of sleep counted as more than two seconds')
      assert.equal(await becomes(() => false, 0.1), false)
    })
  })
})
