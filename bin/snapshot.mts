#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// A snapshot of the whole cluster at one moment: the memory and the disks of all machines, and the
// keys and settings that belong to them. qcow2 keeps all snapshots of a machine in its disk itself.
import { existsSync } from 'node:fs'
import { readdir, readFile, rename, rm, stat } from 'node:fs/promises'
import { $ } from 'zx/core'
import { loadCluster, type Node } from '../lib/cluster.mts'
import { describeError, StepError } from '../lib/errors.mts'
import { privateFolder, sha256, writeFileAtomic } from '../lib/files.mts'
import { formatBytes, formatTable, timestamp } from '../lib/format.mts'
import { interruption, takingTime } from '../lib/interrupt.mts'
import { stopLanSwitch } from '../lib/lan.mts'
import { withClusterLock, withMachineLocks } from '../lib/lock.mts'
import { commandLine, isGone, memoryOf } from '../lib/processes.mts'
import { Qmp } from '../lib/qmp.mts'
import { refuseIf, script } from '../lib/script.mts'
import type { Kind, Snapshot } from '../lib/snapshots.mts'
import { hardware, inspect, liveParts, readSnapshots, suspended } from '../lib/snapshots.mts'
import { setClocks, syncGuests } from '../lib/ssh.mts'
import { step } from '../lib/steps.mts'
import { assertDiskSpace, filesOf, hasDisk, machineState } from '../lib/vm.mts'
import { becomes } from '../lib/wait.mts'

const { flags, args } = script({
  does: `Takes a snapshot of all machines under NAME or the current time: memory and disks, or disks alone if
one is off or cannot save its memory. Running ones are paused, so that all show the same moment.
UEFI variables, certificates, kubeconfigs, encryption key and cluster.env are kept with them.`,
  reads: ['cluster.env', 'run/', 'images/', 'tls/', 'configs/'],
  writes: ['images/NODE.qcow2', 'images/NODE.efivars.qcow2', 'snapshots/NAME/'],
  flags: {
    'disks-only': { help: 'without memory: make restore boots the machines; takes less space' },
    suspend: { help: 'then end the machines, as make suspend does; make up continues from there' },
    list: { help: 'show the snapshots' },
    delete: { value: 'NAME', help: 'remove this snapshot; the machines may run' },
    automatic: { help: 'used by restore for what it replaces; the next restore deletes it' },
    json: { help: 'print the snapshot, or with --list all of them, as JSON' },
  },
  args: '[NAME]',
  examples: ['./bin/snapshot.mts before-lab-3', './bin/snapshot.mts --delete before-lab-3'],
})
const { suspend, 'disks-only': disksOnly } = flags
const modes = [flags.list, flags.delete, suspend, args[0]].filter(Boolean)
refuseIf(modes.length > 1, 'only one of NAME, --list, --delete NAME and --suspend at a time')
refuseIf(suspend && disksOnly, '--suspend needs the memory, so not --disks-only')

/** One that runs has `qmp` and `pid`: only its QEMU may change its images. */
type Machine = { node: Node; disk: string; images: Image[]; qmp?: Qmp; pid?: number }
type Ask = (qmp: Qmp, machine: Machine) => Promise<unknown>
/** The disk or the UEFI variables: QEMU's name of it, and its path. */
type Image = { device: 'disk' | 'efivars'; path: string }

/** The folder of a snapshot that is being taken or removed. */
const partialOf = (name: string) => `snapshots/.${name}.partial`

const cluster = loadCluster()
// From here on, Ctrl-C ends only what gets this signal.
const signal = interruption()
if (flags.list) await list()
else if (flags.delete) await remove(flags.delete)
else await take(suspend ? suspended : (args[0] ?? timestamp()))

