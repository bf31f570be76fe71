#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// Whether this computer can run the machines: programs, firmware, accelerator, memory, disk, ports.
import { spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { freemem } from 'node:os'
import { createInterface } from 'node:readline/promises'
import { $, which } from 'zx/core'
import { loadCluster } from '../lib/cluster.mts'
import { explain, StepError } from '../lib/errors.mts'
import { readIfThere } from '../lib/files.mts'
import { findFirmware } from '../lib/firmware.mts'
import { formatBytes, formatTable } from '../lib/format.mts'
import * as host from '../lib/host.mts'
import { bsdtar } from '../lib/iso.mts'
import { lanSwitchStatus } from '../lib/lan.mts'
import { assertFree, commandLines, isPortFree } from '../lib/processes.mts'
import { refuseIf, script } from '../lib/script.mts'
import { assertPortsFree, assertRoomForDisks, freeBytes, hasDisk, isRunning } from '../lib/vm.mts'

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
    leftovers: { help: 'list running processes and generated files of this project instead' },
  },
  examples: ['./bin/check-prereqs.mts --install', './bin/check-prereqs.mts --leftovers'],
})
refuseIf(flags.yes && !flags.install, '--yes is for --install')
refuseIf(flags.leftovers && (flags.json || flags.install), '--leftovers takes no other flag')

const cluster = loadCluster()
if (flags.leftovers) await showLeftovers()
const { settings, nodes } = cluster
const { KUBERNETES_VERSION, QEMU_FIRMWARE_CODE: code, QEMU_FIRMWARE_VARS: vars } = settings
const os = host.detectSystem()
const arch = await host.detectArchitecture(os)
const isX86 = arch === 'x86_64'
const [deb, rpm, go] = isX86 ? ['x86', 'x86', 'amd64'] : ['arm', 'aarch64', 'arm64']
const release = os === 'darwin' ? 'ID=darwin' : ((await readIfThere('/etc/os-release')) ?? '')
const isRedHat = /^ID(_LIKE)?=.*\b(rhel|centos)\b/m.test(release)
const noQemu = `${release.match(/^NAME="?([^"\n]*)/m)?.[1]} has no qemu-system-${arch}, and its qemu-kvm lacks the user network (slirp): install QEMU with Nix or Homebrew, or use Fedora`
const newQemu = `${host.leastQemuVersion} or newer`
const [, minor = 0] = KUBERNETES_VERSION.split('.').map(Number)
const skew = `1.${minor - 1} to 1.${minor + 1}`
const tar = await bsdtar().catch(() => 'bsdtar')
const loadsHelm = `the scripts that need it download Helm ${settings.HELM_VERSION} to tools/`

/** Programs: the command that prints the version, what precedes it there, what is wanted and why. */
const programs = [
  ['QEMU', `qemu-system-${arch} --version`, 'version ', newQemu, 'runs the machines'],
  ['qemu-img', 'qemu-img --version', 'version ', newQemu, 'creates disks and their snapshots'],
  ['UEFI firmware', '', '', `for ${arch}`, 'boots the machines'],
  ['bsdtar', `${tar} --version`, 'bsdtar ', 'any', 'reads the installer ISO (GNU tar cannot)'],
  ['ssh', 'ssh -V', 'OpenSSH.*_', 'any', 'connects to the machines'],
  ['curl', 'curl --version', 'curl ', 'any', 'downloads the installer ISO'],
  ['kubectl', 'kubectl version --client -o json', '"v', skew, 'talks to the API server'],
  ['helm', 'helm version', 'v', '3.14 or newer', loadsHelm],
  ['bash', 'bash --version', 'version ', 'any', 'runs the commands in the scripts'],
  ['make', 'make --version', 'GNU Make ', 'any', "runs the Makefile's targets"],
] as const

const sudo = process.getuid?.() === 0 ? '' : 'sudo '
/** Package managers: the systems that they belong to, by os-release(5), and how they install. */
const managers = [
  ['brew', /darwin/, 'brew install'],
  ['apt-get', /debian|ubuntu/, `${sudo}apt-get install --yes`],
  ['dnf', /fedora|rhel/, `${sudo}dnf install --assumeyes`],
  ['pacman', /arch/, `${sudo}pacman -S --needed --noconfirm`],
  ['zypper', /suse/, `${sudo}zypper --non-interactive install`],
  ['nix', /nixos/, "nix --extra-experimental-features 'nix-command flakes' profile install"],
] as const

