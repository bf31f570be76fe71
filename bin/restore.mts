#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// Goes back to a snapshot: the machines stop, their disks, the keys and the settings become what
// they were, and the machines start.
import { createHash } from 'node:crypto'
import { readFile, rm } from 'node:fs/promises'
import { $ } from 'zx/core'
import { loadCluster, type Node } from '../lib/cluster.mts'
import { describeError, StepError } from '../lib/errors.mts'
import { readIfThere, writeFileAtomic } from '../lib/files.mts'
import { formatBytes, formatDuration, timestamp } from '../lib/format.mts'
import { detectHost } from '../lib/host.mts'
import { interruption, takingTime } from '../lib/interrupt.mts'
import { withClusterLock, withMachineLocks } from '../lib/lock.mts'
import { runScript, script } from '../lib/script.mts'
import { setClocks, syncGuests, waitForSsh } from '../lib/ssh.mts'
import { inParallel, step } from '../lib/steps.mts'
import { freeBytes, hasDisk, isRunning, machineState, startMachine } from '../lib/vm.mts'
import type { Snapshot } from './snapshot.mts'

const { flags, args } = script({
  does: `Restores a snapshot of the cluster, the newest unless one is named: disks, UEFI variables,
certificates, kubeconfigs, encryption key and cluster.env. What they replace is kept as a snapshot
of its own. Ends when the cluster answers. Refuses before anything is changed.`,
  reads: ['cluster.env', 'snapshots/NAME/', 'images/'],
  writes: ['images/', 'tls/', 'configs/', 'cluster.env', 'snapshots/', 'run/'],
  flags: {
    'start-only': { help: 'end when the machines have been started' },
    timeout: { value: 'SECONDS', number: true, help: 'for the cluster to answer (WAIT_TIMEOUT)' },
  },
  args: '[NAME]',
  examples: ['./bin/restore.mts', './bin/restore.mts before-lab-3'],
})

const began = performance.now()
const signal = interruption()
const cluster = loadCluster()
const names = cluster.nodes.map((node) => node.name)
const marker = cluster.path('snapshots', '.restoring')

const restored = await withClusterLock(cluster, 'restoring a snapshot', async () => {
  // 1. Everything that prevents a restore is found before anything is changed.
  const snapshot = await find(args[0])
  await step(`check the snapshot ${snapshot.name}`, () => check(snapshot))
  const host = await detectHost(cluster)

  // 2. The machines stop, and what is there now becomes a snapshot.
  // 3. Disks, keys and settings are put back. If that fails, the machines that ran run on.
  const saved = `before-restore-${timestamp()}`
  const states = await Promise.all(cluster.nodes.map((node) => isRunning(cluster, node)))
  const running = cluster.nodes.filter((_, index) => states[index])
  await syncGuests(cluster, signal)
  signal.throwIfAborted()
  await takingTime(async () => {
    try {
      // As if the plug were pulled: what is on their disks is of no use any more.
      await runScript('shutdown', ['--now'])
      await withMachineLocks(cluster, cluster.nodes, 'restoring a snapshot', async () => {
        await runScript('snapshot', ['--automatic', saved])
        await step('put back disks, keys and settings', () => replace(snapshot, saved))
      })
    } catch (error) {
      for (const node of running) {
        if (await isRunning(cluster, node)) continue
        await startMachine(cluster, node, host).catch((second) => {
          console.error(`! ${node.name} was not started again: ${describeError(second)}`)
        })
      }
      throw error
    }
  })
  console.log(`what was replaced is kept: make restore NAME=${saved}`)

  // 4. The machines start, with the cluster.env of the snapshot.
  const then = loadCluster()
  await inParallel(names, async (name, row) => {
    row.step('power on')
    await startMachine(then, then.node(name), host)
  })
  return then
})

// 5. The cluster answers.
if (!flags['start-only']) {
  await inParallel(names, async (name, row) => {
    row.step('wait for ssh')
    await waitForSsh(restored, restored.node(name), { detail: (text) => row.detail(text), signal })
  })
  await setClocks(restored, signal)
  await runScript('wait-for-cluster', flags.timeout ? ['--timeout', `${flags.timeout}`] : [], {
    failure: 'but the snapshot is restored and all machines run',
    hint: 'make wait waits longer',
  })
}
console.log(`restored in ${formatDuration(performance.now() - began)}`)

async function allSnapshots(): Promise<Snapshot[]> {
  return JSON.parse((await $`./bin/snapshot.mts --list --json`).stdout)
}

