import assert from 'node:assert/strict'
import { mkdir, mkdtemp, rm, symlink, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { afterEach, beforeEach, describe, it } from 'node:test'
import type { StepError } from '../../lib/errors.mts'
import { type Architecture, findFirmware } from '../../lib/firmware.mts'

/** The header of a firmware volume, as OVMF's code begins. */
const codeImage = `${'\0'.repeat(16)}\x78\xe5\x8c\x8c${'\0'.repeat(20)}_FVH`
const mine = { code: '/mine/code.fd', vars: '/mine/vars.fd' }

describe('the UEFI firmware', () => {
  let root: string
  beforeEach(async () => {
    root = await mkdtemp(join(tmpdir(), 'firmware-'))
  })
  afterEach(() => rm(root, { recursive: true }))

  async function put(path: string, content = 'raw'): Promise<void> {
    await mkdir(dirname(join(root, path)), { recursive: true })
    await writeFile(join(root, path), content, 'latin1')
  }

  function describedBy(code: string, vars: string, changes: object = {}): string {
    return JSON.stringify({
      mapping: {
        device: 'flash',
        executable: { filename: code, format: 'raw' },
        'nvram-template': { filename: vars, format: 'raw' },
      },
      targets: [{ architecture: 'x86_64', machines: ['pc-i440fx-*', 'pc-q35-*'] }],
      features: ['acpi-s3', 'verbose-dynamic'],
      ...changes,
    })
  }

  function find(settings: { code?: string; vars?: string; arch?: Architecture } = {}) {
    const { arch = 'x86_64', code = '', vars = '' } = settings
    return findFirmware({ arch, code, vars, qemu: '/nonexistent/bin/qemu', root })
  }

  async function pathsFound(settings: Parameters<typeof find>[0] = {}): Promise<string[]> {
    const { code, vars } = await find(settings)
    return [code, vars].map(({ path }) => path.slice(root.length))
  }

  it('is what a descriptor of QEMU describes', async () => {
    await put('/opt/code.fd')
    await put('/opt/vars.fd')
    await put('/usr/share/qemu/firmware/60-x.json', describedBy('/opt/code.fd', '/opt/vars.fd'))
    assert.deepEqual(await pathsFound(), ['/opt/code.fd', '/opt/vars.fd'])
  })

  it('is never one for Secure Boot, another machine type or another architecture', async () => {
    await put('/opt/code.fd')
    await put('/opt/vars.fd')
    const pair = ['/opt/code.fd', '/opt/vars.fd'] as const
    const folder = '/usr/share/qemu/firmware'
    await put(`${folder}/1.json`, describedBy(...pair, { features: ['secure-boot'] }))
    await put(`${folder}/2.json`, describedBy(...pair, { features: ['requires-smm'] }))
    await put(
      `${folder}/3.json`,
      describedBy(...pair, {
        targets: [{ architecture: 'x86_64', machines: ['pc-i440fx-*', 'microvm'] }],
      }),
    )
    await put(
      `${folder}/4.json`,
      describedBy(...pair, { targets: [{ architecture: 'aarch64', machines: ['virt-*'] }] }),
    )
    await put(`${folder}/5.json`, describedBy(...pair, { mapping: { device: 'memory' } }))
    await put(`${folder}/6.json`, 'not JSON')
    await assert.rejects(find(), /no UEFI firmware for x86_64/)
    assert.deepEqual(await pathsFound({ arch: 'aarch64' }), [...pair])
  })

  it('is that of the first descriptor by name whose files exist', async () => {
    await put('/opt/b-code.fd')
    await put('/opt/b-vars.fd')
    const folder = '/usr/share/qemu/firmware'
    await put(`${folder}/50-gone.json`, describedBy('/opt/a-code.fd', '/opt/a-vars.fd'))
    await put(`${folder}/60-here.json`, describedBy('/opt/b-code.fd', '/opt/b-vars.fd'))
    assert.deepEqual(await pathsFound(), ['/opt/b-code.fd', '/opt/b-vars.fd'])
  })

  it('is not one that the administrator has hidden with an empty descriptor', async () => {
    await put('/opt/code.fd')
    await put('/opt/vars.fd')
    await put('/usr/share/qemu/firmware/60-x.json', describedBy('/opt/code.fd', '/opt/vars.fd'))
    await put('/etc/qemu/firmware/60-x.json', '')
    await assert.rejects(find(), /no UEFI firmware/)
  })

  for (const [system, arch, code, vars] of [
    ['Debian', 'x86_64', '/usr/share/OVMF/OVMF_CODE_4M.fd', '/usr/share/OVMF/OVMF_VARS_4M.fd'],
    ['Debian', 'aarch64', '/usr/share/AAVMF/AAVMF_CODE.fd', '/usr/share/AAVMF/AAVMF_VARS.fd'],
    ['Fedora', 'x86_64', '/usr/share/edk2/ovmf/OVMF_CODE.fd', '/usr/share/edk2/ovmf/OVMF_VARS.fd'],
    [
      'Arch',
      'x86_64',
      '/usr/share/edk2/x64/OVMF_CODE.4m.fd',
      '/usr/share/edk2/x64/OVMF_VARS.4m.fd',
    ],
    [
      'openSUSE',
      'x86_64',
      '/usr/share/qemu/ovmf-x86_64-4m-code.bin',
      '/usr/share/qemu/ovmf-x86_64-4m-vars.bin',
    ],
  ] as const) {
    it(`is found where ${system} puts it for ${arch}`, async () => {
      await put(code)
      await put(vars)
      assert.deepEqual(await pathsFound({ arch }), [code, vars])
    })
  }

  it('is never one half of 2 MB and one of 4 MB', async () => {
    await put('/usr/share/OVMF/OVMF_CODE_4M.fd')
    await put('/usr/share/OVMF/OVMF_VARS.fd')
    await assert.rejects(find(), /no UEFI firmware/)
    await put('/usr/share/OVMF/OVMF_CODE.fd')
    assert.deepEqual(await pathsFound(), [
      '/usr/share/OVMF/OVMF_CODE.fd',
      '/usr/share/OVMF/OVMF_VARS.fd',
    ])
  })

  it('is found next to QEMU, also through a link, as with Homebrew', async () => {
    const cellar = join(root, 'Cellar/qemu/10.1.0')
    await put('/Cellar/qemu/10.1.0/bin/qemu-system-aarch64')
    await put('/Cellar/qemu/10.1.0/share/qemu/edk2-aarch64-code.fd')
    await put('/Cellar/qemu/10.1.0/share/qemu/edk2-arm-vars.fd')
    await mkdir(join(root, 'bin'))
    await symlink(join(cellar, 'bin/qemu-system-aarch64'), join(root, 'bin/qemu-system-aarch64'))
    const { code, vars } = await findFirmware({
      arch: 'aarch64',
      code: '',
      vars: '',
      qemu: join(root, 'bin/qemu-system-aarch64'),
      root,
    })
    assert.equal(code.path, join(cellar, 'share/qemu/edk2-aarch64-code.fd'))
    assert.equal(vars.path, join(cellar, 'share/qemu/edk2-arm-vars.fd'))
  })

  it('has the format that its first bytes show', async () => {
    await put('/usr/share/OVMF/OVMF_CODE_4M.fd', 'QFI\xfb and so on')
    await put('/usr/share/OVMF/OVMF_VARS_4M.fd')
    const { code, vars } = await find()
    assert.deepEqual([code.format, vars.format], ['qcow2', 'raw'])
  })

  it('is what cluster.env names, before anything else', async () => {
    await put('/usr/share/OVMF/OVMF_CODE_4M.fd')
    await put('/usr/share/OVMF/OVMF_VARS_4M.fd')
    await put('/mine/code.fd', codeImage)
    await put('/mine/vars.fd')
    assert.deepEqual(await pathsFound(mine), [mine.code, mine.vars])
  })

  for (const [name, arch] of [
    ['OVMF_CODE_4M.secboot.fd', 'x86_64'],
    ['OVMF_CODE_4M.ms.fd', 'x86_64'],
    ['OVMF_CODE_4M.snakeoil.fd', 'x86_64'],
    ['OVMF_CODE.secboot.4m.fd', 'x86_64'],
    ['ovmf-x86_64-ms-4m-code.bin', 'x86_64'],
    ['edk2-x86_64-secure-code.fd', 'x86_64'],
    ['AAVMF_CODE.ms.fd', 'aarch64'],
  ] as const) {
    it(`is refused when cluster.env names an image for Secure Boot: ${name}`, async () => {
      await put(`/fw/${name}`, codeImage)
      await put('/fw/vars.fd')
      const reason = /QEMU_FIRMWARE_CODE is for Secure Boot, with which the machines do not start/
      await assert.rejects(find({ arch, code: `/fw/${name}`, vars: '/fw/vars.fd' }), reason)
      // A link with a harmless name leads to it.
      await mkdir(join(root, 'mine'))
      await symlink(join(root, 'fw', name), join(root, 'mine/code.fd'))
      await assert.rejects(find({ arch, code: '/mine/code.fd', vars: '/fw/vars.fd' }), reason)
    })
  }

  it('is refused when a descriptor says that cluster.env’s image is for Secure Boot', async () => {
    await put('/mine/code.fd', codeImage)
    await put('/mine/vars.fd')
    const text = describedBy(mine.code, mine.vars, { features: ['requires-smm', 'secure-boot'] })
    await put('/usr/share/qemu/firmware/50-secure.json', text)
    await assert.rejects(find(mine), /QEMU_FIRMWARE_CODE is for Secure Boot/)
  })

  it('is accepted when one of two descriptors says that it is without Secure Boot', async () => {
    await put('/mine/code.fd', codeImage)
    await put('/mine/vars.fd')
    const folder = '/usr/share/qemu/firmware'
    const secure = { features: ['enrolled-keys', 'secure-boot'] }
    await put(`${folder}/40.json`, describedBy(mine.code, '/mine/vars.ms.fd', secure))
    await put(`${folder}/60.json`, describedBy(mine.code, mine.vars))
    assert.deepEqual(await pathsFound(mine), [mine.code, mine.vars])
  })

  it('is refused when cluster.env names a folder', async () => {
    await put('/mine/vars.fd')
    await assert.rejects(
      find({ ...mine, code: '/mine' }),
      /QEMU_FIRMWARE_CODE is not a file: .*\/mine$/,
    )
  })

  it('is refused when cluster.env names another file as code, such as the variables', async () => {
    const reason = /QEMU_FIRMWARE_CODE is not the code of a UEFI firmware: .*\/mine\/code\.fd/
    await put('/mine/vars.fd')
    await put('/mine/code.fd', '#!/bin/sh')
    await assert.rejects(find(mine), reason)
    await put('/mine/code.fd', `${'\0'.repeat(16)}\x8d\x2b\xf1\xff${'\0'.repeat(20)}_FVH`)
    await assert.rejects(find(mine), reason)
  })

  it('is refused when cluster.env names half of it, or a file that is not there', async () => {
    await put('/mine/code.fd')
    await assert.rejects(find({ code: '/mine/code.fd' }), /QEMU_FIRMWARE_VARS is not set/)
    await assert.rejects(
      find({ code: '/mine/code.fd', vars: '/mine/none.fd' }),
      /QEMU_FIRMWARE_VARS names a file that is not there: .*\/mine\/none\.fd/,
    )
  })

  it('is reported as missing with the places searched and a hint', async () => {
    await assert.rejects(find({ arch: 'aarch64' }), ({ message, explanation }: StepError) => {
      assert.equal(message, 'no UEFI firmware for aarch64 was found')
      assert.match(explanation.output ?? '', /\/usr\/share\/AAVMF\/AAVMF_CODE\.fd/)
      assert.match(explanation.hint ?? '', /QEMU_FIRMWARE_CODE/)
      return true
    })
  })
})
