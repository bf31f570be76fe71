#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// A snapshot of the whole cluster at one moment: the disks of all machines, and the keys and
// settings that belong to them. qcow2 keeps a disk's snapshots in the image itself.
import { createHash } from 'node:crypto'
import { constants, existsSync } from 'node:fs'
import { copyFile, readdir, readFile, rename, rm, stat } from 'node:fs/promises'
import { $ } from 'zx/core'
import { loadCluster, type Node } from '../lib/cluster.mts'
import { StepError } from '../lib/errors.mts'
import { privateFolder, readIfThere, writeFileAtomic } from '../lib/files.mts'
import { formatBytes, formatTable, timestamp } from '../lib/format.mts'
import { interruption, takingTime } from '../lib/interrupt.mts'
import { withClusterLock, withMachineLocks } from '../lib/lock.mts'
import { Qmp } from '../lib/qmp.mts'
import { script } from '../lib/script.mts'
import { setClocks, syncGuests } from '../lib/ssh.mts'
import { step } from '../lib/steps.mts'
import { filesOf, freeBytes, hasDisk, machineState } from '../lib/vm.mts'

const { flags, args } = script({
  does: `Takes a snapshot of all machines, running or not, under NAME or the current time. Running machines
are paused for a moment, so that all disks show the same moment. UEFI variables, certificates,
kubeconfigs, the encryption key and cluster.env are kept with them. make restore goes back to it.`,
  reads: ['cluster.env', 'run/', 'images/', 'tls/', 'configs/'],
  writes: ['images/NODE.qcow2', 'snapshots/NAME/'],
  flags: {
    list: { help: 'show the snapshots' },
    delete: { value: 'NAME', help: 'remove this snapshot; the machines may run' },
    automatic: { help: 'mark it as what a restore overwrites: a later restore removes it' },
    json: { help: 'print the snapshot, or with --list all of them, as JSON' },
  },
  args: '[NAME]',
  examples: [
    './bin/snapshot.mts before-lab-3',
    './bin/snapshot.mts --list',
    './bin/snapshot.mts --delete before-lab-3',
  ],
})
if ([flags.list, flags.delete, args[0]].filter(Boolean).length > 1) {
  throw new StepError('only one of NAME, --list and --delete NAME', { exitCode: 2 })
}

/** The record of a snapshot: snapshots/NAME/snapshot.json. */
export interface Snapshot {
  name: string
  taken: string // ISO 8601
  automatic: boolean // by a restore, of what it was about to overwrite
  nixos: string
  pause: number // seconds for which the running machines were paused
  /** `bytes`: what the disk took on this computer. */
  machines: (Pick<Node, 'name' | 'role'> & { running: boolean; bytes: number; disk: OnDisk })[]
  /** Paths in the project, and in snapshots/NAME/; the mode is that of the original. */
  files: { path: string; mode: number; sha256: string }[]
}
/** A snapshot in an image, identified by all three. `time`: seconds since 1970. */
type OnDisk = { name: string; id: string; time: number }
/** `qmp`: the machine runs, so only its QEMU may change its image. */
type Machine = { node: Node; image: string; qmp?: Qmp }

const cluster = loadCluster()
// From here on, Ctrl-C cuts off nothing that does not get this signal.
const signal = interruption()
if (flags.list) await list()
else if (flags.delete) await remove(flags.delete)
else await take(args[0] ?? timestamp())

async function take(name: string): Promise<void> {
  // An image takes a number for a snapshot's id. A leading dot means unfinished.
  if (!/^(?!\d+$)[A-Za-z0-9][A-Za-z0-9._-]{0,62}$/.test(name)) {
    const hint =
      'up to 63 letters, digits, dots, dashes and underscores; a letter or digit first; not only digits'
    throw new StepError(`a snapshot cannot be named "${name}"`, { hint, exitCode: 2 })
  }
  const snapshot = await withMachines(`taking the snapshot ${name}`, cluster.nodes, (machines) =>
    step(`snapshot ${name}`, (detail) => takeSnapshot(name, machines, detail)),
  )
  const paused = snapshot.machines.flatMap((machine) => (machine.running ? machine.name : []))
  // The clock of a paused machine is behind afterwards.
  if (paused.length > 0) await setClocks(cluster, signal)
  if (flags.json) return console.log(JSON.stringify(snapshot, null, 2))
  console.log(contents(snapshot))
  if (paused.length > 0) {
    console.log(`paused for ${Math.round(snapshot.pause * 1000)} ms: ${paused.join(', ')}`)
  }
  console.log(`go back to it: make restore NAME=${name}`)
}

