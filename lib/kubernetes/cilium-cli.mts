// The cilium command: that of the PATH, else the pinned release in tools/, fetched when it is not
// there yet. Cilium's maintainers install by it; it brings Helm and finds the chart.
import { existsSync } from 'node:fs'
import { mkdir, readFile, rename, rm } from 'node:fs/promises'
import { arch, platform } from 'node:os'
import { join } from 'node:path'
import { rootCertificates } from 'node:tls'
import { $, which } from 'zx/core'
import type { Cluster } from '../cluster.mts'
import { download } from '../download/download.mts'
import { type HostProxy, hostProxy } from '../download/host-proxy.mts'
import { requestText } from '../download/http.mts'
import { progressListener } from '../download/progress-bar.mts'
import { StepError } from '../errors.mts'
import { writeFileAtomic } from '../files.mts'

export interface FetchOptions {
  /** Where releases lie: SITE/vVERSION/cilium-OS-ARCH.tar.gz, each with a .sha256sum beside it. */
  site?: string
  /** Of this computer, as Node names them. */
  os?: NodeJS.Platform
  cpu?: string
  detail?: (text: string) => void
  signal?: AbortSignal
}

/** Go's names for what the releases are built for. */
const architectures: Readonly<Record<string, string>> = { x64: 'amd64', arm64: 'arm64' }
const systems: readonly string[] = ['linux', 'darwin']

/**
 * The path of the cilium command.
 *
 * @throws StepError if it has to be fetched and there is none for this computer, or none of this
 *   version, or it is not what its checksum says
 */
export async function ciliumCommand(cluster: Cluster, options: FetchOptions = {}): Promise<string> {
  const found = await which('cilium', { nothrow: true })
  return found ?? (await pinnedCilium(cluster, options))
}

/** The one in tools/. */
export async function pinnedCilium(cluster: Cluster, options: FetchOptions = {}): Promise<string> {
  const {
    site = 'https://github.com/cilium/cilium-cli/releases/download',
    os = platform(),
    cpu = arch(),
    detail = () => {},
    signal,
  } = options
  const version = cluster.settings.CILIUM_CLI_VERSION
  const program = cluster.path('tools', `cilium-${version}`)
  if (existsSync(program)) return program

  const architecture = architectures[cpu]
  if (!architecture || !systems.includes(os)) {
    throw new StepError(`the cilium command is not released for ${os} on ${cpu}`, {
      hint: 'build it (https://github.com/cilium/cilium-cli) and put it on the PATH',
    })
  }
  const url = `${site}/v${version}/cilium-${os}-${architecture}.tar.gz`
  const request = { proxy: hostProxy(cluster), ...(signal ? { signal } : {}) }
  const sum = await requestText(`${url}.sha256sum`, request)
  const sha256 = sum?.match(/^[0-9a-f]{64}\b/i)?.[0]
  if (!sha256) {
    throw new StepError(`there is no cilium command ${version} for ${os}-${architecture}`, {
      command: `curl -fL ${url}.sha256sum`,
      hint: 'CILIUM_CLI_VERSION in cluster.env; https://github.com/cilium/cilium-cli/releases lists them',
    })
  }
  const archive = `${program}.tar.gz`
  await download(url, archive, { ...request, sha256, onProgress: progressListener(detail) })
  const unpacked = `${program}.partial`
  try {
    await rm(unpacked, { recursive: true, force: true })
    await mkdir(unpacked)
    await $({ quiet: true })`tar -xzf ${archive} -C ${unpacked} cilium`
    await rename(join(unpacked, 'cilium'), program)
  } finally {
    await rm(unpacked, { recursive: true, force: true })
    await rm(archive, { force: true })
  }
  return program
}

/**
 * The environment in which the command finds the cluster and gets the chart: it runs on this
 * computer, so it uses this computer's proxy.
 *
 * @returns variables to set beside those that are there
 */
export async function ciliumEnvironment(cluster: Cluster): Promise<Record<string, string>> {
  const proxy = hostProxy(cluster)
  const variables: Record<string, string> = {
    KUBECONFIG: cluster.path('configs', 'admin.kubeconfig'),
    ...(proxy.http ? { HTTP_PROXY: proxy.http } : {}),
    ...(proxy.https ? { HTTPS_PROXY: proxy.https } : {}),
    ...(proxy.no ? { NO_PROXY: proxy.no } : {}),
  }
  if (proxy.caFile) variables.SSL_CERT_FILE = await trustFile(cluster, proxy)
  return variables
}

/** A file of all authorities to trust: SSL_CERT_FILE replaces a Go program's own. */
async function trustFile(cluster: Cluster, { caFile }: HostProxy): Promise<string> {
  const file = cluster.path('run', 'trusted-authorities.pem')
  await mkdir(cluster.path('run'), { recursive: true, mode: 0o700 })
  await writeFileAtomic(file, [...rootCertificates, await readFile(caFile, 'utf8')].join('\n'))
  return file
}
