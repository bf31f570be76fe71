import assert from 'node:assert/strict'
import { readdirSync } from 'node:fs'
import { mkdtemp, readdir, rm, symlink } from 'node:fs/promises'
import { tmpdir } from 'node:os'
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

  it('explains itself, refuses what it does not know, and then has done nothing', async () => {
    const before = await everything()
    const waiting = [...scripts]
    const checkNext = async (): Promise<void> => {
      const script = waiting.pop()
      if (!script) return
      // As users start it, without what the tests' runner sets.
      const env = { NODE_OPTIONS: undefined }
      const help = await run(checkout, `bin/${script}`, ['--help'], { cwd: '/', env })
      assert.deepEqual([help.exitCode, help.stderr], [0, ''], script)
      for (const part of [`Usage: ./bin/${script} `, 'Reads: ', 'Writes: ', 'Example']) {
        assert.ok(help.stdout.includes(part), `${script}: ${part}`)
      }
      assert.ok(help.stdout.includes(`\n  ./bin/${script}`), `${script}: an example`)

      const name = script.replace('.mts', '')
      const unknown = await run(checkout, `bin/${script}`, ['--no-such-flag'])
      assert.equal(unknown.exitCode, 2, script)
      assert.match(unknown.stderr, new RegExp(`^${name}: unknown flag --no-such-flag\n`))
      assert.equal(unknown.stdout, '', script)
      await checkNext()
    }
    await Promise.all([checkNext(), checkNext(), checkNext()])
    assert.deepEqual(await everything(), before)
  })

  it('works through a link, at a path with blanks, quotes, a dollar sign and umlauts', async () => {
    const folder = await mkdtemp(join(tmpdir(), 'odd-'))
    const odd = await makeCheckout({ folder: join(folder, `it's "$HOME" für #1 50%`) })
    try {
      const link = join(folder, 'encrypt')
      await symlink(odd.path('bin/generate-encryption-config.mts'), link)
      const { exitCode, stderr } = await run({ root: folder }, link.slice(folder.length))
      assert.equal(exitCode, 0, stderr)
      assert.ok((await readdir(odd.path('configs'))).includes('encryption-config.yaml'))
      const named = await run(odd, 'bin/generate-nocloud-iso.mts', ['sigma'])
      assert.match(named.stderr, /sigma cannot be staged/)
    } finally {
      await odd.remove()
      await rm(folder, { recursive: true, force: true })
    }
  })

  it('reports mistakes in cluster.env before anything happens', async () => {
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
