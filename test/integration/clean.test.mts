import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { existsSync } from 'node:fs'
import { cp, mkdir, readdir, rm, symlink, writeFile } from 'node:fs/promises'
import { after, afterEach, before, beforeEach, describe, it } from 'node:test'
import { type Checkout, makeCheckout, run } from '../checkout.mts'
import { noQemu, startIdleQemu } from '../idle-qemu.mts'

const script = 'bin/clean.mts'

describe('clean', () => {
  let made: Checkout
  let checkout: Checkout
  before(async () => {
    made = await makeCheckout()
    for (const step of ['certs', 'kubeconfigs', 'encryption-config', 'nocloud-iso']) {
      const { exitCode, stderr } = await run(made, `bin/generate-${step}.mts`)
      assert.equal(exitCode, 0, stderr)
    }
  })
  after(() => made.remove())

  beforeEach(async () => {
    checkout = await makeCheckout()
    for (const folder of ['tls', 'configs', 'cloud-init']) {
      await cp(made.path(folder), checkout.path(folder), { recursive: true })
    }
    await mkdir(checkout.path('images'))
    await writeFile(checkout.path('images', 'nixos-26.05-x86_64.iso'), 'iso')
    await writeFile(checkout.path('images', 'nixos-26.05-x86_64.iso.json'), '{}')
  })
  afterEach(() => checkout.remove())

  const install = async (...names: string[]) => {
    for (const name of names) {
      await writeFile(checkout.path('images', `${name}.qcow2`), 'disk')
      await writeFile(checkout.path('images', `${name}-console.log`), 'log')
    }
  }
  const files = (folder: string) => readdir(checkout.path(folder)).catch(() => [])

  it('leaves the checkout as it was cloned', async () => {
    const { exitCode, stdout } = await run(checkout, script)
    assert.equal(exitCode, 0)
    assert.match(stdout, /certificates and keys +\d+ /)
    const left = (await files('.')).sort()
    assert.deepEqual(left, [
      'Makefile',
      'bin',
      'cluster.env',
      'configs',
      'lib',
      'node_modules',
      'package.json',
    ])
    assert.ok((await files('configs')).every((name) => name.endsWith('.nix')))
  })

  it('has nothing to do the second time', async () => {
    await run(checkout, script)
    const { exitCode, stdout } = await run(checkout, script)
    assert.equal(exitCode, 0)
    assert.equal(stdout, 'There is nothing to remove.\n')
  })

  it('keeps the keys of installed machines, and their disks, and says so', async () => {
    await install('alpha')
    const { stdout } = await run(checkout, script)
    assert.match(
      stdout,
      /Kept, as alpha cannot be reached without: certificates and keys, kubeconfigs/,
    )
    assert.ok(existsSync(checkout.path('tls', 'ca-key.pem')))
    assert.ok(existsSync(checkout.path('configs', 'admin.kubeconfig')))
    assert.ok(existsSync(checkout.path('configs', 'encryption-config.yaml')))
    assert.deepEqual((await files('images')).sort(), ['alpha-console.log', 'alpha.qcow2'])
    assert.deepEqual(await files('cloud-init'), [])
  })

  it('removes all of it with --disks', async () => {
    await install('alpha', 'sigma')
    await mkdir(checkout.path('backups'))
    await writeFile(checkout.path('backups', 'etcd.db'), '')
    const { stdout } = await run(checkout, script, ['--disks'])
    assert.match(stdout, /disks +2 /)
    for (const folder of ['tls', 'images', 'cloud-init', 'backups', 'run']) {
      assert.equal(existsSync(checkout.path(folder)), false, folder)
    }
  })

  it('shows with --list what would go, and removes nothing', async () => {
    await install('alpha')
    const before = await run(checkout, 'find', [
      '.',
      '-path',
      './node_modules',
      '-prune',
      '-o',
      '-print',
    ])
    const { stdout } = await run(checkout, script, ['--disks', '--list'])
    assert.match(stdout, /^TO REMOVE/)
    assert.match(stdout, /disks +1 /)
    const now = await run(checkout, 'find', [
      '.',
      '-path',
      './node_modules',
      '-prune',
      '-o',
      '-print',
    ])
    assert.equal(now.stdout, before.stdout)
  })

  it("keeps files of one's own in the folders of ours", async () => {
    await writeFile(checkout.path('images', 'holiday.jpg'), '')
    await writeFile(checkout.path('tls', 'notes.txt'), '')
    await run(checkout, script, ['--disks'])
    assert.deepEqual(await files('images'), ['holiday.jpg'])
    assert.deepEqual(await files('tls'), ['notes.txt'])
  })

  it("removes the link to one's own ISO, not the ISO", async () => {
    const mine = checkout.path('mine.iso')
    await writeFile(mine, 'iso')
    await rm(checkout.path('images', 'nixos-26.05-x86_64.iso'))
    await symlink(mine, checkout.path('images', 'nixos-26.05-x86_64.iso'))
    await run(checkout, script)
    assert.ok(existsSync(mine))
    assert.deepEqual(await files('images'), [])
  })

  it('refuses what it does not know, and removes nothing then', async () => {
    assert.equal((await run(checkout, script, ['--everything'])).exitCode, 2)
    assert.equal((await run(checkout, script, ['alpha'])).exitCode, 2)
    assert.ok(existsSync(checkout.path('tls', 'ca.pem')))
  })

  describe('with machines that run', { skip: noQemu }, () => {
    it('stops them before it removes their disks, and nobody else’s QEMU', async () => {
      await checkout.set({ STOP_TIMEOUT: 1 })
      await install('alpha')
      const ours = await startIdleQemu(checkout, 'alpha')
      const another = spawn('qemu-system-x86_64', ['-machine', 'none', '-display', 'none'], {
        stdio: 'ignore',
      })
      try {
        const { stderr, exitCode } = await run(checkout, script, ['--disks'])
        assert.equal(exitCode, 0, stderr)
        assert.match(stderr, /stop alpha/)
        assert.throws(() => process.kill(ours.pid, 0), { code: 'ESRCH' })
        assert.equal(another.exitCode, null)
        assert.ok(process.kill(another.pid ?? 0, 0))
        assert.equal(existsSync(checkout.path('images', 'alpha.qcow2')), false)
      } finally {
        another.kill('SIGKILL')
        await ours.stop()
      }
    })

    it('refuses while one runs that cluster.env does not name any more', async () => {
      await install('gamma')
      const gamma = await startIdleQemu(checkout, 'gamma')
      try {
        const env = { WORKER_NODES: 'sigma' }
        await checkout.set({ WORKER_NODES: 'sigma' })
        await run(checkout, 'sed', ['-i', '/_gamma=/d', 'cluster.env'])
        const { stderr, exitCode } = await run(checkout, script, ['--disks'], { env })
        assert.equal(exitCode, 1)
        assert.match(stderr, /a machine "gamma" runs \(pid \d+\) that cluster\.env does not name/)
        assert.ok(existsSync(checkout.path('images', 'gamma.qcow2')))
      } finally {
        await gamma.stop()
      }
    })
  })
})
