// deploy-coredns with a real CoreDNS, which runs here with the Corefile of the manifest and the
// rights of its service account, in place of pods that only seem to run.
import assert from 'node:assert/strict'
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import { becomes } from '../../../lib/wait.mts'
import type { HollowCluster } from '../../kubernetes/hollow-cluster.mts'
import { missingTool } from '../../kubernetes/prepared.mts'
import { goPrograms } from '../../kubernetes/programs.mts'
import { freePorts } from '../../ports.mts'
import type { Shared } from './shared.mts'

const coredns = await goPrograms('coredns')
const skip = coredns.reason || (await missingTool('busybox')) || false

export const deployCoreDns = (shared: Shared) =>
  describe('deploy-coredns', { skip }, () => {
    let hollow: HollowCluster
    before(() => {
      hollow = shared.hollow
    })

    const deploy = (...args: string[]) => hollow.script('deploy-coredns', ...args)
    const namespaces = async () => {
      const { items } = await hollow.get<{ items: { metadata: { name: string } }[] }>('namespaces')
      return items.map(({ metadata }) => metadata.name)
    }

    it('ends at once when there is no image of that version', async () => {
      const message =
        'failed to resolve reference "registry.k8s.io/coredns/coredns:v9.9.9": not found'
      hollow.setFate(() => ({ reason: 'ErrImagePull', message }))
      const { exitCode, stderr } = await deploy()
      assert.equal(exitCode, 1)
      assert.match(stderr, /the image of pod coredns-\S+ does not exist/)
      assert.match(stderr, /v9\.9\.9": not found/)
      assert.match(stderr, /hint: .*version in cluster\.env/)
    })

    it('says why its pods are not ready when its time is over', async () => {
      await hollow.letPodsWait('kube-system', 'CrashLoopBackOff', 'back-off restarting')
      const { exitCode, stderr } = await deploy('--timeout', '1')
      assert.equal(exitCode, 1)
      assert.match(stderr, /deployment\/coredns is not ready after 1 s/)
      assert.match(stderr, /coredns-\S+: CrashLoopBackOff: back-off restarting/)
      hollow.setFate()
      await hollow.kubectl(['delete', 'pods', '--all', '--namespace=kube-system'])
    })

    describe('with CoreDNS', () => {
      let server: ChildProcess
      let address: string
      before(async () => {
        ;({ server, address } = await startCoreDns(hollow, coredns.folder ?? ''))
        hollow.programs.add('nslookup', `exec busybox nslookup "$1" ${address}`)
      })
      after(async () => {
        server?.kill()
        if (server?.exitCode === null) await once(server, 'exit')
      })

      it('looks a service and a missing one up from every worker', async () => {
        hollow.runsInPods('"$@"')
        const { exitCode, stderr, stdout } = await deploy()
        assert.equal(exitCode, 0, stderr)
        const dns = hollow.cluster.settings.K8S_CLUSTER_DNS
        const lookups = hollow.programs.calls().filter((call) => call.startsWith('nslookup '))
        const count = (name: string) =>
          lookups.filter((call) => call === `nslookup ${name}.default.svc.cluster.local. ${dns}`)
            .length
        assert.equal(count('kubernetes'), 20)
        assert.equal(count('no-such-service'), 2)
        assert.match(stdout, /^Try: KUBECONFIG=\S+ kubectl run /m)
      })

      it('leaves nothing of its check behind', async () => {
        const gone = async () => !(await namespaces()).includes('network-probe')
        assert.ok(await becomes(gone, 60))
      })

      it('spreads its replicas over the workers', async () => {
        const { items } = await hollow.get<{ items: { spec: { nodeName: string } }[] }>(
          'pods',
          '--namespace=kube-system',
          '--selector=k8s-app=kube-dns',
        )
        assert.deepEqual(items.map(({ spec }) => spec.nodeName).sort(), ['gamma', 'sigma'])
      })

      it('fails when a lookup out of ten does', async () => {
        const counter = hollow.checkout.path('lookups')
        hollow.programs.add(
          'nslookup',
          `echo >>'${counter}'; [ $(wc -l <'${counter}') -ne 7 ] || { echo "timed out"; exit 1; }; exec busybox nslookup "$1" ${address}`,
        )
        const { exitCode, stderr } = await deploy()
        assert.equal(exitCode, 1)
        assert.match(stderr, /on sigma finds kubernetes\S+ in 9 of 10 lookups\n.*failed: timed out/)
        assert.match(stderr, /command: nslookup kubernetes\.default\.svc\.cluster\.local\. 10\.32/)
      })

      it('fails when a missing name is not answered', async () => {
        hollow.programs.add(
          'nslookup',
          `case $1 in no-such*) echo "connection timed out"; exit 1;; esac; exec busybox nslookup "$1" ${address}`,
        )
        const { exitCode, stderr } = await deploy()
        assert.equal(exitCode, 1)
        assert.match(stderr, /gets no answer that no-such-service\S+ does not exist/)
      })

      it('fails when a name that does not exist is found', async () => {
        hollow.programs.add('nslookup', 'echo "Address: 192.0.2.1"')
        const { exitCode, stderr } = await deploy()
        assert.equal(exitCode, 1)
        assert.match(stderr, /gets no answer that no-such-service\S+ does not exist/)
      })
    })

    it('is deleted, and again', async () => {
      for (const _ of [1, 2]) {
        const { exitCode, stderr } = await deploy('--delete')
        assert.equal(exitCode, 0, stderr)
      }
      const args = ['get', 'all,configmaps,pdb', '--namespace=kube-system', '--output=name']
      const names = await hollow.kubectl([...args, '--selector=k8s-app=kube-dns'])
      assert.equal(names, '')
      assert.doesNotMatch(await hollow.kubectl(args), /coredns/)
      assert.doesNotMatch(await hollow.kubectl(['get', 'clusterroles']), /system:coredns\b/)
    })
  })

/** CoreDNS with what the manifest gives it, but for ports, and with a token in place of a pod's. */
async function startCoreDns(
  hollow: HollowCluster,
  programs: string,
): Promise<{ server: ChildProcess; address: string }> {
  // The manifest has been applied before; its ConfigMap is what a pod would read.
  const { data } = await hollow.get<{ data: { Corefile: string } }>(
    'configmap/coredns',
    '--namespace=kube-system',
  )
  const [dns, health, ready, metrics, nobody] = await freePorts(5)
  const kubeconfig = await hollow.kubeconfigOf('coredns', 'kube-system')
  const replacements: [RegExp, string][] = [
    [/^\.:1053 \{/m, `.:${dns} {\n    bind 127.0.0.1`],
    [/health :8080/, `health 127.0.0.1:${health}`],
    [/ready :8181/, `ready 127.0.0.1:${ready}`],
    [/prometheus :9153/, `prometheus 127.0.0.1:${metrics}`],
    [/(kubernetes .* \{)/, `$1\n        kubeconfig ${kubeconfig}`],
    [/forward \. \S+/, `forward . 127.0.0.1:${nobody}`],
  ]
  const file = join(hollow.checkout.root, 'Corefile')
  const corefile = replacements.reduce((text, [there, here]) => {
    assert.match(text, there)
    return text.replace(there, here)
  }, data.Corefile)
  await writeFile(file, corefile)
  const server = spawn(
    'setpriv',
    ['--pdeathsig', 'TERM', join(programs, 'coredns'), '-conf', file],
    { stdio: 'ignore' },
  )
  const isReady = async () => {
    assert.equal(server.exitCode, null, 'CoreDNS ended')
    const answer = await fetch(`http://127.0.0.1:${ready}/ready`).catch(() => undefined)
    return answer?.status === 200
  }
  assert.ok(await becomes(isReady, 60), 'CoreDNS is not ready')
  return { server, address: `127.0.0.1:${dns}` }
}
