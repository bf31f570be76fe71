// test-cluster against a real control plane with real etcd; workers, pods and machines are hollow.
import assert from 'node:assert/strict'
import { after, before, describe, it } from 'node:test'
import type { Result } from '../../lib/check-list.mts'
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
    await hollow.addNodes()
    // As on alpha, but for where things are.
    const { controlPlane, checkout } = hollow
    await machines.sshd('alpha').program(
      'etcdctl',
      `#!/bin/bash
args=()
for arg; do
  case $arg in
    --endpoints=*) args+=(--endpoints=https://127.0.0.1:${controlPlane.ports.etcdClients});;
    *) args+=("\${arg/\\/var\\/lib\\/kubernetes\\/pki/${checkout.path('tls').replaceAll('/', '\\/')}}");;
  esac
done
exec ${controlPlane.place.etcd}/etcdctl "\${args[@]}"
`,
    )
    hollow.runsInPods(inPods)
  })
  after(async () => {
    await machines?.stop(...names)
    await hollow?.stop()
  })

  async function test(...args: string[]) {
    const outcome = await hollow.script('test-cluster', '--json', ...args)
    const results = JSON.parse(outcome.stdout) as Result[]
    const of = (name: string) => results.find((result) => result.name === name)
    return { ...outcome, results, of }
  }

  it('does every check, and passes those that have what they need', async () => {
    const { results, stderr } = await test()
    const passed = results.filter(({ result }) => result === 'passed').map(({ name }) => name)
    for (const name of [
      'alpha is up',
      'the services of gamma are healthy',
      'the certificates in tls/ are right',
      'the API server is ready',
      'kube-scheduler leads',
      'every worker is Ready, at its lan address',
      'a pod runs on every worker',
      'exec runs a program in every pod',
      'every pod reaches every pod',
      'every pod reaches the service',
      'every pod reaches the API server',
      'a Secret is ciphertext in etcd',
    ]) {
      assert.ok(passed.includes(name), `${name}: ${stderr}`)
    }
  })

  it('names the provider that encrypts Secrets', async () => {
    assert.match((await test()).of('a Secret is ciphertext in etcd')?.detail ?? '', /^\w+$/)
  })

  it('skips DNS as long as there is none, and says how to get it', async () => {
    const found = (await test()).of('every pod finds a service by its name')
    assert.equal(found?.result, 'skipped')
    assert.match(found?.detail ?? '', /make dns/)
  })

  it('leaves nothing behind', async () => {
    await test()
    const namespaces = await hollow.kubectl([
      'get',
      'namespaces',
      '-o=jsonpath={.items[?(@.status.phase=="Active")].metadata.name}',
    ])
    assert.doesNotMatch(namespaces, /cluster-test/)
  })

  it('goes on after a failure, and ends with status 1 and the names of what failed', async () => {
    await machines.set('sigma', 'broken-kubelet')
    hollow.runsInPods(`case $3 in *:8080*) echo 'wget: timed out' >&2; exit 1;; esac; ${inPods}`)
    const { exitCode, stderr, of } = await test()
    assert.equal(exitCode, 1)
    assert.match(of('the services of sigma are healthy')?.detail ?? '', /kubelet is activating/)
    assert.equal(of('the services of gamma are healthy')?.result, 'passed')
    assert.match(of('every pod reaches every pod')?.detail ?? '', /web-sigma .*\n.*timed out/)
    assert.equal(of('every pod reaches the service')?.result, 'passed')
    assert.match(stderr, /of 23 checks failed[\s\S]*the services of sigma are healthy/)
    await machines.reset('sigma')
    hollow.runsInPods(inPods)
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
