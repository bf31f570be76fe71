// The scripts that work in the cluster, one after the other on one real control plane, with workers
// without machines: their pods only seem to run. Order matters: the workers become Ready in
// install-cilium, and the API server is down at the end.
import assert from 'node:assert/strict'
import { mkdir, readFile, rename, writeFile } from 'node:fs/promises'
import { createServer, type Server } from 'node:http'
import type { AddressInfo } from 'node:net'
import { after, before, describe, it } from 'node:test'
import { becomes } from '../../lib/wait.mts'
import { HollowCluster } from '../kubernetes/hollow-cluster.mts'
import { findTools } from '../kubernetes/prepared.mts'
import { deployCoreDns } from './add-ons/deploy-coredns.mts'
import { deployLocalStorage } from './add-ons/deploy-local-storage.mts'
import { deployMetricsServer } from './add-ons/deploy-metrics-server.mts'
import { helmDeploy } from './add-ons/helm-deploy.mts'
import { installCilium } from './add-ons/install-cilium.mts'
import { manifests } from './add-ons/manifests.mts'
import { observe } from './add-ons/observe.mts'
import type { Shared } from './add-ons/shared.mts'
import { smoke } from './add-ons/smoke.mts'
import { testCluster } from './add-ons/test-cluster.mts'

const tools = await findTools()
const skip = typeof tools === 'string' && tools
// A skipped suite is counted nowhere; a skipped test is.
it('what this needs is there', { skip }, () => {})

/** Scripts that start pods, with arguments for those that need some. */
const starters = [
  ['deploy-coredns'],
  ['deploy-metrics-server'],
  ['deploy-local-storage'],
  ['smoke'],
  ['helm-deploy', 'some/chart'],
] as const

