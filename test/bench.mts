// How long our steps take compared with the programs that they replace, or with themselves on a
// larger cluster: in turn, several rounds, medians. `--json` prints the figures as JSON. Ends with
// status 1 if a ratio is above its goal.
import { spawn } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { cp, mkdir, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises'
import { availableParallelism, cpus, loadavg, tmpdir } from 'node:os'
import { delimiter, join } from 'node:path'
import { setTimeout } from 'node:timers/promises'
import { parse } from 'yaml'
import { $ } from 'zx'
import { authorityOf, type CertificateEntry, certificatesOf } from '../lib/certificates.mts'
import { type Cluster, loadCluster } from '../lib/cluster.mts'
import { ConsoleShell } from '../lib/console-shell.mts'
import { spawn as spawnInTerminal } from '../lib/expect.mts'
import { formatTable } from '../lib/format.mts'
import { ensureLanSwitch } from '../lib/lan.mts'
import type { Snapshot } from '../lib/snapshots.mts'
import { nodeList, startFakeApiServer } from './api-server.mts'
import { type Checkout, makeCheckout, projectRoot, run } from './checkout.mts'
import { HollowMachines } from './hollow-machines.mts'
import { installerFiles, makeIso } from './installer-iso.mts'
import { makeLiveSystem } from './live-system.mts'
import { freePorts } from './ports.mts'
import { makeMachines } from './uefi-machine.mts'

interface Contest {
  name: string
  /** Ours, and what it is compared with. */
  between: [string, string]
  /** Our median, divided by the other's, has to be at most this. */
  goal: number
  rounds: number
  prepare?(): Promise<unknown>
  /** What takes the time, or the seconds that it took itself. */
  ours(): Promise<unknown>
  /** The same, or a limit in seconds. */
  other(): Promise<unknown>
}

const steps = [
  'generate-certs',
  'generate-kubeconfigs',
  'generate-encryption-config',
  'generate-nocloud-iso',
]
const scratch = await mkdtemp(join(tmpdir(), 'bench-'))
const checkouts: Checkout[] = []
const cleanUp: (() => Promise<unknown>)[] = []
try {
  const three = await prepared(3)
  const cluster = loadCluster({ root: three.root, env: {} })
  await prepareCfssl(cluster)
  const kubeconfigs = await prepareKubectl(three)
  const [status3, status5, status10] = [await statusOf(3), await statusOf(5), await statusOf(10)]
  const snapshots = snapshotsOfMachines()
  const contests: Contest[] = [
    {
      name: `${certificatesOf(cluster).length + 1} certificates`,
      between: ['generate-certs', 'cfssl'],
      goal: 0.6,
      // The time to find a prime is random; the median needs some rounds.
      rounds: 9,
      prepare: () => rm(three.path('tls'), { recursive: true }),
      ours: () => must(three, 'bin/generate-certs.mts'),
      other: () => must({ root: scratch }, 'bash', ['-e', 'cfssl.sh']),
    },
    {
      name: `${kubeconfigs} kubeconfigs`,
      between: ['generate-kubeconfigs', 'kubectl config'],
      goal: 0.3,
      rounds: 5,
      ours: () => must(three, 'bin/generate-kubeconfigs.mts', ['--force']),
      other: () => must({ root: scratch }, 'bash', ['-e', 'kubectl.sh']),
    },
    {
      name: 'everything before an installation',
      between: ['make pki configs', 'cfssl, kubectl config, xorriso'],
      goal: 0.5,
      rounds: 7,
      prepare: () => forget(three),
      ours: () => prepare(three),
      other: () => must({ root: scratch }, 'bash', ['-e', 'prepare.sh']),
    },
    {
      name: 'start of a script',
      between: ['directly', 'by tsx'],
      goal: 1.2,
      rounds: 7,
      ours: () => must(three, 'bin/generate-certs.mts', ['--help']),
      other: () =>
        must({ root: projectRoot }, 'node_modules/.bin/tsx', [
          three.path('bin', 'generate-certs.mts'),
          '--help',
        ]),
    },
    {
      // The certificates, which take random time, are compared above.
      name: 'kubeconfigs and configurations',
      between: ['50 nodes', '3 nodes, times 50/3'],
      goal: 1,
      rounds: 3,
      ...(await preparations()),
    },
    {
      name: 'cluster-status',
      between: ['5 nodes', '3 nodes'],
      goal: 1.5,
      rounds: 5,
      ours: status5,
      other: status3,
    },
    {
      name: 'cluster-status',
      between: ['10 nodes', '3 nodes'],
      goal: 1.5,
      rounds: 5,
      ours: status10,
      other: status3,
    },
    {
      name: 'upload over the console',
      between: ['240 KB', '60 KB, times 4'],
      goal: 1.2,
      rounds: 3,
      ...(await uploads()),
    },
    {
      name: 'megabyte over the LAN',
      between: ['our switch', 'vde_switch'],
      goal: 1.11,
      rounds: 5,
      ...(await switches(cluster)),
    },
    {
      name: 'installation of three machines',
      between: ['at once', 'one after another'],
      goal: 0.6,
      rounds: 3,
      ...(await installations()),
    },
    {
      name: 'snapshot of three machines',
      between: ['pause', 'goal'],
      goal: 1,
      rounds: 3,
      prepare: snapshots.prepare,
      ours: snapshots.pause,
      other: async () => 2.5,
    },
    {
      name: 'restore of three machines',
      between: ['with memory', 'of the disks alone'],
      goal: 2,
      rounds: 3,
      prepare: snapshots.prepare,
      ours: () => snapshots.restore('live'),
      other: () => snapshots.restore('disks'),
    },
  ]
  const results = []
  for (const contest of contests) {
    process.stderr.write(`${contest.name} …\n`)
    const [ours, other] = await measure(contest)
    const ratio = ours / other
    if (ratio > contest.goal) process.exitCode = 1
    const { name, between, goal } = contest
    results.push({ name, between, ours, other, ratio, goal, met: ratio <= goal })
  }
  const [load = 0] = loadavg()
  const computer = `${availableParallelism()} × ${cpus()[0]?.model.trim() ?? '?'}, Node ${process.version}`
  if (process.argv.includes('--json')) {
    console.log(JSON.stringify({ computer, load, results }, null, 2))
  } else {
    if (load > availableParallelism() + 1) {
      console.log(`This computer is busy (load ${load.toFixed(1)}): the ratios mean little.`)
    }
    const ms = (seconds: number) => `${(seconds * 1000).toFixed(0)} ms`
    const rows = results.map(({ name, between, ours, other, ratio, goal, met }) => [
      ...[name, between.join(' / '), ms(ours), ms(other), ratio.toFixed(2)],
      `${met ? 'at most' : 'NOT at most'} ${goal}`,
    ])
    const header = ['MEDIANS OF', 'COMPARED', 'FIRST', 'SECOND', 'RATIO', 'GOAL']
    console.log(`${computer}\n\n${formatTable(header, rows)}`)
  }
} finally {
  for (const undo of cleanUp.reverse()) await undo()
  await rm(scratch, { recursive: true, force: true })
  for (const checkout of checkouts) await checkout.remove()
}

/** Medians of both, in seconds. */
async function measure(contest: Contest): Promise<[number, number]> {
  const ours: number[] = []
  const other: number[] = []
  for (let round = 0; round < contest.rounds; round += 1) {
    await contest.prepare?.()
    ours.push(await timed(contest.ours))
    other.push(await timed(contest.other))
  }
  return [median(ours), median(other)]
}

async function timed(work: () => Promise<unknown>): Promise<number> {
  const start = performance.now()
  const own = await work()
  return typeof own === 'number' ? own : (performance.now() - start) / 1000
}

function median(values: readonly number[]): number {
  return values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)] ?? Number.NaN
}

