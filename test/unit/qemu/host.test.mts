import assert from 'node:assert/strict'
import { chmod, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import { StepError } from '../../../lib/errors.mts'
import { detectQemu } from '../../../lib/qemu/host.mts'

describe('the QEMU program', () => {
  let folder: string
  const before_ = process.env.PATH
  before(async () => {
    folder = await mkdtemp(join(tmpdir(), 'host with space-'))
  })
  after(async () => {
    process.env.PATH = before_
    await rm(folder, { recursive: true })
  })

  async function pretend(version: string): Promise<void> {
    const program = join(folder, 'qemu-system-aarch64')
    await writeFile(program, `#!/bin/sh\necho 'QEMU emulator version ${version}'\n`)
    await chmod(program, 0o755)
    process.env.PATH = `${folder}:/usr/bin:/bin`
  }

  for (const [text, version] of [
    ['7.2.22 (Debian 1:7.2+dfsg-7)', '7.2.22'],
    ['10.1.0', '10.1.0'],
    ['11.0', '11.0'],
  ] as const) {
    it(`is found with its version, ${version}`, async () => {
      await pretend(text)
      const path = join(folder, 'qemu-system-aarch64')
      assert.deepEqual(await detectQemu('aarch64'), { path, version })
    })
  }

  it('is refused when it is too old for the lan', async () => {
    await pretend('6.2.0 (Debian 1:6.2+dfsg-2ubuntu6)')
    await assert.rejects(detectQemu('aarch64'), /QEMU 6\.2\.0 is too old: 7\.2 or newer/)
  })

  it('is missed with a hint when there is none', async () => {
    process.env.PATH = '/nonexistent'
    await assert.rejects(detectQemu('x86_64'), (error: StepError) => {
      assert.equal(error.message, 'qemu-system-x86_64 is not installed')
      assert.match(error.explanation.hint ?? '', /check-prereqs/)
      return error instanceof StepError
    })
  })
})
