#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// Removes what the other steps created; with --disks also the machines.
import { rmdir } from 'node:fs/promises'
import { basename, dirname } from 'node:path'
import { $, glob } from 'zx'
import { loadCluster } from '../lib/cluster.mts'
import { StepError } from '../lib/errors.mts'
import { formatTable } from '../lib/format.mts'
import { withClusterLock } from '../lib/lock.mts'
import { pidFrom } from '../lib/processes.mts'
import { runScript, script } from '../lib/script.mts'
import { hasDisk, machineState } from '../lib/vm.mts'

const { flags } = script({
  does: `Removes what the other steps created: the ISO, staged configurations, certificates, kubeconfigs.
Certificates and keys that an installed machine needs stay, unless its disk is removed too (--disks).
It does not ask, and also removes files of yours with such names: --list shows them first.`,
  reads: ['cluster.env', 'run/', 'images/'],
  writes: ['tls/, configs/, cloud-init/, images/', 'run/, logs/, snapshots/, backups/, tools/'],
  flags: {
    disks: { help: 'stop the machines; remove disks, snapshots, backups, logs and tools as well' },
    list: { help: 'show what would be removed, and remove nothing' },
  },
  examples: ['./bin/clean.mts --list', './bin/clean.mts', './bin/clean.mts --disks'],
})

/**
 * What there is to remove. "key": an installed machine cannot be reached without it, so it stays
 * as long as there is one. "machine": removed with --disks only.
 */
const generated = [
  ['key', 'certificates and keys', 'tls/*.pem tls/ssh_* tls/known_hosts'],
  ['key', 'kubeconfigs', 'configs/*.kubeconfig'],
  ['key', 'encryption key', 'configs/encryption-config.yaml'],
  ['step', 'unfinished files', '.cluster.env.tmp-* {tls,configs,run}/.*.tmp-*'],
  ['step', 'staged configurations', 'cloud-init/*'],
  ['step', 'installer ISO', 'images/*.iso*'],
  ['machine', 'disks', 'images/*.qcow2*'],
  ['machine', 'logs', 'images/*-console.log* images/*-install.log* logs/*'],
  ['machine', 'snapshots and backups', 'snapshots/* backups/*'],
  ['machine', 'downloaded tools', 'tools/*'],
  ['machine', 'sockets and pid files', 'run/* !run/bootstrap.lock*'],
] as const

const cluster = loadCluster()
const find = (paths: string) =>
  glob(paths.split(' '), { cwd: cluster.root, onlyFiles: false, dot: true })

if (flags.list) await clean()
else {
  await withClusterLock(cluster, flags.disks ? 'removing everything' : 'cleaning up', clean)
  // Folders that still contain something fail here, and stay.
  const folders = new Set(generated.flatMap(([, , paths]) => paths.split(' ').map(dirname)))
  for (const folder of folders) await rmdir(cluster.path(folder)).catch(() => {})
}

async function clean(): Promise<void> {
  if (!flags.list) await refuseIfInUse()
  if (flags.disks && !flags.list) await runScript('shutdown')

  const installed = cluster.nodes.filter((node) => hasDisk(cluster, node)).map(({ name }) => name)
  const [kept, chosen, rows]: [string[], string[], string[][]] = [[], [], []]
  for (const [of, what, paths] of generated) {
    const files = await find(paths)
    if (files.length === 0 || (of === 'machine' && !flags.disks)) continue
    if (of === 'key' && installed.length > 0 && !flags.disks) kept.push(what)
    else {
      rows.push([what, `${files.length}`, paths])
      chosen.push(...files)
    }
  }
  if (!flags.list && chosen.length > 0) await $`rm -rf ${chosen}`
  if (rows.length === 0 && kept.length === 0) console.log('There is nothing to remove.')
  else if (rows.length > 0)
    console.log(formatTable([flags.list ? 'TO REMOVE' : 'REMOVED', 'FILES', 'WHERE'], rows))
  if (kept.length > 0) {
    const names = installed.join(', ')
    console.log(`Kept, because ${names} cannot be reached without them: ${kept.join(', ')}.`)
    console.log('make clobber removes them together with the disks.')
  }
  if (!flags.list && flags.disks) await runScript('check-prereqs', ['--leftovers'])
}

/** Nothing is removed during an installation, or while a machine runs that would not be stopped. */
async function refuseIfInUse(): Promise<void> {
  for (const node of cluster.nodes) {
    if ((await machineState(cluster, node)).state !== 'installing') continue
    const hint = 'wait until it has finished, or interrupt it with Ctrl-C'
    throw new StepError(`${node.name} is being installed`, { hint })
  }
  for (const file of flags.disks ? await find('run/*.pid') : []) {
    const [name, path] = [basename(file, '.pid'), cluster.path(file)]
    const pid = await pidFrom(path, ['qemu-system-', `-pidfile ${path}`])
    if (pid === undefined || cluster.nodes.some((node) => node.name === name)) continue
    throw new StepError(`a machine "${name}" runs (pid ${pid}) that cluster.env does not name`, {
      hint: 'add it to WORKER_NODES again, or stop it, then try again',
    })
  }
}