async function take(name: string): Promise<void> {
  // QEMU takes a number for a snapshot's id. A leading dot marks an unfinished snapshot.
  if (!suspend && !/^(?!\d+$)[A-Za-z0-9][A-Za-z0-9._-]{0,62}$/.test(name)) {
    const hint =
      'up to 63 letters, digits, dots, dashes and underscores; a letter or digit first; not only digits'
    throw new StepError(`a snapshot cannot be named "${name}"`, { hint, exitCode: 2 })
  }
  const snapshot = await withMachines(`taking the snapshot ${name}`, cluster.nodes, (machines) =>
    step(`snapshot ${name}`, (detail) => takeSnapshot(name, machines, detail)),
  )
  const paused = snapshot.machines.flatMap((machine) => (machine.running ? machine.name : []))
  // The clock of a paused machine is behind afterwards.
  if (paused.length > 0 && !suspend) await setClocks(cluster, signal)
  if (flags.json) return console.log(JSON.stringify(snapshot, null, 2))
  console.log(contents(snapshot))
  if (paused.length > 0) {
    console.log(`paused for ${Math.round(snapshot.pause * 1000)} ms: ${paused.join(', ')}`)
  }
  console.log(suspend ? 'continue: make up' : `go back to it: make restore NAME=${name}`)
}

/** Completes the snapshot, or removes it. Machines that ran continue, unless they are suspended. */
async function takeSnapshot(name: string, machines: Machine[], detail: (text: string) => void) {
  await removeUnfinished(machines)
  const wanted = kindFor(machines)
  await assertPossible(name, machines, wanted)
  // From now on a snapshot of this name on a disk belongs to this folder.
  const partial = partialOf(name)
  await privateFolder(cluster.path('snapshots'))
  await privateFolder(cluster.path(partial))
  try {
    // 1. cluster.env, certificates, keys and kubeconfigs. (A dot first: it is being written.)
    const found =
      await $`{ ls -dp cluster.env tls/* configs/*.kubeconfig configs/encryption-config.yaml 2>/dev/null || true; } | grep -v '/$'`
    const files = found.stdout.trim().split('\n')
    await $`tar -cf - ${files} | tar -xf - -C ${partial}`

    // 2. What the machines' kernels and this computer hold in memory is written to the disks, so
    // that the pause need not wait for it. A machine that is off does not change: no pause for it.
    detail('the machines write out their data')
    await syncGuests(cluster, signal)
    signal.throwIfAborted()
    await $`sync ${machines.flatMap(({ images }) => images.map(({ path }) => path))}`
    for (const { qmp, images } of machines) {
      for (const { path } of qmp ? [] : images) await $`qemu-img snapshot -q -c ${name} ${path}`
    }

    // 3. The running machines.
    detail('the machines are paused')
    const { pause, kind } = await takingTime(() => atOneMoment(name, machines, wanted))

    // 4. The record, and the final name of the folder: only now can the snapshot be restored.
    await $`chmod -R go= ${partial}`
    const record: Snapshot = {
      ...{ name, taken: new Date().toISOString(), automatic: flags.automatic || suspend, kind },
      ...{ nixos: cluster.settings.NIXOS_VERSION, pause, machines: [], hardware: {}, files: [] },
    }
    for (const { node, disk: image, qmp, pid } of machines) {
      const { bytes, snapshots } = await inspect(image)
      const disk = snapshots.find((each) => each.name === name)
      if (!disk) throw new StepError(`the disk of ${node.name} does not list the new snapshot`)
      const running = qmp !== undefined
      record.machines.push({ name: node.name, role: node.role, running, bytes, disk })
      if (kind === 'disks' || !qmp || !pid) continue
      const { qemu } = (await qmp.execute('query-version')) as { qemu: Record<string, number> }
      const version = `${qemu.major}.${qemu.minor}.${qemu.micro}`
      record.hardware[node.name] = hardware(version, (await commandLine(pid)) ?? '')
    }
    for (const path of files) {
      const mode = (await stat(cluster.path(path))).mode & 0o777
      const data = await readFile(cluster.path(partial, path))
      record.files.push({ path, mode, sha256: sha256(data) })
    }
    const text = JSON.stringify(record, null, 2)
    await writeFileAtomic(cluster.path(partial, 'snapshot.json'), text, 0o600)
    if (suspend) await takingTime(() => endAll(machines))
    await rename(cluster.path(partial), cluster.path('snapshots', name))
    return record
  } catch (error) {
    if (suspend) await takingTime(() => resume(machines)).catch(() => {})
    // The next snapshot removes what cannot be removed now.
    await takingTime(() => removeUnfinished(machines)).catch(() => {})
    throw error
  }
}

/** With memory, unless a machine is off. */
function kindFor(machines: Machine[]): Kind {
  if (disksOnly) return 'disks'
  const off = machines.flatMap(({ node, qmp }) => (qmp ? [] : node.name))
  if (off.length === 0) return 'live'
  return withoutMemory(`${off.join(', ')} ${off.length > 1 ? 'are' : 'is'} off`)
}

