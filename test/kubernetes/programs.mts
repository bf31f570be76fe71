// The Kubernetes programs of cluster.env's version for tests and rehearsal, wherever they can be
// had: KUBE_BIN_DIR, the cache, the download site, Go. As a script it fetches them beforehand and
// prints the folder of each set (kubernetes unless said):
//   node --import tsx test/kubernetes/programs.mts [kubernetes|etcd|coredns|metrics-server]...
import { createHash } from 'node:crypto'
import { createReadStream } from 'node:fs'
import { access, constants } from 'node:fs/promises'
import { join, resolve } from 'node:path'
import { pipeline } from 'node:stream/promises'
import { $ } from 'zx'
import { loadCluster } from '../../lib/cluster.mts'
import { describeError, StepError } from '../../lib/step-error.mts'
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
  const version = loadCluster({ env }).settings.KUBERNETES_VERSION
  if (process.platform !== 'linux') return notLinux
  const given = env.KUBE_BIN_DIR
  if (given) return { folder: await checkFolder(resolve(given), names, version) }

  return orReason(() =>
    cachedPrograms(`kubernetes-v${version}`, names, env, async (missing, into) => {
      const reason = await download(`${site}/release/v${version}`, missing, into, env)
      if (!reason) return
      say(`no download: ${reason}`)
      await goBuild('kubernetes', { version, names: missing, into, env }).catch((error) => {
        if (!(error instanceof StepError)) throw error
        const { message, explanation } = error
        const ways = `KUBE_BIN_DIR is not set; no download: ${reason}; no build: ${message}`
        throw new StepError(`Kubernetes ${version} cannot be had: ${ways}`, explanation)
      })
    }),
  )
}

/**
 * The programs of another Go module: etcd (etcd, etcdctl, etcdutl), coredns or metrics-server, in
 * the version of cluster.env or, for etcd, of its go.mod. Built with Go and cached.
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
  }[name]
  if (process.platform !== 'linux') return notLinux
  return orReason(() =>
    cachedPrograms(`${name}-v${version}`, names, env, (missing, into) =>
      goBuild(name, { version, names: missing, into, env }),
    ),
  )
}

const notLinux = { reason: 'the programs are for Linux, and this computer runs another system' }

/** What a wrong checksum throws must not end as a skipped test. */
class ChecksumError extends StepError {}

async function orReason(find: () => Promise<string>): Promise<Programs> {
  try {
    return { folder: await find() }
  } catch (error) {
    if (error instanceof ChecksumError || !(error instanceof StepError)) throw error
    return { reason: describeError(error) }
  }
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
 * Downloads and checks programs.
 *
 * @returns why it cannot be done; undefined when all are there
 * @throws ChecksumError
 */
async function download(
  release: string,
  names: readonly string[],
  into: string,
  env: NodeJS.ProcessEnv,
): Promise<string | undefined> {
  // curl, as it knows the proxy settings of the environment.
  const curl = $({ env, quiet: true, nothrow: true })
  const get = ['--fail', '--location', '--silent', '--show-error', '--connect-timeout', '5']
  const url = (name: string) => `${release}/bin/linux/${architecture}/${name}`
  const failed = (stderr: string) => stderr.trim().split('\n').at(-1) || 'curl fails'

  const sums = new Map<string, string>()
  for (const name of names) {
    const sum = await curl`curl ${get} --max-time 30 ${url(name)}.sha256`
    if (sum.exitCode !== 0) return failed(sum.stderr)
    sums.set(name, sum.stdout.trim().split(/\s+/)[0] ?? '')
  }
  say(`downloading ${names.join(', ')} from ${release}`)
  const files = await Promise.all(
    names.map((name) => curl`curl ${get} --output ${join(into, name)} ${url(name)}`),
  )
  const broken = files.find(({ exitCode }) => exitCode !== 0)
  if (broken) return failed(broken.stderr)
  for (const name of names) {
    const sum = await sha256(join(into, name))
    if (sum !== sums.get(name)) {
      throw new ChecksumError(`${url(name)} is not what its checksum says`, {
        output: `sha256 ${sum}, not ${sums.get(name)}`,
        hint: 'nothing was kept; try again, or set KUBE_BIN_DIR',
      })
    }
  }
  return undefined
}

async function sha256(path: string): Promise<string> {
  const hash = createHash('sha256')
  await pipeline(createReadStream(path), hash)
  return hash.digest('hex')
}

if (process.argv[1] === import.meta.filename) {
  const sets = process.argv.length > 2 ? process.argv.slice(2) : ['kubernetes']
  try {
    for (const set of sets) {
      if (!isSet(set))
        throw new StepError(`"${set}" is none of ${Object.keys(goModules).join(', ')}`)
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