/** Packages in the order of `managers`, or one name for all; "-": there is none new enough. */
const packages: Readonly<Record<string, string>> = {
  QEMU: `qemu qemu-system-${deb} qemu-system-${rpm} qemu-system-${rpm} qemu-${deb} qemu`,
  'qemu-img': 'qemu qemu-utils qemu-img qemu-img qemu-tools qemu',
  'UEFI firmware': isX86
    ? 'qemu ovmf edk2-ovmf edk2-ovmf qemu-ovmf-x86_64 qemu'
    : 'qemu qemu-efi-aarch64 edk2-aarch64 edk2-aarch64 qemu-uefi-aarch64 qemu',
  bsdtar: 'libarchive libarchive-tools bsdtar libarchive bsdtar libarchive',
  ssh: 'openssh openssh-client openssh-clients openssh openssh-clients openssh',
  // The other systems' packages are years old, or named after one minor version.
  kubectl: 'kubernetes-cli - - kubectl - kubectl',
  make: 'make make make make make gnumake',
}
// For systems that do not package it; a .sha256 is next to it.
const kubectlUrl = `https://dl.k8s.io/release/v${KUBERNETES_VERSION}/bin/linux/${go}/kubectl`
const verify = `echo "$(curl -fsSL ${kubectlUrl}.sha256)  kubectl" | sha256sum -c -`
const copy = `${sudo}install -m 755 kubectl /usr/local/bin/kubectl`
const folder = `cd "$(mktemp -d)" && trap 'rm -r "$PWD"' EXIT`
const getKubectl = `(${folder} && curl -fLO ${kubectlUrl} && ${verify} && ${copy})`

/** A `warning` works, perhaps slowly; `missing` can be installed; a `problem` cannot. */
const marks = { ok: '✓', optional: '-', warning: '!', missing: '✗', problem: '✗' } as const
interface Finding {
  name: string
  found: string
  wanted: string
  state: keyof typeof marks
  advice?: string // what is wrong and what to do about it
}
type Check = (finding: Finding) => Promise<string | undefined>

let result = await checkAll()
if (flags.install && result.commands.length > 0) {
  if (!flags.json) console.log(`${report(result.findings)}\n`)
  await install(result.commands)
  result = await checkAll()
}
const { findings, commands, without } = result
if (flags.json) console.log(JSON.stringify(result, null, 2))
else {
  console.log(report(findings))
  if (commands.length > 0) {
    console.log(`\nTo install what is missing (--install does it):\n\n  ${commands.join('\n  ')}`)
  }
  if (without.length > 0) {
    console.log(`\nNo known package manager here has ${without.join(', ')}: install by hand.`)
  }
}
const wrong = findings.filter(({ state }) => marks[state] === '✗').map(({ name }) => name)
if (wrong.length > 0) throw new StepError(`missing prerequisites: ${wrong.join(', ')}`)

/** Processes with our path in their command line, and files that the scripts have written. */
async function showLeftovers(): Promise<never> {
  const ours = ['run/', 'lib/lan-switch.mts', 'bin/', 'rehearsal/', 'namespaces/']
  const rows = [...(await commandLines())].flatMap(([pid, args]) => {
    // This script, and clean, which may have run it.
    if (pid === process.pid || pid === process.ppid) return []
    const isOurs = ours.some((path) => args.includes(cluster.path(path)))
    return isOurs ? [[`${pid}`, args.slice(0, 100)]] : []
  })
  console.log(rows.length > 0 ? formatTable(['PID', 'PROCESS'], rows) : 'No process is running.')
  console.log((await $`./bin/clean.mts --list --disks`).stdout.trimEnd())
  process.exit(0)
}

