// Helm: the program itself, and what it keeps of a release.
import { createHash } from 'node:crypto'
import { existsSync } from 'node:fs'
import { mkdir, readFile, rename, rm } from 'node:fs/promises'
import { arch, platform } from 'node:os'
import { delimiter, join } from 'node:path'
import { $ } from 'zx/core'
import type { Cluster } from './cluster.mts'
import { StepError } from './errors.mts'
import { hostEnvironment } from './proxy.mts'

/** Go's names of the systems and processors that Helm is released for. */
const systems: Readonly<Record<string, string>> = { linux: 'linux', darwin: 'darwin' }
const processors: Readonly<Record<string, string>> = { x64: 'amd64', arm64: 'arm64' }

/**
 * Makes `$`helm …`` work: with the helm on the PATH if it is 3.14 or later (for
 * --reset-then-reuse-values), else with HELM_VERSION in tools/, which is fetched if it is missing.
 *
 * @param options.site has the releases: SITE/helm-vVERSION-OS-ARCH.tar.gz with a .sha256sum each
 * @throws StepError if there is no such release, or it is not what its checksum says
 */
export async function ensureHelm(
  cluster: Cluster,
  options: { site?: string; os?: string; cpu?: string } = {},
): Promise<void> {
  const { site = 'https://get.helm.sh', os = platform(), cpu = arch() } = options
  const { stdout } = await $({ nothrow: true })`helm version --template '{{.Version}}'`
  const [, major = 0, minor = 0] = (stdout.match(/^v(\d+)\.(\d+)\./) ?? []).map(Number)
  if (major > 3 || (major === 3 && minor >= 14)) return

  const version = cluster.settings.HELM_VERSION
  const folder = cluster.path('tools', `helm-${version}`)
  $.env = { ...$.env, PATH: `${folder}${delimiter}${$.env.PATH}` }
  if (existsSync(join(folder, 'helm'))) return
  if (!systems[os] || !processors[cpu]) {
    throw new StepError(`Helm is not released for ${os} on ${cpu}`, {
      hint: 'install it (https://helm.sh/docs/intro/install/) so that helm is on the PATH',
    })
  }
  const target = `${systems[os]}-${processors[cpu]}`
  const url = `${site}/helm-v${version}-${target}.tar.gz`
  const partial = `${folder}.partial`
  const [archive, checksum] = [join(partial, 'helm.tar.gz'), join(partial, 'helm.sha256sum')]
  await rm(partial, { recursive: true, force: true })
  await mkdir(partial, { recursive: true })
  try {
    const curl = $({ env: { ...$.env, ...(await hostEnvironment(cluster)) }, nothrow: true })
    const { exitCode, stderr } =
      await curl`curl -fsSL --retry 2 --fail-early -o ${checksum} ${url}.sha256sum -o ${archive} ${url}`
    if (exitCode !== 0) {
      throw new StepError(`Helm ${version} for ${target} could not be downloaded`, {
        output: stderr.trim(),
        command: `curl -fL ${url}`,
        hint: 'is HELM_VERSION in cluster.env a released version, and the internet (PROXY_…) reachable?',
      })
    }
    const sha256 = createHash('sha256')
      .update(await readFile(archive))
      .digest('hex')
    if (!(await readFile(checksum, 'utf8')).startsWith(`${sha256} `)) {
      throw new StepError(`the checksum of ${url} does not match, so it was deleted`)
    }
    await $`tar -xzf ${archive} -C ${partial} --strip-components=1 ${target}/helm`
    await Promise.all([rm(archive), rm(checksum)])
    await rename(partial, folder)
  } finally {
    await rm(partial, { recursive: true, force: true })
  }
}

/** The latest revision of a release. */
export interface HelmRelease {
  revision: number
  /** deployed, failed, pending-upgrade, … */
  status: string
  /** Of its chart. */
  version: string
  /** The values it was given, without the chart's own. */
  values: Record<string, unknown>
}

/**
 * Reads a release. If a helm that was killed left it pending, so that every change is refused, it
 * is repaired first: by a rollback to the interrupted revision itself, which completes it and
 * deletes nothing.
 *
 * @returns undefined if there is no such release
 */
export async function usableRelease(
  name: string,
  namespace: string,
): Promise<HelmRelease | undefined> {
  const found = await metadataOf(name, namespace)
  if (found?.status.startsWith('pending-')) {
    // If this fails, the release counts as failed, which an upgrade repairs.
    await $({ nothrow: true })`helm rollback ${name} ${found.revision} --namespace ${namespace}`
  }
  if (found?.status === 'uninstalling') await $`helm uninstall ${name} --namespace ${namespace}`
  const release = found && (await metadataOf(name, namespace))
  if (!release) return undefined
  const values = await $`helm get values ${name} --namespace ${namespace} --output json`
  return { ...release, values: JSON.parse(values.stdout) ?? {} }
}

async function metadataOf(
  name: string,
  namespace: string,
): Promise<Omit<HelmRelease, 'values'> | undefined> {
  const found = await $({
    nothrow: true,
  })`helm get metadata ${name} --namespace ${namespace} --output json`
  if (found.exitCode === 0) return JSON.parse(found.stdout)
  if (/release: not found/.test(found.stderr)) return undefined
  throw found
}
