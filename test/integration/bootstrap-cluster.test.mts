import assert from 'node:assert/strict'
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync } from 'node:fs'
import { mkdir, readdir, readFile, rm, writeFile } from 'node:fs/promises'
import { dirname } from 'node:path'
import { after, before, beforeEach, describe, it } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { type Checkout, makeCheckout, run } from '../checkout.mts'
import { type FileServer, startFileServer } from '../file-server.mts'
import { noQemu, startIdleQemu } from '../idle-qemu.mts'
import { makeIso, noIso } from '../installer-iso.mts'
import { noSshd, startSshd } from '../sshd.mts'

const script = 'bin/bootstrap-cluster.mts'
const names = ['alpha', 'sigma', 'gamma']

describe('bootstrap-cluster on a clean checkout', { skip: noQemu || noIso }, () => {
  let checkout: Checkout
  let server: FileServer
  before(async () => {
    server = await startFileServer()
  })
  after(() => server.close())

  it('stops when a prerequisite is missing, and has generated nothing', async () => {
    checkout = await makeCheckout({ settings: { QEMU_FIRMWARE_CODE: '/no/such/firmware.fd' } })
    const { stderr, stdout, exitCode } = await run(checkout, script)
    assert.equal(exitCode, 1)
    assert.match(stdout, /firmware/)
    assert.match(stderr, /check-prereqs failed, so the cluster is not complete/)
    assert.equal(existsSync(checkout.path('tls')), false)
    await checkout.remove()
  })

  describe('while the ISO is being downloaded', () => {
    let first: ChildProcess
    let firstSaid = ''
    before(async () => {
      checkout = await makeCheckout()
      const iso = checkout.path('slow.iso')
      await makeIso(iso)
      server.files.set('/slow.iso', { data: await readFile(iso), pause: 5000 })
      first = spawn(checkout.path(script), {
        env: { ...process.env, NIXOS_ISO_URL: `${server.url}/slow.iso` },
        stdio: ['ignore', 'ignore', 'pipe'],
      })
      first.stderr?.on('data', (chunk) => {
        firstSaid += chunk
      })
      while (!server.requests.some((request) => request.startsWith('GET /slow.iso'))) {
        assert.equal(first.exitCode, null, firstSaid)
        await sleep(50)
      }
    })
    after(async () => {
      first.kill('SIGKILL')
      await checkout.remove()
    })

    it('refuses to run a second time, and names the first', async () => {
      const { stderr, exitCode } = await run(checkout, script)
      assert.equal(exitCode, 1)
      assert.match(stderr, /another process is bootstrapping this cluster/)
      assert.match(stderr, new RegExp(`pid ${first.pid}`))
    })

    it('keeps clean from removing what it generates', async () => {
      const { stderr, exitCode } = await run(checkout, 'bin/clean.mts')
      assert.equal(exitCode, 1)
      assert.match(stderr, /another process is bootstrapping this cluster/)
    })

    it('ends together with its steps on SIGTERM', async () => {
      first.kill('SIGTERM')
      const [status] = await once(first, 'exit')
      assert.equal(status, 143, firstSaid)
      assert.equal(existsSync(checkout.path('run', 'bootstrap.lock')), false)
      const running = await run(checkout, 'sh', [
        '-c',
        'ps -eo args | grep -F "$0" || true',
        checkout.root,
      ])
      assert.doesNotMatch(running.stdout, /download-iso/)
    })
  })
})

describe('bootstrap-cluster with installed machines, up to those', {
  skip: noQemu || noSshd || noIso,
}, () => {
  it('neither downloads nor installs, and ends when every machine is up', async () => {
    const checkout = await makeCheckout()
    const running: { stop(): Promise<void> }[] = []
    try {
      for (const step of ['certs', 'kubeconfigs', 'encryption-config']) {
        assert.equal((await run(checkout, `bin/generate-${step}.mts`)).exitCode, 0)
      }
      await mkdir(checkout.path('images'))
      for (const name of names) {
        await writeFile(checkout.path('images', `${name}.qcow2`), `the disk of ${name}`)
        running.push(await startIdleQemu(checkout, name))
        const sshd = await startSshd(checkout, name)
        running.unshift(sshd)
        await sshd.program('systemctl', '#!/bin/sh\n[ $1 != is-system-running ] || echo running\n')
      }
      const { stdout, stderr, exitCode } = await run(checkout, script, ['--until', 'machines'])
      assert.equal(exitCode, 0, stderr)
      assert.doesNotMatch(stderr, /download-iso|--iso|wait-for-cluster/)
      for (const name of names) assert.match(stdout, new RegExp(`^${name} +running$`, 'm'))
    } finally {
      for (const each of running) await each.stop()
      await checkout.remove()
    }
  })
})

