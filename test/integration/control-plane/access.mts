// The users that the API server sees, and what each may and may not do.
import assert from 'node:assert/strict'
import { readFile } from 'node:fs/promises'
import { createServer, get, type Server } from 'node:https'
import { text } from 'node:stream/consumers'
import { after, before, describe, it } from 'node:test'
import type { TLSSocket } from 'node:tls'
import type { Cluster } from '../../../lib/cluster.mts'
import { becomes } from '../../../lib/wait.mts'
import { type Checkout, type Outcome, run } from '../../checkout.mts'
import type { ControlPlane } from '../../kubernetes/control-plane.mts'
import type { Shared } from './shared.mts'

/** Kubeconfig to the user and groups that the API server sees. */
const identities: Record<string, { user: string; group: string }> = {
  admin: { user: 'admin', group: 'system:masters' },
  sigma: { user: 'system:node:sigma', group: 'system:nodes' },
  gamma: { user: 'system:node:gamma', group: 'system:nodes' },
  'kube-controller-manager': {
    user: 'system:kube-controller-manager',
    group: 'system:kube-controller-manager',
  },
  'kube-scheduler': { user: 'system:kube-scheduler', group: 'system:kube-scheduler' },
  'kube-proxy': { user: 'system:kube-proxy', group: 'system:node-proxier' },
}

/** What RBAC and the node authorizer say, "VERB RESOURCE[.GROUP][/SUBRESOURCE] [NAMESPACE/NAME]". */
const rights: Record<string, { may: string[]; mayNot: string[] }> = {
  admin: {
    may: [
      '* *.*',
      'delete nodes',
      'get secrets kube-system/any',
      'escalate clusterroles.rbac.authorization.k8s.io',
    ],
    mayNot: [],
  },
  sigma: {
    may: [
      'create nodes',
      'update nodes/status /sigma',
      'get nodes /sigma',
      'create pods default/',
      'create events default/',
      'update leases.coordination.k8s.io kube-node-lease/sigma',
      'list services',
      'create certificatesigningrequests.certificates.k8s.io',
      'create tokenreviews.authentication.k8s.io',
      'create subjectaccessreviews.authorization.k8s.io',
    ],
    mayNot: [
      'get nodes /gamma',
      'list nodes',
      'list pods',
      'list secrets',
      'list configmaps',
      'get secrets default/of-gamma',
      'get configmaps default/of-gamma',
      'update leases.coordination.k8s.io kube-node-lease/gamma',
      'get nodes/proxy /sigma',
      'create deployments.apps default/',
      'update services default/kubernetes',
      'create clusterrolebindings.rbac.authorization.k8s.io',
      'approve signers.certificates.k8s.io',
      'impersonate users',
    ],
  },
  'kube-controller-manager': {
    may: [
      'create serviceaccounts kube-system/',
      'create serviceaccounts/token kube-system/node-controller',
      'list *.*',
      'update leases.coordination.k8s.io kube-system/kube-controller-manager',
    ],
    mayNot: [
      'delete nodes',
      'delete pods default/any',
      'create deployments.apps default/',
      'get nodes/proxy /sigma',
      'create clusterrolebindings.rbac.authorization.k8s.io',
      'escalate clusterroles.rbac.authorization.k8s.io',
      'impersonate users',
    ],
  },
  'kube-scheduler': {
    may: [
      'list pods',
      'list nodes',
      'create pods/binding default/any',
      'update pods/status default/any',
      'delete pods default/any',
      'update leases.coordination.k8s.io kube-system/kube-scheduler',
    ],
    mayNot: [
      'create pods default/',
      'update nodes /sigma',
      'list secrets',
      'get secrets default/any',
      'create serviceaccounts/token default/default',
      'impersonate users',
    ],
  },
  'kube-proxy': {
    may: [
      'list services',
      'watch endpointslices.discovery.k8s.io',
      'get nodes /sigma',
      'create events.events.k8s.io default/',
    ],
    mayNot: [
      'update services default/kubernetes',
      'list pods',
      'list secrets',
      'update nodes /sigma',
    ],
  },
}

