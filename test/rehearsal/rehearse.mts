// The rehearsal: the project's own scripts, unchanged, against a simulated NixOS installer.
// `make rehearse` calls it; its settings are variables, as in Make:
//   YES=1        install the packages that it needs
//   NODES=alpha  only these machines; pods need a worker and the control plane
//   KEEP=1       leave the machines running in rehearsal/
//   DAY_TWO=1    continue: snapshots, backups, changed settings, adding and removing a worker, upgrading one
//   DAY_TWO='breaking upgrade'  of that only the steps with these words in their names
//   KUBE_BIN_DIR=FOLDER  Kubernetes programs for the machines; else they are downloaded or built
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { type Cluster, chooseNodes, loadCluster, type Node } from '../../lib/cluster.mts'
import { describeError, StepError } from '../../lib/errors.mts'
import { detectAccelerator, detectSystem } from '../../lib/host.mts'
import { interruption, takingTime } from '../../lib/interrupt.mts'
import { withLock } from '../../lib/lock.mts'
import { type CiliumParts, ciliumParts } from '../namespaces/cilium-image.mts'
import { buildIso } from './build-iso.mts'
import { clusterSteps, dayTwo, rehearseSteps, waitForComponents } from './cluster-steps.mts'
import { ensureHostPackages } from './host-packages.mts'
import { PortWatch } from './listening-ports.mts'
import { machineTable } from './machine-table.mts'
import { machinePrograms, preferOnPath } from './programs-on-path.mts'
import { Rehearsal, type Step } from './rehearsal.mts'
import { makeRehearsalFolder, rehearsalFolder } from './rehearsal-folder.mts'
import { SecretWatch } from './secrets.mts'

const { YES, KEEP, NODES, DAY_TWO } = process.env
const signal = interruption()

try {
  const cluster = loadCluster()
  const chosen = chooseNodes(cluster, (NODES ?? '').split(/[\s,]+/).filter(Boolean))
  const later = DAY_TWO ? dayTwo(DAY_TWO === '1' ? '' : DAY_TWO) : []
  await ensureHostPackages(Boolean(YES))
  await withLock(`${rehearsalFolder}.lock`, 'rehearsing', () => rehearse(cluster, chosen, later))
} catch (error) {
  console.error(`rehearse: ${describeError(error)}`)
  // A watcher that was not ended would keep this process running.
  process.exit(error instanceof StepError ? (error.explanation.exitCode ?? 1) : 1)
}

async function rehearse(real: Cluster, chosen: readonly Node[], later: Step[]): Promise<void> {
  await endFormer()
  const programs = await machinePrograms()
  const workers = chosen.filter(({ role }) => role === 'worker')
  const whole = chosen.length === real.nodes.length
  // The other workers are not part of this cluster. (A whole one is that of cluster.env, which the
  // scripts that add and remove workers change.)
  const names = workers.map(({ name }) => name).join(' ')
  if (!whole && names !== '') process.env.WORKER_NODES = names

  const began = performance.now()
  const images = programs.length > 0 && workers.length > 0
  const cilium = images ? await realCilium(real) : undefined
  const iso = await buildIso({ programs, images, further: cilium ? [cilium.archive] : [] })
  const isoTook = performance.now() - began
  await makeRehearsalFolder(real, iso, cilium)
  const cluster = loadCluster({ root: rehearsalFolder })
  const nodes = chosen.map(({ name }) => cluster.node(name))
  const rehearsal = new Rehearsal(cluster, nodes, signal)
  rehearsal.note('simulated installer ISO', isoTook)
  await preferOnPath(programs)
  const watch = await SecretWatch.start()
  const ports = await PortWatch.start(cluster)

  try {
    await rehearsal.timed('make all, up to the machines', () =>
      rehearsal.script('bootstrap-cluster', ...(whole ? ['--until=machines'] : rehearsal.names)),
    )
    await rehearsal.enter()
    if (programs.length > 0) await waitForComponents(rehearsal)
    if (programs.length > 0 && whole) await rehearseSteps(rehearsal, clusterSteps)
    console.log(`\n${await machineTable(rehearsal)}`)
    if (programs.length > 0 && whole) await rehearseSteps(rehearsal, later)
    await rehearseSteps(rehearsal, [
      ['secrets', () => watch.check(rehearsal)],
      ['listening ports', () => ports.check(rehearsal)],
    ])
  } finally {
    await ports.end()
    await watch.end()
    console.log(`\n${rehearsal.timeTable()}`)
    if (KEEP) explainHowToContinue(whole ? '' : names)
    else await shutDown(cluster)
  }
  if (!KEEP) await ports.assertNone()
  console.error(`\nrehearsed: ${rehearsal.names.join(', ')}`)
}

/** An emulated processor does not get through compiling Cilium's programs within their time. */
async function realCilium({ settings }: Cluster): Promise<CiliumParts | undefined> {
  const { accel } = await detectAccelerator(settings.QEMU_ACCEL, detectSystem())
  const network = accel === 'tcg' ? 'the bridge plugin' : `Cilium ${settings.CILIUM_VERSION}`
  console.error(`pod network: ${network}, as the accelerator is ${accel}`)
  return accel === 'tcg' ? undefined : ciliumParts()
}

/** Stops machines that an earlier rehearsal has left running. */
async function endFormer(): Promise<void> {
  if (!existsSync(join(rehearsalFolder, 'run'))) return
  await new Rehearsal(loadCluster({ root: rehearsalFolder }), [], signal).script('shutdown')
}

/** Stops the machines, after Ctrl-C too. */
async function shutDown(cluster: Cluster): Promise<void> {
  const uninterrupted = new Rehearsal(cluster, [], new AbortController().signal)
  const shutdown = () => uninterrupted.script('shutdown')
  await takingTime(shutdown).catch((error) => console.error(describeError(error)))
}

/** @param names of the workers, if they are not those of cluster.env */
function explainHowToContinue(names: string): void {
  const variable = names === '' ? '' : `export WORKER_NODES='${names}'; `
  console.error(`
the machines keep running: ${variable}cd ${rehearsalFolder} (stop them: make down)
kubectl there: export KUBECONFIG=$PWD/configs/admin.kubeconfig`)
}
