import assert from 'node:assert/strict'
import { writeFile } from 'node:fs/promises'
import { after, before, describe, it } from 'node:test'
import { spawn } from 'node-pty'
import { type Checkout, makeCheckout, type Outcome, run } from '../checkout.mts'

/** Scripts of a few steps, each under the name of what it shows. */
const samples = {
  one: `
    const answer = await step('count to three', async (detail) => {
      for (const number of ['one', 'two', 'three']) {
        detail(number)
        await wait(120)
      }
      return 3
    })
    console.log(String(answer))`,
  failing: `
    await step('divide by zero', () => { throw new Error('no') })`,
  several: `
    const results = await inParallel(['alpha', 'sigma', 'gamma'], async (name, row) => {
      row.step('starts')
      await wait(name === 'alpha' ? 250 : 60)
      row.detail('passing')
      row.step('ends')
      await wait(60)
      return name.length
    })
    console.log(results.join(' '))`,
  oneOfSeveral: `
    await inParallel(['alpha', 'sigma', 'gamma'], async (name) => {
      await wait(name === 'gamma' ? 200 : 20)
      if (name === 'sigma') throw new StepError('no disk', { hint: 'buy one', exitCode: 4 })
      console.log(name)
    })`,
  allOfSeveral: `
    await inParallel(['alpha', 'sigma'], async (name) => {
      throw new StepError(name + ' has no disk', { hint: 'buy one' })
    })`,
}

describe('steps', () => {
  let checkout: Checkout
  before(async () => {
    checkout = await makeCheckout()
    for (const [name, body] of Object.entries(samples)) {
      const text = `
import { setTimeout as wait } from 'node:timers/promises'
import { script } from '../lib/script.mts'
import { StepError } from '../lib/errors.mts'
import { inParallel, step } from '../lib/steps.mts'
script({ does: '', reads: [], writes: [], examples: [] })
${body}`
      await writeFile(checkout.path('bin', `${name}.mts`), text)
    }
  })
  after(() => checkout.remove())

  const command = (name: keyof typeof samples) => [
    '--disable-warning=ExperimentalWarning',
    checkout.path('lib', 'launch.mjs'),
    checkout.path('bin', `${name}.mts`),
  ]

  const plain = (name: keyof typeof samples): Promise<Outcome> =>
    run({ root: '/' }, process.execPath, command(name))

  /** What a terminal is sent, with its escape sequences. */
  function onTerminal(name: keyof typeof samples, term = 'xterm', columns = 40): Promise<string> {
    return new Promise((resolve) => {
      const env = { ...process.env, TERM: term } as Record<string, string>
      const pty = spawn(process.execPath, command(name), { cols: columns, rows: 24, env })
      let output = ''
      pty.onData((chunk) => {
        output += chunk
      })
      pty.onExit(() => resolve(output))
    })
  }

  /** The screen after all that: what stands on each line in the end. */
  function screen(output: string): string[] {
    const lines: string[] = ['']
    let at = 0
    const shown = output.replaceAll('\x1b', '␛')
    for (const [token] of shown.matchAll(/␛\[(\d*)([A-Z])|\r?\n|[^␛\r\n]+|\r/g)) {
      const [, count, letter] = token.match(/^␛\[(\d*)([A-Z])$/) ?? []
      if (letter === 'A') at -= Number(count)
      else if (letter === 'K') lines[at] = ''
      else if (token.endsWith('\n')) {
        at += 1
        lines[at] ??= ''
      } else if (!letter) lines[at] += token
    }
    return lines.filter(Boolean)
  }

  it('are plain lines where there is no terminal, on stderr', async () => {
    const { stdout, stderr } = await plain('one')
    assert.match(stderr, /^• count to three …\n✓ count to three \(0\.\ds\)\n$/)
    assert.equal(stdout, '3\n')
  })

  it('show on a terminal what passes, in one line, and how it ended', async () => {
    const output = await onTerminal('one')
    for (const number of ['one', 'two', 'three']) {
      assert.match(output, new RegExp(`[⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏] count to three · ${number} \\(0\\.\\ds\\)`))
    }
    assert.match(screen(output)[0] ?? '', /^✓ count to three \(0\.\ds\)$/)
    assert.deepEqual(screen(output).slice(1), ['3'])
  })

  it('are plain on a terminal that can do nothing', async () => {
    const output = await onTerminal('one', 'dumb')
    assert.ok(!output.includes('\x1b'))
    assert.match(output, /^• count to three …\r\n✓ count/)
  })

  it('are cut to the width of the terminal', async () => {
    const output = await onTerminal('one', 'xterm', 12)
    assert.match(screen(output)[0] ?? '', /^✓ count to $/)
  })

  it('that fail are marked, and the error goes on', async () => {
    const { stderr, exitCode } = await plain('failing')
    assert.match(stderr, /^• divide by zero …\n✗ divide by zero \(0\.\ds\)\nfailing: no\n$/)
    assert.equal(exitCode, 1)
  })

  it('of several at once have a line each, and give results in order', async () => {
    const output = await onTerminal('several')
    const lines = screen(output)
    assert.equal(lines.length, 4, lines.join('\n'))
    assert.match(lines.join('\n'), /^✓ alpha \(.*\)\n✓ sigma \(.*\)\n✓ gamma \(.*\)\n5 5 5$/)
    assert.match(output, /[⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏] alpha · starts/)
  })

  it('of several at once tell each new step where there is no terminal', async () => {
    const { stdout, stderr } = await plain('several')
    const events = stderr.split('\n').map((line) => line.replace(/ \(.*\)$/, ''))
    for (const name of ['alpha', 'sigma', 'gamma']) {
      const own = events.filter((line) => line.includes(name))
      assert.deepEqual(own, [`• ${name} · starts …`, `• ${name} · ends …`, `✓ ${name}`])
    }
    assert.ok(events.indexOf('✓ sigma') < events.indexOf('✓ alpha'))
    assert.equal(stdout, '5 5 5\n')
  })

  it('of several at once end all, and throw the one error as it is', async () => {
    const { stdout, stderr, exitCode } = await plain('oneOfSeveral')
    assert.equal(stdout, 'alpha\ngamma\n')
    assert.match(stderr, /✗ sigma · no disk \(/)
    assert.match(stderr, /oneOfSeveral: no disk\n {2}hint: {4}buy one\n$/)
    assert.equal(exitCode, 4)
  })

  it('of several at once name each that failed', async () => {
    const { stderr } = await plain('allOfSeveral')
    assert.match(
      stderr,
      /allOfSeveral: alpha and sigma failed\n {2}\| alpha: alpha has no disk\n {2}\| sigma: sigma has no disk\n {2}hint: {4}buy one\n$/,
    )
  })
})
