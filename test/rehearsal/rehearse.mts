// The rehearsal: the project's own scripts, unchanged, against the stand-in for the NixOS
// installer. `make rehearse` calls it; its settings are variables, as they are Make's:
//   YES=1        install the packages that it needs
//   NODES=alpha  only these nodes
//   KEEP=1       leave the machines running in rehearsal/
//   KUBE_BIN_DIR=FOLDER  Kubernetes programs for the machines
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync } from 'node:fs'
import { stat } from 'node:fs/promises'
import { join, resolve } from 'node:path'
import { type Cluster, chooseNodes, loadCluster, type Node } from '../../lib/cluster.mts'
import { interruption } from '../../lib/interrupt.mts'
import { withLock } from '../../lib/lock.mts'
import { Machine } from '../../lib/machine/machine.mts'
import { filesOf } from '../../lib/qemu/machine-files.mts'
import { describeError, StepError } from '../../lib/step-error.mts'
import { formatDuration, inParallel } from '../../lib/steps.mts'
import { formatTable } from '../../lib/table.mts'
import { buildIso } from './build-iso.mts'
import { ensureHostPackages } from './host-packages.mts'
import { makeRehearsalFolder, rehearsalFolder } from './rehearsal-folder.mts'

const { YES, KEEP, NODES, KUBE_BIN_DIR } = process.env
const signal = interruption()
/** What took how long, in milliseconds. */
const times: [what: string, took: number][] = []

try {
  const cluster = loadCluster()
  const chosen = chooseNodes(cluster, (NODES ?? '').split(/[\s,]+/).filter(Boolean))
  await ensureHostPackages(Boolean(YES))
  await withLock(`${rehearsalFolder}.lock`, 'rehearsing', () => rehearse(cluster, chosen))
} catch (error) {
  console.error(`rehearse: ${describeError(error)}`)
  process.exitCode = error instanceof StepError ? (error.explanation.exitCode ?? 1) : 1
}

async function rehearse(real: Cluster, chosen: readonly Node[]): Promise<void> {
  if (existsSync(join(rehearsalFolder, 'run'))) await script('shutdown')

  const programs = KUBE_BIN_DIR ? [resolve(KUBE_BIN_DIR)] : []
  const iso = await timed('the stand-in for the ISO', () => buildIso(programs))
  await makeRehearsalFolder(real, iso)
  const cluster = loadCluster({ root: rehearsalFolder })
  const nodes = chosen.map(({ name }) => cluster.node(name))
  try {
    if (nodes.length === cluster.nodes.length) {
      await timed('bootstrap-cluster, all of it', () => script('bootstrap-cluster'))
    } else {
      await someOnly(cluster, nodes)
    }
    const machines = await Promise.all(nodes.map((node) => inspect(cluster, node)))
    const steps = times.map(([what, took]) => [what, formatDuration(took)])
    console.log(`\n${formatTable(['step', 'took'], steps)}`)
    const header = ['machine', 'state', 'failed units', 'installed in', 'started in', 'memory used']
    console.log(`\n${formatTable(header, machines)}`)
  } finally {
    if (KEEP) console.error(`\nthe machines run on: cd ${rehearsalFolder} (end them: make down)`)
    else await script('shutdown').catch((error) => console.error(describeError(error)))
  }
  console.error(`\nrehearsed: ${nodes.map(({ name }) => name).join(', ')}`)
}

/** What bootstrap-cluster does, for some of the nodes. */
async function someOnly(cluster: Cluster, nodes: readonly Node[]): Promise<void> {
  const names = nodes.map(({ name }) => name)
  for (const name of ['check-prereqs', 'download-iso', 'generate-certs', 'generate-kubeconfigs']) {
    await script(name)
  }
  await script('generate-encryption-config')
  await script('generate-nocloud-iso', ...names)
  await timed('installation', () => script('provision', '--iso', ...names))
  await timed('from power-on to ssh', async () => {
    await script('provision', ...names)
    await inParallel(names, async (name, row) => {
      row.step('waiting for ssh')
      const machine = new Machine(cluster, cluster.node(name), signal)
      await machine.waitForSsh({ detail: (text) => row.detail(text) })
    })
  })
}

/** Runs a script of the copy in this terminal. */
async function script(name: string, ...args: string[]): Promise<void> {
  console.error(`\n$ ./bin/${name}.mts ${args.join(' ')}`)
  const child = spawn(join(rehearsalFolder, 'bin', `${name}.mts`), args, { stdio: 'inherit' })
  // Ctrl-C reaches both of us; what is sent to this process alone has to be passed on.
  const forward = () => child.kill('SIGTERM')
  process.once('SIGTERM', forward)
  const [status, killedBy] = await once(child, 'exit')
  process.off('SIGTERM', forward)
  if (status === 0) return
  throw new StepError(`${name} ended with ${killedBy ?? `status ${status}`}`, {
    log: join(rehearsalFolder, 'images'),
    hint: 'KEEP=1 leaves the machines running, to look around',
  })
}

async function timed<T>(what: string, work: () => Promise<T>): Promise<T> {
  signal.throwIfAborted()
  const began = performance.now()
  const result = await work()
  times.push([what, performance.now() - began])
  return result
}

/** A row about one machine, as its files and itself tell it. */
async function inspect(cluster: Cluster, node: Node): Promise<string[]> {
  const machine = new Machine(cluster, node, signal)
  const { state, failedUnits } = await machine.waitForSystem()
  const { birthtimeMs, mtimeMs } = await stat(filesOf(cluster, node).installLog)
  const started = await machine.succeed('systemd-analyze time')
  const memory = await machine.succeed("free -m | awk '/^Mem/ { print $3 }'")
  return [
    node.name,
    state,
    failedUnits.join('\n') || '-',
    formatDuration(mtimeMs - birthtimeMs),
    started.match(/= (.*)/)?.[1]?.trim() ?? '?',
    `${memory.trim()} MB`,
  ]
}
