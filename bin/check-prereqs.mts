#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// Whether this computer can run the machines: programs, firmware, accelerator, memory, disk, ports.
import { execFile, spawn } from 'node:child_process'
import { once } from 'node:events'
import { freemem } from 'node:os'
import { createInterface } from 'node:readline/promises'
import { which } from 'zx/core'
import { loadCluster } from '../lib/cluster.mts'
import { explain, StepError } from '../lib/errors.mts'
import { readIfThere } from '../lib/files.mts'
import { findFirmware } from '../lib/firmware.mts'
import { formatBytes, formatTable } from '../lib/format.mts'
import * as host from '../lib/host.mts'
import { lanSwitchStatus } from '../lib/lan.mts'
import { assertFree, isPortFree } from '../lib/processes.mts'
import { script } from '../lib/script.mts'
import { assertDiskSpace, assertPortsFree, freeBytes, hasDisk, isRunning } from '../lib/vm.mts'

const { flags } = script({
  does: `Checks everything that the machines need on this computer, shows it as one table, and names the
commands that install what is missing. Ends with status 1 if something needed is missing;
warnings (no hardware acceleration, little memory) do not count.`,
  reads: ['cluster.env'],
  writes: [],
  flags: {
    install: { help: 'run those commands, after asking, and check again' },
    yes: { help: 'with --install: do not ask' },
    json: { help: 'the findings and the commands as JSON' },
  },
  examples: ['./bin/check-prereqs.mts', './bin/check-prereqs.mts --install'],
})
if (flags.yes && !flags.install) {
  throw new StepError('--yes answers the question of --install', { exitCode: 2 })
}

const cluster = loadCluster()
const { settings, nodes } = cluster
const os = host.detectSystem()
const arch = await host.detectArchitecture(os)
const byArch = (x86: string, arm: string) => (arch === 'x86_64' ? x86 : arm)
const release = os === 'darwin' ? 'ID=darwin' : ((await readIfThere('/etc/os-release')) ?? '')

/** Package managers: the systems that they belong to, by os-release(5), and how they install. */
const managers = [
  { name: 'brew', systems: /darwin/, install: 'brew install' },
  { name: 'apt-get', systems: /debian|ubuntu/, install: 'sudo apt-get install --yes' },
  { name: 'dnf', systems: /fedora|rhel/, install: 'sudo dnf install --assumeyes' },
  { name: 'pacman', systems: /arch/, install: 'sudo pacman -S --needed --noconfirm' },
  { name: 'zypper', systems: /suse/, install: 'sudo zypper --non-interactive install' },
  {
    name: 'nix',
    systems: /nixos/,
    install: "nix --extra-experimental-features 'nix-command flakes' profile install",
  },
] as const

interface Tool {
  name: string
  /** What the scripts need it for. */
  why: string
  /** Its names on PATH, of which the first counts; by default `name`. */
  programs?: readonly string[]
  /** Arguments with which it prints its version, and where that is; by default "version 1.2.3". */
  version?: readonly [args: string, pattern: RegExp]
  /** The oldest version that is sufficient. */
  least?: string
  /** Packages in the order of `managers`, or the one name of all; "-": none that is new enough. */
  packages: string
  /** What happens without it, where it is not needed. */
  optional?: string
}