/** Says why only the disks are kept. @throws StepError if that is not enough */
function withoutMemory(reason: string): Kind {
  if (!suspend) console.error(`! disks only: ${reason}`)
  else throw new StepError(`cannot suspend: ${reason}`, { hint: 'make down shuts machines down' })
  return 'disks'
}

/** Takes the snapshot of all running machines while they are paused; `pause` is in seconds. */
async function atOneMoment(name: string, machines: Machine[], wanted: Kind) {
  const began = performance.now()
  const command = 'blockdev-snapshot-internal-sync'
  const saveDisks = async (qmp: Qmp, { images }: Machine) => {
    for (const { device } of images) await qmp.execute(command, { device, name }, { timeout: 60 })
  }
  let kind: Kind = 'disks'
  try {
    await onAll(machines, (qmp) => qmp.execute('stop', {}, { timeout: 60 }))
    if (wanted === 'live') {
      try {
        await onAll(machines, (qmp) => qmp.job('snapshot-save', { tag: name, ...liveParts }))
        kind = 'live'
      } catch (error) {
        await removeFromDisks(machines, name)
        withoutMemory(describeError(error))
      }
    }
    if (kind === 'disks') await onAll(machines, saveDisks)
  } finally {
    if (kind === 'disks' || !suspend) await resume(machines) // Whatever happened.
  }
  return { kind, pause: (performance.now() - began) / 1000 }
}

async function resume(machines: Machine[]): Promise<void> {
  await onAll(machines, async (qmp, { node }) => {
    await qmp.execute('cont', {}, { timeout: 60 }).catch((error) => {
      console.error(`! ${node.name} may still be paused: make up resumes it`)
      throw error
    })
  })
}

/** Ends the QEMUs of paused machines, and the LAN switch. */
async function endAll(machines: Machine[]): Promise<void> {
  signal.throwIfAborted()
  await onAll(machines, async (qmp, { pid = 0 }) => {
    // A QEMU that quits may close the connection before it answers.
    await qmp.execute('quit').catch(() => {})
    if (!(await becomes(() => isGone(pid), 60))) throw new StepError('its QEMU does not end')
  })
  await stopLanSwitch(cluster)
}

/** Asks all QEMUs at once and waits for all. @throws the first failure, with the machine's name */
async function onAll(machines: Machine[], ask: Ask): Promise<void> {
  const asked = machines.map(async (machine) => machine.qmp && ask(machine.qmp, machine))
  for (const [index, outcome] of (await Promise.allSettled(asked)).entries()) {
    if (outcome.status === 'fulfilled') continue
    throw new StepError(`${machines[index]?.node.name}: ${describeError(outcome.reason)}`)
  }
}

async function list(): Promise<void> {
  const snapshots = await readSnapshots(cluster)
  if (flags.json) return console.log(JSON.stringify(snapshots, null, 2))
  if (snapshots.length === 0) return console.log('There is no snapshot yet: make snapshot')
  const rows = snapshots.map((snapshot) => [
    snapshot.name,
    new Date(snapshot.taken).toLocaleString('sv'), // 2026-11-30 14:05:00, in local time
    formatBytes(snapshot.machines.reduce((total, { bytes }) => total + bytes, 0)),
    contents(snapshot),
  ])
  console.log(formatTable(['NAME', 'TAKEN', 'DISKS THEN', 'CONTENTS'], rows))
}

function contents({ name, kind, machines, nixos, files, automatic }: Snapshot): string {
  const names = machines.map(({ name, running }) => `${name}${running ? '' : ' (was off)'}`)
  const why = automatic && name !== suspended ? '; what a restore overwrote' : ''
  return `${names.join(', ')}${kind === 'live' ? ' with memory' : ''}; NixOS ${nixos}; ${files.length} files${why}`
}