/** All checks, in the order of the report, and what would install what is missing. */
async function checkAll() {
  const findings: Finding[] = await Promise.all([
    // lib/launch.mjs has refused every older one.
    { name: 'Node', found: process.versions.node, wanted: '20.11 or newer', state: 'ok' as const },
    ...programs.map((row) => check(row[0], row[3], (finding) => checkProgram(row, finding))),
    check('accelerator', os === 'darwin' ? 'hvf' : 'kvm', async (finding) => {
      const { accel, warning } = await host.detectAccelerator(settings.QEMU_ACCEL, os)
      finding.found = accel
      return warning
    }),
    check('free memory', '', checkMemory),
    check('free disk', '', checkDisk),
    check('ports', 'free', checkPorts),
    check('checkout', 'on a Linux file system', checkWindows),
  ])
  const shown = findings.filter(({ name, state }) => name !== 'checkout' || state !== 'ok')
  return { findings: shown, ...remedyFor(shown) }
}

/** One check, which may return a warning or other advice; what it throws is a `problem`. */
async function check(name: string, wanted: string, work: Check): Promise<Finding> {
  const finding: Finding = { name, found: '-', wanted, state: 'ok' }
  try {
    const advice = await work(finding)
    const state = finding.state === 'ok' ? 'warning' : finding.state
    return advice ? { ...finding, state, advice } : finding
  } catch (error) {
    const { reason, explanation } = explain(error)
    const advice = [reason, explanation.output, explanation.hint].filter(Boolean).join('\n')
    return { ...finding, state: 'problem', advice }
  }
}

/** A program on PATH, and its version. */
async function checkProgram(row: (typeof programs)[number], finding: Finding) {
  const [name, command, before, wanted, why] = row
  const purpose = name === 'helm' ? why : `it ${why}`
  finding.state = name === 'helm' ? 'optional' : 'missing'
  if (!command) return checkFirmware(finding, purpose)
  const [program] = command.split(' ')
  // There may be none, or another program of that name.
  const found = outputOf(command).match(`${before}(\\d+\\.[\\d.]*\\d)`)?.[1]
  if (!found) return name === 'QEMU' && isRedHat ? noQemu : purpose
  finding.found = found
  const least = wanted.match(/(\S+) or newer/)?.[1]
  if (least && host.isOlder(found, least)) return `${program} ${found} is too old; ${purpose}`
  finding.state = 'ok'
  if (name === 'kubectl' && Math.abs(Number(found.split('.')[1]) - minor) > 1) {
    return `kubectl ${found} is made for API servers one minor version older or newer, and the cluster has ${KUBERNETES_VERSION}`
  }
  const networks = name === 'QEMU' ? outputOf(`${program} -netdev help`) : ''
  if (!/backend types/.test(networks) || /^user$/m.test(networks)) return undefined
  throw new StepError(`${program} was built without the user network (slirp)`)
}

/** What a program prints; nothing if it does not exist. Not by zx: bash itself may be missing. */
function outputOf(command: string): string {
  const [program = '', ...args] = command.split(' ')
  const options = { cwd: cluster.root, timeout: 20_000, encoding: 'utf8' } as const
  const { stdout, stderr } = spawnSync(program, args, options)
  return [stdout, stderr].join('\n')
}

async function checkFirmware(finding: Finding, purpose: string): Promise<string | undefined> {
  const qemu = (await which(`qemu-system-${arch}`, { nothrow: true })) ?? '/usr/bin/qemu'
  const firmware = await findFirmware({ arch, qemu, code, vars }).catch((error: unknown) => {
    // A wrong setting cannot be corrected by installing a package.
    if (code || vars) throw error
  })
  if (!firmware) return purpose
  Object.assign(finding, { found: firmware.code.path, state: 'ok' })
}

/** Little memory is a warning: the machines take it only as they need it. */
async function checkMemory(finding: Finding): Promise<string | undefined> {
  let needed = 0
  for (const node of nodes) if (!(await isRunning(cluster, node))) needed += node.memory * 2 ** 20
  // macOS fills its memory with caches: freemem() does not count those pages, vm_stat does.
  const text = os === 'darwin' ? outputOf('vm_stat') : ''
  const size = Number(text.match(/page size of (\d+) bytes/)?.[1] ?? 0)
  const pages = text.matchAll(/^Pages (?:free|inactive|speculative|purgeable):\s+(\d+)/gm)
  const counted = [...pages].reduce((sum, [, count]) => sum + Number(count) * size, 0)
  const free = Math.max(freemem(), counted)
  Object.assign(finding, { found: formatBytes(free), wanted: formatBytes(needed) })
  if (free >= needed) return undefined
  return `the machines may use up to ${finding.wanted}: close other programs, or lower CONTROL_PLANE_MEM and WORKER_MEM in cluster.env`
}

