#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// Goes back to a snapshot: the machines stop, their disks, the keys and the settings become what
// they were, and the machines continue from their memory of that moment, or boot.
import { existsSync } from 'node:fs'
import { readFile, rm } from 'node:fs/promises'
import { $ } from 'zx/core'
import { type Cluster, loadCluster, type Node } from '../lib/cluster.mts'
import { describeError, StepError } from '../lib/errors.mts'
import { readIfThere, sha256, writeFileAtomic } from '../lib/files.mts'
import { formatDuration, timestamp } from '../lib/format.mts'
import { detectHost, type Host } from '../lib/host.mts'
import { interruption, takingTime } from '../lib/interrupt.mts'
import { ensureLanSwitch } from '../lib/lan.mts'
import { withClusterLock, withMachineLocks } from '../lib/lock.mts'
import { filesOf, qemuArguments } from '../lib/qemu.mts'
import { Qmp } from '../lib/qmp.mts'
import { runScript, script } from '../lib/script.mts'
import type { Snapshot } from '../lib/snapshots.mts'
import * as snapshots from '../lib/snapshots.mts'
import { setClocks, syncGuests, waitForSsh } from '../lib/ssh.mts'
import { inParallel, step } from '../lib/steps.mts'
import { assertDiskSpace, hasDisk, isRunning, machineState, startMachine } from '../lib/vm.mts'

