// GET and HEAD over HTTP(S): redirects followed, through a proxy where there is one. (fetch of
// Node 20 knows no proxies.)
import { readFileSync } from 'node:fs'
import { type ClientRequest, request as httpRequest, type IncomingMessage } from 'node:http'
import { request as httpsRequest } from 'node:https'
import { isIP, type Socket } from 'node:net'
import { text as readAll } from 'node:stream/consumers'
import { connect as connectTls, rootCertificates } from 'node:tls'
import { StepError } from '../errors.mts'
import { type HostProxy, proxyFor } from './host-proxy.mts'

export interface RequestOptions {
  proxy: HostProxy
  method?: 'GET' | 'HEAD'
  headers?: Record<string, string>
  signal?: AbortSignal
  /** Milliseconds without a single byte after which the request has failed; 60 s unless said. */
  patience?: number
}

export interface Answer {
  /** Status, headers and body; the caller reads the body or destroys it. */
  response: IncomingMessage
  /** Where the redirects led. */
  url: URL
}

/** A failure that may be gone at the next attempt: a cut connection, a busy server. */
export class PassingError extends StepError {}

const redirects = new Set([301, 302, 303, 307, 308])

/**
 * Sends a request and follows up to ten redirects, never from https: to http:.
 *
 * @returns the first answer that is no redirect, whatever its status
 * @throws StepError if the server or the proxy cannot be reached, or does not answer
 */
export async function request(address: string | URL, options: RequestOptions): Promise<Answer> {
  let url = new URL(address)
  for (let hop = 0; hop <= 10; hop += 1) {
    const response = await requestOnce(url, options)
    const location = response.headers.location
    if (!redirects.has(response.statusCode ?? 0) || !location) return { response, url }
    response.destroy()
    const next = new URL(location, url)
    if (next.protocol !== 'https:' && (url.protocol === 'https:' || next.protocol !== 'http:')) {
      throw new StepError(`${shown(url)} redirects to ${next.protocol}//, which is not followed`)
    }
    url = next
  }
  throw new StepError(`${shown(address)} redirects more than ten times`)
}

/**
 * The body of a small text file; undefined if the server has no such file (404, 403, 410).
 *
 * @throws StepError for every other failure
 */
export async function requestText(
  address: string | URL,
  options: RequestOptions,
): Promise<string | undefined> {
  const { response, url } = await request(address, options)
  if (response.statusCode === 200) {
    return await readAll(response).catch((cause) => {
      throw unreachable(url, cause)
    })
  }
  response.destroy()
  // Object stores say 403 for what is not there, when listing is not allowed.
  if ([403, 404, 410].includes(response.statusCode ?? 0)) return undefined
  throw statusError(url, response)
}

/** The error for an answer that is of no use; a PassingError where the server may recover. */
export function statusError(url: URL, { statusCode, statusMessage }: IncomingMessage): StepError {
  const passing = statusCode && (statusCode >= 500 || [408, 425, 429].includes(statusCode))
  const reason = `${shown(url)}: the server answers ${statusCode} ${statusMessage ?? ''}`.trim()
  return passing ? new PassingError(reason) : new StepError(reason)
}

/** An address without the password that may stand in it. */
export function shown(address: string | URL): string {
  const url = new URL(address)
  url.username = ''
  url.password = ''
  return url.href
}

async function requestOnce(url: URL, options: RequestOptions): Promise<IncomingMessage> {
  const proxy = proxyFor(url, options.proxy)
  let socket: Socket | undefined
  try {
    if (proxy && url.protocol === 'https:') socket = await tunnel(url, proxy, options)
    return await answerOf(send(url, proxy, socket, options), options)
  } catch (error) {
    socket?.destroy()
    options.signal?.throwIfAborted()
    throw error instanceof StepError ? error : unreachable(url, error, proxy)
  }
}

