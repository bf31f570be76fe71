// One GET to the API server, through its port on this computer, with the admin's certificate.
import { readFile } from 'node:fs/promises'
import { request } from 'node:https'
import { text } from 'node:stream/consumers'
import type { Cluster } from '../cluster.mts'
import { StepError } from '../errors.mts'

export interface ApiAnswer {
  /** HTTP status. */
  status: number
  body: string
}

/** What it means when the API server says "unable to transform key": it cannot decrypt. */
export const wrongEncryptionKey =
  'Secrets in etcd are encrypted with another key than that of encryption-config.yaml'

/**
 * Asks the API server, which has to prove that it has a certificate of our CA.
 *
 * @param path such as "/readyz?verbose" or "/api/v1/nodes"
 * @param options.timeout seconds
 * @throws StepError if there is no answer, or the certificate is not right
 */
export async function askApiServer(
  cluster: Cluster,
  path: string,
  options: { timeout?: number; signal?: AbortSignal | undefined } = {},
): Promise<ApiAnswer> {
  const [ca, cert, key] = await Promise.all(
    ['ca.pem', 'admin.pem', 'admin-key.pem'].map((name) => readCertificate(cluster, name)),
  )
  const limit = AbortSignal.timeout((options.timeout ?? 10) * 1000)
  const signal = options.signal ? AbortSignal.any([options.signal, limit]) : limit
  const { API_PORT } = cluster.settings
  try {
    return await new Promise((resolve, reject) => {
      const sent = request(
        // agent: false, as a kept connection would hold the script open.
        { host: '127.0.0.1', port: API_PORT, path, ca, cert, key, signal, agent: false },
        (response) => {
          const status = response.statusCode ?? 0
          text(response).then((body) => resolve({ status, body }), reject)
        },
      )
      sent.on('error', reject).end()
    })
  } catch (cause) {
    options.signal?.throwIfAborted()
    throw new StepError(`127.0.0.1:${API_PORT}: ${reasonOf(cause, limit)}`, { cause })
  }
}

async function readCertificate(cluster: Cluster, name: string): Promise<string> {
  return readFile(cluster.path('tls', name), 'utf8').catch((cause) => {
    throw new StepError(`tls/${name} is missing`, { hint: 'make certs', cause })
  })
}

/** Errors of sockets and TLS that are met while a machine boots, in words. */
const reasons: Readonly<Record<string, string>> = {
  ECONNREFUSED: 'nothing listens there',
  ECONNRESET: 'the connection is cut: nothing listens on the machine yet',
  EPIPE: 'the connection is cut: nothing listens on the machine yet',
  UNABLE_TO_VERIFY_LEAF_SIGNATURE: "the certificate that answers is not of this cluster's CA",
  SELF_SIGNED_CERT_IN_CHAIN: "the certificate that answers is not of this cluster's CA",
  DEPTH_ZERO_SELF_SIGNED_CERT: "the certificate that answers is not of this cluster's CA",
  CERT_SIGNATURE_FAILURE: "the certificate that answers is not of this cluster's CA",
  CERT_HAS_EXPIRED: "the API server's certificate has expired (or this computer's clock is wrong)",
  CERT_NOT_YET_VALID: "the API server's certificate is not valid yet: clocks differ",
  ERR_TLS_CERT_ALTNAME_INVALID: "the API server's certificate has no SAN 127.0.0.1",
}

function reasonOf(error: unknown, limit: AbortSignal): string {
  if (limit.aborted) return 'no answer in time'
  const { code = '', message } = error as NodeJS.ErrnoException
  return reasons[code] ?? (message || code)
}
