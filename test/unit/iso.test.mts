import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { mkdir, mkdtemp, realpath, rm, stat, truncate, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, beforeEach, describe, it } from 'node:test'
import { type Cluster, loadCluster } from '../../lib/cluster.mts'
import { inspectIso, isoFile, isoRecord, recordIso, verifiedIso } from '../../lib/iso.mts'
import { projectRoot } from '../checkout.mts'
import { largeInstaller, makeIso, noIso } from '../installer-iso.mts'

let folder: string
let cluster: Cluster
before(async () => {
  folder = await realpath(await mkdtemp(join(tmpdir(), 'iso test-')))
  const project = loadCluster({ root: projectRoot, env: { NIXOS_VERSION: '26.05' } })
  cluster = { ...project, root: folder, path: (...parts) => join(folder, ...parts) }
})
after(() => rm(folder, { recursive: true, force: true }))

describe('a file taken for the installer', { skip: noIso }, () => {
  let iso: string
  beforeEach(async () => {
    iso = join(folder, 'a.iso')
    const { 'EFI/BOOT/BOOTAA64.EFI': _, ...forX86 } = largeInstaller
    await makeIso(iso, forX86)
  })

  it('passes if it is a whole ISO image with GRUB for UEFI', () => inspectIso(iso, 'x86_64'))

  it('passes with the folder name of older installers', async () => {
    await makeIso(iso, { 'EFI/boot/grub.cfg': 'menu\n', 'EFI/boot/bootx64.efi': 'MZ' })
    await inspectIso(iso, 'x86_64')
  })

  it('passes if xorriso made it', async (t) => {
    try {
      execFileSync('xorriso', ['--version'], { stdio: 'ignore' })
    } catch {
      return t.skip('xorriso is not installed')
    }
    const tree = join(folder, 'tree')
    await mkdir(join(tree, 'EFI', 'BOOT'), { recursive: true })
    await writeFile(join(tree, 'EFI', 'BOOT', 'grub.cfg'), 'menu')
    const options = ['-as', 'mkisofs', '-quiet', '-r', '-J', '-iso-level', '3', '-o', iso, tree]
    execFileSync('xorriso', options, { stdio: 'pipe' })
    await inspectIso(iso, 'x86_64')
  })

  it('is refused if it is something else', async () => {
    const contents = [
      '',
      '<html>Please log in</html>',
      Buffer.alloc(1e6),
      Buffer.alloc(1e5, 'CD001'),
    ]
    for (const content of contents) {
      await writeFile(join(folder, 'b.iso'), content)
      const expected = { message: 'b.iso is not an ISO 9660 image' }
      await assert.rejects(inspectIso(join(folder, 'b.iso'), 'x86_64'), expected)
    }
    await assert.rejects(inspectIso(folder, 'x86_64'), /is not an ISO 9660 image/)
  })

  it('is refused wherever it is cut off', async () => {
    const { size } = await stat(iso)
    await truncate(iso, 900_000)
    await assert.rejects(
      inspectIso(iso, 'x86_64'),
      /^StepError: a\.iso is cut off: 900000 of \d+ b/,
    )
    for (const length of [size - 300_000, 40_960, 34_816, 32_900, 2048, 0]) {
      await truncate(iso, length)
      await assert.rejects(inspectIso(iso, 'x86_64'), /is cut off|is not an ISO 9660 image/)
    }
  })

  it('is refused if it has no boot menu', async () => {
    await makeIso(iso, { 'README.txt': 'holiday pictures' })
    await assert.rejects(
      inspectIso(iso, 'x86_64'),
      /is not a NixOS installer: it has no EFI\/BOOT\/g/,
    )
  })

  it('is refused if it is for another processor', async () => {
    await assert.rejects(inspectIso(iso, 'aarch64'), /for another processor than aarch64/)
  })
})

describe('a verified ISO', () => {
  const sha256 = 'a'.repeat(64)
  let file: string
  beforeEach(async () => {
    file = isoFile(cluster, 'x86_64')
    await rm(join(folder, 'images'), { recursive: true, force: true })
    await mkdir(join(folder, 'images'))
    await writeFile(file, largeInstaller['nix-store.squashfs'] ?? '')
  })

  it('is accepted as long as its size and time are those of the record', async () => {
    assert.equal(file, join(folder, 'images/nixos-26.05-x86_64.iso'))
    await recordIso(file, 'http://mirror.test/a.iso', sha256)
    assert.equal(await verifiedIso(cluster, 'x86_64'), file)
    assert.equal((await isoRecord(file))?.source, 'http://mirror.test/a.iso')
  })

  it('is not accepted without a record, after a change, or cut off', async () => {
    const changed = /has changed since \.\/bin\/download-iso\.mts verified it/
    await assert.rejects(verifiedIso(cluster, 'x86_64'), changed)
    await recordIso(file, 'http://mirror.test/a.iso', sha256)
    await truncate(file, 1000)
    await assert.rejects(verifiedIso(cluster, 'x86_64'), changed)
    await recordIso(file, 'http://mirror.test/a.iso', sha256)
    await writeFile(`${file}.json`, 'half a rec')
    await assert.rejects(verifiedIso(cluster, 'x86_64'), changed)
  })

  it('that is missing is named', async () => {
    await rm(file)
    const missing = /there is no installer ISO: .*images\/nixos-/
    await assert.rejects(verifiedIso(cluster, 'x86_64'), missing)
  })
})
