// An HTTPS server in place of the API server, with its certificate: it answers what a test says,
// and what kubectl asks to find out which resources there are. Clients need a certificate of the
// cluster's CA.
import { once } from 'node:events'
import { readFile } from 'node:fs/promises'
import { createServer } from 'node:https'
import type { TLSSocket } from 'node:tls'
import { loadCluster } from '../lib/cluster.mts'
import type { Checkout } from './checkout.mts'

interface Answer {
  /** HTTP status; 200 by default. */
  status?: number
  body: string
  /** The request gets no answer, and counts as held. */
  held?: boolean
}

export interface FakeApiServer {
  /**
   * What it answers, by "METHOD path" or by path, without query; 404 for all else. An object of a
   * list needs no answer of its own. May be changed at any time.
   */
  answers: Record<string, Answer>
  /** Paths of the requests that are held. */
  held: string[]
  /** The subjects' CN of the clients, one for each request. */
  askedBy: string[]
  /** Each request: "GET /api/v1/nodes". */
  requests: string[]
  stop(): Promise<void>
}

const metrics = 'metrics.k8s.io/v1beta1'

/** The resources that kubectl finds, by group and version. */
const resources: Record<string, [name: string, kind: string, namespaced: boolean][]> = {
  v1: [
    ['configmaps', 'ConfigMap', true],
    ['events', 'Event', true],
    ['namespaces', 'Namespace', false],
    ['nodes', 'Node', false],
    ['pods', 'Pod', true],
    ['secrets', 'Secret', true],
    ['services', 'Service', true],
  ],
  'apps/v1': [
    ['daemonsets', 'DaemonSet', true],
    ['deployments', 'Deployment', true],
  ],
  'coordination.k8s.io/v1': [['leases', 'Lease', true]],
  [metrics]: [
    ['nodes', 'NodeMetrics', false],
    ['pods', 'PodMetrics', true],
  ],
}

/** Starts it at API_PORT of a checkout that has its certificates. */
export async function startFakeApiServer(checkout: Checkout): Promise<FakeApiServer> {
  const cluster = loadCluster({ root: checkout.root, env: {} })
  const [ca, cert, key] = await Promise.all(
    ['ca', 'kubernetes', 'kubernetes-key'].map((name) =>
      readFile(checkout.path('tls', `${name}.pem`)),
    ),
  )
  const fake: FakeApiServer = {
    answers: {},
    held: [],
    askedBy: [],
    requests: [],
    stop: async () => {
      server.closeAllConnections()
      server.close()
      await once(server, 'close')
    },
  }
  const server = createServer(
    { ca, cert, key, requestCert: true, rejectUnauthorized: true, minVersion: 'TLSv1.3' },
    (request, response) => {
      fake.askedBy.push(String((request.socket as TLSSocket).getPeerCertificate().subject.CN))
      const path = request.url?.split('?')[0] ?? ''
      const named = `${request.method} ${path}`
      fake.requests.push(named)
      const { answers } = fake
      const { held, ...answer } =
        answers[named] ??
        answers[path] ??
        discovery(answers, path) ??
        objectOfList(answers, path) ??
        failure(404, 'NotFound', `no ${path}`)
      if (held) {
        fake.held.push(path)
        return
      }
      const { status = 200, body } = answer
      response.statusCode = status
      response.setHeader('content-type', body.startsWith('{') ? 'application/json' : 'text/plain')
      response.end(body)
    },
  )
  server.listen(cluster.settings.API_PORT, '127.0.0.1')
  await once(server, 'listening')
  return fake
}

/** The answer to a question about the API itself. */
function discovery(answers: FakeApiServer['answers'], path: string): Answer | undefined {
  if (path === '/api') return json({ kind: 'APIVersions', versions: ['v1'] })
  if (path === '/apis') {
    const groups = Object.keys(resources).filter((id) => id !== 'v1' && isServed(answers, id))
    return json({
      ...{ kind: 'APIGroupList', apiVersion: 'v1' },
      groups: groups.map((groupVersion) => {
        const [name, version] = groupVersion.split('/')
        const preferredVersion = { groupVersion, version }
        return { name, versions: [preferredVersion], preferredVersion }
      }),
    })
  }
  const groupVersion = path.replace(/^\/apis?\//, '')
  const found = resources[groupVersion]
  if (!found || !isServed(answers, groupVersion)) return undefined
  const verbs = ['create', 'delete', 'get', 'list', 'patch', 'update', 'watch']
  return json({
    ...{ kind: 'APIResourceList', apiVersion: 'v1', groupVersion },
    resources: found.map(([name, kind, namespaced]) => {
      return { name, singularName: '', namespaced, kind, verbs }
    }),
  })
}

/** A cluster has the metrics API only with metrics-server: when a test answers for it. */
function isServed(answers: FakeApiServer['answers'], groupVersion: string): boolean {
  const path = `/apis/${groupVersion}/`
  return groupVersion !== metrics || Object.keys(answers).some((key) => key.includes(path))
}

/** One object of a list that the test answers with. */
function objectOfList(answers: FakeApiServer['answers'], path: string): Answer | undefined {
  const [, parent = '', name] = path.match(/^(.*)\/([^/]+)$/) ?? []
  const list = answers[parent] ?? answers[parent.replace(/\/namespaces\/[^/]+/, '')]
  if (!list?.body.startsWith('{')) return undefined
  const { items = [], kind = '', apiVersion } = JSON.parse(list.body) as List
  const item = items.find(({ metadata }) => metadata.name === name)
  return item && json({ kind: kind.replace(/List$/, ''), apiVersion, ...item })
}

interface List {
  kind?: string
  apiVersion?: string
  items?: { metadata: { name: string } }[]
}

function json(object: object): Answer {
  return { body: JSON.stringify(object) }
}

/** An error as the API server returns it: 500, 'InternalError', … */
export function failure(code: number, reason: string, message: string): Answer {
  const status = { kind: 'Status', apiVersion: 'v1', status: 'Failure', reason, code, message }
  return { status: code, body: JSON.stringify(status) }
}

/** A NodeList as the API server returns it. */
export function nodeList(nodes: Record<string, { ready: boolean }>): string {
  const items = Object.entries(nodes).map(([name, { ready }]) => ({
    metadata: { name },
    status: {
      conditions: [
        {
          type: 'Ready',
          status: ready ? 'True' : 'False',
          reason: ready ? 'KubeletReady' : 'KubeletNotReady',
          message: ready ? 'kubelet is posting ready status' : 'cni plugin not initialized',
        },
      ],
      addresses: [{ type: 'InternalIP', address: '192.168.100.11' }],
      nodeInfo: { kubeletVersion: 'v1.36.3', containerRuntimeVersion: 'containerd://2.1.9' },
    },
  }))
  return JSON.stringify({ kind: 'NodeList', apiVersion: 'v1', items })
}
