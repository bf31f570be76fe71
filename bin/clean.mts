#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// Removes what the other steps made; with --disks the machines too. Files of yours stay, also in
// the folders of ours.
import { readdir, rm, rmdir } from 'node:fs/promises'
import { basename, dirname } from 'node:path'
import { type Cluster, loadCluster } from '../lib/cluster.mts'
import { StepError } from '../lib/errors.mts'
import { formatTable } from '../lib/format.mts'
import { interruption } from '../lib/interrupt.mts'
import { stopLanSwitch } from '../lib/lan/lan-switch.mts'
import { withLock } from '../lib/lock.mts'
import { hasDisk } from '../lib/qemu/disk.mts'
import { pidFrom } from '../lib/qemu/processes.mts'
import { stopMachine } from '../lib/qemu/stop-machine.mts'
import { machineState } from '../lib/qemu/vm.mts'
import { script } from '../lib/script.mts'
import { step } from '../lib/steps.mts'

const { flags } = script({
  does: `Removes what the other steps made: the ISO, staged configurations, certificates, kubeconfigs.
Certificates and keys that an installed machine needs stay, unless its disk goes too (--disks).
Shows what it removes, and does not ask.`,
  reads: ['cluster.env', 'run/', 'images/'],
  writes: ['tls/', 'configs/', 'cloud-init/', 'images/', 'run/', 'logs/', 'snapshots/', 'backups/'],
  flags: {
    disks: { help: 'stop the machines, then remove their disks, snapshots and backups as well' },
    list: { help: 'show what would be removed, and remove nothing' },
  },
  examples: ['./bin/clean.mts --list', './bin/clean.mts', './bin/clean.mts --disks'],
})

/** What there is to remove. `*` is any part of a name; folders that become empty go too. */
const generated = [
  { what: 'certificates and keys', paths: ['tls/*.pem', 'tls/ssh_*', 'tls/known_hosts'] },
  { what: 'kubeconfigs', paths: ['configs/*.kubeconfig'] },
  { what: 'encryption key', paths: ['configs/encryption-config.yaml'] },
  { what: 'staged configurations', paths: ['cloud-init/*'] },
  { what: 'installer ISO', paths: ['images/*.iso*'] },
  { what: 'disks', paths: ['images/*.qcow2*', 'images/*-efivars.fd'] },
  { what: 'logs', paths: ['images/*-console.log*', 'images/*-install.log*', 'logs/*'] },
  { what: 'snapshots and backups', paths: ['snapshots/*', 'backups/*'] },
  { what: 'downloaded tools', paths: ['tools/*'] },
  { what: 'sockets and pid files', paths: ['run/*'] },
] as const
type What = (typeof generated)[number]['what']

/** Without these an installed machine can be neither reached nor understood. */
const keys: readonly What[] = ['certificates and keys', 'kubeconfigs', 'encryption key']
const onlyWithDisks: readonly What[] = [
  ...(['disks', 'logs', 'snapshots and backups', 'downloaded tools'] as const),
  'sockets and pid files',
]

const cluster = loadCluster()
const lock = cluster.path('run', 'bootstrap.lock')
if (flags.list) await clean()
else {
  await withLock(lock, flags.disks ? 'removing everything' : 'cleaning up', clean)
  // A folder that holds something still is not for us to remove.
  const folders = generated.flatMap(({ paths }) => paths.map((path) => dirname(path)))
  for (const folder of new Set(folders)) await rmdir(cluster.path(folder)).catch(() => {})
}

async function clean(): Promise<void> {
  await refuseIfInUse(cluster)
  if (flags.disks && !flags.list) await stopEverything(cluster)

  const installed = cluster.nodes.filter((node) => hasDisk(cluster, node))
  const stay = new Set<What>(flags.disks ? [] : onlyWithDisks)
  if (!flags.disks && installed.length > 0) for (const what of keys) stay.add(what)
  const found = await Promise.all(
    generated.map(async ({ what, paths }) => {
      const files = (await Promise.all(paths.map(expand))).flat().filter((file) => file !== lock)
      return { what, files, where: paths.join(' ') }
    }),
  )
  const there = found.filter(({ files }) => files.length > 0)
  const chosen = there.filter(({ what }) => !stay.has(what))
  const kept = there.filter(({ what }) => stay.has(what) && keys.includes(what))
  const rows = chosen.map(({ what, files, where }) => [what, String(files.length), where])
  if (rows.length === 0) console.log('There is nothing to remove.')
  else console.log(formatTable([flags.list ? 'TO REMOVE' : 'REMOVED', 'FILES', 'WHERE'], rows))
  if (kept.length > 0) {
    const names = installed.map(({ name }) => name).join(', ')
    console.log(
      `Kept, as ${names} cannot be reached without: ${kept.map((k) => k.what).join(', ')}.`,
    )
    console.log('make clobber removes them together with the disks.')
  }
  if (flags.list) return

  for (const file of chosen.flatMap(({ files }) => files)) {
    await rm(file, { recursive: true, force: true })
  }
}

/** Nothing may go while somebody writes it, or while a machine runs that would not be stopped. */
async function refuseIfInUse(cluster: Cluster): Promise<void> {
  for (const node of cluster.nodes) {
    const found = await machineState(cluster, node)
    if (found.state === 'running' && found.mode === 'install') {
      throw new StepError(`${node.name} is being installed`, {
        hint: 'let it finish, or Ctrl-C it',
      })
    }
  }
  for (const file of flags.disks ? await expand('run/*.pid') : []) {
    const name = basename(file, '.pid')
    if (cluster.nodes.some((node) => node.name === name)) continue
    const pid = await pidFrom(file, ['qemu-system-', `-pidfile ${file}`])
    if (pid === undefined) continue
    throw new StepError(`a machine "${name}" runs (pid ${pid}) that cluster.env does not name`, {
      hint: 'put it back into WORKER_NODES, or end it, then try again',
    })
  }
}

async function stopEverything(cluster: Cluster): Promise<void> {
  const signal = interruption()
  await Promise.all(
    cluster.nodes.map(async (node) => {
      if ((await machineState(cluster, node)).state === 'stopped') return
      await step(`stop ${node.name}`, (detail) =>
        stopMachine(cluster, node, { report: detail, signal }),
      )
    }),
  )
  await stopLanSwitch(cluster)
}

async function expand(pattern: string): Promise<string[]> {
  const folder = dirname(pattern)
  const shape = basename(pattern).replaceAll('.', '\\.').replaceAll('*', '.*')
  const names = await readdir(cluster.path(folder)).catch(() => [])
  return names
    .filter((name) => new RegExp(`^${shape}$`).test(name))
    .map((name) => cluster.path(folder, name))
}
