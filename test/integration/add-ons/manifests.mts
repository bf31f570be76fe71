// What the add-ons' scripts apply, before a real API server: whether it accepts their manifests
// strictly, what their service accounts may do, and whether Pod Security admits their pods.
import assert from 'node:assert/strict'
import { after, before, describe, it } from 'node:test'
import { parse, parseAllDocuments } from 'yaml'
import type { ApiObject } from '../../../lib/kubectl.mts'
import { becomes } from '../../../lib/wait.mts'
import type { Outcome } from '../../checkout.mts'
import type { HollowCluster } from '../../kubernetes/hollow-cluster.mts'
import type { Shared } from './shared.mts'

const scripts = [
  'install-cilium',
  'deploy-coredns',
  'deploy-metrics-server',
  'deploy-local-storage',
] as const
type Script = (typeof scripts)[number]

/** What service accounts may and may not, "VERB RESOURCE[.GROUP] [--flags]" as auth can-i has it. */
const access: Record<string, { may: string[]; mayNot: string[] }> = {
  'kube-system:coredns': {
    may: [
      'list services -A',
      'watch services -A',
      'list namespaces',
      'watch endpointslices.discovery.k8s.io -A',
    ],
    mayNot: [
      'list pods -A',
      'list secrets -A',
      'list configmaps -A',
      'list nodes',
      'update services -A',
      'create endpointslices.discovery.k8s.io -A',
      'get nodes --subresource=proxy',
    ],
  },
  'kube-system:metrics-server': {
    may: [
      'list nodes',
      'watch pods -A',
      'get nodes --subresource=metrics',
      'create tokenreviews.authentication.k8s.io',
      'create subjectaccessreviews.authorization.k8s.io',
      'get configmaps/extension-apiserver-authentication -n kube-system',
    ],
    mayNot: [
      'get nodes --subresource=proxy',
      'get nodes --subresource=log',
      'create nodes --subresource=proxy',
      'update nodes',
      'delete pods -A',
      'create pods --subresource=exec -A',
      'list secrets -A',
      'get secrets/metrics-server-tls -n kube-system',
      'list configmaps -n kube-system',
      'impersonate users',
    ],
  },
  'local-path-storage:local-path-provisioner': {
    may: [
      'watch persistentvolumeclaims -A',
      'create persistentvolumes',
      'delete persistentvolumes',
      'watch storageclasses.storage.k8s.io',
      'get nodes/sigma',
      'create events -A',
      'create pods -n local-path-storage',
      'delete pods -n local-path-storage',
      'get pods --subresource=log -n local-path-storage',
      'list configmaps -n local-path-storage',
    ],
    mayNot: [
      'create pods -n default',
      'create pods -n kube-system',
      'list pods -A',
      'update persistentvolumeclaims -A',
      'list configmaps -A',
      'list secrets -A',
      'list secrets -n local-path-storage',
      'create storageclasses.storage.k8s.io',
      'update nodes/sigma',
      'create pods --subresource=exec -n local-path-storage',
      'create serviceaccounts --subresource=token -n local-path-storage',
    ],
  },
}

interface Deployment extends ApiObject {
  spec: { template: { metadata: object; spec: PodSpec } }
}

interface Probe {
  periodSeconds: number
  failureThreshold: number
  timeoutSeconds: number
}

interface PodSpec {
  serviceAccountName?: string
  containers: { image: string; command?: string[]; args?: string[]; startupProbe?: Probe }[]
  securityContext?: object
}

