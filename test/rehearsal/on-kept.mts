// Repeats steps of the rehearsal on the machines that `make rehearse KEEP=1` has left running, with
// the present scripts:
//   node --import tsx test/rehearsal/on-kept.mts           lists the steps
//   node --import tsx test/rehearsal/on-kept.mts etcd …    runs those whose names contain a word
import { existsSync } from 'node:fs'
import { cp } from 'node:fs/promises'
import { join } from 'node:path'
import { loadCluster } from '../../lib/cluster.mts'
import { describeError, StepError } from '../../lib/errors.mts'
import { interruption } from '../../lib/interrupt.mts'
import { withLock } from '../../lib/lock.mts'
import { projectRoot } from '../checkout.mts'
import { clusterSteps, dayTwo, rehearseSteps } from './cluster-steps.mts'
import { machinePrograms, preferOnPath } from './programs-on-path.mts'
import { Rehearsal } from './rehearsal.mts'
import { rehearsalFolder } from './rehearsal-folder.mts'

const signal = interruption()
const words = process.argv.slice(2)
const all = [...clusterSteps, ...dayTwo()]
const steps = all.filter(([what]) => words.some((word) => what.includes(word)))
try {
  if (steps.length === 0) console.log(all.map(([what]) => what).join('\n'))
  else await withLock(`${rehearsalFolder}.lock`, 'rehearsing', again)
} catch (error) {
  console.error(`rehearse: ${describeError(error)}`)
  process.exitCode = 1
}

async function again(): Promise<void> {
  if (!existsSync(join(rehearsalFolder, 'run'))) {
    throw new StepError('there is no rehearsal to continue', { hint: 'make rehearse KEEP=1' })
  }
  for (const folder of ['bin', 'lib']) {
    await cp(join(projectRoot, folder), join(rehearsalFolder, folder), { recursive: true })
  }
  await preferOnPath(await machinePrograms())
  const cluster = loadCluster({ root: rehearsalFolder })
  const rehearsal = new Rehearsal(cluster, cluster.nodes, signal)
  await rehearsal.enter()
  try {
    await rehearseSteps(rehearsal, steps)
  } finally {
    console.log(`\n${rehearsal.timeTable()}`)
  }
}
