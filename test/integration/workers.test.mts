// add-worker and remove-worker: addresses, refusals, and a worker added and removed, with a real API
// server, its controllers, and simulated machines. Only the installation is a fake.
import assert from 'node:assert/strict'
import { existsSync } from 'node:fs'
import { mkdir, readdir, readFile, rm, writeFile } from 'node:fs/promises'
import { createServer } from 'node:net'
import { after, before, describe, it } from 'node:test'
import { loadCluster } from '../../lib/cluster.mts'
import { filesOf, isRunning } from '../../lib/vm.mts'
import { becomes } from '../../lib/wait.mts'
import { type ChangeableMachines, changeableMachines } from '../changeable-cluster.mts'
import { type Checkout, makeCheckout, run } from '../checkout.mts'
import { type IdleQemu, noQemu, startIdleQemu } from '../idle-qemu.mts'
import { HollowCluster } from '../kubernetes/hollow-cluster.mts'
import { findTools } from '../kubernetes/prepared.mts'
import { freePorts } from '../ports.mts'
import { noSshd } from '../sshd.mts'

const tools = await findTools()
const skip = (typeof tools === 'string' && tools) || noQemu || noSshd
// A skipped suite is counted nowhere; a skipped test is.
it('what this needs is there', { skip }, () => {})

/** cluster.env with another worker, as add-worker writes it. */
const withDelta = (text: string) => `${text}
# ── Worker delta, by ./bin/add-worker.mts; ./bin/remove-worker.mts takes it out ──────────────────
WORKER_NODES="$WORKER_NODES delta"
SSH_PORT_delta=3999
NODE_IP_delta=192.168.100.13
MAC_delta=52:54:00:12:34:59
POD_CIDR_delta=10.200.3.0/24
`