describe('in the cluster', { skip }, () => {
  const shared = {} as Shared
  let hollow: HollowCluster
  const script = (line: readonly string[]) => hollow.script(line[0] ?? '', ...line.slice(1))
  before(async () => {
    if (typeof tools === 'string') return
    hollow = await HollowCluster.start(tools)
    hollow.programs.add('helm', 'echo v4.3.1')
    shared.hollow = hollow
  })
  after(() => hollow?.stop())

  describe('pods cannot start yet', () => {
    for (const line of starters) {
      it(`${line[0]} says to wait when no worker has registered`, async () => {
        const { exitCode, stderr } = await script(line)
        assert.equal(exitCode, 1)
        assert.match(stderr, /no worker has registered yet/)
        assert.match(stderr, /hint: +make wait$/m)
      })
    }

    it('install-cilium says which workers have not registered', async () => {
      const { exitCode, stderr } = await script(['install-cilium'])
      assert.equal(exitCode, 1)
      assert.match(stderr, /not registered yet: sigma, gamma\n.*make wait/)
    })

    it('says that there are no workers, and what to do', async () => {
      const { exitCode, stderr } = await hollow.shell('WORKER_NODES= bin/smoke.mts')
      assert.equal(exitCode, 1)
      assert.match(stderr, /the cluster has no workers/)
      assert.match(stderr, /hint: .*make add-worker/)
    })

    it('says to install the network first when no worker is Ready', async () => {
      await hollow.addNodes({ ready: false })
      for (const line of starters) {
        const { exitCode, stderr } = await script(line)
        assert.equal(exitCode, 1, line[0])
        assert.match(stderr, /no worker is Ready/)
        assert.match(stderr, /hint: .*make network$/m)
      }
      assert.equal((await hollow.kubectl(['get', 'deployments', '--all-namespaces'])).trim(), '')
    })
  })

  installCilium(shared)
  it('the workers are Ready', () => hollow.nodes?.start())
  deployCoreDns(shared)
  deployLocalStorage(shared)
  deployMetricsServer(shared)
  helmDeploy(shared)
  smoke(shared)
  observe(shared)

  describe("the caller's own configuration", () => {
    let other: Server
    const requests: string[] = []
    const own = () => hollow.checkout.path('configs', 'admin.kubeconfig')
    before(async () => {
      // Another cluster, at the address where kubectl looks without a kubeconfig, too.
      other = createServer((request, response) => {
        requests.push(`${request.method} ${request.url}`)
        response.end('{}')
      })
      await new Promise<void>((resolve) => other.listen(0, '127.0.0.1', resolve))
    })
    after(() => other.close())

    it('does not lead kubectl to another cluster by its current context', async () => {
      const { port } = other.address() as AddressInfo
      const before = await readFile(own(), 'utf8')
      const config = `kubectl config --kubeconfig='${own()}'`
      const { stderr } = await hollow.shell(`set -e
        ${config} set-cluster other --server=http://127.0.0.1:${port}
        ${config} set-context other --cluster=other
        ${config} use-context other`)
      const outcome = await hollow.shell(`KUBECONFIG='${own()}' bin/smoke.mts --cleanup`)
      await writeFile(own(), before)
      assert.equal(outcome.exitCode, 0, stderr + outcome.stderr)
      assert.deepEqual(requests, [])
    })

    it('does not lead kubectl to another cluster when ours has no kubeconfig', async () => {
      const { port } = other.address() as AddressInfo
      const kubeconfig = hollow.checkout.path('other.kubeconfig')
      const config = `kubectl config --kubeconfig='${kubeconfig}'`
      await hollow.shell(`${config} set-cluster other --server=http://127.0.0.1:${port}
        ${config} set-context other --cluster=other; ${config} use-context other`)
      await rename(own(), `${own()}.away`)
      const { exitCode, stderr } = await hollow.shell(
        `KUBECONFIG='${kubeconfig}' bin/smoke.mts --cleanup`,
      )
      await rename(`${own()}.away`, own())
      assert.equal(exitCode, 1)
      assert.match(stderr, /configs\/admin\.kubeconfig is missing\n.*make kubeconfigs/)
      assert.deepEqual(requests, [])
    })

    it('does not make kubectl ask before it deletes', async () => {
      const home = hollow.checkout.path('home')
      await mkdir(`${home}/.kube`, { recursive: true })
      await writeFile(
        `${home}/.kube/kuberc`,
        'apiVersion: kubectl.config.k8s.io/v1beta1\nkind: Preference\ndefaults:\n  - command: delete\n    options: [{name: interactive, default: "true"}]\n',
      )
      const { exitCode, stderr } = await hollow.shell(`HOME='${home}' bin/smoke.mts --cleanup`)
      assert.equal(exitCode, 0, stderr)
    })

    it('does not print into what is read as JSON', async () => {
      const file = hollow.checkout.path('bash-env')
      await writeFile(file, 'echo "Now using node v22"\n')
      const { stderr } = await hollow.shell(`BASH_ENV='${file}' bin/deploy-coredns.mts --timeout 0`)
      assert.match(stderr, /✓ pods can start/)
      assert.match(stderr, /coredns/)
      assert.doesNotMatch(stderr, /JSON|Unexpected token/)
      await script(['deploy-coredns', '--delete'])
    })
  })

  manifests(shared)

  it('deploy-coredns ends soon when the API server goes away in the middle', async () => {
    hollow.runsInPods('exit 1')
    hollow.setFate(({ metadata }) => {
      const stuck = { reason: 'ImagePullBackOff', message: 'dial tcp: i/o timeout' }
      return metadata.namespace === 'network-probe' ? stuck : 'Running'
    })
    const outcome = script(['deploy-coredns', '--force-conflicts'])
    const isProbing = async () => {
      const found = ['get', 'namespace', 'network-probe', '--ignore-not-found', '-o=name']
      return (await hollow.kubectl(found)) !== ''
    }
    assert.ok(await becomes(isProbing, 60))
    await hollow.controlPlane.stop()
    const { exitCode, stderr } = await outcome
    await hollow.controlPlane.start()
    hollow.setFate()
    await hollow.kubectl(['delete', 'deployments', '--all', '--namespace=kube-system'])
    assert.equal(exitCode, 1)
    assert.match(stderr, /the API server does not answer/)
    assert.match(stderr, /hint: +make status/)
  })

  testCluster(shared)

  describe('the API server is down', () => {
    before(() => hollow.controlPlane.stop())
    for (const line of [...starters, ['install-cilium'], ['smoke', '--cleanup']]) {
      it(`${line.join(' ')} says so at once`, async () => {
        const { exitCode, stderr } = await script(line)
        assert.equal(exitCode, 1)
        assert.match(stderr, /the API server does not answer/)
        assert.match(stderr, /hint: +make status/)
      })
    }
  })
})

it('the chart in place of Cilium is of its version, and uses the image of the smoke test', async () => {
  const { loadCluster } = await import('../../lib/cluster.mts')
  const { settings } = loadCluster({ env: {} })
  const chart = await readFile('test/charts/cilium/Chart.yaml', 'utf8')
  assert.match(chart, new RegExp(`^version: ${settings.CILIUM_VERSION}$`, 'm'))
  const values = await readFile('test/charts/cilium/values.yaml', 'utf8')
  assert.match(values, new RegExp(`^image: ${settings.SMOKE_IMAGE}$`, 'm'))
})
