// The corporate proxy as the machines use it: their installation, their system, containerd and
// Cilium. (For this computer there is host-proxy.mts.)
import { resolve } from 'node:path'
import type { Cluster } from '../cluster.mts'

export interface MachineProxy {
  /** URLs for http:// and https://; empty without a proxy. */
  http: string
  https: string
  /** Names, domains (".svc") and CIDRs that are reached without it. */
  no: string[]
  /** PEM file on this computer with the CA of a proxy that intercepts TLS, absolute. */
  caFile?: string
}

/** The proxy, and what of the cluster's own never goes through it. */
export function machineProxy(cluster: Cluster): MachineProxy {
  const { settings } = cluster
  return {
    http: settings.PROXY_HTTP,
    https: settings.PROXY_HTTPS || settings.PROXY_HTTP,
    no: [
      'localhost',
      '127.0.0.1',
      settings.LAN_CIDR,
      settings.K8S_SERVICE_CIDR,
      settings.K8S_POD_CIDR,
      '.svc',
      `.${settings.K8S_CLUSTER_DOMAIN}`,
      ...cluster.nodes.map((node) => node.name),
      ...settings.PROXY_NO.split(/[\s,]+/).filter(Boolean),
    ],
    ...(settings.PROXY_CA_FILE ? { caFile: resolve(cluster.root, settings.PROXY_CA_FILE) } : {}),
  }
}
