import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import { mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import { promisify } from 'node:util'
import { which } from 'zx'
import { extractKernel, firstEntry } from '../../lib/iso-boot.mts'
import { describeError } from '../../lib/step-error.mts'

const missing = ['xorriso', 'bsdtar'].filter((tool) => !which.sync(tool, { nothrow: true }))
const skip = missing.length > 0 && `${missing.join(' and ')} missing`

const store = '/nix/store/0123456789abcdfghijklmnpqrsvwxyz'
// As NixOS writes it: a fallback console line, the menu's own variable, a store path below /boot.
const menu = `
set timeout=10
if [ \${iso_path} ] ; then
  set isoboot="findiso=\${iso_path}"
fi
menuentry 'NixOS 26.05 Installer '  --class installer {
  # Fallback to UEFI console for boot, efifb sometimes has difficulties.
  terminal_output console

  linux /boot/${store}-linux-6.18/bzImage \${isoboot} init=${store}-nixos/init  root=LABEL=nixos-minimal loglevel=4
  initrd /boot/${store}-initrd/initrd
}
menuentry 'NixOS (serial)' {
  linux /boot/other \${isoboot} console=ttyS0,115200n8
  initrd /boot/other-initrd
}
`

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

describe('the kernel of an ISO', { skip }, () => {
  let folder: string
  before(async () => {
    folder = await mkdtemp(join(tmpdir(), 'iso-boot-'))
  })
  after(() => rm(folder, { recursive: true }))

  async function makeIso(name: string, files: Record<string, string>): Promise<string> {
    const tree = join(folder, name)
    await mkdir(tree)
    for (const [path, content] of Object.entries(files)) {
      await mkdir(dirname(join(tree, path)), { recursive: true })
      await writeFile(join(tree, path), content)
    }
    const iso = join(folder, `${name} with space.iso`)
    const args = ['-as', 'mkisofs', '-quiet', '-iso-level', '3', '-R', '-o', iso, tree]
    await promisify(execFile)('xorriso', args)
    return iso
  }

  const target = async () => await mkdtemp(join(folder, 'target-'))

  const files = {
    [`boot${store}-linux-6.18/bzImage`]: 'the kernel',
    [`boot${store}-initrd/initrd`]: 'the initrd',
  }

  for (const path of ['EFI/BOOT/grub.cfg', 'EFI/boot/grub.cfg']) {
    it(`is found by ${path}, with the serial console added`, async () => {
      const iso = await makeIso(path.replaceAll('/', '-'), { ...files, [path]: menu })
      const kernel = await extractKernel(iso, await target())
      assert.equal(await readFile(kernel.kernel, 'utf8'), 'the kernel')
      assert.equal(await readFile(kernel.initrd, 'utf8'), 'the initrd')
      assert.match(kernel.append, /^init=\S+ root=LABEL=nixos-minimal .* console=ttyS0,115200n8$/)
      assert.doesNotMatch(kernel.append, /isoboot/)
    })
  }

  for (const [what, contents, reason] of [
    ['without a boot menu', files, /it has no EFI\/BOOT\/grub\.cfg/],
    ['with an empty boot menu', { 'EFI/BOOT/grub.cfg': 'set x=1\n' }, /starts no kernel/],
    [
      'without the kernel its menu names',
      { 'EFI/BOOT/grub.cfg': menu },
      /linux-6\.18\/bzImage, which its EFI\/BOOT\/grub\.cfg names, is not there/,
    ],
    [
      'with a folder where the kernel should be',
      { 'EFI/BOOT/grub.cfg': menu, [`boot${store}-linux-6.18/bzImage/vmlinux`]: 'kernel' },
      /bzImage, which .* is not there/,
    ],
    [
      'with an empty initrd',
      { ...files, 'EFI/BOOT/grub.cfg': menu, [`boot${store}-initrd/initrd`]: '' },
      /initrd\/initrd, which .* is not there/,
    ],
  ] as const) {
    it(`is refused of an ISO ${what}`, async () => {
      const iso = await makeIso(what.replaceAll(' ', '-'), contents)
      await assert.rejects(extractKernel(iso, await target()), (error) => {
        assert.match(describeError(error), /is no NixOS installer/)
        assert.match(describeError(error), reason)
        return true
      })
    })
  }

  it('cannot be read from what is no ISO', async () => {
    const iso = join(folder, 'text.iso')
    await writeFile(iso, 'not an ISO at all')
    await assert.rejects(extractKernel(iso, await target()), (error) => {
      assert.match(describeError(error), /^text\.iso is no NixOS installer: bsdtar: /)
      return true
    })
  })
})
