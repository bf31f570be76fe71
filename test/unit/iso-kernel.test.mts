import assert from 'node:assert/strict'
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import { describeError } from '../../lib/errors.mts'
import { extractKernel, firstEntry } from '../../lib/iso.mts'
import { bootFiles, makeIso, menu, noIso, store } from '../installer-iso.mts'

describe("the boot menu's first entry", () => {
  it('is read as GRUB would start it, with paths as they are in the ISO', () => {
    assert.deepEqual(firstEntry(menu), {
      kernel: `boot${store}-linux-6.18/bzImage`,
      initrd: `boot${store}-initrd/initrd`,
      append: `init=${store}-nixos/init root=LABEL=nixos-minimal loglevel=4`,
    })
  })

  it('has no double slashes, which newer menus write', () => {
    const entry = firstEntry('linux /boot//nix/store/x/bzImage init=/a\ninitrd /boot//nix/initrd\n')
    assert.equal(entry?.kernel, 'boot/nix/store/x/bzImage')
    assert.equal(entry?.initrd, 'boot/nix/initrd')
  })

  it('may have no parameters', () => {
    assert.equal(firstEntry('linux /bzImage\ninitrd /initrd\n')?.append, '')
  })

  for (const text of ['', 'menuentry x {\n  linux /bzImage\n}\n', 'initrd /initrd\n']) {
    it(`is not found in ${JSON.stringify(text)}`, () => assert.equal(firstEntry(text), undefined))
  }
})

describe('the kernel of an ISO', { skip: noIso }, () => {
  let folder: string
  before(async () => {
    folder = await mkdtemp(join(tmpdir(), 'iso-boot-'))
  })
  after(() => rm(folder, { recursive: true }))

  const target = async () => await mkdtemp(join(folder, 'target-'))

  for (const path of ['EFI/BOOT/grub.cfg', 'EFI/boot/grub.cfg']) {
    it(`is found by ${path}, with the serial console added`, async () => {
      const iso = await makeIso(join(folder, 'with space.iso'), { ...bootFiles, [path]: menu })
      const kernel = await extractKernel(iso, await target(), 'x86_64')
      assert.equal(await readFile(kernel.kernel, 'utf8'), 'the kernel')
      assert.equal(await readFile(kernel.initrd, 'utf8'), 'the initrd')
      assert.match(kernel.append, /^init=\S+ root=LABEL=nixos-minimal .* console=ttyS0,115200n8 /)
      assert.doesNotMatch(kernel.append, /isoboot/)
    })
  }

  it('has the console of its architecture', async () => {
    const iso = await makeIso(join(folder, 'arm.iso'), { ...bootFiles, 'EFI/BOOT/grub.cfg': menu })
    const { append } = await extractKernel(iso, await target(), 'aarch64')
    assert.match(append, / console=ttyAMA0 /)
    assert.doesNotMatch(append, /ttyS0/)
  })

  for (const [what, contents, reason] of [
    ['without a boot menu', bootFiles, /it has no EFI\/BOOT\/grub\.cfg/],
    ['with an empty boot menu', { 'EFI/BOOT/grub.cfg': 'set x=1\n' }, /starts no kernel/],
    [
      'without the kernel its menu names',
      { 'EFI/BOOT/grub.cfg': menu },
      /linux-6\.18\/bzImage, which its EFI\/BOOT\/grub\.cfg names, is missing/,
    ],
    [
      'with a folder where the kernel should be',
      { 'EFI/BOOT/grub.cfg': menu, [`boot${store}-linux-6.18/bzImage/vmlinux`]: 'kernel' },
      /bzImage, which .* is missing/,
    ],
    [
      'with an empty initrd',
      { ...bootFiles, 'EFI/BOOT/grub.cfg': menu, [`boot${store}-initrd/initrd`]: '' },
      /initrd\/initrd, which .* is missing/,
    ],
  ] as const) {
    it(`is refused of an ISO ${what}`, async () => {
      const iso = await makeIso(join(folder, 'faulty.iso'), contents)
      await assert.rejects(extractKernel(iso, await target(), 'x86_64'), (error) => {
        assert.match(describeError(error), /is not a NixOS installer/)
        assert.match(describeError(error), reason)
        return true
      })
    })
  }

  it('cannot be read from what is no ISO', async () => {
    const iso = join(folder, 'text.iso')
    await writeFile(iso, 'not an ISO at all')
    await assert.rejects(extractKernel(iso, await target(), 'x86_64'), (error) => {
      assert.match(describeError(error), /^text\.iso is not a NixOS installer: bsdtar: /)
      return true
    })
  })
})
