// The real Cilium: its chart, and one image for its agent and its operator, of programs built from
// its Go module and of Debian's compiler and network tools.
import { cp, mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { $ } from 'zx'
import { loadCluster } from '../../lib/cluster.mts'
import { describeError, StepError } from '../../lib/errors.mts'
import { moduleFolder } from '../kubernetes/go-programs.mts'
import { goPrograms } from '../kubernetes/programs.mts'
import { findSource } from '../rehearsal/distribution.mts'
import { packImage } from '../rehearsal/docker-archive.mts'
import { cached, contentOf } from '../rehearsal/layer-cache.mts'

export interface CiliumParts {
  /** Docker archive of the image, with the tags of agent and operator. */
  archive: string
  /** Folder of the Helm chart. */
  chart: string
}

/** Debian's packages in the image: agent and chart call clang, llc, ip, iptables, ipset, modprobe, mount. */
const packages = [
  ...['clang', 'llvm', 'iproute2', 'iptables', 'ipset', 'kmod', 'mount', 'ca-certificates'],
]

/** What the chart calls by these names, beside programs of the same name. */
const programs: Record<string, string> = {
  'usr/bin/cilium-agent': 'cilium-agent',
  'usr/bin/cilium': 'cilium-dbg',
  'usr/bin/cilium-dbg': 'cilium-dbg',
  'usr/bin/cilium-health': 'cilium-health',
  'usr/bin/cilium-health-responder': 'cilium-health-responder',
  'usr/bin/cilium-mount': 'cilium-mount',
  'usr/bin/cilium-sysctlfix': 'cilium-sysctlfix',
  'usr/bin/cilium-operator-generic': 'cilium-operator-generic',
  'opt/cni/bin/cilium-cni': 'cilium-cni',
}

/** Scripts of the module that the chart's init containers run. */
const scripts: Record<string, string> = {
  'init-container.sh': 'images/cilium/init-container.sh',
  'install-plugin.sh': 'plugins/cilium-cni/install-plugin.sh',
  'cni-uninstall.sh': 'plugins/cilium-cni/cni-uninstall.sh',
}

/** Chart and image of CILIUM_VERSION, from the cache or built. */
export async function ciliumParts(): Promise<CiliumParts> {
  const version = loadCluster({ env: {} }).settings.CILIUM_VERSION
  const base = await debianBase()
  const { folder, reason } = await goPrograms('cilium')
  if (!folder) throw new StepError(reason ?? '')
  const inputs = [version, base, await contentOf(import.meta.filename)]
  const entry = await cached('cilium', inputs, async (into) => {
    const source = await moduleFolder('cilium', version)
    await cp(join(source, 'install/kubernetes/cilium'), join(into, 'chart'), { recursive: true })
    await $({ quiet: true })`chmod -R u+w ${join(into, 'chart')}`
    const scratch = await mkdtemp(join(into, 'scratch-'))
    try {
      const [tree, parts] = [join(scratch, 'tree'), join(scratch, 'parts')]
      await Promise.all([mkdir(tree), mkdir(parts)])
      await placeFiles(tree, folder, source)
      const layer = join(parts, 'layer.tar')
      await cp(base, layer)
      await $({ quiet: true })`tar --append --owner=0 --group=0 -C ${tree} -f ${layer} .`
      const names = ['cilium', 'operator-generic']
      const tags = names.map((name) => `quay.io/cilium/${name}:v${version}`)
      await packImage(parts, tags, join(into, 'cilium.tar'))
    } finally {
      await rm(scratch, { recursive: true, force: true })
    }
  })
  return { archive: join(entry, 'cilium.tar'), chart: join(entry, 'chart') }
}

/** A tar file of a Debian root with the packages. */
async function debianBase(): Promise<string> {
  const { release, sources, settings } = await findSource()
  const unwanted = ['man', 'doc', 'info', 'locale'].map((kind) => `/usr/share/${kind}/*`)
  const options = [
    '--dpkgopt=force-unsafe-io',
    ...unwanted.map((path) => `--dpkgopt=path-exclude=${path}`),
    // For those who compile something else than BPF.
    `--customize-hook=cd "$1" && rm -rf ${unneeded.join(' ')}`,
    '--skip=cleanup/reproducible',
  ]
  const inputs = [release, sources, packages.join(), options.join('\n')]
  const entry = await cached('cilium-base', inputs, async (into, detail) => {
    const apt = join(into, 'apt.conf')
    await writeFile(apt, `APT::Install-Recommends "false";\n${settings}\n`)
    const include = `--include=${packages.join(',')}`
    const build = $({ quiet: true, env: { ...process.env, TMPDIR: into } })`mmdebstrap \
      --variant=essential --format=tar ${include} --aptopt=${apt} ${options} \
      ${release} ${join(into, 'root.tar')} ${sources}`
    build.stderr.on('data', (chunk: Buffer) => {
      const text = chunk.toString().match(/^I: (.*)/m)?.[1]
      if (text) detail(text)
    })
    await build.catch((cause) => {
      const output = String(cause.stderr).trim().split('\n').slice(-15).join('\n')
      throw new StepError('mmdebstrap could not build the root of Cilium', { output, cause })
    })
    await rm(apt)
  })
  return join(entry, 'root.tar')
}

/** Paths of a shell's pattern. */
const unneeded = [
  ...['usr/include', 'usr/lib/gcc', 'usr/lib/llvm-*/include', 'usr/lib/llvm-*/lib/*.a'],
  ...['usr/lib/*-linux-gnu/perl*', 'usr/share/perl*', 'usr/lib/python3*'],
  ...['var/lib/apt/lists/*', 'var/cache/apt'],
]

async function placeFiles(tree: string, programFolder: string, source: string): Promise<void> {
  const place = async (from: string, to: string) => {
    await mkdir(join(tree, to, '..'), { recursive: true })
    await cp(from, join(tree, to), { recursive: true })
  }
  for (const [path, name] of Object.entries(programs)) await place(join(programFolder, name), path)
  for (const [path, name] of Object.entries(scripts)) await place(join(source, name), path)
  await place(join(source, 'bpf'), 'var/lib/cilium/bpf')
  await $({ quiet: true })`chmod -R u+w,a+rX ${tree}`
  for (const path of Object.keys(scripts)) await $({ quiet: true })`chmod 755 ${join(tree, path)}`
}

if (process.argv[1] === import.meta.filename) {
  try {
    const { archive, chart } = await ciliumParts()
    console.log(`${archive}\n${chart}`)
  } catch (error) {
    console.error(`cilium-image: ${describeError(error)}`)
    process.exitCode = 1
  }
}