async function checkDisk(finding: Finding): Promise<string | undefined> {
  const added = nodes.filter((node) => !hasDisk(cluster, node))
  finding.wanted = `for ${added.length} new ${added.length === 1 ? 'machine' : 'machines'}`
  finding.found = formatBytes(await freeBytes(cluster.path('images')))
  return assertRoomForDisks(cluster, added)
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
  if (os !== 'linux' || !/microsoft/i.test(outputOf('uname -r'))) return
  if (!/^(9p|v9fs|drvfs)$/.test(outputOf('stat -f -c %T .').trim())) return
  finding.found = 'on a Windows drive'
  const reason = `${cluster.root} is on a Windows drive, which has no Unix sockets and file modes`
  const copy = `cp -r ${JSON.stringify(cluster.root)} ~/`
  throw new StepError(reason, { hint: `copy it to your Linux home folder: ${copy}` })
}

/** The shell commands that install what is missing, and the names of what none of them brings. */
function remedyFor(findings: readonly Finding[]) {
  const ids = [...release.matchAll(/^ID(?:_LIKE)?=(.*)$/gm)].join(' ')
  // The system's own first.
  const sorted = [...managers].sort(([, a], [, b]) => +b.test(ids) - +a.test(ids))
  const manager = sorted.find(([name]) => which.sync(name, { nothrow: true }))
  const chosen = new Set<string>()
  const without: string[] = []
  for (const { name } of findings.filter(({ state }) => state === 'missing')) {
    if (!manager || (isRedHat && name === 'QEMU')) without.push(name)
    else chosen.add(packages[name]?.split(' ')[managers.indexOf(manager)] ?? name)
  }
  const commands = chosen.delete('-') ? [getKubectl] : []
  if (manager && chosen.size > 0) {
    const [program, , install] = manager
    commands.unshift([install, ...chosen].join(program === 'nix' ? ' nixpkgs#' : ' '))
    if (program === 'apt-get') commands.unshift(`${sudo}apt-get update`)
  }
  return { commands, without }
}

/** The table, and below it what there is to say about each line that is not ok. */
function report(findings: readonly Finding[]): string {
  const rows = findings.map((one) => [marks[one.state], one.name, one.found, one.wanted, one.state])
  const advice = findings.flatMap(({ name, state, advice: text }) =>
    text ? [`${marks[state]} ${name}: ${text.replaceAll('\n', '\n    ')}`] : [],
  )
  const table = formatTable(['', 'tool', 'found', 'wanted', 'state'], rows)
  return [table, ...(advice.length > 0 ? ['', ...advice] : [])].join('\n')
}

/** Runs the commands in the terminal, where sudo can ask. A failing one does not stop the others. */
async function install(commands: readonly string[]): Promise<void> {
  if (!flags.yes && !process.stdin.isTTY) {
    const reason = '--install asks before it runs commands, but there is no terminal'
    const hint = 'add --yes to run them without asking'
    throw new StepError(reason, { output: commands.join('\n'), hint })
  }
  if (!flags.yes) {
    const terminal = createInterface({ input: process.stdin, output: process.stderr })
    const answer = await terminal.question(`Run this?\n\n  ${commands.join('\n  ')}\n\n[y/N] `)
    terminal.close()
    if (!/^y(es)?$/i.test(answer.trim())) throw new StepError('nothing was installed')
  }
  for (const command of commands) {
    console.error(`$ ${command}`)
    // stdout is for the report only.
    const child = spawn('sh', ['-c', command], { stdio: ['inherit', 2, 2] })
    const [status, signal] = await once(child, 'close')
    if (status !== 0) console.error(`! ended with ${signal ?? `status ${status}`}: ${command}`)
  }
}