/** The snapshot of that name; without a name the newest that was taken on purpose. */
async function find(name?: string): Promise<Snapshot> {
  const all = await allSnapshots()
  const found = all.findLast((each) => (name ? each.name === name : !each.automatic))
  if (found) return found
  const reason = name ? `there is no snapshot "${name}"` : 'there is no snapshot yet'
  const others = all.map((each) => each.name).join(', ')
  const hint = others ? `there are ${others}` : 'make snapshot'
  throw new StepError(reason, { hint, exitCode: 2 })
}

/** @throws StepError with every reason why the snapshot cannot be restored */
async function check({ name: snapshot, machines, files }: Snapshot): Promise<void> {
  const problems: string[] = []
  const title = ({ name, role }: Pick<Node, 'name' | 'role'>) => `${name} (${role})`
  const [then, now] = [machines.map(title), cluster.nodes.map(title)]
  for (const each of now) if (!then.includes(each)) problems.push(`it does not contain ${each}`)
  for (const each of then) if (!now.includes(each)) problems.push(`it also contains ${each}`)

  for (const { name, disk } of machines.filter((each) => names.includes(each.name))) {
    const found = await machineState(cluster, cluster.node(name))
    const image = `images/${name}.qcow2`
    if (found.state === 'running' && found.mode === 'install') {
      problems.push(`${name} is being installed`)
    } else if (!hasDisk(cluster, cluster.node(name))) {
      problems.push(`${name} has no disk: ${image} is missing`)
    } else {
      // -U: reading the list of snapshots is safe while a machine runs.
      const info = JSON.parse((await $`qemu-img info -U --output=json ${image}`).stdout)
      const same = info.snapshots?.find((each: { name: string }) => each.name === disk.name)
      const time = same && same['date-sec'] + same['date-nsec'] / 1e9
      if (!same) problems.push(`the disk of ${name} does not have it`)
      else if (same.id !== disk.id || time !== disk.time) {
        problems.push(`the disk of ${name} has another snapshot of that name`)
      }
    }
  }
  for (const { path, sha256 } of files) {
    const data = await readFile(cluster.path('snapshots', snapshot, path)).catch(() => '')
    if (createHash('sha256').update(data).digest('hex') === sha256) continue
    problems.push(`snapshots/${snapshot}/${path} is missing or was changed`)
  }
  // As for a snapshot, which is about to be taken.
  const [needed, free] = [names.length * 2 ** 30, await freeBytes(cluster.path('images'))]
  const amounts = `${formatBytes(needed)} are needed, ${formatBytes(free)} are free`
  const isShort = free < needed && process.platform !== 'darwin'
  if (isShort) problems.push(`not enough disk space: ${amounts}`)
  if (problems.length === 0) return
  const later = cluster.workers.filter(({ name }) => !machines.some((each) => each.name === name))
  const removals = later.map(({ name }) => `make remove-worker NAME=${name}`).join(', ')
  const remove = `remove the workers that were added after it: ${removals}`
  throw new StepError(`the snapshot "${snapshot}" cannot be restored; nothing was changed`, {
    output: problems.join('\n'),
    hint: removals ? remove : './bin/snapshot.mts --list shows the others',
  })
}

/**
 * Puts the snapshot in the place of what `saved` keeps; if that fails, that is put back. Meanwhile the
 * marker names the last complete state: after a restore that was killed, until one succeeds.
 */
async function replace(snapshot: Snapshot, saved: string): Promise<void> {
  const interrupted = (await readIfThere(marker))?.trim()
  if (!interrupted) await writeFileAtomic(marker, `${saved}\n`)
  try {
    await putBack(snapshot)
  } catch (error) {
    try {
      await putBack(await find(saved))
    } catch (second) {
      const output = `${describeError(error)}\n${describeError(second)}`
      const hint = `what was there before: make restore NAME=${saved}`
      throw new StepError('some disks are restored, others are not', { output, hint })
    }
    if (!interrupted) await rm(marker, { force: true })
    throw error
  }
  await rm(marker, { force: true })
  // Of what restores have replaced the last is enough: each snapshot keeps the images from shrinking.
  for (const { name, automatic } of await allSnapshots()) {
    if (!automatic || [saved, snapshot.name, interrupted].includes(name)) continue
    await runScript('snapshot', ['--delete', name]).catch((error) => {
      console.error(`! what an earlier restore replaced is still there: ${describeError(error)}`)
    })
  }
}

/** No machine runs. Other files stay as they are. */
async function putBack({ name, machines, files }: Snapshot): Promise<void> {
  for (const { name: machine } of machines) {
    if (await isRunning(cluster, cluster.node(machine))) {
      throw new StepError(`${machine} runs, so its disk is not changed`)
    }
    await $`qemu-img snapshot -q -a ${name} images/${machine}.qcow2`
  }
  for (const { path, mode } of files) {
    const data = await readFile(cluster.path('snapshots', name, path))
    await writeFileAtomic(cluster.path(path), data, mode)
  }
}