describe('the addresses of a new worker', () => {
  let checkout: Checkout
  before(async () => {
    checkout = await makeCheckout()
  })
  after(() => checkout.remove())

  async function choose(env: Record<string, string> = {}): Promise<Record<string, string>> {
    const { stdout, stderr, exitCode } = await run(
      checkout,
      'bin/add-worker.mts',
      ['delta', '--dry-run'],
      { env },
    )
    assert.equal(exitCode, 0, stderr)
    return Object.fromEntries(stdout.split('\n').map((line) => line.split('=')))
  }

  it('follow those of the last one, and nothing is written', async () => {
    const before = await readFile(checkout.path('cluster.env'), 'utf8')
    const found = await choose()
    assert.equal(found.WORKER_NODES, '"$WORKER_NODES delta"')
    assert.equal(found.NODE_IP_delta, '192.168.100.13')
    assert.equal(found.MAC_delta, '52:54:00:12:34:59')
    assert.equal(found.POD_CIDR_delta, '10.200.3.0/24')
    assert.equal(await readFile(checkout.path('cluster.env'), 'utf8'), before)
  })

  it('have ports that are free on this computer', async () => {
    const [port = 0] = await freePorts(1)
    const server = createServer()
    await new Promise<void>((resolve) => server.listen(port + 1, '127.0.0.1', resolve))
    const ports = { SSH_PORT_alpha: '1024', SSH_PORT_sigma: '1025', SSH_PORT_gamma: String(port) }
    const found = await choose({ ...ports, API_PORT: String(port + 2) })
    server.close()
    assert.ok(Number(found.SSH_PORT_delta) >= port + 3, JSON.stringify(found))
  })

  it('fill gaps when there is nothing above', async () => {
    const found = await choose({
      NODE_IP_gamma: '192.168.100.254',
      POD_CIDR_gamma: '10.200.255.0/24',
      MAC_gamma: '52:54:00:ff:ff:ff',
    })
    assert.equal(found.NODE_IP_delta, '192.168.100.1')
    assert.equal(found.POD_CIDR_delta, '10.200.0.0/24')
    assert.equal(found.MAC_delta, '52:54:00:00:00:00')
  })

  it('have no MAC that another machine has in the LAN, and a range of the size of the last', async () => {
    const found = await choose({
      // The highest is that of alpha, and the interface of gamma in the LAN has the next.
      MAC_alpha: '52:54:01:12:34:58',
      MAC_sigma: '52:54:00:12:34:5a',
      MAC_gamma: '52:54:00:12:34:59',
      POD_CIDR_sigma: '10.200.0.0/26',
      POD_CIDR_gamma: '10.200.0.64/26',
    })
    assert.equal(found.MAC_delta, '52:54:01:12:34:5b')
    assert.equal(found.POD_CIDR_delta, '10.200.0.128/26')
  })

  it('have a range for pods that overlaps none of another size', async () => {
    const env = { POD_CIDR_sigma: '10.200.16.0/20', POD_CIDR_gamma: '10.200.1.0/24' }
    assert.equal((await choose(env)).POD_CIDR_delta, '10.200.32.0/24')
  })

  it('are refused when a range is used up', async () => {
    for (const [env, reason] of [
      [
        {
          K8S_POD_CIDR: '10.200.0.0/23',
          POD_CIDR_sigma: '10.200.0.0/24',
          POD_CIDR_gamma: '10.200.1.0/24',
        },
        /K8S_POD_CIDR \(10\.200\.0\.0\/23\) has no room for another \/24/,
      ],
      [
        {
          LAN_CIDR: '192.168.100.8/29',
          ...{
            NODE_IP_alpha: '192.168.100.9',
            NODE_IP_sigma: '192.168.100.10',
            NODE_IP_gamma: '192.168.100.11',
          },
          LAN_SWITCH_PORT: '65532',
        },
        /LAN_CIDR \(192\.168\.100\.8\/29\) has no address left/,
      ],
    ] as const) {
      const { stderr, exitCode } = await run(
        checkout,
        'bin/add-worker.mts',
        ['delta', '--dry-run'],
        { env },
      )
      assert.equal(exitCode, 1)
      assert.match(stderr, reason)
    }
  })

  it('are not chosen for names that no node can have, nor for one that is taken', async () => {
    for (const [name, reason] of [
      ['two words', /a node cannot be named "two words"/],
      ['../delta', /a node cannot be named "\.\.\/delta"/],
      ['Delta', /a node cannot be named "Delta"/],
      ['sigma-key', /a node cannot be named "sigma-key"/],
      ['lan-switch', /a node cannot be named "lan-switch"/],
      ['sigma', /there is already a node "sigma": a worker/],
    ] as const) {
      const { exitCode, stderr } = await run(checkout, 'bin/add-worker.mts', [name])
      assert.equal(exitCode, 2, stderr)
      assert.match(stderr, reason)
    }
    assert.equal((await run(checkout, 'bin/add-worker.mts')).exitCode, 2)
  })
})

