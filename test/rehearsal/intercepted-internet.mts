// The internet as it is behind a proxy that intercepts TLS: a few pages, which it serves itself in
// the name of their hosts, with a certificate of the company's own CA.
import { execFileSync } from 'node:child_process'
import { readFile } from 'node:fs/promises'
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http'
import { createServer as createTlsServer } from 'node:https'
import type { AddressInfo, Socket } from 'node:net'
import { join } from 'node:path'
import { $ } from 'zx'
import { hash } from './layer-cache.mts'

export interface Page {
  type?: string
  body: string | Buffer
}

export interface InterceptedInternet {
  /** Of the proxy, on 127.0.0.1; it knows CONNECT and nothing else. */
  port: number
  /** PEM file of the company's CA. */
  caFile: string
  /** Who asked for what: "containerd/1.7.24 GET https://registry.k8s.io/v2/". */
  visits: string[]
  close(): void
}

/**
 * @param folder for keys and certificates
 * @param pages by URL; all of https://
 */
export async function startInterceptedInternet(
  folder: string,
  pages: ReadonlyMap<string, Page>,
): Promise<InterceptedInternet> {
  const hosts = [...new Set([...pages.keys()].map((url) => new URL(url).host))]
  const { caFile, key, cert } = await companyCertificates(folder, hosts)
  const visits: string[] = []
  const answer = (request: IncomingMessage, response: ServerResponse) => {
    const { method, headers } = request
    const url = `https://${headers.host}${request.url}`
    visits.push(`${headers['user-agent']} ${method} ${url}`)
    const page = pages.get(url)
    if (!page) return response.writeHead(404).end()
    const body = Buffer.from(page.body)
    response.writeHead(200, {
      'content-type': page.type ?? 'text/plain',
      'content-length': body.length,
      'docker-content-digest': `sha256:${hash(body)}`,
    })
    return response.end(method === 'HEAD' ? undefined : body)
  }
  const tls = createTlsServer({ key, cert }, answer)
  const sockets = new Set<Socket>()
  const proxy = createServer((_, response) => response.writeHead(501).end())
  proxy.on('connection', (socket) => sockets.add(socket))
  proxy.on('connect', ({ url = '' }: IncomingMessage, socket: Socket) => {
    // Whoever goes away in the middle is no error of ours.
    socket.on('error', () => {})
    const known = hosts.some((host) => url === `${host}:443`)
    if (!known) return socket.end('HTTP/1.1 502 no such host\r\n\r\n')
    socket.write('HTTP/1.1 200 connected\r\n\r\n')
    return tls.emit('connection', socket)
  })
  await new Promise<void>((resolve) => proxy.listen(0, '127.0.0.1', resolve))
  return {
    port: (proxy.address() as AddressInfo).port,
    caFile,
    visits,
    close: () => {
      proxy.close()
      for (const socket of sockets) socket.destroy()
    },
  }
}

/**
 * What a registry has of an image: https://distribution.github.io/distribution/spec/api/
 *
 * @param archive of docker, with one layer
 * @param name such as "registry.k8s.io/pause:3.10.2"
 * @returns pages by URL
 */
export function registryPages(archive: string, name: string): Map<string, Page> {
  const [, host, repository, tag] = name.match(/^([^/]+)\/(.+):([^:]+)$/) ?? []
  const part = (file: string) => {
    const body = execFileSync('tar', ['-xOf', archive, file], { maxBuffer: Infinity })
    return { body, digest: `sha256:${hash(body)}`, size: body.length }
  }
  const [config, layer] = [part('config.json'), part('layer.tar')]
  const describe = (mediaType: string, { digest, size }: typeof config) => {
    return { mediaType, digest, size }
  }
  const docker = 'application/vnd.docker'
  const manifest = {
    schemaVersion: 2,
    mediaType: `${docker}.distribution.manifest.v2+json`,
    config: describe(`${docker}.container.image.v1+json`, config),
    layers: [describe(`${docker}.image.rootfs.diff.tar`, layer)],
  }
  const body = JSON.stringify(manifest)
  const page = { type: manifest.mediaType, body }
  const api = `https://${host}/v2`
  return new Map([
    [`${api}/`, { body: '{}' }],
    [`${api}/${repository}/manifests/${tag}`, page],
    [`${api}/${repository}/manifests/sha256:${hash(body)}`, page],
    ...[config, layer].map(({ body, digest }): [string, Page] => [
      `${api}/${repository}/blobs/${digest}`,
      { type: 'application/octet-stream', body },
    ]),
  ])
}

/** A CA, and a certificate of it for all of the hosts. */
async function companyCertificates(folder: string, hosts: readonly string[]) {
  const file = (name: string) => join(folder, name)
  const make = $({ quiet: true })
  const fresh = ['-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-noenc']
  const caFile = file('company-ca.pem')
  await make`openssl req ${fresh} -days 7 -subj ${'/O=Company/CN=Company TLS inspection'} -keyout ${file('company-ca-key.pem')} -out ${caFile}`
  const names = hosts.map((host) => `DNS:${host}`).join(',')
  const issuer = ['-CA', caFile, '-CAkey', file('company-ca-key.pem')]
  const server = ['-addext', 'basicConstraints=critical,CA:FALSE']
  await make`openssl req ${fresh} -days 7 ${issuer} -subj /CN=intercepted ${server} -addext ${`subjectAltName=${names}`} -keyout ${file('server-key.pem')} -out ${file('server.pem')}`
  const [key, cert] = await Promise.all(
    ['server-key.pem', 'server.pem'].map((name) => readFile(file(name))),
  )
  return { caFile, key, cert }
}
