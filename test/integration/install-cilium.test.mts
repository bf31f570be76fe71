// install-cilium against a real control plane and workers without machines. The cilium command is
// the rehearsal's stand-in, which takes only what the real one takes.
import assert from 'node:assert/strict'
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import { helmRelease } from '../../lib/kubernetes/helm.mts'
import { Kubectl } from '../../lib/kubernetes/kubectl.mts'
import { becomes } from '../../lib/wait.mts'
import { projectRoot } from '../checkout.mts'
import { helmRecord } from '../kubernetes/helm-record.mts'
import { HollowCluster } from '../kubernetes/hollow-cluster.mts'
import { findTools } from '../kubernetes/prepared.mts'

const tools = await findTools()
const skip = typeof tools === 'string' && tools
// A skipped suite is counted nowhere; a skipped test is.
it('what this needs is there', { skip }, () => {})

interface Node {
  metadata: { labels: Record<string, string> }
  spec: { podCIDR?: string; podCIDRs?: string[] }
}

describe('install-cilium', { skip }, () => {
  let hollow: HollowCluster
  before(async () => {
    if (typeof tools === 'string') return
    hollow = await HollowCluster.start(tools)
    process.env.PATH = `${tools.kubernetes}:${process.env.PATH}`
    await hollow.checkout.set({ KUBE_PROXY_MODE: 'iptables' })
    hollow.programs.add('cilium', `exec '${join(projectRoot, 'test/rehearsal/bin/cilium')}' "$@"`)
  })
  after(() => hollow?.stop())

  const install = (...args: string[]) => hollow.script('install-cilium', ...args)
  const latestRelease = async () => {
    const found = await helmRelease(new Kubectl(hollow.cluster), 'cilium', 'kube-system')
    assert.ok(found)
    return found
  }
  const calls = () => hollow.programs.calls().filter((call) => call.startsWith('cilium '))

  it('says which workers have not registered', async () => {
    const { exitCode, stderr } = await install()
    assert.equal(exitCode, 1)
    assert.match(stderr, /not registered yet: sigma, gamma\n.*make wait/)
    assert.deepEqual(calls(), [])
  })

  it('tells what the command says when it does not know the version', async () => {
    await hollow.addNodes({ ready: false })
    await hollow.checkout.set({ CILIUM_VERSION: '9.9.9' })
    const { exitCode, stderr } = await install()
    await hollow.checkout.set({ CILIUM_VERSION: hollow.cluster.settings.CILIUM_VERSION })
    assert.equal(exitCode, 1)
    assert.match(stderr, /cilium install ended with status 1/)
    assert.match(stderr, /version "9\.9\.9" not found/)
    assert.match(stderr, /hint: .*CILIUM_VERSION/)
  })

  it('gives each worker its pod range and role', async () => {
    for (const { name, podCidr } of hollow.cluster.workers) {
      const { metadata, spec } = await hollow.get<Node>('node', name)
      assert.equal(spec.podCIDR, podCidr)
      assert.deepEqual(spec.podCIDRs, [podCidr])
      assert.equal(metadata.labels['node-role.kubernetes.io/worker'], '')
    }
  })

  it('gives up when agents do not become ready, and says why', async () => {
    await install('--timeout', '0')
    // The controllers and the scheduler of a busy host take their time to say so.
    const said = async () => {
      const message =
        'jsonpath={range .items[*]}{.status.conditions[?(@.type=="PodScheduled")].message}{"\\n"}{end}'
      const agents = ['--namespace=kube-system', '--selector=k8s-app=cilium']
      const text = await hollow.kubectl(['get', 'pods', ...agents, `--output=${message}`])
      return text.match(/^.*nodes are available/gm)?.length === 2
    }
    assert.ok(await becomes(said, 120))
    const { exitCode, stderr } = await install('--timeout', '1')
    assert.equal(exitCode, 1)
    assert.match(stderr, /daemonset\/cilium is not ready after 1 s/)
    assert.match(stderr, /nodes are available/)
  })

  it('waits until the agents are ready and the workers Ready', async () => {
    await hollow.nodes?.start()
    const { exitCode, stderr } = await install()
    assert.equal(exitCode, 0, stderr)
    assert.match(stderr, /✓ all workers are Ready/)
  })

  it('changes nothing when all is as it should be', async () => {
    const before = calls().length
    const { exitCode, stderr } = await install()
    assert.equal(exitCode, 0, stderr)
    assert.equal(calls().length, before)
  })

  it('upgrades when a value has changed, and keeps values that others have set', async () => {
    const former = await latestRelease()
    const others = { hubble: { relay: { enabled: true } } }
    await writeRecord({ ...former, values: { ...former.values, ...others } })
    await hollow.checkout.set({ K8S_POD_CIDR: '10.200.0.0/15' })
    const { exitCode, stderr } = await install()
    await hollow.checkout.set({ K8S_POD_CIDR: hollow.cluster.settings.K8S_POD_CIDR })
    assert.equal(exitCode, 0, stderr)
    assert.match(calls().at(-1) ?? '', /^cilium upgrade --version \S+ --values /)
    const { revision, values } = await latestRelease()
    assert.equal(revision, former.revision + 1)
    assert.equal(values.ipv4NativeRoutingCIDR, '10.200.0.0/15')
    assert.deepEqual(values.hubble, others.hubble)
  })

  it('goes on where an interrupted run has left off', async () => {
    const latest = await latestRelease()
    await writeRecord({ ...latest, revision: latest.revision + 1, status: 'pending-upgrade' })
    const { exitCode, stderr } = await install()
    assert.equal(exitCode, 0, stderr)
    assert.equal((await latestRelease()).status, 'deployed')
  })

  it('explains a pod range that is another than that of cluster.env', async () => {
    await hollow.checkout.set({ POD_CIDR_gamma: '10.200.9.0/24' })
    const { exitCode, stderr } = await install()
    await hollow.checkout.set({ POD_CIDR_gamma: '10.200.2.0/24' })
    assert.equal(exitCode, 1)
    assert.match(stderr, /gamma has pod range 10\.200\.2\.0\/24, not 10\.200\.9\.0\/24/)
    assert.match(stderr, /can be set once/)
    assert.match(stderr, /kubectl delete node gamma/)
  })

  it('shows the values it would give, each with its reason', async () => {
    const { exitCode, stdout } = await install('--print-values')
    assert.equal(exitCode, 0)
    assert.match(stdout, /^ {2}# .+\n {2}mode: kubernetes$/m)
    assert.match(stdout, /^# K8S_POD_CIDR: .+\nipv4NativeRoutingCIDR: 10\.200\.0\.0\/16$/m)
    assert.match(stdout, /^k8sServiceHost: 192\.168\.100\.10$/m)
  })

  it('is taken away, and that again', async () => {
    for (const _ of [1, 2]) {
      const { exitCode, stderr } = await install('--delete')
      assert.equal(exitCode, 0, stderr)
    }
    assert.equal(calls().filter((call) => call.startsWith('cilium uninstall')).length, 1)
    const left = [
      'get',
      'daemonsets,clusterroles,clusterrolebindings',
      '--all-namespaces',
      '-o=name',
    ]
    assert.doesNotMatch(await hollow.kubectl(left), /cilium|kubelet-api-full/)
  })

  it('hands the proxy of cluster.env to the command, but not for the cluster', async () => {
    const ca = join(hollow.checkout.root, 'tls', 'ca.pem')
    await hollow.checkout.set({ PROXY_HTTPS: 'http://10.0.2.2:3128', PROXY_CA_FILE: ca })
    const record = join(hollow.checkout.root, 'environment')
    hollow.programs.add('cilium', `env >'${record}'; exit 1`)
    await hollow.checkout.set({ K8S_POD_CIDR: '10.200.0.0/15' })
    await install()
    const environment = await readFile(record, 'utf8')
    assert.match(environment, /^HTTPS_PROXY=http:\/\/127\.0\.0\.1:3128$/m)
    const trusted = environment.match(/^SSL_CERT_FILE=(.*)$/m)?.[1] ?? ''
    const bundle = await readFile(trusted, 'utf8')
    assert.ok(bundle.includes((await readFile(ca, 'utf8')).trim()))
    assert.ok((bundle.match(/BEGIN CERTIFICATE/g)?.length ?? 0) > 100)
  })

  it('ends at once when the API server is gone', async () => {
    await hollow.controlPlane.stop()
    const { exitCode, stderr } = await install()
    assert.equal(exitCode, 1)
    assert.match(stderr, /the API server does not answer/)
    await hollow.controlPlane.start()
  })

  /** Puts a record beside those that are there, as Helm would. */
  async function writeRecord(release: Parameters<typeof helmRecord>[1]): Promise<void> {
    const args = ['apply', '--server-side', '--force-conflicts', '--filename=-']
    await hollow.kubectl(args, JSON.stringify(helmRecord('cilium', release)))
  }
})
