// test-cluster against a real control plane with real etcd; workers, pods and machines are hollow.
import assert from 'node:assert/strict'
import { after, before, describe, it } from 'node:test'
import { becomes } from '../../../lib/wait.mts'
import { HollowMachines } from '../../hollow-machines.mts'
import { noQemu } from '../../idle-qemu.mts'
import type { HollowCluster } from '../../kubernetes/hollow-cluster.mts'
import { noSshd } from '../../sshd.mts'
import type { Shared } from './shared.mts'

const names = ['alpha', 'sigma', 'gamma']
// What a command in a pod prints, if all goes well.
const inPods = 'case $3 in hostname) echo "$POD";; esac; exit 0'

interface Result {
  name: string
  result: string
  detail: string
}

/** Leaves the cluster with its API server down. */
export const testCluster = (shared: Shared) =>
  describe('test-cluster', { skip: noSshd || noQemu }, () => {
    let hollow: HollowCluster
    let machines: HollowMachines
    before(async () => {
      hollow = shared.hollow
      machines = new HollowMachines(hollow.checkout)
      await machines.start(...names)
      await hollow.nodes?.useLanAddresses()
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

    describe('of a healthy cluster', () => {
      let outcome: Awaited<ReturnType<typeof test>>
      before(async () => {
        outcome = await test()
      })

      it('does every check, and passes', async () => {
        const { results, exitCode, stderr } = outcome
        assert.equal(exitCode, 0, stderr)
        assert.equal(results.length, 26)
        const others = results.filter(({ result }) => result !== 'passed').map(({ name }) => name)
        assert.deepEqual(others, [
          'every pod finds a service by its name',
          'a network policy blocks traffic between pods',
        ])
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

    describe('of a cluster with several faults', () => {
      let outcome: Awaited<ReturnType<typeof test>>
      const detail = (name: string) => outcome.of(name)?.detail ?? ''
      before(async () => {
        const inNamespace = '--namespace=kube-system'
        await hollow.kubectl(['create', 'deployment', 'coredns', '--image=none', inNamespace])
        await hollow.checkout.set({ NODE_IP_gamma: '192.168.100.99' })
        await machines.set('sigma', 'broken-kubelet')
        await machines.sshd('alpha').program('etcdctl', '#!/bin/sh\necho "k8s v1 Secret plain"\n')
        const timedOut = "*:8080*) echo 'wget: timed out' >&2; exit 1"
        const unknown = `nslookup*) echo "can't resolve"; exit 1`
        inPodsRuns(`case $3 in ${timedOut};; ${unknown};; esac; ${inPods}`)
        outcome = await test()
        await hollow.kubectl(['delete', 'deployment', 'coredns', inNamespace])
        await hollow.checkout.set({ NODE_IP_gamma: '192.168.100.12' })
        await machines.reset('sigma')
        inPodsRuns(inPods)
      })

      it('continues after a failure, and ends with status 1 and the names of what failed', () => {
        const { exitCode, stderr, of } = outcome
        assert.equal(exitCode, 1)
        assert.equal(of('the services of gamma are healthy')?.result, 'passed')
        assert.equal(of('every pod reaches the service')?.result, 'passed')
        assert.match(stderr, /6 of 26 checks failed[\s\S]*the services of sigma are healthy/)
      })

      it('says of each what is wrong', () => {
        assert.match(detail('the services of sigma are healthy'), /kubelet is activating/)
        assert.match(detail('every pod reaches every pod'), /pod web-sigma [\s\S]*timed out/)
        assert.match(
          detail('every pod finds a service by its name'),
          /can't resolve\n[\s\S]*nslookup kubernetes\.default\.svc\.cluster\.local\./,
        )
        assert.match(detail('a Secret is ciphertext in etcd'), /in plain text/)
        assert.match(
          detail('every worker is Ready, at its LAN address'),
          /gamma is at 192\.168\.100\.12, not 192\.168\.100\.99/,
        )
      })
    })

    it('says that the cluster has no workers, and tests the rest', async () => {
      const { stdout } = await hollow.shell('WORKER_NODES= bin/test-cluster.mts --json')
      const results = JSON.parse(stdout) as Result[]
      const of = (name: string) => results.find((result) => result.name === name)
      assert.match(of('a pod runs on every worker')?.detail ?? '', /no workers: make add-worker/)
      assert.equal(of('a Secret is ciphertext in etcd')?.result, 'failed')
    })

    it('sums up also when there can be no namespace, and skips what needs it', async () => {
      assert.ok(await becomes(async () => !(await isThere()), 60))
      // A finalizer that no controller handles keeps it.
      const metadata = { name: 'cluster-test', finalizers: ['test.example/kept'] }
      const namespace = { apiVersion: 'v1', kind: 'Namespace', metadata }
      await hollow.kubectl(['create', '-f=-'], JSON.stringify(namespace))
      const { exitCode, results, of } = await test('--timeout', '1')
      const free = { metadata: { finalizers: null } }
      await hollow.kubectl(['patch', 'namespace', 'cluster-test', '-p', JSON.stringify(free)])
      assert.equal(exitCode, 1)
      assert.equal(results.length, 26)
      assert.match(of('a namespace can be created')?.detail ?? '', /timed out waiting/)
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