/** In the end the snapshot is complete or nothing of it is left, and the machines run. */
async function takeSnapshot(name: string, machines: Machine[], detail: (text: string) => void) {
  await removeUnfinished(machines)
  await assertPossible(name, machines)
  // From now on a snapshot of this name on a disk belongs to this folder.
  const partial = `snapshots/.${name}.partial`
  await privateFolder(cluster.path('snapshots'))
  await privateFolder(cluster.path(partial))
  try {
    // 1. cluster.env, certificates, keys and kubeconfigs (a dot first: it is being written), and
    // UEFI variables.
    const found =
      await $`{ ls -dp cluster.env tls/* configs/*.kubeconfig configs/encryption-config.yaml 2>/dev/null || true; } | grep -v '/$'`
    const settings = found.stdout.trim().split('\n')
    await $`tar -cf - ${settings} | tar -xpf - -C ${partial}`
    const copied = Date.now()
    const variables = await copyVariables(partial)

    // 2. What the machines' kernels and this computer hold in memory is written to the disks, so
    // that the pause need not wait for it. A machine that is off does not change: no pause for it.
    detail('the machines write out their data')
    await syncGuests(cluster, signal)
    signal.throwIfAborted()
    await $`sync ${machines.map(({ image }) => image)}`
    for (const { qmp, image } of machines) {
      if (!qmp) await $`qemu-img snapshot -q -c ${name} ${image}`
    }

    // 3. The disks of running machines, and those UEFI variables that have changed since 1, which
    // is rare: they are 64 MB each on arm64. (A second less, for file systems with coarse times.)
    const pause = await takingTime(() =>
      atOneMoment(name, machines, () => copyVariables(partial, copied - 1000)),
    )

    // 4. The record, and with it the name.
    await $`chmod -R go= ${partial}`
    const record: Snapshot = {
      ...{ name, taken: new Date().toISOString(), automatic: flags.automatic },
      ...{ nixos: cluster.settings.NIXOS_VERSION, pause, machines: [], files: [] },
    }
    for (const { node, image, qmp } of machines) {
      const { bytes, snapshots } = await inspect(image)
      const disk = snapshots.find((each) => each.name === name)
      if (!disk) throw new StepError(`the disk of ${node.name} does not list the new snapshot`)
      const running = qmp !== undefined
      record.machines.push({ name: node.name, role: node.role, running, bytes, disk })
    }
    for (const path of [...settings, ...variables]) {
      const mode = (await stat(cluster.path(path))).mode & 0o777
      const hash = createHash('sha256').update(await readFile(cluster.path(partial, path)))
      record.files.push({ path, mode, sha256: hash.digest('hex') })
    }
    const text = JSON.stringify(record, null, 2)
    await writeFileAtomic(cluster.path(partial, 'snapshot.json'), text, 0o600)
    await rename(cluster.path(partial), cluster.path('snapshots', name))
    return record
  } catch (error) {
    // The next snapshot removes what cannot be removed now.
    await takingTime(() => removeUnfinished(machines)).catch(() => {})
    throw error
  }
}

/** Takes the snapshot on all disks while all machines are paused. @returns seconds of the pause */
async function atOneMoment(name: string, machines: Machine[], whilePaused: () => Promise<unknown>) {
  // Of those that run.
  const all = (command: string, args = {}) =>
    Promise.allSettled(machines.map(({ qmp }) => qmp?.execute(command, args, { timeout: 60 })))
  const began = performance.now()
  const outcomes = await all('stop')
  if (outcomes.every(({ status }) => status === 'fulfilled')) {
    const disks = all('blockdev-snapshot-internal-sync', { device: 'disk', name })
    outcomes.push(...(await Promise.allSettled([whilePaused()])), ...(await disks))
  }
  const resumed = await all('cont') // Whatever happened.
  const stuck = machines.filter((_, index) => resumed[index]?.status === 'rejected')
  for (const { node } of stuck) {
    console.error(`! ${node.name} may still be paused: make up resumes it`)
  }
  const failed = [...outcomes, ...resumed].find(({ status }) => status === 'rejected')
  if (failed?.status === 'rejected') throw failed.reason
  return (performance.now() - began) / 1000
}

async function list(): Promise<void> {
  const snapshots = await readSnapshots()
  if (flags.json) return console.log(JSON.stringify(snapshots, null, 2))
  if (snapshots.length === 0) return console.log('There is no snapshot yet: make snapshot')
  const rows = snapshots.map((snapshot) => [
    snapshot.name,
    new Date(snapshot.taken).toLocaleString('sv'),
    formatBytes(snapshot.machines.reduce((total, { bytes }) => total + bytes, 0)),
    contents(snapshot),
  ])
  console.log(formatTable(['NAME', 'TAKEN', 'DISKS THEN', 'CONTENTS'], rows))
}

function contents({ machines, nixos, files, automatic }: Snapshot): string {
  const names = machines.map(({ name, running }) => `${name}${running ? '' : ' (was off)'}`)
  const why = automatic ? '; what a restore overwrote' : ''
  return `${names.join(', ')}; NixOS ${nixos}; ${files.length} files${why}`
}

async function remove(name: string): Promise<void> {
  const names = (await readSnapshots()).map((snapshot) => snapshot.name)
  if (!names.includes(name)) {
    const hint = names.length > 0 ? `there are ${names.join(', ')}` : 'there are none'
    throw new StepError(`there is no snapshot "${name}"`, { hint, exitCode: 2 })
  }
  const nodes = cluster.nodes.filter((node) => hasDisk(cluster, node))
  await withMachines(`removing the snapshot ${name}`, nodes, (machines) =>
    step(`remove ${name}`, async () => {
      await removeFromDisks(machines, name)
      await rm(cluster.path('snapshots', name), { recursive: true, force: true })
    }),
  )
  if (flags.json) console.log(JSON.stringify({ removed: name }))
}

