import assert from 'node:assert/strict'
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync } from 'node:fs'
import { mkdir, readdir, readFile, rm, writeFile } from 'node:fs/promises'
import { after, before, describe, it } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { type Checkout, makeCheckout, run } from '../checkout.mts'
import { type FileServer, startFileServer } from '../file-server.mts'
import { type IdleQemu, noQemu, startIdleQemu } from '../idle-qemu.mts'
import { installerFiles, makeIso, noIsoTool } from '../iso-image.mts'
import { noSshd, type Sshd, startSshd } from '../sshd.mts'

const script = 'bin/bootstrap-cluster.mts'
const names = ['alpha', 'sigma', 'gamma']

describe('bootstrap-cluster on a clean checkout', { skip: noQemu || noIsoTool }, () => {
  let checkout: Checkout
  let server: FileServer
  before(async () => {
    server = await startFileServer()
  })
  after(() => server.close())

  it('stops when this computer lacks something, and has made nothing', async () => {
    checkout = await makeCheckout({ settings: { QEMU_FIRMWARE_CODE: '/no/such/firmware.fd' } })
    const { stderr, stdout, exitCode } = await run(checkout, script)
    assert.equal(exitCode, 1)
    assert.match(stdout, /firmware/)
    assert.match(stderr, /check-prereqs did not succeed, so the cluster is not complete/)
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

    it('keeps clean from removing what it makes', async () => {
      const { stderr, exitCode } = await run(checkout, 'bin/clean.mts')
      assert.equal(exitCode, 1)
      assert.match(stderr, /another process is bootstrapping this cluster/)
    })

    it('ends with its steps when it is told to, and can be run again', async () => {
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

describe('bootstrap-cluster with installed machines', {
  skip: noQemu || noSshd || noIsoTool,
}, () => {
  let checkout: Checkout
  const machines = new Map<string, { qemu: IdleQemu; sshd: Sshd }>()
  before(async () => {
    checkout = await makeCheckout()
    for (const step of ['certs', 'kubeconfigs', 'encryption-config']) {
      assert.equal((await run(checkout, `bin/generate-${step}.mts`)).exitCode, 0)
    }
    await mkdir(checkout.path('images'))
    for (const name of names) {
      await writeFile(checkout.path('images', `${name}.qcow2`), `the disk of ${name}`)
      const qemu = await startIdleQemu(checkout, name)
      const sshd = await startSshd(checkout, name)
      await sshd.program('systemctl', '#!/bin/sh\n[ "$1" != is-system-running ] || echo running\n')
      machines.set(name, { qemu, sshd })
    }
  })
  after(async () => {
    for (const { qemu, sshd } of machines.values()) {
      await sshd.stop()
      await qemu.stop()
    }
    await checkout.remove()
  })

  it('neither downloads nor installs, and ends when every machine is up', async () => {
    const { stdout, stderr, exitCode } = await run(checkout, script, ['--until', 'machines'])
    assert.equal(exitCode, 0, stderr)
    assert.doesNotMatch(stderr, /download-iso|--iso|wait-for-cluster/)
    for (const name of names) assert.match(stdout, new RegExp(`^${name} +running$`, 'm'))
  })

  it('names the units that failed on a machine that is up all the same', async () => {
    const { sshd } = machines.get('sigma') ?? assert.fail()
    await sshd.program(
      'systemctl',
      `#!/bin/sh
case $1 in
  is-system-running) echo degraded; exit 1;;
  list-units) echo 'kubelet.service loaded failed failed The kubelet';;
esac
`,
    )
    const { stdout, exitCode } = await run(checkout, script, ['--until', 'machines'])
    assert.equal(exitCode, 0)
    assert.match(stdout, /^sigma +degraded: kubelet\.service failed$/m)
  })

  describe('when the machines are up', () => {
    const steps = [
      ...['wait-for-cluster', 'install-cilium'],
      ...['deploy-coredns', 'deploy-local-storage', 'deploy-metrics-server'],
    ]
    const waited = 'wait-for-cluster|install-cilium|wait-for-cluster --ready'
    const originals = new Map<string, string>()
    before(async () => {
      for (const name of steps) {
        const path = checkout.path('bin', `${name}.mts`)
        originals.set(path, await readFile(path, 'utf8'))
        const note = `echo "$(basename "$0" .mts) $*" >>'${checkout.path('steps')}'`
        await writeFile(path, `#!/bin/sh\n${note}\n[ ! -e '${checkout.path(`broken-${name}`)}' ]\n`)
      }
    })
    after(async () => {
      for (const [path, text] of originals) await writeFile(path, text)
    })
    const bootstrap = async (...args: string[]) => {
      await writeFile(checkout.path('steps'), '')
      const outcome = await run(checkout, script, args)
      const taken = (await readFile(checkout.path('steps'), 'utf8')).trimEnd().split('\n')
      return { ...outcome, taken: taken.map((line) => line.trim()).join('|') }
    }

    it('goes on to the network, and then to names, volumes and numbers', async () => {
      const { taken, exitCode, stderr } = await bootstrap()
      assert.equal(exitCode, 0, stderr)
      const addOns = steps.slice(2).map((name) => `${name} --timeout 900`)
      assert.equal(taken, [waited, ...addOns].join('|'))
      assert.match(stderr, /next: make smoke/)
    })

    it('can end before the add-ons', async () => {
      const { taken, exitCode } = await bootstrap('--until', 'cluster')
      assert.equal(exitCode, 0)
      assert.equal(taken, waited)
    })

    it('stops at the step that fails, and names it', async () => {
      await writeFile(checkout.path('broken-install-cilium'), '')
      const { taken, exitCode, stderr } = await bootstrap()
      await rm(checkout.path('broken-install-cilium'))
      assert.equal(exitCode, 1)
      assert.equal(taken, 'wait-for-cluster|install-cilium')
      assert.match(stderr, /install-cilium did not succeed, so the cluster is not complete/)
    })

    it('ends with the machines when only some are named', async () => {
      assert.equal((await bootstrap('alpha')).taken, '')
      const { exitCode, stderr } = await bootstrap('--until', 'all', 'alpha')
      assert.equal(exitCode, 2)
      assert.match(stderr, /--until all is for the whole cluster, not for alpha/)
    })
  })

  it('boots only the machines that are named, if any are', async () => {
    const { stdout, exitCode } = await run(checkout, script, ['alpha'])
    assert.equal(exitCode, 0)
    assert.equal(
      stdout
        .split('\n')
        .filter((line) => / running$/.test(line))
        .join(),
      'alpha  running',
    )
  })

  it('installs only the machine whose disk is missing, and touches no other disk', async () => {
    await machines.get('gamma')?.sshd.stop()
    await machines.get('gamma')?.qemu.stop()
    await rm(checkout.path('images', 'gamma.qcow2'))
    // An installer whose menu starts no kernel ends every installation at its beginning.
    await makeIso(checkout.path('broken.iso'), installerFiles)
    const { stderr, exitCode } = await run(checkout, script, [], {
      env: { NIXOS_ISO_URL: checkout.path('broken.iso') },
    })
    assert.equal(exitCode, 1)
    assert.match(stderr, /\$ \.\/bin\/provision\.mts --iso gamma\n/)
    assert.match(stderr, /✗ gamma/)
    const images = await readdir(checkout.path('images'))
    assert.deepEqual(images.filter((name) => name.includes('qcow2')).sort(), [
      'alpha.qcow2',
      'sigma.qcow2',
    ])
    const disk = await readFile(checkout.path('images', 'alpha.qcow2'), 'utf8')
    assert.equal(disk, 'the disk of alpha')
  })

  it('makes no new keys for machines that were installed with others', async () => {
    await rm(checkout.path('tls', 'ssh_ed25519'))
    const { stderr, exitCode } = await run(checkout, script)
    assert.equal(exitCode, 1)
    assert.match(stderr, /alpha, sigma were installed with keys .*: tls\/ssh_ed25519/)
    assert.match(stderr, /make clobber/)
    assert.equal(existsSync(checkout.path('tls', 'ssh_ed25519')), false)
  })

  it('refuses what it does not know', async () => {
    assert.equal((await run(checkout, script, ['--fast'])).exitCode, 2)
    const unknown = await run(checkout, script, ['nobody'])
    assert.equal(unknown.exitCode, 2)
    assert.match(unknown.stderr, /there is no node "nobody"/)
  })
})