describe('workers', { skip, timeout: 900_000 }, () => {
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
  const isCordoned = async (name: string) => {
    const { spec } = await hollow.get<{ spec: { unschedulable?: boolean } }>('node', name)
    return spec.unschedulable === true
  }
  /** Files of delta on this computer. */
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

  it('are not added where the environment hides what would be written', async () => {
    const { exitCode, stderr } = await hollow.shell(
      `WORKER_NODES='sigma gamma' ./bin/add-worker.mts delta`,
    )
    assert.equal(exitCode, 2)
    assert.match(stderr, /WORKER_NODES is set in the environment/)
    assert.equal(await settings(), original)
  })

  it('are not added while a machine cannot be reconfigured', async () => {
    const { exitCode, stderr } = await add('delta')
    assert.equal(exitCode, 1)
    assert.match(stderr, /all machines must be reachable to add a worker; nothing was changed/)
    for (const name of ['alpha', 'sigma', 'gamma']) {
      assert.match(stderr, new RegExp(`${name} is not running`))
    }
    assert.equal(await settings(), original)
    assert.equal(existsSync(hollow.checkout.path('tls', 'delta.pem')), false)
  })

  it('are not removed if one is not a worker, or the last one', async () => {
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

  it('are not removed while a machine cannot be reconfigured, unless it is forced', async () => {
    const { exitCode, stderr } = await remove('gamma')
    assert.equal(exitCode, 1)
    assert.match(stderr, /gamma cannot be removed, and nothing was done/)
    assert.match(stderr, /sigma is not running, and cannot be reconfigured/)
    assert.equal(await settings(), original)
    assert.equal(await isCordoned('gamma'), false)
  })

  describe('one that was added, removed by force while the others are down', () => {
    let qemu: IdleQemu
    before(async () => {
      await write(withDelta(original))
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
      const storage = { apiVersion: 'storage.k8s.io/v1', kind: 'StorageClass' }
      const storageClass = {
        ...storage,
        metadata: { name: 'local-path-delta' },
        provisioner: 'none',
      }
      await hollow.kubectl(['apply', '--filename=-'], JSON.stringify(storageClass))
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
      assert.match(stdout, new RegExp(`its disk.*is kept: ${disk}`))
      assert.equal(await readFile(hollow.checkout.path(disk ?? ''), 'utf8'), 'the disk')
      for (const file of ['known_hosts', 'ssh_config']) {
        const text = await readFile(hollow.checkout.path('tls', file), 'utf8')
        assert.doesNotMatch(text, /3999|delta/)
        assert.match(text, /ssh-ed25519/)
      }
      assert.equal(await hollow.kubectl(['get', 'node', 'delta', '--ignore-not-found']), '')
      assert.equal(await hollow.kubectl(['get', 'pod', 'bare', '--ignore-not-found']), '')
      assert.doesNotMatch(await hollow.kubectl(['get', 'storageclass']), /delta/)
      const text = withDelta(original)
      const cluster = loadCluster({ root: hollow.checkout.root, env: {}, text })
      assert.equal(await isRunning(cluster, cluster.node('delta')), false)
      await rm(hollow.checkout.path(disk ?? ''))
    })

    it('is gone also when that was interrupted before its end, with its disk on request', async () => {
      await write(withDelta(original))
      await writeFile(hollow.checkout.path('images', 'delta.qcow2'), 'another disk')
      const { exitCode, stderr } = await remove('delta', '--force', '--purge')
      assert.equal(exitCode, 0, stderr)
      assert.equal(await settings(), original)
      assert.equal(existsSync(hollow.checkout.path('images', 'delta.qcow2')), false)
    })
  })

  describe('with all machines running', () => {
    let all: ChangeableMachines
    let beat: NodeJS.Timeout
    const names = ['alpha', 'sigma', 'gamma']
    before(async () => {
      all = changeableMachines(hollow.checkout)
      await writeFile(hollow.checkout.path('calls'), '')
      for (const name of names) {
        await all.start(name)
        await all.program(name, 'nixos-rebuild', '#!/bin/sh\necho "$NAME $*" >>"$CALLS"\n')
        // The routes are those of the configuration.
        const routes = `#!/bin/sh
case $2 in
  show) grep -o "\\"podCidr\\": \\"$4\\"" /etc/nixos/cluster.json; exit 0;;
  *) exit 2;;
esac
`
        await all.program(name, 'ip', routes)
      }
      await all.install(...names)
      beat = await renewLeases(hollow, ['sigma', 'gamma'])
      // One pod that has to run, on gamma.
      await hollow.kubectl(['cordon', 'sigma'])
      await hollow.kubectl(['create', 'deployment', 'kept', '--image=kept'])
      await hollow.kubectl(['create', 'pdb', 'kept', '--selector=app=kept', '--min-available=1'])
      await hollow.kubectl(['rollout', 'status', 'deployment/kept', '--timeout=120s'])
      await hollow.kubectl(['uncordon', 'sigma'])
    })
    after(async () => {
      clearInterval(beat)
      await all?.machines.stop('delta')
      await all?.stop()
    })

    async function assertStays(args: string[], reason: RegExp, cordoned = false): Promise<void> {
      const { exitCode, stderr } = await remove('gamma', ...args)
      assert.equal(exitCode, 1)
      assert.match(stderr, reason)
      assert.equal(await isCordoned('gamma'), cordoned)
      assert.equal(await isRunning(hollow.cluster, hollow.cluster.node('gamma')), true)
      assert.equal(await settings(), original)
    }

    it('one whose pod a disruption budget keeps takes pods again, and stays', () =>
      assertStays(['--timeout', '8'], /a disruption budget keeps pods on gamma/))

    it('one with a pod that nothing would start again stays, and stays cordoned if it was', async () => {
      const bare = { apiVersion: 'v1', kind: 'Pod', metadata: { name: 'bare' } }
      const spec = { nodeName: 'gamma', containers: [{ name: 'bare', image: 'bare' }] }
      await hollow.kubectl(['apply', '--filename=-'], JSON.stringify({ ...bare, spec }))
      await hollow.kubectl(['cordon', 'gamma'])
      const reason = /on gamma there are pods that nothing would start again elsewhere/
      await assertStays([], reason, true)
      await hollow.kubectl(['uncordon', 'gamma'])
      await hollow.kubectl(['delete', 'pod', 'bare', '--wait=false'])
    })

    it('one with the only copy of data stays, and the claims are named', async () => {
      const host = 'kubernetes.io/hostname'
      const is = (key: string, ...values: string[]) => ({ key, operator: 'In', values })
      const items = [
        volume('here', { matchExpressions: [is(host, 'gamma')] }),
        volume('by-name', { matchFields: [is('metadata.name', 'gamma')] }),
        volume('other-node', { matchExpressions: [is(host, 'sigma')] }),
        volume('either', { matchExpressions: [is(host, 'gamma', 'sigma')] }),
        volume(
          ...['alternative' as const],
          { matchExpressions: [is(host, 'gamma')] },
          { matchExpressions: [is(host, 'sigma')] },
        ),
        volume('without', { matchExpressions: [{ ...is(host, 'gamma'), operator: 'NotIn' }] }),
        volume('zone', { matchExpressions: [is('topology.kubernetes.io/zone', 'gamma')] }),
        { ...volume('free', { matchExpressions: [is(host, 'gamma')] }, false) },
      ]
      const list = JSON.stringify({ apiVersion: 'v1', kind: 'List', items })
      await hollow.kubectl(['apply', '--filename=-'], list)
      await assertStays(
        [],
        /volumes on gamma have the only copy of default\/by-name, default\/here$/m,
      )
      await hollow.kubectl(['delete', 'persistentvolumes', '--all', '--wait=false'])
    })

    it('another one is added, where an interruption had left off', async () => {
      await fakeInstallation(hollow.checkout)
      const failed = await add('delta')
      assert.equal(failed.exitCode, 1)
      assert.match(failed.stderr, /so delta is not a worker yet/)
      assert.match(failed.stderr, /make add-worker NAME=delta continues/)
      const text = await settings()
      assert.match(text, /^WORKER_NODES="\$WORKER_NODES delta"$/m)

      const adding = add('delta')
      const boots = () => existsSync(hollow.checkout.path('boots-delta'))
      if (!(await becomes(boots, 180))) assert.fail(JSON.stringify(await adding))
      try {
        await all.machines.start('delta')
        await hollow.nodes?.api('POST', '/api/v1/nodes', {
          ...{ apiVersion: 'v1', kind: 'Node' },
          metadata: { name: 'delta', labels: { 'kubernetes.io/hostname': 'delta' } },
        })
      } finally {
        await rm(hollow.checkout.path('boots-delta'))
      }
      const { exitCode, stdout, stderr } = await adding
      assert.equal(exitCode, 0, stderr)
      assert.equal(await settings(), text, 'other addresses were chosen')
      assert.match(
        stdout,
        /^delta is a worker: 192\.168\.100\.13, pods 10\.200\.3\.0\/24, ssh port/m,
      )
      assert.match(stderr, /next: make network/)
      const { metadata, spec } = await hollow.get<{
        metadata: { labels: Record<string, string> }
        spec: { podCIDR: string }
      }>('node', 'delta')
      assert.equal(spec.podCIDR, '10.200.3.0/24')
      assert.equal(metadata.labels['node-role.kubernetes.io/worker'], '')
      for (const name of names)
        assert.match(await all.on(name, 'cat /etc/nixos/cluster.json'), /delta/)
      const calls = (await readFile(hollow.checkout.path('calls'), 'utf8')).trim().split('\n')
      assert.deepEqual(calls, ['alpha switch', 'sigma switch', 'gamma switch'])
    })

    it('it is removed when its pods run elsewhere, and the others forget it', async () => {
      for (const name of ['sigma', 'gamma']) await hollow.kubectl(['cordon', name])
      await hollow.kubectl(['scale', 'deployment/kept', '--replicas=3'])
      await hollow.kubectl(['rollout', 'status', 'deployment/kept', '--timeout=120s'])
      for (const name of ['sigma', 'gamma']) await hollow.kubectl(['uncordon', name])

      const { exitCode, stdout, stderr } = await remove('delta', '--purge')
      assert.equal(exitCode, 0, stderr)
      assert.match(stdout, /^delta is gone/m)
      assert.equal(await settings(), original)
      assert.deepEqual(await leftovers(), [])
      assert.equal(await hollow.kubectl(['get', 'node', 'delta', '--ignore-not-found']), '')
      await hollow.kubectl(['rollout', 'status', 'deployment/kept', '--timeout=120s'])
      for (const name of names) {
        assert.doesNotMatch(await all.on(name, 'cat /etc/nixos/cluster.json'), /delta/)
      }
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

/** A local volume, with alternative terms for the nodes that have it. */
function volume(name: string, ...rest: (object | boolean)[]): object {
  const terms = rest.filter((each) => typeof each === 'object')
  const claimRef = rest.includes(false) ? {} : { claimRef: { namespace: 'default', name } }
  return {
    ...{ apiVersion: 'v1', kind: 'PersistentVolume', metadata: { name } },
    spec: {
      ...{ capacity: { storage: '1Gi' }, accessModes: ['ReadWriteOnce'], ...claimRef },
      local: { path: '/data' },
      nodeAffinity: { required: { nodeSelectorTerms: terms } },
    },
  }
}

/** The leases that kubelets renew. */
async function renewLeases(hollow: HollowCluster, names: string[]): Promise<NodeJS.Timeout> {
  const path = '/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases'
  for (const name of names) {
    const lease = { apiVersion: 'coordination.k8s.io/v1', kind: 'Lease', metadata: { name } }
    await hollow.nodes?.api('POST', path, lease)
  }
  return setInterval(() => {
    for (const name of names) {
      const spec = { renewTime: new Date().toISOString().replace('Z', '000Z') }
      hollow.nodes?.api('PATCH', `${path}/${name}`, { spec }).catch(() => {})
    }
  }, 500)
}

/** Replaces the download and provision: the first installation fails; a start waits for the test. */
async function fakeInstallation(checkout: Checkout): Promise<void> {
  const provision = `#!/bin/sh -e
cd "$(dirname "$0")/.."
if [ "$1" = --iso ]; then
  if [ ! -e failed-once ]; then touch failed-once; exit 1; fi
  touch "images/$2.qcow2"
else
  touch boots-delta
  while [ -e boots-delta ]; do sleep 0.1; done
fi
`
  await writeFile(checkout.path('bin', 'download-iso.mts'), '#!/bin/sh\n')
  await writeFile(checkout.path('bin', 'provision.mts'), provision)
}
