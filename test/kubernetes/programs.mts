// The Kubernetes programs of cluster.env's version for tests and rehearsal, from where they are
// available: KUBE_BIN_DIR, the cache, the download site, Go. As a script it fetches them and prints
// the folder of each set (kubernetes by default):
//   node --import tsx test/kubernetes/programs.mts [kubernetes|etcd|coredns|helm|…]...
import { createHash } from 'node:crypto'
import { access, constants, readFile } from 'node:fs/promises'
import { join, resolve } from 'node:path'
import { $ } from 'zx'
import { type Cluster, loadCluster } from '../../lib/cluster.mts'
import { describeError, lastLines, StepError } from '../../lib/errors.mts'
import { hostEnvironment } from '../../lib/proxy.mts'
import { type GoModuleName, goBuild, goModules, pinnedVersion } from './go-programs.mts'
import { architecture, cachedPrograms, say } from './program-cache.mts'

/** The folder that holds the programs, or why there is none: tests then skip with the reason. */
export type Programs = { folder: string; reason?: never } | { folder?: never; reason: string }

interface Options {
  /** Which programs; all of them unless said. */
  names?: readonly string[]
  env?: NodeJS.ProcessEnv
  /** Where releases are downloaded from. */
  site?: string
}

/**
 * The programs of Kubernetes KUBERNETES_VERSION: those of KUBE_BIN_DIR when it is set, else
 * downloaded from `site` and checked against their .sha256, else built with Go, the latter two
 * kept by version in the user's cache.
 *
 * @throws StepError when KUBE_BIN_DIR lacks a program or has another minor version, and when a
 *   downloaded file is not what its checksum says
 */
export async function kubernetesPrograms(options: Options = {}): Promise<Programs> {
  const { env = process.env, site = 'https://dl.k8s.io' } = options
  const names = options.names ?? Object.keys(goModules.kubernetes.programs)
  const cluster = loadCluster({ env })
  const version = cluster.settings.KUBERNETES_VERSION
  if (process.platform !== 'linux') return notLinux
  const given = env.KUBE_BIN_DIR
  if (given) return { folder: await checkFolder(resolve(given), names, version) }

  return orReason(() =>
    cachedPrograms(`kubernetes-v${version}`, names, env, async (missing, into) => {
      const unreachable = await fetchAll(cluster, `${site}/release/v${version}`, missing, into, env)
      if (!unreachable) return
      say(`no download: ${unreachable}`)
      await build('kubernetes', { version, names: missing, into, env }, [
        'KUBE_BIN_DIR is not set',
        `no download: ${unreachable}`,
      ])
    }),
  )
}

/**
 * The programs of another Go module: etcd (etcd, etcdctl, etcdutl), coredns, metrics-server,
 * local-path-provisioner, helm or cilium, in the version of cluster.env or, for etcd, of its go.mod. Built
 * with Go and cached.
 */
export async function goPrograms(
  name: Exclude<GoModuleName, 'kubernetes'>,
  { env = process.env, names = Object.keys(goModules[name].programs) }: Options = {},
): Promise<Programs> {
  const { settings } = loadCluster({ env })
  const version = {
    etcd: await pinnedVersion('etcd'),
    coredns: settings.COREDNS_VERSION,
    'metrics-server': settings.METRICS_SERVER_VERSION,
    'local-path-provisioner': settings.LOCAL_PATH_VERSION,
    helm: settings.HELM_VERSION,
    cilium: settings.CILIUM_VERSION,
  }[name]
  if (process.platform !== 'linux') return notLinux
  return orReason(() =>
    cachedPrograms(`${name}-v${version}`, names, env, (missing, into) =>
      build(name, { version, names: missing, into, env }),
    ),
  )
}

const notLinux = { reason: 'the programs are for Linux, and this computer runs another system' }

/** The programs cannot be had here. */
class Unavailable extends StepError {}

async function orReason(find: () => Promise<string>): Promise<Programs> {
  try {
    return { folder: await find() }
  } catch (error) {
    if (error instanceof Unavailable) return { reason: describeError(error) }
    throw error
  }
}