const firmware = {
  name: 'UEFI firmware',
  why: 'boots the machines',
  packages: byArch(
    'qemu ovmf edk2-ovmf edk2-ovmf qemu-ovmf-x86_64 qemu',
    'qemu qemu-efi-aarch64 edk2-aarch64 edk2-aarch64 qemu-uefi-aarch64 qemu',
  ),
}
const tools: readonly Tool[] = [
  {
    name: 'QEMU',
    why: 'runs the machines',
    programs: [`qemu-system-${arch}`],
    least: host.leastQemuVersion,
    packages: byArch(
      'qemu qemu-system-x86 qemu-system-x86 qemu-system-x86 qemu-x86 qemu',
      'qemu qemu-system-arm qemu-system-aarch64 qemu-system-aarch64 qemu-arm qemu',
    ),
  },
  {
    name: 'qemu-img',
    why: "creates the machines' disks and their snapshots",
    least: host.leastQemuVersion,
    packages: 'qemu qemu-utils qemu-img qemu-img qemu-tools qemu',
  },
  firmware,
  {
    name: 'bsdtar',
    why: 'reads the installer ISO (GNU tar cannot)',
    programs: os === 'darwin' ? ['bsdtar', 'tar'] : ['bsdtar'],
    version: ['--version', /bsdtar (\d+\.\d+(?:\.\d+)?)/],
    packages: 'libarchive libarchive-tools bsdtar libarchive bsdtar libarchive',
  },
  {
    name: 'ssh',
    why: 'connects to the machines',
    version: ['-V', /OpenSSH\w*_(\d+\.\d+)/],
    packages: 'openssh openssh-client openssh-clients openssh openssh-clients openssh',
  },
  {
    name: 'curl',
    why: 'downloads the installer ISO',
    version: ['--version', /^curl (\d+\.\d+(?:\.\d+)?)/],
    packages: 'curl',
  },
  {
    name: 'kubectl',
    why: 'talks to the API server',
    version: ['version --client --output=json', /"v(\d+\.\d+\.\d+)/],
    // The other systems' packages are years old, or named after one minor version.
    packages: 'kubernetes-cli - - kubectl - kubectl',
  },
  {
    name: 'helm',
    why: 'installs Cilium',
    version: ['version', /v(\d+\.\d+\.\d+)/],
    least: '3.14',
    packages: '-',
    optional: `the scripts that need it download Helm ${settings.HELM_VERSION} to tools/`,
  },
  { name: 'bash', why: 'runs the commands in the scripts', packages: 'bash' },
  {
    name: 'make',
    why: "runs the Makefile's targets",
    version: ['--version', /GNU Make (\d+\.\d+(?:\.\d+)?)/],
    packages: 'make make make make make gnumake',
  },
]

// For systems that do not package it; a .sha256 is next to it.
const goArch = byArch('amd64', 'arm64')
const kubectlUrl = `https://dl.k8s.io/release/v${settings.KUBERNETES_VERSION}/bin/linux/${goArch}/kubectl`

// Red Hat Enterprise Linux and its rebuilds.
const isRedHat = /^ID(_LIKE)?=.*\b(rhel|centos)\b/m.test(release)
const noQemu = `${release.match(/^NAME="?([^"\n]*)/m)?.[1]} has no qemu-system-${arch}, and its qemu-kvm lacks the user network (slirp): install QEMU with Nix or Homebrew, or use Fedora`

interface Finding {
  name: string
  found: string
  wanted: string
  /** A `warning` works, perhaps slowly; `missing` can be installed; a `problem` cannot. */
  state: 'ok' | 'optional' | 'warning' | 'missing' | 'problem'
  /** What is wrong and what to do about it; none if nothing is wrong. */
  advice?: string
}

let findings = await checkAll()
let remedy = await findRemedy(findings)
if (flags.install && remedy.commands.length > 0) {
  if (!flags.json) console.log(`${report(findings)}\n`)
  if (!flags.yes) await confirm(remedy.commands)
  await runAll(remedy.commands)
  findings = await checkAll()
  remedy = await findRemedy(findings)
}

if (flags.json) console.log(JSON.stringify({ findings, ...remedy }, null, 2))
else {
  console.log(report(findings))
  if (remedy.commands.length > 0) {
    const commands = remedy.commands.map((command) => `  ${command}`)
    console.log(`\nTo install what is missing (--install does it):\n\n${commands.join('\n')}`)
  }
  if (remedy.without.length > 0) {
    console.log(
      `\nNo known package manager here has ${remedy.without.join(', ')}: install by hand.`,
    )
  }
}
const wrong = findings.filter(({ state }) => state === 'missing' || state === 'problem')
if (wrong.length > 0) {
  throw new StepError(`missing prerequisites: ${wrong.map(({ name }) => name).join(', ')}`)
}

/** All checks, in the order of the report. What is wrong is a finding, not an error. */
async function checkAll(): Promise<Finding[]> {
  const native = os === 'darwin' ? 'hvf' : 'kvm'
  const findings = await Promise.all([
    // lib/launch.mjs has refused every older one.
    { name: 'Node', found: process.versions.node, wanted: '20.11 or newer', state: 'ok' as const },
    ...tools.map((tool) => (tool === firmware ? checkFirmware() : checkTool(tool))),
    check('accelerator', native, async (finding) => {
      const { accel, warning } = await host.detectAccelerator(settings.QEMU_ACCEL, os)
      finding.found = accel
      return warning
    }),
    check('free memory', '', checkMemory),
    check('free disk', '', async (finding) => {
      const added = nodes.filter((node) => !hasDisk(cluster, node))
      finding.wanted = `for ${added.length} new ${added.length === 1 ? 'machine' : 'machines'}`
      finding.found = formatBytes(await freeBytes(cluster.path('images')))
      return assertDiskSpace(cluster, added)
    }),
    check('ports', 'free', checkPorts),
    check('checkout', 'on a Linux file system', checkWindows),
  ])
  return findings.filter(({ name, state }) => name !== 'checkout' || state !== 'ok')
}

/** A check that returns a warning, and throws what would stop the machines. */
async function check(
  name: string,
  wanted: string,
  work: (finding: Finding) => Promise<string | undefined>,
): Promise<Finding> {
  const finding: Finding = { name, found: '-', wanted, state: 'ok' }
  try {
    const advice = await work(finding)
    return advice ? { ...finding, state: 'warning', advice } : finding
  } catch (error) {
    const { reason, explanation } = explain(error)
    const advice = [reason, explanation.output, explanation.hint].filter(Boolean).join('\n')
    return { ...finding, state: 'problem', advice }
  }
}

/** A program on PATH, and its version. */
async function checkTool({ name, why, least, optional, ...tool }: Tool): Promise<Finding> {
  const minor = (text: string) => Number(text.split('.')[1])
  const kubernetes = settings.KUBERNETES_VERSION
  const skew = [-1, 1].map((step) => `1.${minor(kubernetes) + step}`).join(' to ')
  const wanted = least ? `${least} or newer` : name === 'kubectl' ? skew : 'any'
  const absent = { name, found: '-', wanted, state: optional ? 'optional' : 'missing' } as const
  const [args, pattern] = tool.version ?? ['--version', /version (\d+\.\d+(?:\.\d+)?)/]
  for (const program of tool.programs ?? [name]) {
    const found = (await outputOf(program, args)).match(pattern)?.[1]
    // There is none, or another program of that name.
    if (found === undefined) continue
    const finding = { name, found, wanted }
    if (least && host.isOlder(found, least)) {
      return {
        ...absent,
        found,
        advice: `${program} ${found} is too old; ${optional ?? `it ${why}`}`,
      }
    }
    if (name === 'kubectl' && Math.abs(minor(found) - minor(kubernetes)) > 1) {
      const advice = `kubectl ${found} is made for API servers one minor version older or newer, and the cluster has ${kubernetes}`
      return { ...finding, state: 'warning', advice }
    }
    const networks = await (name === 'QEMU' ? outputOf(program, '-netdev help') : '')
    if (/backend types/.test(networks) && !/^user$/m.test(networks)) {
      const advice = `${program} was built without the user network (slirp)`
      return { ...finding, state: 'problem', advice }
    }
    return { ...finding, state: 'ok' }
  }
  return { ...absent, advice: name === 'QEMU' && isRedHat ? noQemu : (optional ?? `it ${why}`) }
}

/** What a program prints; empty if it does not exist. Not by zx: bash itself may be missing. */
async function outputOf(program: string, args: string): Promise<string> {
  const path = await which(program, { nothrow: true })
  const words = args.split(' ').filter(Boolean)
  return new Promise((resolve) => {
    if (!path) return resolve('')
    const options = { timeout: 20_000, cwd: cluster.root }
    execFile(path, words, options, (_, stdout, stderr) => resolve(`${stdout}\n${stderr}`))
  })
}

async function checkFirmware(): Promise<Finding> {
  const { name, why } = firmware
  const { QEMU_FIRMWARE_CODE: code, QEMU_FIRMWARE_VARS: vars } = settings
  const qemu = (await which(`qemu-system-${arch}`, { nothrow: true })) ?? '/usr/bin/qemu'
  const finding = await check(name, `for ${arch}`, async (found) => {
    found.found = (await findFirmware({ arch, qemu, code, vars })).code.path
    return undefined
  })
  // A wrong setting cannot be corrected by installing a package.
  if (finding.state === 'ok' || code || vars) return finding
  return { ...finding, state: 'missing', advice: `it ${why}` }
}

/** Little memory is a warning: the machines take it only as they need it. */
async function checkMemory(finding: Finding): Promise<string | undefined> {
  const stopped = []
  for (const node of nodes) if (!(await isRunning(cluster, node))) stopped.push(node)
  const needed = stopped.reduce((sum, { memory }) => sum + memory * 2 ** 20, 0)
  const free = await freeMemory()
  Object.assign(finding, { found: formatBytes(free), wanted: formatBytes(needed) })
  if (free >= needed) return undefined
  return `the machines may use up to ${finding.wanted}: close other programs, or lower CONTROL_PLANE_MEM and WORKER_MEM in cluster.env`
}

/** Bytes that programs could have without swapping. */
async function freeMemory(): Promise<number> {
  if (os !== 'darwin') return freemem()
  // There freemem() counts only pages without any content, and macOS fills them with caches.
  const text = await outputOf('vm_stat', '')
  const pageSize = Number(text.match(/page size of (\d+) bytes/)?.[1] ?? 0)
  const pages = [...text.matchAll(/^Pages (?:free|inactive|speculative|purgeable):\s+(\d+)/gm)]
  return Math.max(freemem(), pages.reduce((sum, [, count]) => sum + Number(count), 0) * pageSize)
}

/** The ports of the machines and of their switch, unless these run already. */
async function checkPorts(finding: Finding): Promise<undefined> {
  finding.found = 'taken'
  await assertPortsFree(cluster, nodes)
  const port = settings.LAN_SWITCH_PORT
  if (!(await isPortFree('udp', port)) && !(await lanSwitchStatus(cluster))) {
    await assertFree([{ transport: 'udp', port, variable: 'LAN_SWITCH_PORT' }])
  }
  finding.found = 'free'
}

/** In WSL 2, a Windows drive is a network file system without Unix sockets and file modes. */
async function checkWindows(finding: Finding): Promise<undefined> {
  if (os !== 'linux' || !/microsoft/i.test(await outputOf('uname', '-r'))) return
  const type = (await outputOf('stat', '-f -c %T .')).trim()
  if (!/^(9p|v9fs|drvfs)$/.test(type)) return
  finding.found = 'on a Windows drive'
  throw new StepError(
    `${cluster.root} is on a Windows drive, which has no Unix sockets and file modes`,
    {
      hint: `move it to the home folder of the Linux system: cp -r ${JSON.stringify(cluster.root)} ~/`,
    },
  )
}

/** The shell commands that install what is missing, and the names of what none of them brings. */
async function findRemedy(all: readonly Finding[]) {
  const ids = [...release.matchAll(/^ID(?:_LIKE)?=(.*)$/gm)].join(' ')
  // The system's own first.
  const sorted = [...managers].sort((a, b) => +b.systems.test(ids) - +a.systems.test(ids))
  const paths = await Promise.all(sorted.map(({ name }) => which(name, { nothrow: true })))
  const manager = sorted.find((_, index) => paths[index])

  const packages = new Set<string>()
  const without: string[] = []
  let download = false
  for (const tool of tools) {
    if (!all.some(({ name, state }) => name === tool.name && state === 'missing')) continue
    const named = tool.packages.split(' ')
    const packaged = manager && (named[managers.indexOf(manager)] ?? named[0])
    if (!packaged || (isRedHat && tool.name === 'QEMU')) without.push(tool.name)
    else if (packaged === '-') download = true
    else packages.add(manager.name === 'nix' ? `nixpkgs#${packaged}` : packaged)
  }
  const commands: string[] = []
  if (manager && packages.size > 0) {
    if (manager.name === 'apt-get') commands.push('sudo apt-get update')
    commands.push(`${manager.install} ${[...packages].join(' ')}`)
  }
  if (download) {
    const steps = [
      'cd "$(mktemp -d)"',
      `curl -fLO ${kubectlUrl}`,
      `echo "$(curl -fsSL ${kubectlUrl}.sha256)  kubectl" | sha256sum -c -`,
      'sudo install -m 755 kubectl /usr/local/bin/kubectl',
    ]
    commands.push(`(${steps.join(' && ')})`)
  }
  const isRoot = process.getuid?.() === 0
  const typed = commands.map((line) => (isRoot ? line.replaceAll('sudo ', '') : line))
  return { commands: typed, without }
}

/** The table, and below it what there is to say about each line that is not ok. */
function report(all: readonly Finding[]): string {
  const marks = { ok: '✓', optional: '-', warning: '!', missing: '✗', problem: '✗' } as const
  const rows = all.map(({ name, found, wanted, state }) => [
    marks[state],
    name,
    found,
    wanted,
    state,
  ])
  const advice = all.flatMap(({ name, state, advice: text }) =>
    text ? [`${marks[state]} ${name}: ${text.replaceAll('\n', '\n    ')}`] : [],
  )
  const table = formatTable(['', 'tool', 'found', 'wanted', 'state'], rows)
  return [table, ...(advice.length > 0 ? [''] : []), ...advice].join('\n')
}

async function confirm(commands: readonly string[]): Promise<void> {
  if (!process.stdin.isTTY) {
    throw new StepError('--install asks before it runs commands, but there is no terminal', {
      output: commands.join('\n'),
      hint: 'add --yes to run them without asking',
    })
  }
  const terminal = createInterface({ input: process.stdin, output: process.stderr })
  const answer = await terminal.question(`Run this?\n\n  ${commands.join('\n  ')}\n\n[y/N] `)
  terminal.close()
  if (!/^y(es)?$/i.test(answer.trim())) throw new StepError('nothing was installed')
}

/** Runs the commands in the terminal, where sudo can ask. A failing one does not stop the others. */
async function runAll(commands: readonly string[]): Promise<void> {
  for (const command of commands) {
    console.error(`$ ${command}`)
    // stdout is for the report only.
    const stdio = ['inherit', process.stderr, process.stderr] as const
    const child = spawn('sh', ['-c', command], { stdio: [...stdio] })
    const [status, signal] = await once(child, 'close')
    if (status !== 0) console.error(`! ended with ${signal ?? `status ${status}`}: ${command}`)
  }
}
