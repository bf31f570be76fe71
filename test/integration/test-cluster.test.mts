// test-cluster against a real control plane with real etcd; workers, pods and machines are hollow.
import assert from 'node:assert/strict'
import { after, before, describe, it } from 'node:test'
import type { Result } from '../../lib/check-list.mts'
import { becomes } from '../../lib/wait.mts'
import { HollowMachines } from '../hollow-machines.mts'
import { noQemu } from '../idle-qemu.mts'
import { HollowCluster } from '../kubernetes/hollow-cluster.mts'
import { findTools } from '../kubernetes/prepared.mts'
import { noSshd } from '../sshd.mts'

const tools = await findTools()
const skip = (typeof tools === 'string' && tools) || noSshd || noQemu
// A skipped suite is counted nowhere; a skipped test is.
it('what this needs is there', { skip }, () => {})

const names = ['alpha', 'sigma', 'gamma']
// What a command in a pod prints, if all goes well.
const inPods = 'case $3 in hostname) echo "$POD";; esac; exit 0'

describe('test-cluster', { skip }, () => {
  let hollow: HollowCluster
  let machines: HollowMachines
  before(async () => {
    if (typeof tools === 'string') return
    hollow = await HollowCluster.start(tools)
    machines = new HollowMachines(hollow.checkout)
    await machines.start(...names)
    const nodes = await hollow.addNodes()
    await nodes.useLanAddresses()
    // As on alpha, but for its port.
    const { controlPlane } = hollow
    const port = controlPlane.ports.etcdClients
    await machines
      .sshd('alpha')
      .program(
        'etcdctl',
        `#!/bin/bash\nexec ${controlPlane.place.etcd}/etcdctl "\${@/:2379/:${port}}"\n`,
      )
    inPodsRuns(inPods)
  })
  after(async () => {
    await machines?.stop(...names)
    await hollow?.stop()
  })

  /** @param shell what `kubectl exec` does; there are no kubelets to have logs, either */
  function inPodsRuns(shell: string): void {
    const kubectl = `${hollow.controlPlane.place.kubernetes}/kubectl`
    hollow.programs.add(
      'kubectl',
      `case $1 in exec) POD=$3; shift 4; ${shell};; logs) echo started;; *) exec ${kubectl} "$@";; esac`,
    )
  }

  const isThere = async () => {
    const args = ['get', 'namespace', 'cluster-test', '--ignore-not-found', '-o=name']
    return (await hollow.kubectl(args)) !== ''
  }

  async function test(...args: string[]) {
    const outcome = await hollow.script('test-cluster', '--json', ...args)
    const results = JSON.parse(outcome.stdout) as Result[]
    const of = (name: string) => results.find((result) => result.name === name)
    return { ...outcome, results, of }
  }

  describe('of a cluster that is well', () => {
    let outcome: Awaited<ReturnType<typeof test>>
    before(async () => {
      outcome = await test()
    })

    it('does every check, and passes', async () => {
      const { results, exitCode, stderr } = outcome
      assert.equal(exitCode, 0, stderr)
      assert.equal(results.length, 24)
      const others = results.filter(({ result }) => result !== 'passed').map(({ name }) => name)
      assert.deepEqual(others, ['every pod finds a service by its name'])
    })

    it('names the provider that encrypts Secrets', () => {
      assert.match(
        outcome.of('a Secret is ciphertext in etcd')?.detail ?? '',
        /^(aescbc|secretbox)$/,
      )
    })

    it('skips DNS as long as there is none, and says how to get it', () => {
      const found = outcome.of('every pod finds a service by its name')
      assert.equal(found?.result, 'skipped')
      assert.match(found?.detail ?? '', /make dns/)
    })

    it('leaves nothing behind', async () => {
      assert.ok(await becomes(async () => !(await isThere()), 60))
    })
  })

  it('looks names up when there is DNS', async () => {
    const inNamespace = '--namespace=kube-system'
    await hollow.kubectl(['create', 'deployment', 'coredns', '--image=none', inNamespace])
    inPodsRuns(`case $3 in nslookup*) echo "can't resolve"; exit 1;; esac; ${inPods}`)
    const { of } = await test()
    await hollow.kubectl(['delete', 'deployment', 'coredns', inNamespace])
    inPodsRuns(inPods)
    const found = of('every pod finds a service by its name')
    assert.equal(found?.result, 'failed')
    assert.match(
      found?.detail ?? '',
      /can't resolve\n.*nslookup kubernetes\.default\.svc\.cluster\.local\./,
    )
  })

  it('goes on after a failure, and ends with status 1 and the names of what failed', async () => {
    await machines.set('sigma', 'broken-kubelet')
    inPodsRuns(`case $3 in *:8080*) echo 'wget: timed out' >&2; exit 1;; esac; ${inPods}`)
    const { exitCode, stderr, of } = await test()
    assert.equal(exitCode, 1)
    assert.match(of('the services of sigma are healthy')?.detail ?? '', /kubelet is activating/)
    assert.equal(of('the services of gamma are healthy')?.result, 'passed')
    assert.match(of('every pod reaches every pod')?.detail ?? '', /web-sigma .*\n.*timed out/)
    assert.equal(of('every pod reaches the service')?.result, 'passed')
    assert.match(stderr, /of 24 checks failed[\s\S]*the services of sigma are healthy/)
    await machines.reset('sigma')
    inPodsRuns(inPods)
  })

  it('notices a Secret that lies in etcd in the clear', async () => {
    await machines.sshd('alpha').program('etcdctl', '#!/bin/sh\necho "k8s v1 Secret plain"\n')
    const found = (await test()).of('a Secret is ciphertext in etcd')
    assert.equal(found?.result, 'failed')
    assert.match(found?.detail ?? '', /in the clear/)
  })

  it('notices a worker that is not where cluster.env has it', async () => {
    await hollow.checkout.set({ NODE_IP_gamma: '192.168.100.99' })
    const found = (await test()).of('every worker is Ready, at its lan address')
    assert.match(found?.detail ?? '', /gamma is at 192\.168\.100\.12, not 192\.168\.100\.99/)
    await hollow.checkout.set({ NODE_IP_gamma: '192.168.100.12' })
  })

  it('sums up also when there can be no namespace, and skips what needs it', async () => {
    assert.ok(await becomes(async () => !(await isThere()), 60))
    // A finalizer that nobody serves keeps it from going.
    const metadata = { name: 'cluster-test', finalizers: ['test.example/kept'] }
    const namespace = { apiVersion: 'v1', kind: 'Namespace', metadata }
    await hollow.kubectl(['create', '-f=-'], JSON.stringify(namespace))
    const { exitCode, results, of } = await test('--timeout', '1')
    const free = { metadata: { finalizers: null } }
    await hollow.kubectl(['patch', 'namespace', 'cluster-test', '-p', JSON.stringify(free)])
    assert.equal(exitCode, 1)
    assert.equal(results.length, 24)
    assert.match(of('a namespace can be made')?.detail ?? '', /timed out waiting/)
    assert.equal(of('a pod runs on every worker')?.result, 'skipped')
    assert.equal(of('a Secret is ciphertext in etcd')?.result, 'skipped')
  })

  it('checks the machines when the API server is down, and skips the rest', async () => {
    await machines.stop('gamma')
    await hollow.controlPlane.stop()
    const { exitCode, of, stderr } = await test()
    assert.equal(exitCode, 1)
    assert.equal(of('sigma is up')?.result, 'passed')
    assert.equal(of('gamma is up')?.result, 'failed')
    assert.equal(of('the services of gamma are healthy')?.result, 'skipped')
    assert.equal(of('the API server is ready')?.result, 'failed')
    assert.equal(of('a pod runs on every worker')?.result, 'skipped')
    assert.match(stderr, /\d+ passed, \d+ failed, \d+ skipped/)
  })
})