async function must(
  where: Pick<Checkout, 'root'>,
  program: string,
  args: string[] = [],
  env: Record<string, string> = {},
): Promise<string> {
  const { exitCode, stderr, stdout } = await run(where, program, args, { env })
  if (exitCode !== 0) throw new Error(`${program} ${args.join(' ')} failed:\n${stderr}`)
  return stdout
}

async function prepare(checkout: Checkout): Promise<void> {
  for (const step of steps) await must(checkout, `bin/${step}.mts`)
}

async function forget(checkout: Checkout): Promise<void> {
  const made = ['tls', 'cloud-init', 'configs/encryption-config.yaml']
  for (const path of made) await rm(checkout.path(path), { recursive: true, force: true })
  for (const file of await readdir(checkout.path('configs'))) {
    if (file.endsWith('.kubeconfig')) await rm(checkout.path('configs', file))
  }
}

/** A checkout with so many nodes, ready for installation. */
async function prepared(count: number): Promise<Checkout> {
  const more = Array.from({ length: count - 3 }, (_, index) => `w${index + 3}`)
  const ports = await freePorts(more.length)
  const settings: Record<string, string | number> = {
    WORKER_NODES: ['sigma', 'gamma', ...more].join(' '),
  }
  for (const [index, name] of more.entries()) {
    settings[`SSH_PORT_${name}`] = ports[index] ?? 0
    settings[`NODE_IP_${name}`] = `192.168.100.${20 + index}`
    settings[`MAC_${name}`] = `52:54:00:00:01:${(index + 16).toString(16)}`
    settings[`POD_CIDR_${name}`] = `10.200.${index + 3}.0/24`
  }
  const checkout = await makeCheckout({ settings })
  checkouts.push(checkout)
  await prepare(checkout)
  return checkout
}

