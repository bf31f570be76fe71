import assert from 'node:assert/strict'
import { readdirSync } from 'node:fs'
import { readdir } from 'node:fs/promises'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import { type Checkout, makeCheckout, projectRoot, run } from '../checkout.mts'

describe('every script of bin/', () => {
  let checkout: Checkout
  before(async () => {
    checkout = await makeCheckout()
  })
  after(() => checkout.remove())

  const scripts = readdirSync(join(projectRoot, 'bin')).filter((name) => name.endsWith('.mts'))
  const everything = async () => (await readdir(checkout.root, { recursive: true })).sort()

  for (const script of scripts) {
    it(`${script} explains itself, refuses what it does not know, and then has done nothing`, async () => {
      const before = await everything()
      const help = await run(checkout, `bin/${script}`, ['--help'], { cwd: '/' })
      assert.deepEqual([help.exitCode, help.stderr], [0, ''])
      for (const part of [`Usage: ./bin/${script} `, 'Reads: ', 'Writes: ', 'Example']) {
        assert.ok(help.stdout.includes(part), part)
      }
      assert.ok(help.stdout.includes(`\n  ./bin/${script}`), 'an example')

      const name = script.replace('.mts', '')
      const unknown = await run(checkout, `bin/${script}`, ['--no-such-flag'])
      assert.equal(unknown.exitCode, 2)
      assert.match(unknown.stderr, new RegExp(`^${name}: unknown flag --no-such-flag\n`))
      assert.equal(unknown.stdout, '')
      assert.deepEqual(await everything(), before)
    })
  }

  it('and each is told of mistakes in cluster.env before anything happens', async () => {
    await checkout.set({ API_PORT: 'many' })
    const before = await everything()
    for (const script of ['check-prereqs.mts', 'download-iso.mts', 'generate-certs.mts']) {
      const { exitCode, stderr } = await run(checkout, `bin/${script}`)
      assert.equal(exitCode, 1, script)
      assert.match(
        stderr,
        /cluster\.env has a mistake\n {2}\| cluster\.env:\d+: API_PORT is "many"/,
      )
    }
    assert.deepEqual(await everything(), before)
  })
})
