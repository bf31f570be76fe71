// The corporate proxy: as the machines use it, and as curl and helm on this computer use it.
import { readFile } from 'node:fs/promises'
import { resolve } from 'node:path'
import { rootCertificates } from 'node:tls'
import type { Cluster } from './cluster.mts'
import { privateFolder, writeFileAtomic } from './files.mts'

/** The machines' proxy, and what of the cluster never goes through it. */
export function machineProxy({ root, settings }: Cluster) {
  const { PROXY_HTTP, PROXY_HTTPS, PROXY_NO, PROXY_CA_FILE } = settings
  return {
    /** URLs for http:// and https://; empty without a proxy. */
    http: PROXY_HTTP,
    https: PROXY_HTTPS || PROXY_HTTP,
    /** Names, domains (".svc") and CIDRs that are reached directly. */
    no: [
      ...['localhost', '127.0.0.1'],
      // Ranges, not single machines: another worker must not change the others' configuration.
      ...[settings.LAN_CIDR, settings.K8S_SERVICE_CIDR, settings.K8S_POD_CIDR],
      ...['.svc', `.${settings.K8S_CLUSTER_DOMAIN}`],
      ...PROXY_NO.split(/[\s,]+/).filter(Boolean),
    ],
    /** PEM file on this computer with the CA of a proxy that intercepts TLS, absolute. */
    ...(PROXY_CA_FILE ? { caFile: resolve(root, PROXY_CA_FILE) } : {}),
  }
}

/**
 * Variables by which curl and helm on this computer find the proxy: the caller's own first, as
 * every program here takes them, else that of cluster.env. Passwords stay out of argv this way.
 */
export async function hostEnvironment(cluster: Cluster): Promise<Record<string, string>> {
  const { PROXY_NO } = cluster.settings
  const { caFile, http, https } = machineProxy(cluster)
  const callers = (name: string) => process.env[name] || process.env[name.toUpperCase()] || ''
  // A proxy on this computer has another address when seen from the machines.
  const local = (proxy: string) => proxy.replace(/(?<![\d.])10\.0\.2\.2(?![\d.])/, '127.0.0.1')
  const proxy = {
    http_proxy: callers('http_proxy') || local(http),
    https_proxy: callers('https_proxy') || local(https),
    no_proxy: [callers('no_proxy'), PROXY_NO].filter(Boolean).join(','),
  }
  const variables = Object.fromEntries(
    Object.entries(proxy).flatMap(([name, value]) =>
      value === '' ? [] : [name, name.toUpperCase()].map((each) => [each, value] as const),
    ),
  )
  if (!caFile) return variables
  // These variables replace the system's authorities, so the file holds both.
  const trusted = cluster.path('run', 'trusted-authorities.pem')
  await privateFolder(cluster.path('run'))
  await writeFileAtomic(trusted, [...rootCertificates, await readFile(caFile, 'utf8')].join('\n'))
  return { ...variables, CURL_CA_BUNDLE: trusted, SSL_CERT_FILE: trusted }
}