describe('the steps of bootstrap-cluster', () => {
  let checkout: Checkout
  before(async () => {
    checkout = await makeCheckout({ settings: { WAIT_TIMEOUT: 900 } })
    await mkdir(checkout.path('images'))
    for (const name of ['alpha', 'sigma']) {
      await writeFile(checkout.path('images', `${name}.qcow2`), `the disk of ${name}`)
    }
    for (const file of ['tls/ca.pem', 'tls/ssh_ed25519', 'configs/encryption-config.yaml']) {
      await mkdir(dirname(checkout.path(file)), { recursive: true })
      await writeFile(checkout.path(file), 'a key')
    }
    // Each step notes that it ran, and fails if there is a file broken-STEP.
    for (const name of await readdir(checkout.path('bin'))) {
      if (name === 'bootstrap-cluster.mts') continue
      const step = name.replace('.mts', '')
      const note = `echo "${step} $*" >>'${checkout.path('steps')}'`
      const broken = checkout.path(`broken-${step}`)
      await writeFile(checkout.path('bin', name), `#!/bin/sh\n${note}\n[ ! -e '${broken}' ]\n`)
    }
  })
  beforeEach(() => writeFile(checkout.path('images', 'gamma.qcow2'), 'the disk of gamma'))
  after(() => checkout.remove())

  const bootstrap = async (...args: string[]) => {
    await writeFile(checkout.path('steps'), '')
    const outcome = await run(checkout, script, args)
    const steps = (await readFile(checkout.path('steps'), 'utf8')).trimEnd().split('\n')
    return { ...outcome, steps: steps.map((line) => line.trim()).filter(Boolean) }
  }
  const prepared = [
    'check-prereqs',
    'generate-certs',
    'generate-kubeconfigs',
    'generate-encryption-config',
    'generate-nocloud-iso',
  ]
  const installed = 'install-cilium --timeout 900'
  const network = ['wait-for-cluster', installed, 'wait-for-cluster --ready']

  it('are preparation, machines, network, add-ons', async () => {
    const { steps, exitCode, stderr } = await bootstrap()
    assert.equal(exitCode, 0, stderr)
    const addOns = ['deploy-coredns', 'deploy-local-storage', 'deploy-metrics-server']
    const before = [...prepared, 'provision --wait', ...network]
    assert.deepEqual(steps.slice(0, before.length), before)
    // These run at the same time.
    assert.deepEqual(
      steps.slice(before.length).sort(),
      addOns.map((name) => `${name} --timeout 900`).sort(),
    )
    assert.match(stderr, /^\$ \.\/bin\/provision\.mts --wait$/m)
    assert.match(stderr, /next: make smoke/)
  })

  it('end before the add-ons with --until cluster', async () => {
    const { steps, exitCode } = await bootstrap('--until', 'cluster')
    assert.equal(exitCode, 0)
    assert.deepEqual(steps, [...prepared, 'provision --wait', ...network])
  })

  it('include download and installation for the machine whose disk is missing, and no other', async () => {
    await rm(checkout.path('images', 'gamma.qcow2'))
    const { steps, exitCode, stderr } = await bootstrap('--until', 'machines')
    assert.equal(exitCode, 0, stderr)
    const [check = '', ...generate] = prepared
    const install = ['provision --iso gamma', 'provision --wait']
    assert.deepEqual(steps, [check, 'download-iso', ...generate, ...install])
    const disk = await readFile(checkout.path('images', 'alpha.qcow2'), 'utf8')
    assert.equal(disk, 'the disk of alpha')
  })

  it('stop at the first one that fails, which is named', async () => {
    await writeFile(checkout.path('broken-install-cilium'), '')
    const { steps, exitCode, stderr } = await bootstrap()
    await rm(checkout.path('broken-install-cilium'))
    assert.equal(exitCode, 1)
    assert.equal(steps.at(-1), installed)
    assert.match(stderr, /install-cilium failed, so the cluster is not complete/)
    assert.match(stderr, /hint: .*make all continues from here/)
  })

  it('all end before the failure of an add-on is reported', async () => {
    await writeFile(checkout.path('broken-deploy-coredns'), '')
    const { steps, exitCode, stderr } = await bootstrap()
    await rm(checkout.path('broken-deploy-coredns'))
    assert.equal(exitCode, 1)
    assert.ok(steps.includes('deploy-metrics-server --timeout 900'), steps.join('\n'))
    assert.match(stderr, /deploy-coredns failed, so the cluster is not complete/)
  })

  it('end with the machines when only some are named', async () => {
    const { steps, exitCode } = await bootstrap('alpha')
    assert.equal(exitCode, 0)
    assert.deepEqual(steps, [...prepared, 'provision --wait alpha'])
    const more = await bootstrap('--until', 'all', 'alpha')
    assert.equal(more.exitCode, 2)
    assert.match(more.stderr, /--until all is for the whole cluster/)
  })

  it('do not begin without the keys that the machines were installed with', async () => {
    await rm(checkout.path('tls', 'ssh_ed25519'))
    const { steps, exitCode, stderr } = await bootstrap()
    await writeFile(checkout.path('tls', 'ssh_ed25519'), 'a key')
    assert.equal(exitCode, 1)
    assert.match(stderr, /alpha, sigma, gamma were installed with keys .*: tls\/ssh_ed25519/)
    assert.match(stderr, /make clobber/)
    assert.deepEqual(steps, [])
  })

  it('do not begin with an unknown flag or node', async () => {
    assert.equal((await bootstrap('--fast')).exitCode, 2)
    const unknown = await bootstrap('nobody')
    assert.equal(unknown.exitCode, 2)
    assert.match(unknown.stderr, /there is no node "nobody"/)
    assert.deepEqual(unknown.steps, [])
  })
})
