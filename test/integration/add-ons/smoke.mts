// smoke against a real control plane and workers without machines. What runs in pods and on alpha
// is the test's: it notes what was asked for.
import assert from 'node:assert/strict'
import { after, before, describe, it } from 'node:test'
import type { HollowCluster } from '../../kubernetes/hollow-cluster.mts'
import { noSshd, type Sshd, startSshd } from '../../sshd.mts'
import type { Shared } from './shared.mts'

interface Pods {
  items: {
    metadata: { name: string; uid: string }
    spec: { nodeName: string }
    status: { podIP: string }
  }[]
}

export const smoke = (shared: Shared) =>
  describe('smoke', { skip: noSshd }, () => {
    let hollow: HollowCluster
    let alpha: Sshd
    before(async () => {
      hollow = shared.hollow
      alpha = await startSshd(hollow.checkout, 'alpha')
    })
    after(async () => {
      await alpha?.stop()
      hollow.runsInPods('exit 1')
    })

    const smoke = (...args: string[]) => hollow.script('smoke', ...args)
    const askedFile = () => hollow.checkout.path('asked')
    const podsAsk = (end = 'exit 0') =>
      hollow.runsInPods(`echo "$POD: $3" >>${askedFile()}; ${end}`)
    const alphaAsks = (end = 'exit 0') =>
      alpha.program(
        'curl',
        `#!/bin/sh\nfor url; do :; done\necho "alpha: $url" >>${askedFile()}\n${end}\n`,
      )
    const asked = async () => (await hollow.shell(`cat asked; : >asked`)).stdout
    const getPods = () => hollow.get<Pods>('pods', '--namespace=smoke')

    it('has a pod on every worker, and asks each of them from each', async () => {
      podsAsk()
      await alphaAsks()
      const { exitCode, stdout, stderr } = await smoke()
      assert.equal(exitCode, 0, stderr)
      const { items } = await getPods()
      assert.deepEqual(items.map(({ spec }) => spec.nodeName).sort(), ['gamma', 'sigma'])
      const said = await asked()
      for (const from of items) {
        for (const to of items) {
          const line = new RegExp(`^${from.metadata.name}: .*http://${to.status.podIP}:8080/`, 'm')
          assert.match(said, line)
        }
        assert.match(stdout, new RegExp(`${from.metadata.name} +${from.status.podIP} `))
      }
    })

    it('asks through the service, and through the NodePort of every worker', async () => {
      const { exitCode } = await smoke()
      assert.equal(exitCode, 0)
      const { spec } = await hollow.get<{
        spec: { clusterIP: string; ports: { nodePort: number }[] }
      }>('service/nginx', '--namespace=smoke')
      const said = await asked()
      assert.doesNotMatch(said, /cluster\.local/)
      assert.match(said, new RegExp(`^nginx-.*http://${spec.clusterIP}:80/`, 'm'))
      for (const { ip } of hollow.cluster.workers) {
        assert.match(said, new RegExp(`^alpha: http://${ip}:${spec.ports[0]?.nodePort}/`, 'm'))
      }
    })

    it('asks by the name of the service, too, when there is DNS', async () => {
      const inNamespace = '--namespace=kube-system'
      await hollow.kubectl(['create', 'deployment', 'coredns', '--image=none', inNamespace])
      assert.equal((await smoke()).exitCode, 0)
      await hollow.kubectl(['delete', 'deployment', 'coredns', inNamespace])
      assert.match(await asked(), /http:\/\/nginx\.smoke\.svc\.cluster\.local:80\//)
    })

    it('changes nothing when it is run again', async () => {
      const versions = async () =>
        await hollow.kubectl([
          'get',
          'deployment,service',
          '-n',
          'smoke',
          '-o',
          'jsonpath={.items[*].metadata.generation}{.items[*].metadata.uid}',
        ])
      const before = [
        await versions(),
        (await getPods()).items.map(({ metadata }) => metadata.name),
      ]
      assert.equal((await smoke()).exitCode, 0)
      assert.deepEqual(
        [await versions(), (await getPods()).items.map(({ metadata }) => metadata.name)],
        before,
      )
    })

    it('names the pod that gets no answer, and from where', async () => {
      const { clusterIP } = (
        await hollow.get<{ spec: { clusterIP: string } }>('service/nginx', '--namespace=smoke')
      ).spec
      podsAsk(
        `case $3 in *${clusterIP}*) echo 'wget: download timed out' >&2; exit 1;; esac; exit 0`,
      )
      const { exitCode, stderr } = await smoke()
      assert.equal(exitCode, 1)
      assert.match(stderr, new RegExp(`nginx-\\S+ gets no page from ${clusterIP}:80`))
      assert.match(stderr, /wget: download timed out/)
      podsAsk()
    })

    it('fails when a NodePort does not answer', async () => {
      await alphaAsks('echo "curl: (28) Connection timed out" >&2; exit 28')
      const { exitCode, stderr } = await smoke()
      assert.equal(exitCode, 1)
      assert.match(stderr, /a command on alpha failed \(exit status 28\)/)
      assert.match(stderr, /Connection timed out/)
      await alphaAsks()
    })

    it('takes all of it away with --cleanup, and has nothing to do the second time', async () => {
      assert.equal((await smoke('--cleanup')).exitCode, 0)
      assert.equal(await hollow.kubectl(['get', 'namespace', 'smoke', '--ignore-not-found']), '')
      assert.equal((await smoke('--cleanup')).exitCode, 0)
    })

    it('gives up at once for an image that is not there', async () => {
      hollow.setFate(() => ({ reason: 'ErrImagePull', message: 'manifest unknown: not found' }))
      const { exitCode, stderr } = await smoke()
      assert.equal(exitCode, 1)
      assert.match(stderr, /image of pod nginx-\S+ does not exist/)
    })

    it('says what keeps the pods from running when it gives up', async () => {
      await hollow.letPodsWait('smoke', 'CreateContainerError', 'no space left on device')
      const { exitCode, stderr } = await smoke('--timeout', '1')
      assert.equal(exitCode, 1)
      assert.match(stderr, /deployment\/nginx is not ready after 1 s/)
      assert.match(stderr, /no space left on device/)
    })

    it('says why the pods have no network', async () => {
      await hollow.letPodsWait('smoke', 'ContainerCreating', '')
      const { items } = await getPods()
      const message = 'plugin type="cilium-cni" failed (add): failed to find plugin "cilium-cni"'
      for (const { metadata } of items) {
        const event = {
          ...{ apiVersion: 'v1', kind: 'Event', type: 'Warning', message },
          metadata: { generateName: 'no-sandbox-', namespace: 'smoke' },
          involvedObject: {
            ...{ kind: 'Pod', namespace: 'smoke' },
            ...{ name: metadata.name, uid: metadata.uid },
          },
          reason: 'FailedCreatePodSandBox',
        }
        await hollow.kubectl(['create', '--filename=-'], JSON.stringify(event))
      }
      const { exitCode, stderr } = await smoke('--timeout', '1')
      assert.equal(exitCode, 1)
      assert.match(stderr, /failed to find plugin "cilium-cni"/)
    })

    it('does not blame the network of pods that have one by now', async () => {
      const conditions = [{ type: 'PodReadyToStartContainers', status: 'True' }]
      const patch = ['--subresource=status', '--patch', JSON.stringify({ status: { conditions } })]
      for (const { metadata } of (await getPods()).items) {
        await hollow.kubectl(['patch', 'pod', metadata.name, '--namespace=smoke', ...patch])
      }
      const { exitCode, stderr } = await smoke('--timeout', '1')
      assert.equal(exitCode, 1)
      assert.match(stderr, /deployment\/nginx is not ready after 1 s/)
      assert.doesNotMatch(stderr, /cilium-cni/)
    })

    it('waits on when the deployment has made no progress for too long', async () => {
      const nginx = ['deployment/nginx', '--namespace=smoke']
      await hollow.kubectl(['patch', ...nginx, '--patch', '{"spec":{"progressDeadlineSeconds":1}}'])
      const failed = '--for=jsonpath={.status.conditions[?(@.type=="Progressing")].status}=False'
      await hollow.kubectl(['wait', ...nginx, failed, '--timeout=60s'])
      const { exitCode, stderr } = await smoke('--timeout', '2')
      assert.equal(exitCode, 1)
      assert.match(stderr, /deployment\/nginx is not ready after 2 s/)
    })

    it('refuses what it does not know', async () => {
      assert.equal((await smoke('--clean')).exitCode, 2)
      assert.equal((await smoke('nginx')).exitCode, 2)
    })
  })
