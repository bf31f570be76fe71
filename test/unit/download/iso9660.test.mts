import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { mkdir, mkdtemp, rm, stat, truncate, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import { readIso } from '../../../lib/download/iso9660.mts'
import { makeIso, noIsoTool } from '../../iso-image.mts'

let folder: string
before(async () => {
  folder = await mkdtemp(join(tmpdir(), 'iso9660-'))
})
after(() => rm(folder, { recursive: true, force: true }))

const many = Array.from({ length: 200 }, (_, index) => `f${String(index).padStart(4, '0')}.txt`)

function xorriso(): string | false {
  try {
    execFileSync('xorriso', ['--version'], { stdio: 'ignore' })
    return false
  } catch {
    return 'xorriso is not installed'
  }
}

describe('an ISO 9660 image', () => {
  it('tells its size and the names in its folders', { skip: noIsoTool }, async () => {
    const path = join(folder, 'a.iso')
    await makeIso(path, { 'EFI/boot/grub.cfg': 'menu', 'EFI/boot/noext': '', 'version.txt': '1' })
    const image = await readIso(path, async ({ size, list }) => ({
      size,
      top: await list(),
      boot: await list('efi', 'BOOT'),
      missing: await list('EFI', 'NOTHING'),
      file: await list('VERSION.TXT'),
    }))
    assert.ok(image && image.size <= (await stat(path)).size)
    assert.deepEqual(image.top.sort(), ['EFI', 'VERSION.TXT'])
    assert.deepEqual(image.boot.sort(), ['GRUB.CFG', 'NOEXT'])
    assert.deepEqual(image.missing, [])
    assert.deepEqual(image.file, [])
  })

  it('may have folders of several sectors', { skip: noIsoTool }, async () => {
    const path = join(folder, 'many.iso')
    await makeIso(path, Object.fromEntries(many.map((name) => [`d/${name}`, 'x'])))
    const names = await readIso(path, ({ list }) => list('d'))
    assert.deepEqual(
      names?.sort(),
      many.map((name) => name.toUpperCase()),
    )
  })

  it('is read as xorriso makes it, too', { skip: xorriso() }, async () => {
    const path = join(folder, 'x.iso')
    await mkdir(join(folder, 'tree', 'EFI', 'BOOT'), { recursive: true })
    await writeFile(join(folder, 'tree', 'EFI', 'BOOT', 'grub.cfg'), 'menu')
    const options = ['-as', 'mkisofs', '-quiet', '-r', '-J', '-iso-level', '3', '-o', path]
    execFileSync('xorriso', [...options, join(folder, 'tree')], { stdio: 'pipe' })
    const image = await readIso(path, async ({ size, list }) => ({
      size,
      boot: await list('EFI', 'BOOT'),
    }))
    assert.deepEqual(image, { size: (await stat(path)).size, boot: ['GRUB.CFG'] })
  })

  it('that is cut off is an error or has less in it, and never an endless loop', {
    skip: noIsoTool,
  }, async () => {
    const path = join(folder, 'cut.iso')
    await makeIso(path, { 'EFI/BOOT/grub.cfg': 'menu' })
    const { size } = await stat(path)
    for (let length = size; length >= 0; length -= 2048) {
      await truncate(path, length)
      await readIso(path, ({ list }) => list('EFI', 'BOOT'))
    }
  })

  it('is told from other files', async () => {
    const path = join(folder, 'other')
    for (const content of ['', 'text', Buffer.alloc(100_000), Buffer.alloc(100_000, 'CD001')]) {
      await writeFile(path, content)
      assert.equal(await readIso(path, async () => 'an image'), undefined)
    }
  })
})