/** Leaves what the scripts apply in the cluster. */
export const manifests = (shared: Shared) =>
  describe('manifests of the add-ons', () => {
    let hollow: HollowCluster
    const manifests = {} as Record<Script, string>
    before(async () => {
      hollow = shared.hollow
      for (const script of scripts) {
        const { stdout, stderr, exitCode } = await hollow.script(script, '--print')
        assert.equal(exitCode, 0, stderr)
        manifests[script] = stdout
      }
    })

    const apply = (manifest: string, ...args: string[]): Promise<Outcome> =>
      hollow.controlPlane.kubectl('admin', ['apply', '-f=-', ...args], manifest)
    const strictly = ['--server-side', '--validate=strict', '--field-manager=test']
    const objects = (script: Script) =>
      parseAllDocuments(manifests[script]).map((document) => document.toJS() as ApiObject)
    const deployments = () =>
      scripts
        .flatMap(objects)
        .filter((object): object is Deployment => object.kind === 'Deployment')
    const podOf = ({ metadata, spec }: Deployment, namespace: string) => ({
      apiVersion: 'v1',
      kind: 'Pod',
      metadata: { name: metadata.name, namespace },
      spec: { ...spec.template.spec, serviceAccountName: 'default' } as PodSpec,
    })

    for (const script of scripts) {
      describe(`the manifest of ${script}`, () => {
        it('is accepted by the API server strictly, without a warning', async () => {
          const { exitCode, stderr } = await apply(manifests[script], ...strictly)
          assert.equal(exitCode, 0, stderr)
          assert.equal(stderr, '')
        })

        it('is applied by kubectl apply -f - too', async () => {
          const { exitCode, stderr } = await apply(manifests[script], '--dry-run=server')
          assert.equal(exitCode, 0, stderr)
        })

        it('would be refused with a field that Kubernetes does not know', async () => {
          const broken = manifests[script].replace(/^kind: /m, 'nmae: x\n$&')
          const { exitCode, stderr } = await apply(broken, ...strictly, '--dry-run=server')
          assert.notEqual(exitCode, 0)
          assert.match(stderr, /unknown field "nmae"|nmae/)
        })

        it('cannot be printed and deleted at the same time', async () => {
          const { exitCode, stderr, stdout } = await hollow.script(script, '--print', '--delete')
          assert.equal(exitCode, 2)
          assert.match(stderr, /only one of --print and --delete/)
          assert.equal(stdout, '')
        })

        it('goes through a pipe that is closed early', async () => {
          const line = `'${hollow.checkout.path('bin', `${script}.mts`)}' --print | head -n 1`
          const { stdout, stderr } = await hollow.shell(line)
          assert.equal(stdout, `${manifests[script].split('\n')[0]}\n`)
          assert.equal(stderr, '')
        })
      })
    }

    it('give every program ten minutes to start before liveness counts', () => {
      const containers = deployments().flatMap(({ spec }) => spec.template.spec.containers)
      assert.equal(containers.length, 3)
      for (const { image, startupProbe } of containers) {
        const { periodSeconds = 0, failureThreshold = 0, timeoutSeconds } = startupProbe ?? {}
        assert.ok(periodSeconds * failureThreshold >= 600, image)
        assert.equal(timeoutSeconds, 5, image)
      }
    })

    it('have versions and addresses from cluster.env', async () => {
      const settings = {
        COREDNS_VERSION: '1.2.3',
        METRICS_SERVER_VERSION: '4.5.6',
        LOCAL_PATH_VERSION: '7.8.9',
        K8S_CLUSTER_DNS: '10.32.0.53',
        K8S_CLUSTER_DOMAIN: 'kube.example',
        SMOKE_IMAGE: 'registry.example/smoke:1',
      }
      const env = Object.entries(settings).map(([name, value]) => `${name}=${value}`)
      const printed = await Promise.all(
        scripts.slice(1).map(async (script) => {
          const path = hollow.checkout.path('bin', `${script}.mts`)
          return (await hollow.shell(`env ${env.join(' ')} '${path}' --print`)).stdout
        }),
      )
      const text = printed.join('')
      for (const [name, value] of Object.entries(settings)) {
        const former = String(hollow.cluster.settings[name as keyof typeof settings])
        assert.ok(text.includes(value), name)
        assert.ok(!text.includes(former), `${name} is still ${former} somewhere`)
      }
    })

    describe('service accounts', () => {
      for (const [account, { may, mayNot }] of Object.entries(access)) {
        const can = async (question: string) => {
          const as = `--as=system:serviceaccount:${account}`
          const args = ['auth', 'can-i', ...question.split(' '), as]
          return (await hollow.controlPlane.kubectl('admin', args)).stdout.trim()
        }
        it(`${account} may do what it needs`, async () => {
          // The API server learns of roles and bindings a moment after they were applied.
          for (const question of may) {
            assert.ok(await becomes(async () => (await can(question)) === 'yes', 60), question)
          }
        })
        it(`${account} may do nothing else`, async () => {
          for (const question of mayNot) assert.equal(await can(question), 'no', question)
        })
      }

      it('are the only ones in the manifests, each used by its deployment', () => {
        const made = scripts
          .flatMap(objects)
          .filter(({ kind }) => kind === 'ServiceAccount')
          .map(({ metadata }) => `${metadata.namespace}:${metadata.name}`)
        assert.deepEqual(made.sort(), Object.keys(access).sort())
        const used = deployments().map(
          ({ metadata, spec }) => `${metadata.namespace}:${spec.template.spec.serviceAccountName}`,
        )
        assert.deepEqual(used.sort(), made.sort())
      })
    })

    describe('Pod Security', () => {
      before(async () => {
        const labels = 'pod-security.kubernetes.io/enforce: restricted'
        await hollow.kubectl(
          ['apply', '-f=-'],
          `{apiVersion: v1, kind: Namespace, metadata: {name: strict, labels: {${labels}}}}`,
        )
        const account = ['get', 'serviceaccount', 'default', '--namespace=strict']
        const there = async () =>
          (await hollow.controlPlane.kubectl('admin', account)).exitCode === 0
        assert.ok(await becomes(there, 60))
      })

      for (const name of ['coredns', 'metrics-server', 'local-path-provisioner']) {
        it(`lets ${name} run as restricted`, async () => {
          const deployment = deployments().find(({ metadata }) => metadata.name === name)
          assert.ok(deployment)
          const pod = JSON.stringify(podOf(deployment, 'strict'))
          const { exitCode, stderr } = await apply(pod, '--dry-run=server', ...strictly)
          assert.equal(exitCode, 0, stderr)
          assert.equal(stderr, '')
        })
      }

      it('would not let a pod of root run as restricted', async () => {
        const [deployment] = deployments()
        assert.ok(deployment)
        const pod = podOf(deployment, 'strict')
        pod.spec.securityContext = { runAsUser: 0 }
        const { exitCode, stderr } = await apply(JSON.stringify(pod), '--dry-run=server')
        assert.notEqual(exitCode, 0)
        assert.match(stderr, /violates PodSecurity "restricted:latest"/)
      })

      it('lets the helper pods of local storage run only where it says so', async () => {
        const config = objects('deploy-local-storage').find(({ kind }) => kind === 'ConfigMap')
        const { data } = config as unknown as { data: Record<string, string> }
        const template = parse(data['helperPod.yaml'] ?? '') as { spec: PodSpec }
        const helper = (namespace: string) => {
          const volumes = [{ name: 'data', hostPath: { path: '/var/lib/local-path' } }]
          const spec = { ...template.spec, volumes, serviceAccountName: 'default' }
          return JSON.stringify({ ...template, metadata: { name: 'helper', namespace }, spec })
        }
        const refused = await apply(helper('strict'), '--dry-run=server')
        assert.match(refused.stderr, /violates PodSecurity .*hostPath/)
        const { exitCode, stderr } = await apply(helper('local-path-storage'), '--dry-run=server')
        assert.equal(exitCode, 0, stderr)
      })
    })

    describe('objects that another owner has created', () => {
      before(() => hollow.programs.add('helm', 'echo "no Helm in this test" >&2; exit 1'))
      after(async () => {
        await hollow.kubectl(['delete', 'deployments', '--all', '--all-namespaces'])
        // With an API that does not answer, no namespace can be deleted.
        await hollow.kubectl(['delete', 'apiservice', 'v1beta1.metrics.k8s.io'])
      })

      for (const script of scripts) {
        it(`are left alone by ${script}, and taken over with --force-conflicts`, async () => {
          const [first] = objects(script).filter(({ kind }) => kind === 'ClusterRole')
          assert.ok(first)
          const other = {
            ...first,
            rules: [{ apiGroups: [''], resources: ['pods'], verbs: ['get'] }],
          }
          const args = ['--server-side', '--force-conflicts', '--field-manager=somebody']
          await apply(JSON.stringify(other), ...args)
          await hollow.kubectl(['delete', 'deployments', '--all', '--all-namespaces'])

          const { exitCode, stderr } = await hollow.script(script, '--timeout=0')
          assert.equal(exitCode, 1)
          assert.match(stderr, /a part of it exists already, owned by "somebody"/)
          assert.match(stderr, /\.rules/)
          assert.match(stderr, /hint: .*--force-conflicts/)
          const left = JSON.parse(
            await hollow.kubectl(['get', 'deployments', '--all-namespaces', '-o=json']),
          )
          assert.deepEqual(left.items, [], 'the rest of the manifest was applied')

          const forced = await hollow.script(script, '--timeout=0', '--force-conflicts')
          assert.doesNotMatch(forced.stderr, /exists already/)
          const role = await hollow.get<typeof other>('clusterrole', first.metadata.name)
          assert.notDeepEqual(role.rules, other.rules)
        })
      }
    })
  })
