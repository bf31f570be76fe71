// install-cilium with a real Helm, before a real control plane and workers without machines. In
// place of Cilium's chart there is test/charts/cilium, which takes the values it is given and no
// others.
import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import { parse } from 'yaml'
import { becomes } from '../../../lib/wait.mts'
import { projectRoot } from '../../checkout.mts'
import { startFileServer } from '../../file-server.mts'
import type { HollowCluster } from '../../kubernetes/hollow-cluster.mts'
import { goPrograms } from '../../kubernetes/programs.mts'
import type { Shared } from './shared.mts'

const helm = await goPrograms('helm')
const chart = join(projectRoot, 'test/charts/cilium')
const inNamespace = '--namespace=kube-system'

interface Node {
  metadata: { labels: Record<string, string> }
  spec: { podCIDR?: string; podCIDRs?: string[] }
}

/** For a cluster whose workers have registered, but are not Ready; afterwards they are. */
export const installCilium = (shared: Shared) =>
  describe('install-cilium', { skip: helm.reason ?? false }, () => {
    let hollow: HollowCluster
    before(async () => {
      hollow = shared.hollow
      await hollow.checkout.set({ KUBE_PROXY_MODE: 'iptables', CILIUM_CHART: chart })
      hollow.programs.add('helm', `exec '${helm.folder}/helm' "$@"`)
    })
    after(() =>
      hollow.checkout.set({ PROXY_HTTPS: '', PROXY_CA_FILE: '', KUBE_PROXY_MODE: 'cilium' }),
    )

    const install = (...args: string[]) => hollow.script('install-cilium', ...args)
    const asHelm = async (...args: string[]) => {
      const kubeconfig = `--kubeconfig=${hollow.checkout.path('configs/admin.kubeconfig')}`
      const line = ['helm', ...args, inNamespace, kubeconfig].map((word) => `'${word}'`).join(' ')
      const { stdout, stderr, exitCode } = await hollow.shell(line)
      assert.equal(exitCode, 0, stderr)
      return stdout
    }
    const metadata = async () => JSON.parse(await asHelm('get', 'metadata', 'cilium', '-o=json'))
    const valuesOf = async () => JSON.parse(await asHelm('get', 'values', 'cilium', '-o=json'))
    const upgrades = () => hollow.programs.calls().filter((call) => call.startsWith('helm upgrade'))

    it('says that the cluster has no workers, and what to do', async () => {
      const { exitCode, stderr } = await hollow.shell('WORKER_NODES= bin/install-cilium.mts')
      assert.equal(exitCode, 1)
      assert.match(stderr, /the cluster has no workers/)
      assert.match(stderr, /hint: .*make add-worker/)
    })

    it('refuses a chart of another version than CILIUM_VERSION', async () => {
      await hollow.checkout.set({ CILIUM_VERSION: '9.9.9' })
      const { exitCode, stderr } = await install()
      await hollow.checkout.set({ CILIUM_VERSION: hollow.cluster.settings.CILIUM_VERSION })
      assert.equal(exitCode, 1)
      assert.match(stderr, /is version 1\.\S+ of the chart, not 9\.9\.9/)
      assert.match(stderr, /hint: .*CILIUM_VERSION/)
    })

    it('gives each worker its pod CIDR and role', async () => {
      for (const { name, podCidr } of hollow.cluster.workers) {
        const { metadata, spec } = await hollow.get<Node>('node', name)
        assert.equal(spec.podCIDR, podCidr)
        assert.deepEqual(spec.podCIDRs, [podCidr])
        assert.equal(metadata.labels['node-role.kubernetes.io/worker'], '')
      }
    })

    it('says what Helm says of a chart that it cannot get', async () => {
      await hollow.checkout.set({ CILIUM_CHART: 'http://127.0.0.1:1/' })
      const { exitCode, stderr } = await install()
      await hollow.checkout.set({ CILIUM_CHART: chart })
      assert.equal(exitCode, 1)
      assert.match(stderr, /chart repository cannot be reached/)
      assert.match(stderr, /command: helm upgrade --install cilium cilium --repo http/)
      assert.match(upgrades().at(-1) ?? '', / cilium --repo http:\S+ --version 1\.\S+ /)
    })

    it('says that a chart repository has no such version', async () => {
      const server = await startFileServer()
      const index = {
        ...{ apiVersion: 'v1', generated: '2026-01-01T00:00:00Z' },
        entries: { cilium: [{ name: 'cilium', version: '1.2.3', urls: ['cilium-1.2.3.tgz'] }] },
      }
      server.files.set('/index.yaml', { data: Buffer.from(JSON.stringify(index)) })
      await hollow.checkout.set({ CILIUM_CHART: `${server.url}/` })
      const { exitCode, stderr } = await install()
      await hollow.checkout.set({ CILIUM_CHART: chart })
      await server.close()
      assert.equal(exitCode, 1)
      assert.match(stderr, /"cilium".* version "1\.\S+" not found/)
      assert.match(stderr, /hint: .*CILIUM_VERSION/)
    })

    it('gives up when agents do not become ready, and says why', async () => {
      await install('--timeout', '0')
      // On a busy host the controllers and the scheduler need some time.
      const reported = async () => {
        const message =
          'jsonpath={range .items[*]}{.status.conditions[?(@.type=="PodScheduled")].message}{"\\n"}{end}'
        const agents = [inNamespace, '--selector=k8s-app=cilium']
        const text = await hollow.kubectl(['get', 'pods', ...agents, `--output=${message}`])
        return text.match(/^.*nodes are available/gm)?.length === 2
      }
      assert.ok(await becomes(reported, 120))
      const { exitCode, stderr } = await install('--timeout', '1')
      assert.equal(exitCode, 1)
      assert.match(stderr, /daemonset\/cilium is not ready after 1 s/)
      assert.match(stderr, /nodes are available/)
    })

    it('waits until the agents are ready and the workers Ready', async () => {
      await hollow.nodes?.start()
      const { exitCode, stderr } = await install()
      assert.equal(exitCode, 0, stderr)
      for (const what of ['daemonset/cilium', 'deployment/cilium-operator']) {
        assert.ok(stderr.includes(`✓ ${what} is ready`), stderr)
      }
      assert.match(stderr, /✓ all workers are Ready/)
    })

    it('changes nothing when all is as it should be', async () => {
      const before = [upgrades().length, (await metadata()).revision]
      const { exitCode, stderr } = await install()
      assert.equal(exitCode, 0, stderr)
      assert.deepEqual([upgrades().length, (await metadata()).revision], before)
    })

    it('takes own values, keeps them, and upgrades when a value has changed', async () => {
      const { revision } = await metadata()
      const own = hollow.checkout.path('own.yaml')
      await writeFile(own, 'hubble: {relay: {enabled: true}}\noperator: {replicas: 2}\n')
      assert.equal((await install('--values', own)).exitCode, 0)
      assert.deepEqual((await valuesOf()).operator, { replicas: 2, rollOutPods: true })
      await install('--values', own)
      assert.equal((await metadata()).revision, revision + 1, 'the same values are no change')

      await hollow.checkout.set({ K8S_POD_CIDR: '10.200.0.0/15' })
      const { exitCode, stderr } = await install()
      await hollow.checkout.set({ K8S_POD_CIDR: hollow.cluster.settings.K8S_POD_CIDR })
      assert.equal(exitCode, 0, stderr)
      const values = await valuesOf()
      assert.equal(values.ipv4NativeRoutingCIDR, '10.200.0.0/15')
      assert.deepEqual(values.hubble, { relay: { enabled: true } })
      assert.equal((await metadata()).revision, revision + 2)
    })

    it('refuses a file of values that is none', async () => {
      const before = upgrades().length
      for (const text of ['- a list\n', 'a: {\n']) {
        const own = hollow.checkout.path('wrong.yaml')
        await writeFile(own, text)
        const { exitCode, stderr } = await install('--values', own)
        assert.equal(exitCode, 2)
        assert.match(stderr, /the values in \S+wrong\.yaml cannot be read: /)
      }
      assert.equal(upgrades().length, before)
    })

    it('passes on what the chart does not accept', async () => {
      const own = hollow.checkout.path('wrong.yaml')
      await writeFile(own, 'ipam: {mood: kubernetes}\n')
      const { exitCode, stderr } = await install('--values', own)
      assert.equal(exitCode, 1)
      assert.match(stderr, /additional properties 'mood' not allowed/)
    })

    it('repairs a release that a killed Helm has left pending, also that of a first installation', async () => {
      for (const status of ['pending-upgrade', 'pending-install']) {
        if (status === 'pending-install') await asHelm('uninstall', 'cilium', '--wait')
        await killHelm(status)
        const { exitCode, stderr } = await install()
        assert.equal(exitCode, 0, stderr)
        assert.equal((await metadata()).status, 'deployed')
      }
    })

    it('explains a pod CIDR that differs from that of cluster.env', async () => {
      await hollow.checkout.set({ POD_CIDR_gamma: '10.200.9.0/24' })
      const { exitCode, stderr } = await install()
      await hollow.checkout.set({ POD_CIDR_gamma: '10.200.2.0/24' })
      assert.equal(exitCode, 1)
      assert.match(stderr, /gamma has pod CIDR 10\.200\.2\.0\/24, not 10\.200\.9\.0\/24/)
      assert.match(stderr, /can be set once/)
      assert.match(stderr, /kubectl delete node gamma/)
    })

    it('shows the values it would give, each with its reason', async () => {
      const { exitCode, stdout } = await install('--print-values')
      assert.equal(exitCode, 0)
      assert.match(stdout, /^ {2}# .+\n {2}mode: kubernetes$/m)
      assert.match(stdout, /^# K8S_POD_CIDR: .+\nipv4NativeRoutingCIDR: 10\.200\.0\.0\/16$/m)
      assert.match(stdout, /^k8sServiceHost: 192\.168\.100\.10$/m)
      assert.deepEqual(parse(stdout).operator, { replicas: 1, rollOutPods: true })
    })

    it('is deleted, and again', async () => {
      for (const _ of [1, 2]) {
        const { exitCode, stderr } = await install('--delete')
        assert.equal(exitCode, 0, stderr)
      }
      const calls = hollow.programs.calls().filter((call) => call.includes('uninstall cilium'))
      assert.equal(calls.length, 2, 'one of them is of the test')
      const left = ['daemonsets,clusterroles,clusterrolebindings', '--all-namespaces', '-o=name']
      assert.doesNotMatch(await hollow.kubectl(['get', ...left]), /cilium|kubelet-api-full/)
    })

    it('hands the proxy of cluster.env to Helm, and nothing of the caller that would mislead it', async () => {
      const ca = join(hollow.checkout.root, 'tls', 'ca.pem')
      await hollow.checkout.set({ PROXY_HTTPS: 'http://10.0.2.2:3128', PROXY_CA_FILE: ca })
      const record = join(hollow.checkout.root, 'environment')
      hollow.programs.add(
        'helm',
        `case $1 in upgrade) env >'${record}'; exit 1;; esac; exec '${helm.folder}/helm' "$@"`,
      )
      await hollow.shell('HELM_KUBEAPISERVER=https://127.0.0.1:1 bin/install-cilium.mts')
      const environment = await readFile(record, 'utf8')
      assert.match(environment, /^HTTPS_PROXY=http:\/\/127\.0\.0\.1:3128$/m)
      assert.match(environment, /^KUBECONFIG=\S+\/run\/admin\.kubeconfig$/m)
      assert.doesNotMatch(environment, /^HELM_/m)
      const trusted = environment.match(/^SSL_CERT_FILE=(.*)$/m)?.[1] ?? ''
      const bundle = await readFile(trusted, 'utf8')
      assert.ok(bundle.includes((await readFile(ca, 'utf8')).trim()))
      assert.ok((bundle.match(/BEGIN CERTIFICATE/g)?.length ?? 0) > 100)
    })

    /** Kills a Helm that waits for pods, as soon as its release has the status. */
    async function killHelm(status: string): Promise<void> {
      const kubeconfig = `--kubeconfig=${hollow.checkout.path('configs/admin.kubeconfig')}`
      const values = hollow.checkout.path('values.yaml')
      await writeFile(values, (await install('--print-values')).stdout)
      const from = [chart, '--values', values]
      const args = ['upgrade', '--install', 'cilium', ...from, inNamespace, kubeconfig]
      const command = [...args, '--set', 'operator.replicas=2', '--wait']
      hollow.setFate(() => ({ reason: 'CreateContainerError', message: 'it has to wait' }))
      const child = spawn(`${helm.folder}/helm`, command, { stdio: 'ignore' })
      const ended = once(child, 'exit')
      const isPending = async () => {
        const selector = `--selector=owner=helm,status=${status}`
        return (await hollow.kubectl(['get', 'secrets', inNamespace, selector, '-o=name'])) !== ''
      }
      assert.ok(await becomes(isPending, 60))
      child.kill('SIGKILL')
      await ended
      hollow.setFate()
      assert.equal((await metadata()).status, status)
    }
  })
