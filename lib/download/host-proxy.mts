// Which proxy a request of this computer goes through: its own environment first, as every other
// program here does it, then the machines' proxy of cluster.env.
import { isIP } from 'node:net'
import { resolve } from 'node:path'
import { contains, outsideGateway, parseAddress, parseCidr } from '../cidr.mts'
import type { Cluster } from '../cluster.mts'
import { StepError } from '../errors.mts'

export interface HostProxy {
  /** Proxies for http:// and https:// addresses; empty: none. */
  http: string
  https: string
  /** Hosts that are reached without, as in NO_PROXY: names, suffixes, addresses, ranges, "*". */
  no: string
  /** PEM file of further certificate authorities to trust; empty: none. */
  caFile: string
}

type Environment = Readonly<Record<string, string | undefined>>

/** This computer's proxy: of http_proxy, https_proxy and no_proxy, or else of cluster.env. */
export function hostProxy(
  { settings, root }: Pick<Cluster, 'settings' | 'root'>,
  env: Environment = process.env,
): HostProxy {
  const { PROXY_HTTP, PROXY_HTTPS, PROXY_NO, PROXY_CA_FILE } = settings
  return {
    http: variable(env, 'http_proxy') || seenFromHere(PROXY_HTTP),
    https: variable(env, 'https_proxy') || seenFromHere(PROXY_HTTPS),
    no: [variable(env, 'no_proxy'), PROXY_NO].filter(Boolean).join(','),
    caFile: PROXY_CA_FILE && resolve(root, PROXY_CA_FILE),
  }
}

/**
 * The proxy that a request for `url` has to go through; undefined: none.
 *
 * @throws StepError for a proxy that is no http:// or https:// address
 */
export function proxyFor(url: URL, proxy: HostProxy): URL | undefined {
  const text = url.protocol === 'https:' ? proxy.https : proxy.http
  if (!text || bypasses(url, proxy.no)) return undefined
  const address = text.includes('://') ? text : `http://${text}`
  const found = URL.canParse(address) ? new URL(address) : undefined
  if (!found || !/^https?:$/.test(found.protocol)) {
    // Without the text itself: it may hold a password.
    throw new StepError(`the proxy for ${url.protocol}// is no http:// or https:// address`, {
      hint: 'PROXY_HTTP and PROXY_HTTPS of cluster.env set it, or http_proxy and https_proxy in the environment',
    })
  }
  return found
}

function variable(env: Environment, name: string): string {
  return env[name] || env[name.toUpperCase()] || ''
}

/** A proxy on this computer has another address when seen from the machines. */
function seenFromHere(proxy: string): string {
  return proxy.replace(outsideGateway, '127.0.0.1')
}

/** Whether NO_PROXY names the host. A leading dot or "*." makes no difference, as with curl. */
function bypasses(url: URL, list: string): boolean {
  const host = url.hostname.toLowerCase().replace(/^\[|\]$/g, '')
  const port = url.port || (url.protocol === 'https:' ? '443' : '80')
  return list.split(/[\s,]+/).some((entry) => {
    if (entry === '*') return true
    const range = parseCidr(entry)
    const address = parseAddress(host)
    if (range && address !== undefined) return contains(range, address)
    // A bare IPv6 address has colons too.
    const [, name = entry, onlyPort] = entry.match(/^([^:]*|\[.*\]):(\d+)$/) ?? []
    if (onlyPort && onlyPort !== port) return false
    const suffix = name.toLowerCase().replace(/^\*?\.|^\[|\]$/g, '')
    if (!suffix) return false
    return host === suffix || (!isIP(host) && host.endsWith(`.${suffix}`))
  })
}