type Both = Pick<Contest, 'ours' | 'other'>

async function preparations(): Promise<Both> {
  const [few, many] = [await prepared(3), await prepared(50)]
  const again = async (checkout: Checkout, factor: number) => {
    const began = performance.now()
    await must(checkout, 'bin/generate-kubeconfigs.mts', ['--force'])
    await must(checkout, 'bin/generate-nocloud-iso.mts')
    return ((performance.now() - began) / 1000) * factor
  }
  return { ours: () => again(many, 1), other: () => again(few, 50 / 3) }
}

/** Machines with a real sshd; the API server answers what a healthy one does. */
async function statusOf(count: number): Promise<() => Promise<unknown>> {
  const checkout = await prepared(count)
  const { nodes, workers } = loadCluster({ root: checkout.root, env: {} })
  const machines = new HollowMachines(checkout)
  const names = nodes.map(({ name }) => name)
  await machines.start(...names)
  cleanUp.push(() => machines.stop(...names))
  const api = await startFakeApiServer(checkout)
  cleanUp.push(() => api.stop())
  const ready = workers.map(({ name }) => [name, { ready: true }] as const)
  const list = { kind: 'PodList', apiVersion: 'v1', items: [] }
  Object.assign(api.answers, {
    '/readyz': { body: 'readyz check passed' },
    '/version': { body: JSON.stringify({ gitVersion: 'v1.36.3' }) },
    '/api/v1/nodes': { body: nodeList(Object.fromEntries(ready)) },
    '/api/v1/pods': { body: JSON.stringify(list) },
  })
  const ask = () => must(checkout, 'bin/cluster-status.mts', ['--json', '--timeout', '60'])
  // The first opens the ssh connections that later ones share.
  await ask()
  return ask
}

/** Real QEMUs whose machines have no operating system, so their firmware runs: nothing boots. */
function snapshotsOfMachines() {
  let root = ''
  const script = (name: string, ...args: string[]) => must({ root }, `bin/${name}.mts`, args)
  return {
    /** Not earlier than they are needed: they take processor time. */
    async prepare(): Promise<void> {
      if (root) return
      const { checkout, cluster, start, remove } = await makeMachines()
      cleanUp.push(remove)
      root = checkout.root
      for (const node of cluster.nodes) await start(node)
      await script('snapshot', 'live')
      await script('snapshot', '--disks-only', 'disks')
    },
    /** Seconds for which the machines are paused. */
    async pause(): Promise<number> {
      const taken = await script('snapshot', '--json', 'measured')
      await script('snapshot', '--delete', 'measured')
      return (JSON.parse(taken) as Snapshot).pause
    },
    /** Until the machines run. */
    restore: (name: string) => script('restore', '--start-only', name),
  }
}

/** Into a shell on a terminal, as the installer's console is. */
async function uploads(): Promise<Both> {
  const session = spawnInTerminal('bash', ['--norc', '--noprofile'], { name: 'bench' })
  cleanUp.push(async () => {
    await session.close()
  })
  const shell = await ConsoleShell.open(session, { silence: ':' })
  const upload = async (size: number, factor: number) => {
    const began = performance.now()
    await shell.upload(randomBytes(size), join(scratch, 'uploaded'))
    return ((performance.now() - began) / 1000) * factor
  }
  return { ours: () => upload(240_000, 1), other: () => upload(60_000, 4) }
}

/** Seconds that a megabyte takes, in frames of full size. */
async function switches(cluster: Cluster): Promise<Both> {
  await ensureLanSwitch(cluster)
  const folder = join(scratch, 'vde')
  // It ends when its input does.
  const vde = spawn('vde_switch', ['--sock', folder], { stdio: ['pipe', 'ignore', 'inherit'] })
  cleanUp.push(async () => vde.stdin?.end())
  await setTimeout(1000)
  const through = async (...args: string[]) => {
    const script = join(import.meta.dirname, 'lan-throughput.py')
    const { stdout } = await $({
      quiet: true,
      stdio: ['ignore', 'pipe', 'inherit'],
    })`python3 ${script} ${args}`
    return 1 / Number(stdout)
  }
  const [from, to] = cluster.workers.map(({ lanPort }) => `${lanPort}`)
  const { LAN_SWITCH_PORT } = cluster.settings
  return {
    ours: () => through('udp', `${LAN_SWITCH_PORT}`, from ?? '', to ?? ''),
    other: () => through('vde', folder),
  }
}