/** Builds, or throws with all that was tried: before, and now. */
async function build(
  name: GoModuleName,
  options: Parameters<typeof goBuild>[1],
  tried: readonly string[] = [],
): Promise<void> {
  await goBuild(name, options).catch((error) => {
    if (!(error instanceof StepError)) throw error
    const reasons = [...tried, `no build: ${error.message}`].join('; ')
    const what = `${name} ${options.version}`
    throw new Unavailable(`${what} cannot be had: ${reasons}`, error.explanation)
  })
}

async function checkFolder(
  folder: string,
  names: readonly string[],
  version: string,
): Promise<string> {
  const minor = (text: string) => text.match(/\bv(\d+\.\d+)\./)?.[1]
  const problems = await Promise.all(
    names.map(async (name) => {
      const path = join(folder, name)
      const executable = await access(path, constants.X_OK).then(
        () => true,
        () => false,
      )
      if (!executable) return `${name}: not there, or not executable`
      const args = name === 'kubectl' ? ['version', '--client'] : ['--version']
      const { stdout, exitCode } = await $({
        quiet: true,
        nothrow: true,
        timeout: '20s',
      })`${path} ${args}`
      const reported = stdout.trim().split('\n')[0] ?? ''
      if (exitCode !== 0) return `${name}: ${args.join(' ')} fails`
      return minor(reported) === minor(`v${version}`) ? '' : `${name}: it is "${reported}"`
    }),
  )
  if (problems.every((problem) => !problem)) return folder
  throw new StepError(`KUBE_BIN_DIR is not of Kubernetes ${minor(`v${version}`)}: ${folder}`, {
    output: problems.filter(Boolean).join('\n'),
    hint: 'unset KUBE_BIN_DIR to have the programs downloaded or built',
  })
}

/**
 * Downloads programs and checks them.
 *
 * @returns why that is not possible here; undefined when all are there
 * @throws StepError when a download breaks off, or is not what its checksum says
 */
async function fetchAll(
  cluster: Cluster,
  release: string,
  names: readonly string[],
  into: string,
  env: NodeJS.ProcessEnv,
): Promise<string | undefined> {
  const curl = $({
    quiet: true,
    nothrow: true,
    env: { ...(await hostEnvironment(cluster)), ...env },
  })
  const url = (name: string) => `${release}/bin/linux/${architecture}/${name}`
  const sums = new Map<string, string>()
  for (const name of names) {
    // A short time, as there often is no internet.
    const sum = await curl`curl -fsSL --connect-timeout 5 --max-time 20 ${url(name)}.sha256`
    if (sum.exitCode !== 0) return lastLines(sum.stderr, 1)
    sums.set(name, sum.stdout.trim().split(/\s+/)[0] ?? '')
  }
  say(`downloading ${names.join(', ')} from ${release}`)
  const downloads = await Promise.allSettled(
    names.map(async (name) => {
      const file = join(into, name)
      const { exitCode, stderr } = await curl`curl -fsSL --retry 2 -o ${file} ${url(name)}`
      if (exitCode !== 0) throw new StepError(`${name}: ${lastLines(stderr, 1)}`)
      const sum = createHash('sha256')
        .update(await readFile(file))
        .digest('hex')
      if (sum !== sums.get(name)) throw new StepError(`the checksum of ${url(name)} does not match`)
    }),
  )
  // Only now is no curl left that writes into the folder.
  for (const download of downloads) if (download.status === 'rejected') throw download.reason
  return undefined
}

if (process.argv[1] === import.meta.filename) {
  const sets = process.argv.length > 2 ? process.argv.slice(2) : ['kubernetes']
  try {
    for (const set of sets) {
      if (!isSet(set))
        throw new StepError(`"${set}" is not one of ${Object.keys(goModules).join(', ')}`)
      const { folder, reason } = await (set === 'kubernetes'
        ? kubernetesPrograms()
        : goPrograms(set))
      if (!folder) throw new StepError(reason ?? '')
      console.log(folder)
    }
  } catch (error) {
    console.error(`programs: ${describeError(error)}`)
    process.exitCode = 1
  }
}

function isSet(name: string): name is GoModuleName {
  return Object.hasOwn(goModules, name)
}