export const access = (shared: Shared) =>
  describe('access to the API server', () => {
    let checkout: Checkout
    let cluster: Cluster
    let controlPlane: ControlPlane
    const as = (identity: string, args: readonly string[], object?: unknown): Promise<Outcome> =>
      controlPlane.kubectl(identity, args, object ? JSON.stringify(object) : '')
    const ok = async (outcome: Promise<Outcome>) => {
      const { exitCode, stderr, stdout } = await outcome
      assert.equal(exitCode, 0, stderr)
      return stdout
    }
    const refused = async (outcome: Promise<Outcome>, reason: RegExp) => {
      const { exitCode, stderr } = await outcome
      assert.notEqual(exitCode, 0)
      assert.match(stderr, reason)
    }
    before(async () => {
      ;({ checkout, cluster, controlPlane } = shared)
      const account = () => as('admin', ['get', 'serviceaccount', 'default'])
      assert.ok(await becomes(async () => (await account()).exitCode === 0, 60))
    })
    describe('the user of a kubeconfig', () => {
      for (const [identity, { user, group }] of Object.entries(identities)) {
        it(`${identity}: ${user} of ${group}`, async () => {
          const { userInfo } = JSON.parse(
            await ok(as(identity, ['auth', 'whoami', '-o=json'])),
          ).status
          assert.equal(userInfo.username, user)
          assert.deepEqual(userInfo.groups, [group, 'system:authenticated'])
        })
      }
    })

    describe('what a user may do', () => {
      for (const [identity, { may, mayNot }] of Object.entries(rights)) {
        it(`${identity}`, async () => {
          const questions = [...may, ...mayNot]
          const answers = await ask(as, identity, questions, (resourceAttributes) => {
            return {
              apiVersion: 'authorization.k8s.io/v1',
              kind: 'SelfSubjectAccessReview',
              spec: { resourceAttributes },
            }
          })
          assert.deepEqual(
            questions.filter((_, index) => answers[index]),
            may,
          )
        })
      }
    })

    describe('a node', () => {
      before(async () => {
        for (const name of ['sigma', 'gamma']) {
          await ok(as(name, ['create', '-f=-'], nodeNamed(name)))
          const secret = ['create', 'secret', 'generic', `of-${name}`, '--from-literal=key=value']
          await ok(as('admin', secret))
          await ok(as('admin', ['create', '-f=-'], podOn(name)))
        }
        const read = () => as('sigma', ['get', 'secret', 'of-sigma'])
        assert.ok(await becomes(async () => (await read()).exitCode === 0, 60), 'sees its pod')
      })

      it('reads the Secrets of its pods, and no others', async () => {
        assert.match(await ok(as('sigma', ['get', 'secret', 'of-sigma'])), /of-sigma/)
        await refused(as('sigma', ['get', 'secret', 'of-gamma']), /no relationship found/)
      })

      it('sees its own pods, and no others', async () => {
        const pods = (node: string) => [
          ...['get', 'pods', '-A', '-o=name'],
          `--field-selector=spec.nodeName=${node}`,
        ]
        assert.equal(await ok(as('sigma', pods('sigma'))), 'pod/on-sigma\n')
        await refused(as('sigma', pods('gamma')), /Forbidden|forbidden/)
      })

      it('cannot register as another node', async () => {
        await refused(
          as('sigma', ['create', '-f=-'], nodeNamed('gamma')),
          /is not allowed to modify node/,
        )
        await refused(as('sigma', ['label', 'node', 'gamma', 'a=b']), /forbidden/)
      })

      it('cannot give itself labels that isolate nodes, nor remove its taints', async () => {
        const label = (key: string) => as('sigma', ['label', 'node', 'sigma', `${key}=x`])
        await ok(label('topology.kubernetes.io/zone'))
        await refused(
          label('node-restriction.kubernetes.io/secret'),
          /is not allowed to modify labels/,
        )
        await refused(
          label('node-role.kubernetes.io/control-plane'),
          /is not allowed to modify labels/,
        )
        const taints = ['patch', 'node', 'sigma', '-p={"spec":{"taints":[]}}']
        await ok(as('admin', ['taint', 'node', 'sigma', 'kept=apart:NoSchedule']))
        await refused(as('sigma', taints), /is not allowed to modify taints/)
      })

      it('cannot start pods on another node, nor delete those there', async () => {
        await refused(
          as('sigma', ['create', '-f=-'], podOn('gamma', 'more')),
          /pods? .*is forbidden/,
        )
        await refused(as('sigma', ['delete', 'pod', 'on-gamma']), /forbidden/)
        await refused(as('sigma', ['delete', 'node', 'gamma']), /forbidden/)
      })

      it('gets tokens for its own pods only', async () => {
        const uid = (name: string) =>
          ok(as('admin', ['get', 'pod', name, '-o=jsonpath={.metadata.uid}']))
        const token = async (name: string) => [
          ...['create', 'token', 'default', '--bound-object-kind=Pod'],
          ...[`--bound-object-name=${name}`, `--bound-object-uid=${await uid(name)}`],
        ]
        assert.match(await ok(as('sigma', await token('on-sigma'))), /^eyJ/)
        await refused(as('sigma', await token('on-gamma')), /forbidden/)
        await refused(as('sigma', ['create', 'token', 'default']), /forbidden/)
      })

      describe('from which the API server reads logs', () => {
        let kubelet: Server
        const callers: string[] = []
        const identity = async (name: string) => {
          const [ca, cert, key] = await Promise.all(
            ['ca.pem', `${name}.pem`, `${name}-key.pem`].map((file) =>
              readFile(checkout.path('tls', file)),
            ),
          )
          return { ca, cert, key }
        }
        before(async () => {
          const options = { ...(await identity('sigma')), requestCert: true }
          kubelet = createServer(options, (request, response) => {
            const { subject } = (request.socket as TLSSocket).getPeerCertificate()
            callers.push(`${subject.CN} ${request.method} ${request.url}`)
            response.end('what the container said\n')
          })
          await new Promise<void>((resolve) => kubelet.listen(0, '127.0.0.1', resolve))
          const address = kubelet.address()
          const port = typeof address === 'object' ? address?.port : 0
          const status = {
            addresses: [{ type: 'InternalIP', address: '127.0.0.1' }],
            daemonEndpoints: { kubeletEndpoint: { Port: port } },
          }
          const patch = ['patch', 'node', 'sigma', '--subresource=status', '-p']
          await ok(as('admin', [...patch, JSON.stringify({ status })]))
        })
        after(() => kubelet?.close())

        it('sees the API server as user kubernetes', async () => {
          assert.equal(await ok(as('admin', ['logs', 'on-sigma'])), 'what the container said\n')
          assert.deepEqual(callers, ['kubernetes GET /containerLogs/default/on-sigma/main'])
        })

        it('is refused with a certificate for another address', async () => {
          kubelet.setSecureContext(await identity('kube-scheduler'))
          kubelet.closeAllConnections()
          await refused(as('admin', ['logs', 'on-sigma']), /x509: .*(IP SANs|not valid for)/)
          assert.equal(callers.length, 1)
        })
      })
    })

    describe('the API server itself, at kubelets', () => {
      const may = [
        'get nodes/proxy /sigma',
        'create nodes/proxy /sigma',
        'get nodes/stats /sigma',
        'get nodes/log /sigma',
        'get nodes/metrics /sigma',
      ]
      const mayNot = [
        'create nodes/log /sigma',
        'create nodes/checkpoint /sigma',
        'update nodes/proxy /sigma',
        'delete nodes/proxy /sigma',
        'get nodes /sigma',
        'update nodes /sigma',
        'list pods',
        'create pods default/',
        'create pods/exec default/any',
        'get pods/log default/any',
        'list secrets',
        'get secrets default/any',
        'create serviceaccounts/token default/default',
        'create clusterrolebindings.rbac.authorization.k8s.io',
        'impersonate users',
      ]
      const allowed = async () => {
        const questions = [...may, ...mayNot]
        const answers = await ask(as, 'admin', questions, (resourceAttributes) => {
          return {
            apiVersion: 'authorization.k8s.io/v1',
            kind: 'SubjectAccessReview',
            spec: {
              user: 'kubernetes',
              groups: ['Kubernetes', 'system:authenticated'],
              resourceAttributes,
            },
          }
        })
        return questions.filter((_, index) => answers[index])
      }

      it('may do nothing without its role', async () => {
        assert.deepEqual(await allowed(), [])
      })

      it('may reach them with it, and nothing else', async () => {
        const manifest = await ok(run(checkout, 'bin/install-cilium.mts', ['--print']))
        await ok(controlPlane.kubectl('admin', ['apply', '-f=-'], manifest))
        assert.ok(await becomes(async () => (await allowed()).length > 0, 60))
        assert.deepEqual(await allowed(), may)
      })
    })

    describe('on behalf of another user, as for an aggregated API', () => {
      const statusOf = async (certificate: string): Promise<number | undefined> => {
        const read = (name: string) => readFile(checkout.path('tls', name))
        const [ca, cert, key] = await Promise.all(
          ['ca.pem', `${certificate}.pem`, `${certificate}-key.pem`].map(read),
        )
        return new Promise((resolve, reject) => {
          const headers = { 'X-Remote-User': 'someone', 'X-Remote-Group': 'system:masters' }
          const port = cluster.settings.API_PORT
          const path = '/api/v1/secrets'
          get(
            { host: '127.0.0.1', port, path, ca, cert, key, headers, agent: false },
            (response) => {
              text(response).then(() => resolve(response.statusCode), reject)
            },
          ).on('error', reject)
        })
      }

      it('front-proxy-client is accepted', async () => {
        assert.equal(await statusOf('front-proxy-client'), 200)
      })

      it('no other certificate is', async () => {
        for (const certificate of ['sigma', 'kube-proxy', 'kubernetes']) {
          assert.equal(await statusOf(certificate), 403, certificate)
        }
      })
    })
  })

