import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { existsSync } from 'node:fs'
import { mkdir, readdir, rm, symlink, writeFile } from 'node:fs/promises'
import { dirname } from 'node:path'
import { afterEach, beforeEach, describe, it } from 'node:test'
import { type Checkout, makeCheckout, run } from '../checkout.mts'
import { noQemu, startIdleQemu } from '../idle-qemu.mts'

const script = 'bin/clean.mts'

describe('clean', () => {
  let checkout: Checkout
  beforeEach(async () => {
    checkout = await makeCheckout()
    const files = [
      ...['tls/ca.pem', 'tls/ca-key.pem', 'tls/ssh_config', 'tls/known_hosts'],
      ...['configs/admin.kubeconfig', 'configs/encryption-config.yaml'],
      ...['cloud-init/alpha/nixos/etc/nixos/cluster.json'],
      ...['images/nixos-26.05-x86_64.iso', 'images/nixos-26.05-x86_64.iso.json'],
    ]
    for (const file of files) {
      await mkdir(dirname(checkout.path(file)), { recursive: true })
      await writeFile(checkout.path(file), '')
    }
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
    // The files above are not real ones.
    const steps = [
      'certs --force',
      'kubeconfigs --force',
      'encryption-config --force',
      'nocloud-iso',
    ]
    for (const step of steps) {
      const [name, ...args] = step.split(' ')
      const made = await run(checkout, `bin/generate-${name}.mts`, args)
      assert.equal(made.exitCode, 0, made.stderr)
    }
    const { exitCode, stdout } = await run(checkout, script)
    assert.equal(exitCode, 0)
    assert.match(stdout, /certificates and keys +\d+ /)
    const left = [
      'Makefile',
      'bin',
      'cluster.env',
      'configs',
      'lib',
      'node_modules',
      'package.json',
    ]
    assert.deepEqual((await files('.')).sort(), left)
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
      /Kept, because alpha cannot be reached without them: certificates and keys, kubeconfigs/,
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
    assert.match(stdout, /No process is running\.\nThere is nothing to remove\.\n$/)
    for (const folder of ['tls', 'images', 'cloud-init', 'backups', 'run']) {
      assert.equal(existsSync(checkout.path(folder)), false, folder)
    }
  })

  it('shows with --list what would go, and removes nothing', async () => {
    await install('alpha')
    const everything = ['.', '-path', './node_modules', '-prune', '-o', '-print']
    const before = await run(checkout, 'find', everything)
    const { stdout } = await run(checkout, script, ['--disks', '--list'])
    assert.match(stdout, /^TO REMOVE/)
    assert.match(stdout, /disks +1 /)
    assert.equal((await run(checkout, 'find', everything)).stdout, before.stdout)
  })

  it("keeps the user's own files in the folders of generated ones", async () => {
    await writeFile(checkout.path('images', 'holiday.jpg'), '')
    await writeFile(checkout.path('tls', 'notes.txt'), '')
    await run(checkout, script, ['--disks'])
    assert.deepEqual(await files('images'), ['holiday.jpg'])
    assert.deepEqual(await files('tls'), ['notes.txt'])
  })

  it("removes the link to the user's own ISO, not the ISO", async () => {
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
    it('make check FLAGS=--leftovers lists them and the files, and nothing of another', async () => {
      const other = await makeCheckout()
      await install('alpha')
      const [ours, theirs] = [
        await startIdleQemu(checkout, 'alpha'),
        await startIdleQemu(other, 'alpha'),
      ]
      try {
        const { stdout, exitCode } = await run(checkout, 'bin/check-prereqs.mts', ['--leftovers'])
        assert.equal(exitCode, 0)
        assert.match(stdout, new RegExp(`^ *${ours.pid} +\\S*qemu-system-`, 'm'))
        assert.doesNotMatch(stdout, new RegExp(`^ *${theirs.pid} `, 'm'))
        assert.match(stdout, /^disks +1 /m)
      } finally {
        for (const qemu of [ours, theirs]) await qemu.stop()
        await other.remove()
      }
    })

    it('stops them before it removes their disks, and no other QEMU', async () => {
      await checkout.set({ STOP_TIMEOUT: 1 })
      await install('alpha')
      const ours = await startIdleQemu(checkout, 'alpha')
      const another = spawn('qemu-system-x86_64', ['-machine', 'none', '-display', 'none'], {
        stdio: 'ignore',
      })
      try {
        const { stderr, exitCode } = await run(checkout, script, ['--disks'])
        assert.equal(exitCode, 0, stderr)
        assert.match(stderr, /\$ \.\/bin\/shutdown\.mts\n[\s\S]*alpha/)
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
        const list = await run(checkout, script, ['--disks', '--list'], { env })
        assert.match(list.stdout, /disks +1 /)
      } finally {
        await gamma.stop()
      }
    })
  })
})