/** All snapshots, oldest first. */
async function readSnapshots(): Promise<Snapshot[]> {
  const names = await readdir(cluster.path('snapshots')).catch(() => [])
  const snapshots: Snapshot[] = []
  for (const name of names.filter((each) => !each.startsWith('.'))) {
    const text = await readIfThere(cluster.path('snapshots', name, 'snapshot.json'))
    try {
      if (text !== undefined) snapshots.push({ ...JSON.parse(text), name })
    } catch (cause) {
      const hint = `without it this snapshot cannot be restored: remove snapshots/${name}`
      throw new StepError(`snapshots/${name}/snapshot.json cannot be read`, { hint, cause })
    }
  }
  return snapshots.sort((one, other) => Date.parse(one.taken) - Date.parse(other.taken))
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
  if (found.state === 'running' && found.mode === 'install') {
    throw new StepError(`${node.name} is being installed`, { hint: 'wait until it is installed' })
  }
  const image = `images/${node.name}.qcow2`
  if (!hasDisk(cluster, node)) {
    const hint = `install it first: make install-${node.name}`
    throw new StepError(`${node.name} has no disk: ${image} is missing`, { hint })
  }
  if (found.state === 'stopped') return { node, image }
  return { node, image, qmp: await Qmp.connect(filesOf(cluster, node).qmp) }
}

async function assertPossible(name: string, machines: Machine[]): Promise<void> {
  // Not every file system distinguishes case.
  const names = await readdir(cluster.path('snapshots')).catch(() => [])
  const taken = names.find((other) => other.toLowerCase() === name.toLowerCase())
  if (taken) {
    const hint = `use another name, or remove it: ./bin/snapshot.mts --delete ${taken}`
    throw new StepError(`there is a snapshot "${taken}" already`, { hint })
  }
  for (const { node, image } of machines) {
    if (!(await inspect(image)).snapshots.some((each) => each.name === name)) continue
    const hint = 'this script did not take it: use another name'
    throw new StepError(`the disk of ${node.name} has a snapshot "${name}" of its own`, { hint })
  }
  // What the machines change after a snapshot takes new space in their images.
  const [needed, free] = [machines.length * 2 ** 30, await freeBytes(cluster.path('images'))]
  if (free >= needed) return
  const amounts = `${formatBytes(needed)} are needed, ${formatBytes(free)} are free`
  const reason = `not enough disk space: ${amounts}`
  const hint = 'free space where images/ is, or remove a snapshot: ./bin/snapshot.mts --list'
  if (process.platform !== 'darwin') throw new StepError(reason, { hint })
  console.error(`! ${reason}; macOS may free more by itself`)
}

/** The size of an image on this computer and its snapshots. -U: its machine may run. */
async function inspect(image: string): Promise<{ bytes: number; snapshots: OnDisk[] }> {
  const info = JSON.parse((await $`qemu-img info -U --output=json ${image}`).stdout)
  const snapshots: OnDisk[] = []
  for (const { name, id, 'date-sec': seconds, 'date-nsec': nano } of info.snapshots ?? []) {
    snapshots.push({ name, id, time: seconds + nano / 1e9 })
  }
  return { bytes: info['actual-size'] ?? 0, snapshots }
}

async function removeFromDisks(machines: Machine[], name: string): Promise<void> {
  for (const { image, qmp } of machines) {
    if (!(await inspect(image)).snapshots.some((each) => each.name === name)) continue
    const command = 'blockdev-snapshot-delete-internal-sync'
    if (qmp) await qmp.execute(command, { device: 'disk', name }, { timeout: 60 })
    else await $`qemu-img snapshot -q -d ${name} ${image}`
  }
}

/** Of a snapshot that failed, or was interrupted by force or by the end of this computer. */
async function removeUnfinished(machines: Machine[]): Promise<void> {
  for (const folder of await readdir(cluster.path('snapshots')).catch(() => [])) {
    const [, name] = folder.match(/^\.(.+)\.partial$/) ?? []
    if (!name) continue
    await removeFromDisks(machines, name)
    await rm(cluster.path('snapshots', folder), { recursive: true })
  }
}

/** Copies UEFI variables that were written after a time, in ms since 1970. @returns all of them */
async function copyVariables(folder: string, after = 0): Promise<string[]> {
  await privateFolder(cluster.path(folder, 'images'))
  const all = cluster.nodes.map(({ name }) => `images/${name}-efivars.fd`)
  const there = all.filter((path) => existsSync(cluster.path(path)))
  for (const path of there) {
    if ((await stat(cluster.path(path))).mtimeMs <= after) continue
    await copyFile(cluster.path(path), cluster.path(folder, path), constants.COPYFILE_FICLONE)
  }
  return there
}
