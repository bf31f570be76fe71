// add-worker and remove-worker: what they refuse, and a worker removed, with a real API server and
// a real QEMU that has no system.
import assert from 'node:assert/strict'
import { existsSync } from 'node:fs'
import { mkdir, readdir, readFile, writeFile } from 'node:fs/promises'
import { after, before, describe, it } from 'node:test'
import { loadCluster } from '../../lib/cluster.mts'
import { filesOf } from '../../lib/qemu/machine-files.mts'
import { isRunning } from '../../lib/qemu/vm.mts'
import { withWorker } from '../../lib/workers/worker-settings.mts'
import { HollowMachines } from '../hollow-machines.mts'
import { type IdleQemu, noQemu, startIdleQemu } from '../idle-qemu.mts'
import { HollowCluster } from '../kubernetes/hollow-cluster.mts'
import { findTools } from '../kubernetes/prepared.mts'
import { noSshd } from '../sshd.mts'

const tools = await findTools()
const skip = (typeof tools === 'string' && tools) || noQemu || noSshd
// A skipped suite is counted nowhere; a skipped test is.
it('what this needs is there', { skip }, () => {})

const delta = {
  name: 'delta',
  sshPort: 3999,
  ip: '192.168.100.13',
  mac: '52:54:00:12:34:59',
  podCidr: '10.200.3.0/24',
}

