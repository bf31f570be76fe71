import assert from 'node:assert/strict'
import { existsSync } from 'node:fs'
import { mkdir, mkdtemp, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, it } from 'node:test'
import { $, which } from 'zx'
import { type Cluster, loadCluster, type Node } from '../../../lib/cluster.mts'
import {
  assertDiskSpace,
  createDisk,
  discardDisk,
  finishDisk,
  hasDisk,
  prepareEfiVars,
} from '../../../lib/qemu/disk.mts'
import type { Host } from '../../../lib/qemu/host.mts'
import { filesOf } from '../../../lib/qemu/machine-files.mts'
import { type Checkout, makeCheckout } from '../../checkout.mts'

const hasTools = await which('qemu-img', { nothrow: true })

describe('a disk', { skip: hasTools ? false : 'qemu-img is not installed' }, () => {
  let checkout: Checkout
  let cluster: Cluster
  let alpha: Node
  beforeEach(async () => {
    checkout = await makeCheckout({ long: true, settings: { DISK_SIZE: 3 } })
    cluster = loadCluster({ root: checkout.root })
    alpha = cluster.controlPlane
  })
  afterEach(() => checkout.remove())

  it('is an empty qcow2 file of the size in cluster.env, under the name of a partial one', async () => {
    await createDisk(cluster, alpha)
    const { partialDisk } = filesOf(cluster, alpha)
    const info = JSON.parse((await $`qemu-img info --output=json ${partialDisk}`).stdout)
    assert.equal(info.format, 'qcow2')
    assert.equal(info['virtual-size'], 3 * 2 ** 30)
    assert.equal(hasDisk(cluster, alpha), false)
  })

  it('replaces what a former attempt has left', async () => {
    await createDisk(cluster, alpha)
    const { partialDisk } = filesOf(cluster, alpha)
    await writeFile(partialDisk, 'half a system')
    await createDisk(cluster, alpha)
    assert.equal((await readFile(partialDisk)).toString('latin1', 0, 3), 'QFI')
  })

  it('takes its own name when a system is installed on it, and is then never replaced', async () => {
    await createDisk(cluster, alpha)
    await finishDisk(cluster, alpha)
    assert.equal(hasDisk(cluster, alpha), true)
    await assert.rejects(createDisk(cluster, alpha), /alpha has a disk already/)
    assert.equal(existsSync(filesOf(cluster, alpha).partialDisk), false)
  })

  it('is gone after an installation that failed, and an installed one stays', async () => {
    await createDisk(cluster, alpha)
    await writeFile(filesOf(cluster, alpha).efiVars, 'vars')
    await discardDisk(cluster, alpha)
    assert.equal(existsSync(filesOf(cluster, alpha).partialDisk), false)
    assert.equal(existsSync(filesOf(cluster, alpha).efiVars), false)

    await createDisk(cluster, alpha)
    await finishDisk(cluster, alpha)
    await writeFile(filesOf(cluster, alpha).efiVars, 'vars')
    await discardDisk(cluster, alpha)
    assert.equal(hasDisk(cluster, alpha), true)
    assert.equal(existsSync(filesOf(cluster, alpha).efiVars), true)
  })

  it('is not begun where there is no room for it', async () => {
    const free = async () => 8.4 * 2 ** 30
    await assertDiskSpace(cluster, cluster.nodes.slice(0, 2), free)
    await assert.rejects(
      assertDiskSpace(cluster, cluster.nodes, free),
      /alpha, sigma, gamma need 9 GB, 8\.4 GB are free/,
    )
  })
})

describe('the UEFI variables', () => {
  let checkout: Checkout
  let cluster: Cluster
  let folder: string
  let host: Host
  beforeEach(async () => {
    checkout = await makeCheckout()
    cluster = loadCluster({ root: checkout.root })
    folder = await mkdtemp(join(tmpdir(), 'vars-'))
    const template = join(folder, 'vars.fd')
    await writeFile(template, 'template', { mode: 0o444 })
    host = {
      os: 'linux',
      arch: 'x86_64',
      accel: 'tcg',
      cpu: 'max',
      qemu: { path: 'qemu', version: '7.2' },
      firmware: {
        code: { path: '/none', format: 'raw' },
        vars: { path: template, format: 'raw' },
      },
    }
    await mkdir(checkout.path('images'))
  })
  afterEach(async () => {
    await checkout.remove()
    await rm(folder, { recursive: true })
  })

  it('are a copy of the template that the machine may write to', async () => {
    const { efiVars } = filesOf(cluster, cluster.controlPlane)
    await prepareEfiVars(cluster, cluster.controlPlane, host)
    assert.equal(await readFile(efiVars, 'utf8'), 'template')
    assert.equal((await stat(efiVars)).mode & 0o777, 0o600)
  })

  it('are kept from boot to boot, and new for an installation', async () => {
    const { efiVars } = filesOf(cluster, cluster.controlPlane)
    await writeFile(efiVars, 'oftheVM!')
    await prepareEfiVars(cluster, cluster.controlPlane, host)
    assert.equal(await readFile(efiVars, 'utf8'), 'oftheVM!')
    await prepareEfiVars(cluster, cluster.controlPlane, host, { fresh: true })
    assert.equal(await readFile(efiVars, 'utf8'), 'template')
  })

  it('are made anew, the old put aside, when the firmware has become one of another size', async () => {
    const { efiVars } = filesOf(cluster, cluster.controlPlane)
    await writeFile(efiVars, 'of a firmware of 2 MB')
    await prepareEfiVars(cluster, cluster.controlPlane, host)
    assert.equal(await readFile(efiVars, 'utf8'), 'template')
    assert.equal(await readFile(`${efiVars}.old`, 'utf8'), 'of a firmware of 2 MB')
  })
})
