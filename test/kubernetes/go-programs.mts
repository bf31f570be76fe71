// Programs built with Go from a go.mod folder that pins them as tool dependencies.
import { cp, mkdtemp, readFile, rename, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { basename, join } from 'node:path'
import { $, ProcessOutput, type Shell } from 'zx'
import { StepError } from '../../lib/errors.mts'
import { formatDuration } from '../../lib/format.mts'
import { architecture, say } from './program-cache.mts'

interface GoModule {
  /** Folder of its go.mod, below this one. */
  folder: string
  /** The module whose version is that of the programs. */
  module: string
  /** Program to package. */
  programs: Readonly<Record<string, string>>
  tags?: string
  /** Variables that the linker sets: what --version prints. */
  stamp?: (version: string) => Readonly<Record<string, string>>
}

export const goModules = {
  kubernetes: {
    folder: '.',
    module: 'k8s.io/kubernetes',
    programs: {
      'kube-apiserver': 'k8s.io/kubernetes/cmd/kube-apiserver',
      'kube-controller-manager': 'k8s.io/kubernetes/cmd/kube-controller-manager',
      'kube-proxy': 'k8s.io/kubernetes/cmd/kube-proxy',
      'kube-scheduler': 'k8s.io/kubernetes/cmd/kube-scheduler',
      kubectl: 'k8s.io/kubernetes/cmd/kubectl',
      kubelet: 'k8s.io/kubernetes/cmd/kubelet',
    },
    // Those of the released programs.
    tags: 'selinux,notest,grpcnotrace',
    stamp: (version) => {
      const [major = '', minor = ''] = version.split('.')
      const values = { gitVersion: `v${version}`, gitMajor: major, gitMinor: minor }
      return Object.fromEntries(
        ['k8s.io/component-base/version', 'k8s.io/client-go/pkg/version'].flatMap((package_) =>
          Object.entries(values).map(([name, value]) => [`${package_}.${name}`, value]),
        ),
      )
    },
  },
  etcd: {
    folder: 'etcd',
    module: 'go.etcd.io/etcd/server/v3',
    programs: {
      etcd: 'go.etcd.io/etcd/server/v3',
      etcdctl: 'go.etcd.io/etcd/etcdctl/v3',
      etcdutl: 'go.etcd.io/etcd/etcdutl/v3',
    },
  },
  coredns: {
    folder: 'coredns',
    module: 'github.com/coredns/coredns',
    programs: { coredns: 'github.com/coredns/coredns' },
  },
  'metrics-server': {
    folder: 'metrics-server',
    module: 'sigs.k8s.io/metrics-server',
    programs: { 'metrics-server': 'sigs.k8s.io/metrics-server/cmd/metrics-server' },
    stamp: (version) => ({ 'k8s.io/client-go/pkg/version.gitVersion': `v${version}` }),
  },
  'local-path-provisioner': {
    folder: 'local-path-provisioner',
    module: 'github.com/rancher/local-path-provisioner',
    programs: { 'local-path-provisioner': 'github.com/rancher/local-path-provisioner' },
    stamp: (version) => ({ 'main.VERSION': `v${version}` }),
  },
  helm: {
    folder: 'helm',
    module: 'helm.sh/helm/v4',
    programs: { helm: 'helm.sh/helm/v4/cmd/helm' },
    stamp: (version) => ({ 'helm.sh/helm/v4/internal/version.version': `v${version}` }),
  },
  cilium: {
    folder: 'cilium',
    module: 'github.com/cilium/cilium',
    programs: {
      'cilium-agent': 'github.com/cilium/cilium/daemon',
      'cilium-cni': 'github.com/cilium/cilium/plugins/cilium-cni',
      'cilium-dbg': 'github.com/cilium/cilium/cilium-dbg',
      'cilium-health': 'github.com/cilium/cilium/cilium-health',
      'cilium-health-responder': 'github.com/cilium/cilium/cilium-health/responder',
      'cilium-mount': 'github.com/cilium/cilium/tools/mount',
      'cilium-operator-generic': 'github.com/cilium/cilium/operator',
      'cilium-sysctlfix': 'github.com/cilium/cilium/tools/sysctlfix',
    },
    // The second makes the operator the generic one, which gives out each node's pod CIDR.
    tags: 'osusergo,ipam_provider_operator',
    stamp: (version) => ({ 'github.com/cilium/cilium/pkg/version.ciliumVersion': version }),
  },
} satisfies Record<string, GoModule>

export type GoModuleName = keyof typeof goModules

/** The version that the module's go.mod names, without the "v". */
export async function pinnedVersion(name: GoModuleName): Promise<string> {
  const { folder, module } = goModules[name]
  const file = join(import.meta.dirname, folder, 'go.mod')
  const text = await readFile(file, 'utf8')
  const line = text.split('\n').find((candidate) => candidate.includes(`\t${module} v`))
  const version = line?.match(/ v(\S+)/)?.[1]
  if (!version) throw new StepError(`${file} requires no ${module}`)
  return version
}

/** The folder of a module's source in Go's cache, downloaded if it is not there yet. */
export async function moduleFolder(name: GoModuleName, version: string): Promise<string> {
  const { module } = goModules[name]
  const go = $({
    quiet: true,
    nothrow: true,
    cwd: join(import.meta.dirname, goModules[name].folder),
  })
  const { stdout, stderr } = await go`go mod download -json ${module}@v${version}`
  const { Dir: folder, Error: reason } = JSON.parse(stdout || '{}') as Record<string, string>
  if (folder) return folder
  throw new StepError(`${module} v${version} cannot be had`, { output: reason ?? stderr.trim() })
}

/**
 * Builds programs of one module for Linux: static, stripped, without paths of this computer.
 *
 * @param into the folder that gets them, by their names
 * @throws StepError when there is no Go, Go is too old, or the build fails
 */
export async function goBuild(
  name: GoModuleName,
  {
    version,
    names,
    into,
    env,
  }: {
    version: string
    names: readonly string[]
    into: string
    env: NodeJS.ProcessEnv
  },
): Promise<void> {
  const { folder, module, programs, tags, stamp }: GoModule = goModules[name]
  // In a copy, as another version than the pinned one changes go.mod and go.sum.
  const work = await mkdtemp(join(tmpdir(), 'go-programs-'))
  try {
    await cp(join(import.meta.dirname, folder), work, {
      recursive: true,
      // Kubernetes' own go.mod lies beside the folders of the others.
      filter: (path) => folder !== '.' || /\/go\.(mod|sum)$|\/kubernetes$/.test(path),
    })
    const go = $({
      cwd: work,
      quiet: true,
      env: { ...env, CGO_ENABLED: '0', GOOS: 'linux', GOARCH: architecture, GOWORK: 'off' },
    })
    const release = await goRelease(go)
    if (version !== (await pinnedVersion(name))) await choose(go, module, version)

    say(`building ${names.join(', ')} ${version} with ${release}`)
    const began = performance.now()
    const packages = names.map((program) => programs[program] ?? '')
    const variables = Object.entries(stamp?.(version) ?? {}).map(
      ([key, value]) => `-X ${key}=${value}`,
    )
    const build = go`go build -v -mod=mod -trimpath -tags ${tags ?? ''} -ldflags ${['-s -w', ...variables].join(' ')} -o ${into}/ ${packages}`
    let compiled = 0
    build.stderr.on('data', (chunk: Buffer) => {
      compiled += chunk.toString().split('\n').length - 1
    })
    const report = setInterval(() => {
      say(`${compiled} packages compiled, ${formatDuration(performance.now() - began)}`)
    }, 30_000)
    await build.finally(() => clearInterval(report))
    for (const program of names) {
      await rename(join(into, goName(programs[program] ?? '')), join(into, program))
    }
    say(`built in ${formatDuration(performance.now() - began)}`)
  } catch (cause) {
    throw cause instanceof StepError ? cause : failure(name, version, cause)
  } finally {
    await rm(work, { recursive: true, force: true })
  }
}

/** The release of Go that will build; an older Go fetches the one that go.mod names, if it can. */
async function goRelease(go: Shell): Promise<string> {
  const found = await go`go env GOVERSION`.nothrow()
  if (found.exitCode === 0) return found.stdout.trim()
  const missing = found.exitCode === 127 || /ENOENT|not found/.test(found.stderr)
  throw new StepError(missing ? 'there is no Go to build with' : 'this Go is too old', {
    output: found.stderr.trim().split('\n').at(-1) ?? '',
    hint: 'install Go 1.26 or later',
  })
}

/** Has the copied go.mod name another version than the pinned one. */
async function choose(go: Shell, module: string, version: string): Promise<void> {
  const downloaded = await go`go mod download -json ${module}@v${version}`.nothrow()
  const { GoMod: file, Error: reason } = JSON.parse(downloaded.stdout || '{}') as {
    GoMod?: string
    Error?: string
  }
  if (!file) {
    throw new StepError(`${module} v${version} cannot be had`, {
      output: reason ?? downloaded.stderr.trim(),
    })
  }
  await go`go mod edit -require=${module}@v${version}`
  // Kubernetes replaces its staging modules by folders that its module does not carry; as modules
  // they have the version with major 0.
  const staging = (await readFile(file, 'utf8')).matchAll(/^\t(\S+) => \.\/staging\//gm)
  for (const [, path] of staging) {
    await go`go mod edit -replace=${path}=${path}@v${version.replace(/^1\./, '0.')}`
  }
}

function failure(name: string, version: string, cause: unknown): StepError {
  // With -v each compiled package is a line; what is wrong stands among them with spaces in it.
  const lines = cause instanceof ProcessOutput ? cause.stderr.split('\n') : []
  return new StepError(`${name} ${version} does not build`, {
    output: lines
      .filter((line) => /\s/.test(line))
      .slice(-15)
      .join('\n'),
    cause,
  })
}

/** What Go calls a package's program: the last part of its path that is no major version. */
function goName(package_: string): string {
  return basename(package_.replace(/\/v\d+$/, ''))
}