function nodeNamed(name: string): object {
  return { apiVersion: 'v1', kind: 'Node', metadata: { name } }
}

/** A pod that reads the Secret of its node. No kubelet is there to run it. */
function podOn(node: string, name = `on-${node}`): object {
  const volume = { name: 'secret', secret: { secretName: `of-${node}` } }
  return {
    apiVersion: 'v1',
    kind: 'Pod',
    metadata: { name },
    spec: { nodeName: node, containers: [{ name: 'main', image: 'none' }], volumes: [volume] },
  }
}

/** Asks all questions in one go; the answers are in their order. */
async function ask(
  as: (identity: string, args: readonly string[], object?: unknown) => Promise<Outcome>,
  identity: string,
  questions: readonly string[],
  review: (attributes: object) => object,
): Promise<boolean[]> {
  const items = questions.map((question) => review(attributesOf(question)))
  const { stdout, stderr } = await as(
    identity,
    ['create', '-f=-', '-o=jsonpath={.status.allowed}{"\\n"}'],
    { apiVersion: 'v1', kind: 'List', items },
  )
  const answers = stdout.trim().split('\n')
  assert.equal(answers.length, questions.length, stderr)
  return answers.map((answer) => answer === 'true')
}

function attributesOf(question: string): object {
  const [verb = '', what = '', where = ''] = question.split(' ')
  const [, resource, group, subresource] = what.match(/^([^./]+)(?:\.([^/]+))?(?:\/(.+))?$/) ?? []
  const [namespace, name] = where.split('/')
  return { verb, resource, group, subresource, namespace, name }
}