async function remove(name: string): Promise<void> {
  const names = (await readSnapshots(cluster)).map((snapshot) => snapshot.name)
  const partial = cluster.path(partialOf(name))
  if (!names.includes(name) && !existsSync(partial)) {
    const hint = names.length > 0 ? `there are ${names.join(', ')}` : 'there are none'
    throw new StepError(`there is no snapshot "${name}"`, { hint, exitCode: 2 })
  }
  const nodes = cluster.nodes.filter((node) => hasDisk(cluster, node))
  await withMachines(`removing the snapshot ${name}`, nodes, (machines) =>
    step(`remove ${name}`, async () => {
      if (names.includes(name)) await rename(cluster.path('snapshots', name), partial)
      await removeUnfinished(machines)
    }),
  )
  if (flags.json) console.log(JSON.stringify({ removed: name }))
}

/** Works while no other script changes the cluster, and none starts or stops a machine. */
function withMachines<T>(purpose: string, nodes: Node[], work: (of: Machine[]) => Promise<T>) {
  const opened = async () => {
    const machines = await Promise.all(nodes.map(open))
    return work(machines).finally(() => machines.map(({ qmp }) => qmp?.close()))
  }
  const locked = () => withMachineLocks(cluster, cluster.nodes, purpose, opened)
  return withClusterLock(cluster, purpose, locked)
}

async function open(node: Node): Promise<Machine> {
  const found = await machineState(cluster, node)
  if (found.state === 'installing') {
    throw new StepError(`${node.name} is being installed`, { hint: 'wait until it is installed' })
  }
  const disk = `images/${node.name}.qcow2`
  if (!hasDisk(cluster, node)) {
    const hint = `install it first: make install-${node.name}`
    throw new StepError(`${node.name} has no disk: ${disk} is missing`, { hint })
  }
  const images: Image[] = [{ device: 'disk', path: disk }]
  const efivars = `images/${node.name}.efivars.qcow2`
  if (existsSync(cluster.path(efivars))) images.push({ device: 'efivars', path: efivars })
  if (found.state === 'stopped') return { node, disk, images }
  return { node, disk, images, pid: found.pid, qmp: await Qmp.connect(filesOf(cluster, node).qmp) }
}

async function assertPossible(name: string, machines: Machine[], kind: Kind): Promise<void> {
  if (existsSync(cluster.path('snapshots', suspended)) && machines.some(({ qmp }) => qmp)) {
    throw new StepError('not all suspended machines have continued', { hint: 'make up' })
  }
  // Not every file system distinguishes case.
  const names = await readdir(cluster.path('snapshots')).catch(() => [])
  const taken = names.find((other) => other.toLowerCase() === name.toLowerCase())
  if (taken) {
    const hint = `use another name, or remove it: ./bin/snapshot.mts --delete ${taken}`
    throw new StepError(`there is a snapshot "${taken}" already`, { hint })
  }
  for (const { node, disk } of machines) {
    if (!(await inspect(disk)).snapshots.some((each) => each.name === name)) continue
    const hint = 'this script did not take it: use another name'
    throw new StepError(`the disk of ${node.name} has a snapshot "${name}" of its own`, { hint })
  }
  // Their memory, and what the machines change after a snapshot, take new space in their images.
  const memory = machines.map(({ pid }) => (kind === 'live' && pid ? memoryOf(pid) : 0))
  const needed = (await Promise.all(memory)).reduce((sum, bytes) => sum + bytes + 2 ** 30, 0)
  const less = kind === 'live' ? '--disks-only needs less; ' : ''
  const hint = `${less}free space where images/ is, or remove a snapshot: ./bin/snapshot.mts --list`
  const warning = await assertDiskSpace(cluster.path('images'), needed, { hint })
  if (warning) console.error(`! ${warning}`)
}

async function removeFromDisks(machines: Machine[], name: string): Promise<void> {
  for (const { images, qmp } of machines) {
    for (const { device, path } of images) {
      if (!(await inspect(path)).snapshots.some((each) => each.name === name)) continue
      const command = 'blockdev-snapshot-delete-internal-sync'
      if (qmp) await qmp.execute(command, { device, name }, { timeout: 60 })
      else await $`qemu-img snapshot -q -d ${name} ${path}`
    }
  }
}

/** Removes what a snapshot has left that failed or was killed. */
async function removeUnfinished(machines: Machine[]): Promise<void> {
  for (const folder of await readdir(cluster.path('snapshots')).catch(() => [])) {
    const [, name] = folder.match(/^\.(.+)\.partial$/) ?? []
    if (!name) continue
    await removeFromDisks(machines, name)
    await rm(cluster.path('snapshots', folder), { recursive: true })
  }
}