/** Machines without emulation, which start into something like the installer. */
async function installations(): Promise<Both> {
  const checkout = await prepared(3)
  await checkout.set({ QEMU_ACCEL: 'tcg', DISK_SIZE: 2 })
  const system = await makeLiveSystem()
  cleanUp.push(() => system.remove())
  const iso = await makeIso(checkout.path('installer.iso'), installerFiles)
  const { nodes } = loadCluster({ root: checkout.root, env: {} })
  const path = `${system.folder}${delimiter}${process.env.PATH}`
  const env = { ...system.env(), PATH: path, http_proxy: '', NIX_SSL_CERT_FILE: '' }
  const install = (...names: string[]) =>
    must(checkout, 'bin/provision.mts', ['--iso', '--force', '--iso-file', iso, ...names], env)
  const names = nodes.map(({ name }) => name)
  return {
    ours: () => install(...names),
    other: async () => {
      for (const name of names) await install(name)
    },
  }
}

/** The same table for cfssl: a CSR and a line of shell for each certificate. */
async function prepareCfssl(cluster: Cluster): Promise<void> {
  const expiry = `${cluster.settings.CERT_DAYS * 24}h`
  const uses = ['signing', 'key encipherment', 'server auth', 'client auth']
  await writeJson('ca-config.json', {
    signing: { default: { expiry }, profiles: { kubernetes: { usages: uses, expiry } } },
  })
  await writeJson('ca-csr.json', csrOf(authorityOf(cluster)))
  const lines = ['cfssl gencert -loglevel=4 -initca ca-csr.json | cfssljson -bare ca']
  for (const entry of certificatesOf(cluster)) {
    await writeJson(`${entry.name}-csr.json`, csrOf(entry))
    const ca = '-ca=ca.pem -ca-key=ca-key.pem -config=ca-config.json -profile=kubernetes'
    const csr = `${entry.name}-csr.json`
    lines.push(`cfssl gencert -loglevel=4 ${ca} ${csr} | cfssljson -bare ${entry.name}`)
  }
  await writeFile(join(scratch, 'cfssl.sh'), lines.join('\n'))
}

function csrOf({ subject: { C, ST, L, O, OU, CN }, sans }: CertificateEntry): object {
  return { CN, hosts: sans, key: { algo: 'rsa', size: 2048 }, names: [{ C, ST, L, O, OU }] }
}

/**
 * The four commands with which kubectl writes a kubeconfig, for each of ours; and all of a
 * preparation, which ends with an image of its files for each node.
 *
 * @returns how many kubeconfigs
 */
async function prepareKubectl(checkout: Checkout): Promise<number> {
  const files = (await readdir(checkout.path('configs'))).filter((file) => /kubeconfig$/.test(file))
  const lines: string[] = []
  for (const file of files) {
    const { clusters, users } = parse(await readFile(checkout.path('configs', file), 'utf8'))
    const [{ name, cluster }] = clusters
    const tls = checkout.path('tls')
    const pem = join(tls, file.replace('.kubeconfig', ''))
    const user = users[0].name
    for (const command of [
      `set-cluster ${name} --certificate-authority=${tls}/ca.pem --embed-certs=true --server=${cluster.server}`,
      `set-credentials ${user} --client-certificate=${pem}.pem --client-key=${pem}-key.pem --embed-certs=true`,
      `set-context default --cluster=${name} --user=${user}`,
      'use-context default',
    ]) {
      lines.push(`kubectl config --kubeconfig=${file} ${command}`)
    }
  }
  await writeFile(join(scratch, 'kubectl.sh'), lines.join('\n'))
  await mkdir(join(scratch, 'nodes'))
  await cp(checkout.path('cloud-init'), join(scratch, 'nodes'), { recursive: true })
  const images = (await readdir(join(scratch, 'nodes'))).map(
    (node) =>
      `xorriso -as genisoimage -quiet -volid cidata -joliet -rock -o ${node}.iso nodes/${node}`,
  )
  const all = ['bash -e cfssl.sh', 'bash -e kubectl.sh', 'openssl rand -base64 32 >key', ...images]
  await writeFile(join(scratch, 'prepare.sh'), all.join('\n'))
  return files.length
}

async function writeJson(name: string, value: unknown): Promise<void> {
  await writeFile(join(scratch, name), JSON.stringify(value))
}