describe('workers', { skip }, () => {
  let hollow: HollowCluster
  let original = ''
  const settings = () => readFile(hollow.checkout.path('cluster.env'), 'utf8')
  const write = (text: string) => writeFile(hollow.checkout.path('cluster.env'), text)
  before(async () => {
    if (typeof tools === 'string') return
    hollow = await HollowCluster.start(tools)
    await hollow.addNodes()
    await hollow.checkout.set({ STOP_TIMEOUT: 1 })
    original = await settings()
  })
  after(() => hollow?.stop())

  const add = (...args: string[]) => hollow.script('add-worker', ...args)
  const remove = (...args: string[]) => hollow.script('remove-worker', ...args)

  it('are not added by names that no node can have, nor by one that is taken', async () => {
    for (const [name, reason] of [
      ['two words', /a node cannot be named "two words"/],
      ['../delta', /a node cannot be named "\.\.\/delta"/],
      ['Delta', /a node cannot be named "Delta"/],
      ['sigma', /there is a node "sigma" already/],
    ] as const) {
      const { exitCode, stderr } = await add(name)
      assert.equal(exitCode, 2, stderr)
      assert.match(stderr, reason)
    }
    assert.equal((await add()).exitCode, 2)
    assert.equal(await settings(), original)
  })

  it('are not added where the environment hides what would be written', async () => {
    const env = { WORKER_NODES: 'sigma gamma' }
    const { exitCode, stderr } = await hollow.shell(
      `WORKER_NODES='${env.WORKER_NODES}' ./bin/add-worker.mts delta`,
    )
    assert.equal(exitCode, 2)
    assert.match(stderr, /WORKER_NODES is set in the environment/)
    assert.equal(await settings(), original)
  })

  it('are not added while a machine cannot be told of it', async () => {
    const { exitCode, stderr } = await add('delta')
    assert.equal(exitCode, 1)
    assert.match(stderr, /not all machines can be told of a new worker, so nothing was done/)
    for (const name of ['alpha', 'sigma', 'gamma']) {
      assert.match(stderr, new RegExp(`${name} is not running`))
    }
    assert.equal(await settings(), original)
    assert.equal(existsSync(hollow.checkout.path('tls', 'delta.pem')), false)
  })

  it('are not removed if one is no worker, or the last one', async () => {
    const controlPlane = await remove('alpha')
    assert.equal(controlPlane.exitCode, 2)
    assert.match(controlPlane.stderr, /alpha is the control plane/)
    const unknown = await remove('delta', '--force')
    assert.equal(unknown.exitCode, 2)
    assert.match(unknown.stderr, /there is no node "delta"/)
    const last = await hollow.shell(`WORKER_NODES=sigma ./bin/remove-worker.mts sigma`)
    assert.equal(last.exitCode, 2)
    assert.match(last.stderr, /sigma is the last worker/)
    const hidden = await hollow.shell(`WORKER_NODES=sigma ./bin/remove-worker.mts sigma --force`)
    assert.equal(hidden.exitCode, 2)
    assert.match(hidden.stderr, /WORKER_NODES is set in the environment/)
    assert.equal(await settings(), original)
  })

  it('are not removed while a machine cannot be told, unless it is forced', async () => {
    const { exitCode, stderr } = await remove('gamma')
    assert.equal(exitCode, 1)
    assert.match(stderr, /gamma cannot be removed, and nothing was done/)
    assert.match(stderr, /sigma is not running, and cannot be told/)
    assert.equal(await settings(), original)
    const { spec } = await hollow.get<{ spec: { unschedulable?: boolean } }>('node', 'gamma')
    assert.equal(spec.unschedulable, undefined)
  })

  describe('one whose pods may not leave', () => {
    let machines: HollowMachines
    const all = ['alpha', 'sigma', 'gamma']
    before(async () => {
      machines = new HollowMachines(hollow.checkout)
      await machines.start(...all)
      // Its only pod has to run, and is on gamma.
      await hollow.kubectl(['cordon', 'sigma'])
      await hollow.kubectl(['create', 'deployment', 'kept', '--image=kept'])
      await hollow.kubectl(['create', 'pdb', 'kept', '--selector=app=kept', '--min-available=1'])
      await hollow.kubectl(['rollout', 'status', 'deployment/kept', '--timeout=120s'])
      await hollow.kubectl(['uncordon', 'sigma'])
    })
    after(async () => {
      await machines?.stop(...all)
      await hollow.kubectl(['delete', 'deployment,pdb', 'kept'])
    })

    it('takes pods again, and stays what it was', async () => {
      const { exitCode, stderr } = await remove('gamma', '--timeout', '8')
      assert.equal(exitCode, 1)
      assert.match(stderr, /a disruption budget keeps pods on gamma/)
      const { spec } = await hollow.get<{ spec: { unschedulable?: boolean } }>('node', 'gamma')
      assert.equal(spec.unschedulable, undefined)
      assert.equal(await isRunning(hollow.cluster, hollow.cluster.node('gamma')), true)
      assert.equal(await settings(), original)
    })
  })

  describe('one that was added', () => {
    let qemu: IdleQemu
    const leftovers = async () => {
      const folders = ['tls', 'configs', 'cloud-init', 'images', 'logs', 'run']
      const found = await Promise.all(
        folders.map(async (folder) => {
          const names = await readdir(hollow.checkout.path(folder)).catch(() => [])
          return names.filter((name) => name.includes('delta')).map((name) => `${folder}/${name}`)
        }),
      )
      return found.flat()
    }
    before(async () => {
      await write(withWorker(original, delta))
      for (const script of ['generate-certs', 'generate-kubeconfigs', 'generate-nocloud-iso']) {
        const { exitCode, stderr } = await hollow.script(script)
        assert.equal(exitCode, 0, stderr)
      }
      const cluster = loadCluster({ root: hollow.checkout.root, env: {} })
      const files = filesOf(cluster, cluster.node('delta'))
      await mkdir(hollow.checkout.path('images'), { recursive: true })
      await writeFile(files.disk, 'the disk')
      await writeFile(files.efiVars, 'variables')
      await writeFile(files.installLog, 'installed')
      await hollow.nodes?.api('POST', '/api/v1/nodes', {
        ...{ apiVersion: 'v1', kind: 'Node', metadata: { name: 'delta' } },
      })
      const pod = { apiVersion: 'v1', kind: 'Pod', metadata: { name: 'bare' } }
      const spec = { nodeName: 'delta', containers: [{ name: 'bare', image: 'bare' }] }
      await hollow.kubectl(['apply', '--filename=-'], JSON.stringify({ ...pod, spec }))
      qemu = await startIdleQemu(hollow.checkout, 'delta')
    })
    after(() => qemu?.stop())

    it('is gone with its node, machine, keys and lines in cluster.env, and its disk is kept', async () => {
      const { exitCode, stdout, stderr } = await remove('delta', '--force')
      assert.equal(exitCode, 0, stderr)
      assert.match(stdout, /^delta is gone/m)
      assert.match(stderr, /when they run again: make reconfig/)
      assert.equal(await settings(), original)
      const [disk, ...others] = await leftovers()
      assert.match(disk ?? '', /^images\/delta\.qcow2\.removed-/)
      assert.deepEqual(others, [])
      assert.match(stdout, new RegExp(`its disk is kept.*${disk}`))
      assert.equal(await readFile(hollow.checkout.path(disk ?? ''), 'utf8'), 'the disk')
      const known = await readFile(hollow.checkout.path('tls', 'known_hosts'), 'utf8')
      assert.doesNotMatch(known, /:3999 /)
      assert.match(known, /^\[127\.0\.0\.1\]:\d+ ssh-ed25519 /)
      assert.equal(await hollow.kubectl(['get', 'node', 'delta', '--ignore-not-found']), '')
      assert.equal(await hollow.kubectl(['get', 'pod', 'bare', '--ignore-not-found']), '')
      const cluster = loadCluster({
        root: hollow.checkout.root,
        env: {},
        text: withWorker(original, delta),
      })
      assert.equal(await isRunning(cluster, cluster.node('delta')), false)
    })

    it('is gone also when that was interrupted before its end, with its disk if it is to', async () => {
      await write(withWorker(original, delta))
      await writeFile(hollow.checkout.path('images', 'delta.qcow2'), 'another disk')
      const { exitCode, stderr } = await remove('delta', '--force', '--purge')
      assert.equal(exitCode, 0, stderr)
      assert.equal(await settings(), original)
      assert.equal(existsSync(hollow.checkout.path('images', 'delta.qcow2')), false)
    })
  })

  it('are not touched while the API server is down', async () => {
    await hollow.controlPlane.stop()
    for (const outcome of [await add('delta'), await remove('gamma', '--force')]) {
      assert.equal(outcome.exitCode, 1)
      assert.match(outcome.stderr, /the API server does not answer/)
    }
    assert.equal(await settings(), original)
  })
})
