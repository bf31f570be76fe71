// An HTTPS server in the API server's place, with the certificate it has, for what a test wants
// it to answer. Who asks has to have a certificate of the cluster's CA.
import { once } from 'node:events'
import { readFile } from 'node:fs/promises'
import { createServer } from 'node:https'
import type { TLSSocket } from 'node:tls'
import { loadCluster } from '../lib/cluster.mts'
import type { Checkout } from './checkout.mts'

export interface FakeApiServer {
  /**
   * What it answers, by path without query; 404 for all else. May be changed at any time. What is
   * held back never comes.
   */
  answers: Record<string, { status?: number; body: string; held?: boolean }>
  /** Paths that were asked for and held back. */
  held: string[]
  /** The subjects' CN of those who asked. */
  askedBy: string[]
  stop(): Promise<void>
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
      const answer = fake.answers[path]
      if (answer?.held) {
        fake.held.push(path)
        return
      }
      response.statusCode = answer ? (answer.status ?? 200) : 404
      response.end(answer?.body)
    },
  )
  server.listen(cluster.settings.API_PORT, '127.0.0.1')
  await once(server, 'listening')
  return fake
}

/** A NodeList as the API server has it. */
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
