import assert from 'node:assert/strict'
import { mkdir, mkdtemp, rm, symlink, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { afterEach, beforeEach, describe, it } from 'node:test'
import type { StepError } from '../../../lib/errors.mts'
import { type Architecture, findFirmware } from '../../../lib/qemu/firmware.mts'

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

  it('is what a descriptor of QEMU says', async () => {
    await put('/opt/code.fd')
    await put('/opt/vars.fd')
    await put('/usr/share/qemu/firmware/60-x.json', describedBy('/opt/code.fd', '/opt/vars.fd'))
    assert.deepEqual(await pathsFound(), ['/opt/code.fd', '/opt/vars.fd'])
  })

  it('is never one for secure boot, another machine type or another architecture', async () => {
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

  it('is that of the descriptor whose name sorts first, if its files are there', async () => {
    await put('/opt/b-code.fd')
    await put('/opt/b-vars.fd')
    const folder = '/usr/share/qemu/firmware'
    await put(`${folder}/50-gone.json`, describedBy('/opt/a-code.fd', '/opt/a-vars.fd'))
    await put(`${folder}/60-here.json`, describedBy('/opt/b-code.fd', '/opt/b-vars.fd'))
    assert.deepEqual(await pathsFound(), ['/opt/b-code.fd', '/opt/b-vars.fd'])
  })

  it('is not one that the administrator has hidden by an empty descriptor', async () => {
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

  it('is never half of 2 MB and half of 4 MB', async () => {
    await put('/usr/share/OVMF/OVMF_CODE_4M.fd')
    await put('/usr/share/OVMF/OVMF_VARS.fd')
    await assert.rejects(find(), /no UEFI firmware/)
    await put('/usr/share/OVMF/OVMF_CODE.fd')
    assert.deepEqual(await pathsFound(), [
      '/usr/share/OVMF/OVMF_CODE.fd',
      '/usr/share/OVMF/OVMF_VARS.fd',
    ])
  })

  it('is found beside QEMU, also where a link leads to it, as with Homebrew', async () => {
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

  it('has the format that its first bytes tell', async () => {
    await put('/usr/share/OVMF/OVMF_CODE_4M.fd', 'QFI\xfb and so on')
    await put('/usr/share/OVMF/OVMF_VARS_4M.fd')
    const { code, vars } = await find()
    assert.deepEqual([code.format, vars.format], ['qcow2', 'raw'])
  })

  it('is what cluster.env names, before anything else', async () => {
    await put('/usr/share/OVMF/OVMF_CODE_4M.fd')
    await put('/usr/share/OVMF/OVMF_VARS_4M.fd')
    await put('/mine/code.fd')
    await put('/mine/vars.fd')
    const settings = { code: '/mine/code.fd', vars: '/mine/vars.fd' }
    assert.deepEqual(await pathsFound(settings), ['/mine/code.fd', '/mine/vars.fd'])
  })

  it('is refused when cluster.env names half of it, or a file that is not there', async () => {
    await put('/mine/code.fd')
    await assert.rejects(
      find({ code: '/mine/code.fd' }),
      /QEMU_FIRMWARE_CODE is set and QEMU_FIRMWARE_VARS is not/,
    )
    await assert.rejects(
      find({ code: '/mine/code.fd', vars: '/mine/none.fd' }),
      /QEMU_FIRMWARE_VARS names a file that is not there: \/mine\/none\.fd/,
    )
  })

  it('is missed with the places that were looked at and what to do', async () => {
    await assert.rejects(find({ arch: 'aarch64' }), ({ message, explanation }: StepError) => {
      assert.equal(message, 'no UEFI firmware for aarch64 was found')
      assert.match(explanation.output ?? '', /\/usr\/share\/AAVMF\/AAVMF_CODE\.fd/)
      assert.match(explanation.hint ?? '', /QEMU_FIRMWARE_CODE/)
      return true
    })
  })
})