function send(
  url: URL,
  proxy: URL | undefined,
  socket: Socket | undefined,
  options: RequestOptions,
): ClientRequest {
  const headers = {
    host: url.host,
    'user-agent': 'kubernetes-the-hardest-way',
    ...credentials('authorization', url),
    ...options.headers,
  }
  const { method = 'GET' } = options
  // A proxy takes plain HTTP as a request for the whole address.
  if (proxy && !socket) {
    const whole = { ...headers, ...credentials('proxy-authorization', proxy) }
    return open(proxy, { method, path: shown(url), headers: whole }, options)
  }
  return open(url, { method, path: url.pathname + url.search, headers }, options, socket)
}

/** A connection through the proxy to the server itself: the method CONNECT of RFC 9110, 9.3.6. */
async function tunnel(url: URL, proxy: URL, options: RequestOptions): Promise<Socket> {
  const path = `${url.hostname}:${url.port || 443}`
  const headers = { host: path, ...credentials('proxy-authorization', proxy) }
  const connecting = open(proxy, { method: 'CONNECT', path, headers }, options)
  return new Promise((resolve, reject) => {
    connecting.on('connect', ({ statusCode, statusMessage }, socket: Socket) => {
      if (statusCode === 200) return resolve(socket)
      socket.destroy()
      const reason = `the proxy ${proxy.host} refuses ${path}: ${statusCode} ${statusMessage ?? ''}`
      reject(new StepError(reason.trim(), { hint: proxyHint }))
    })
    giveUp(connecting, options, reject)
    connecting.end()
  })
}

/** Opens a request to a server or proxy, over a connection that is already there or a new one. */
function open(
  to: URL,
  what: { method: string; path: string; headers: Record<string, string> },
  options: RequestOptions,
  socket?: Socket,
): ClientRequest {
  const host = to.hostname.replace(/^\[|\]$/g, '')
  const common = { ...what, host, port: to.port, signal: options.signal }
  if (to.protocol === 'http:') return httpRequest({ ...common, agent: false })
  const tls = { host, servername: isIP(host) ? '' : host, ...trust(options) }
  if (!socket) return httpsRequest({ ...common, ...tls, agent: false })
  return httpsRequest({ ...common, createConnection: () => connectTls({ ...tls, socket }) })
}

function answerOf(sent: ClientRequest, options: RequestOptions): Promise<IncomingMessage> {
  return new Promise((resolve, reject) => {
    sent.on('response', resolve)
    giveUp(sent, options, reject)
    sent.end()
  })
}

function giveUp(
  sent: ClientRequest,
  { patience = 60_000 }: RequestOptions,
  reject: (error: Error) => void,
): void {
  sent.on('error', reject)
  sent.setTimeout(patience, () => {
    sent.destroy(new Error(`no answer for ${Math.round(patience / 1000)} s`))
  })
}

/** The user and password of an address, as the header that carries them. */
function credentials(header: string, { username, password }: URL): Record<string, string> {
  if (!username) return {}
  const plain = `${decodeURIComponent(username)}:${decodeURIComponent(password)}`
  return { [header]: `Basic ${Buffer.from(plain).toString('base64')}` }
}

/** The usual authorities and those of PROXY_CA_FILE. */
function trust({ proxy }: RequestOptions): { ca?: string[] } {
  return proxy.caFile ? { ca: [...rootCertificates, readFileSync(proxy.caFile, 'utf8')] } : {}
}

const proxyHint = 'see PROXY_HTTP, PROXY_HTTPS and PROXY_NO in cluster.env'

function unreachable(url: URL, cause: unknown, proxy?: URL): StepError {
  const { code = '', message } = cause as NodeJS.ErrnoException
  const by = proxy ? ` through the proxy ${proxy.host}` : ''
  const reason = `${url.host} cannot be reached${by}: ${message || code}`
  if (/CERT|SIGNATURE|ISSUER/.test(code)) {
    const hint = 'where a proxy intercepts TLS, PROXY_CA_FILE of cluster.env names its certificate'
    return new StepError(reason, { hint, cause })
  }
  const explanation = { hint: proxyHint, cause }
  return code === 'ENOTFOUND'
    ? new StepError(reason, explanation)
    : new PassingError(reason, explanation)
}