const { flags, args } = script({
  does: `Restores a snapshot of the cluster, the newest unless one is named: memory (without it, the machines
boot), disks, UEFI variables, certificates, kubeconfigs, encryption key and cluster.env. The disks and
files that are replaced are kept as a snapshot. Ends when the cluster answers.`,
  reads: ['cluster.env', 'snapshots/NAME/', 'images/'],
  writes: ['images/', 'tls/', 'configs/', 'cluster.env', 'snapshots/', 'run/'],
  flags: {
    'disks-only': { help: 'restore the disks without the memory: the machines boot' },
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
const { inspect, restoring, suspended } = snapshots
const marker = cluster.path('snapshots', restoring)

const restored = await withClusterLock(cluster, 'restoring a snapshot', async () => {
  // 1. Everything that prevents a restore is found before anything is changed.
  const snapshot = await find(args[0])
  const isSuspended = snapshot.name === suspended
  const former = isSuspended && (await readIfThere(marker))?.trim()
  const hint = `make restore NAME=${former}`
  if (former) throw new StepError('a restore was interrupted halfway', { hint })
  const host = await detectHost(cluster)
  const live = snapshot.kind === 'live' && !flags['disks-only']
  await step(`check the snapshot ${snapshot.name}`, () => check(snapshot, live && host))

  // 2. The machines are stopped, and the present state becomes a snapshot. (Suspended machines match
  //    theirs already; any that run were started by a run that was killed.)
  // 3. Disks, keys and settings are put back; if that fails, the machines that ran are started again.
  const states = await Promise.all(cluster.nodes.map((node) => isRunning(cluster, node)))
  const running = cluster.nodes.filter((_, index) => states[index])
  if (isSuspended && running.length > 0) await runScript('shutdown', ['--now'])
  if (!isSuspended) {
    const saved = `before-restore-${timestamp()}`
    await syncGuests(cluster, signal)
    signal.throwIfAborted()
    await takingTime(async () => {
      try {
        // As if the plug were pulled: what is on their disks is of no use any more.
        await runScript('shutdown', ['--now'])
        await withMachineLocks(cluster, cluster.nodes, 'restoring a snapshot', async () => {
          await runScript('snapshot', ['--automatic', '--disks-only', saved])
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
  }

  // 4. The machines start, with the cluster.env of the snapshot; with memory, all together. Once
  //    they run, the snapshot of make suspend must not be restored again.
  const then = loadCluster()
  await takingTime(async () => {
    await ensureLanSwitch(then)
    if (live) await load(snapshot.name, then, host)
    if (isSuspended) await $`mv snapshots/${suspended} snapshots/.${suspended}.partial`
    await inParallel(names, async (name, row) => {
      row.step(live ? 'continue' : 'power on')
      await startMachine(then, then.node(name), host)
    })
    if (isSuspended) await runScript('snapshot', ['--delete', suspended])
  })
  if (live && flags['start-only']) await setClocks(then, signal)
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

/** Starts the machines, which stay paused, and loads their memory. If one fails, none stays. */
async function load(tag: string, then: Cluster, host: Host): Promise<void> {
  await inParallel(names, async (name, row) => {
    row.step('load its memory')
    const node = then.node(name)
    await startMachine(then, node, host, async () => {
      const qmp = await Qmp.connect(filesOf(then, node).qmp)
      await qmp.job('snapshot-load', { tag, ...snapshots.liveParts }).finally(() => qmp.close())
    })
  }).catch(async (error) => {
    await runScript('shutdown', ['--now'])
    const up = tag === suspended ? 'make up tries again; make up FLAGS=--disks-only' : 'make up'
    const hint = `${up} boots from the disks of that moment`
    const output = describeError(error)
    throw new StepError('the machines cannot continue from their memory', { output, hint })
  })
}

/** The snapshot of that name; without a name the newest that was taken on purpose. */
async function find(name?: string): Promise<Snapshot> {
  const all = await snapshots.readSnapshots(cluster)
  const found = all.findLast((each) => (name ? each.name === name : !each.automatic))
  if (found) return found
  const reason = name ? `there is no snapshot "${name}"` : 'there is no snapshot yet'
  const others = all.map((each) => each.name).join(', ')
  const hint = others ? `there are ${others}` : 'make snapshot'
  throw new StepError(reason, { hint, exitCode: 2 })
}

/** @throws StepError with every reason why the snapshot cannot be restored */
async function check({ name: snapshot, machines, files, ...kept }: Snapshot, live: Host | false) {
  const problems: string[] = []
  const title = ({ name, role }: Pick<Node, 'name' | 'role'>) => `${name} (${role})`
  const [then, now] = [machines.map(title), cluster.nodes.map(title)]
  for (const each of now) if (!then.includes(each)) problems.push(`it does not contain ${each}`)
  for (const each of then) if (!now.includes(each)) problems.push(`it also contains ${each}`)

  for (const { name, disk } of machines.filter((each) => names.includes(each.name))) {
    const found = await machineState(cluster, cluster.node(name))
    const image = `images/${name}.qcow2`
    if (found.state === 'installing') {
      problems.push(`${name} is being installed`)
    } else if (!hasDisk(cluster, cluster.node(name))) {
      problems.push(`${name} has no disk: ${image} is missing`)
    } else {
      const same = (await inspect(image)).snapshots.find((each) => each.name === disk.name)
      if (!same) problems.push(`the disk of ${name} does not have it`)
      else if (same.id !== disk.id || same.time !== disk.time) {
        problems.push(`the disk of ${name} has another snapshot of that name`)
      }
    }
  }
  for (const { path, sha256: expected } of files) {
    const data = await readFile(cluster.path('snapshots', snapshot, path)).catch(() => '')
    if (sha256(data) === expected) continue
    problems.push(`snapshots/${snapshot}/${path} is missing or was changed`)
  }
  // As for a snapshot, which is about to be taken.
  const room = snapshot === suspended ? 0 : names.length * 2 ** 30
  await assertDiskSpace(cluster.path('images'), room).catch((error) => problems.push(error.message))
  const giveUp = `boot without the suspended memory: ./bin/snapshot.mts --delete ${suspended} && make up`
  let hint = snapshot === suspended ? giveUp : './bin/snapshot.mts --list shows the others'
  if (live && problems.length === 0) {
    // With the settings that the machines will have.
    const file = cluster.path(snapshot === suspended ? '.' : `snapshots/${snapshot}`, 'cluster.env')
    const settings = loadCluster({ text: await readFile(file, 'utf8') })
    for (const [name, former] of Object.entries(kept.hardware)) {
      const mode = { kind: 'boot' } as const
      const node = settings.node(name)
      const args = qemuArguments({ cluster: settings, node, host: live, mode })
      const now = snapshots.hardware(live.qemu.version, args.join(' '))
      if (now !== former) problems.push(`${name} was saved on ${former}, and would be on ${now}`)
      // An installation that was interrupted may have replaced them.
      const variables = await inspect(`images/${name}.efivars.qcow2`).catch(() => undefined)
      if (!variables?.snapshots.some((each) => each.name === snapshot)) {
        problems.push(`the UEFI variables of ${name} do not have it`)
      }
    }
    hint = `its disks alone: ./bin/restore.mts --disks-only ${snapshot}`
  }
  if (problems.length === 0) return
  const later = cluster.workers.filter(({ name }) => !machines.some((each) => each.name === name))
  const removals = later.map(({ name }) => `make remove-worker NAME=${name}`).join(', ')
  const remove = `remove the workers that were added after it: ${removals}`
  throw new StepError(`the snapshot "${snapshot}" cannot be restored; nothing was changed`, {
    output: problems.join('\n'),
    hint: removals && snapshot !== suspended ? remove : hint,
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
  // Of what restores have replaced the last is enough: each snapshot keeps the images from shrinking.
  const old = (await snapshots.readSnapshots(cluster)).flatMap(({ name, automatic }) =>
    automatic && ![saved, snapshot.name, interrupted].includes(name) ? name : [],
  )
  // make up must not load suspended memory, even if it stays. (Sorted first: any removal takes it along.)
  if (old.includes(suspended)) await $`mv snapshots/${suspended} snapshots/.${suspended}.partial`
  await rm(marker, { force: true })
  for (const name of old.sort()) {
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
    const variables = `images/${machine}.efivars.qcow2`
    if (!existsSync(cluster.path(variables))) continue
    const { snapshots } = await inspect(variables)
    if (!snapshots.some((each) => each.name === name)) continue
    await $`qemu-img snapshot -q -a ${name} ${variables}`
  }
  for (const { path, mode } of files) {
    const data = await readFile(cluster.path('snapshots', name, path))
    await writeFileAtomic(cluster.path(path), data, mode)
  }
}
