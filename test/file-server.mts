// Servers on loopback for the tests of downloads: one with files that can misbehave, and a proxy.
import { createHash } from 'node:crypto'
import {
  createServer,
  request as httpRequest,
  type IncomingMessage,
  type Server,
  type ServerResponse,
} from 'node:http'
import { createServer as createTlsServer } from 'node:https'
import { type AddressInfo, connect, type Socket } from 'node:net'
import type { Duplex } from 'node:stream'

export interface ServedFile {
  data: Buffer
  /** An ETag of this text, or none; by default one of the content. */
  etag?: string | false
  /** Last-Modified; by default none. */
  modified?: string
  /** Answers Range requests with the whole file. */
  noRanges?: boolean
  /** Bytes of the body after which the connection is cut: one value for each GET, in turn. */
  cuts?: number[]
  /** Statuses to answer with instead: one for each request, in turn, 0 for none. */
  statuses?: number[]
  /** Milliseconds to wait before each 64 KiB. */
  pause?: number
  /** The length that HEAD is answered with; by default that of the data. */
  announced?: number
  /** "user:password" without which it answers 401. */
  login?: string
}

export interface FileServer {
  url: string
  files: Map<string, ServedFile>
  /** Where a path leads instead. */
  redirects: Map<string, string>
  /** What was asked for: "GET /a.iso bytes=100-". */
  requests: string[]
  close(): Promise<void>
}

/** Serves files by path ("/a.iso") over HTTP, or HTTPS where key and certificate are given. */
export async function startFileServer(tls?: { key: string; cert: string }): Promise<FileServer> {
  const files = new Map<string, ServedFile>()
  const redirects = new Map<string, string>()
  const requests: string[] = []
  const answer = (request: IncomingMessage, response: ServerResponse) => {
    const path = request.url ?? ''
    requests.push([request.method, path, request.headers.range].filter(Boolean).join(' '))
    const location = redirects.get(path)
    if (location) return response.writeHead(302, { location }).end()
    const file = files.get(path)
    if (!file) return response.writeHead(404).end('no such file\n')
    if (file.login && loginIn(request.headers.authorization) !== file.login) {
      return response.writeHead(401).end()
    }
    const status = file.statuses?.shift()
    if (status) return response.writeHead(status).end()
    return serve(file, request, response)
  }
  const server = tls ? createTlsServer(tls, answer) : createServer(answer)
  const port = await listen(server)
  return {
    url: `${tls ? 'https' : 'http'}://127.0.0.1:${port}`,
    files,
    redirects,
    requests,
    close: () => close(server),
  }
}

async function serve(file: ServedFile, request: IncomingMessage, response: ServerResponse) {
  const { data } = file
  const etag = file.etag ?? `"${createHash('sha256').update(data).digest('hex').slice(0, 16)}"`
  if (etag) response.setHeader('etag', etag)
  if (file.modified) response.setHeader('last-modified', file.modified)
  const validator = request.headers['if-range']
  const same = validator === undefined || validator === etag || validator === file.modified
  const range = !file.noRanges && same && request.headers.range?.match(/^bytes=(\d+)-$/)
  const start = range ? Number(range[1]) : 0
  if (range && start >= data.length) {
    return response.writeHead(416, { 'content-range': `bytes */${data.length}` }).end()
  }
  const body = data.subarray(start)
  const head = request.method === 'HEAD'
  response.writeHead(range ? 206 : 200, {
    'content-length': head ? (file.announced ?? body.length) : body.length,
    ...(range ? { 'content-range': `bytes ${start}-${data.length - 1}/${data.length}` } : {}),
  })
  if (head) return response.end()
  const cut = file.cuts?.shift()
  const end = cut ?? body.length
  response.flushHeaders()
  for (let at = 0; at < end && !response.destroyed; at += 65536) {
    if (file.pause) await new Promise((resolve) => setTimeout(resolve, file.pause))
    const piece = body.subarray(at, Math.min(at + 65536, end))
    await new Promise((resolve) => response.write(piece, resolve))
  }
  // destroy() would throw away what is still on its way.
  if (cut !== undefined) return response.socket?.destroySoon()
  return response.end()
}

export interface ForwardProxy {
  url: string
  /** "GET http://host/path" and "CONNECT host:port", with the credentials that came with it. */
  requests: string[]
  close(): Promise<void>
}

/**
 * A forward proxy that sends every request to `target`'s port on loopback, whatever host it names.
 *
 * @param login "user:password" without which it answers 407
 */
export async function startProxy(target: string, login?: string): Promise<ForwardProxy> {
  const { port: targetPort } = new URL(target)
  const requests: string[] = []
  const accepts = ({ method, url, headers }: IncomingMessage) => {
    const given = loginIn(headers['proxy-authorization'])
    requests.push(`${method} ${url}${given ? ` by ${given}` : ''}`)
    return login === undefined || given === login
  }
  const server = createServer((request, response) => {
    if (!accepts(request)) return response.writeHead(407).end()
    const { pathname: path } = new URL(request.url ?? '')
    const { method, headers } = request
    const to = { host: '127.0.0.1', port: targetPort, method, path, headers, agent: false }
    const onward = httpRequest(to, (answer) => {
      response.writeHead(answer.statusCode ?? 502, answer.headers)
      answer.pipe(response)
    })
    onward.on('error', () => response.destroy())
    response.on('close', () => onward.destroy())
    return onward.end()
  })
  server.on('connect', (request: IncomingMessage, socket: Duplex) => {
    if (!accepts(request)) {
      return socket.end('HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n')
    }
    const onward = connect(Number(targetPort), '127.0.0.1', () => {
      socket.write('HTTP/1.1 200 Connection established\r\n\r\n')
      onward.pipe(socket).pipe(onward)
    })
    onward.on('error', () => socket.destroy())
    socket.on('error', () => {})
    return socket.on('close', () => onward.destroy())
  })
  // A server that has handed a connection over as a tunnel does not close it.
  const sockets = new Set<Socket>()
  server.on('connection', (socket) => sockets.add(socket))
  const port = await listen(server)
  return {
    url: `http://127.0.0.1:${port}`,
    requests,
    close: async () => {
      for (const socket of sockets) socket.destroy()
      await close(server)
    },
  }
}

/** User and password of basic authentication (RFC 7617), as "user:password". */
function loginIn(header = ''): string {
  return Buffer.from(header.replace('Basic ', ''), 'base64').toString()
}

async function listen(server: Server): Promise<number> {
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  return (server.address() as AddressInfo).port
}

async function close(server: Server): Promise<void> {
  server.closeAllConnections()
  await new Promise((resolve) => server.close(resolve))
}
