#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// Removes what the other steps created; with --disks also the machines. Your own files stay.
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
Shows what it removes, and does not ask.`,
  reads: ['cluster.env', 'run/', 'images/'],
  writes: ['tls/', 'configs/', 'cloud-init/', 'images/', 'run/', 'logs/', 'snapshots/', 'backups/'],
  flags: {
    disks: { help: 'stop the machines, then remove their disks, snapshots and backups as well' },
    list: { help: 'show what would be removed, and remove nothing' },
  },
  examples: ['./bin/clean.mts --list', './bin/clean.mts', './bin/clean.mts --disks'],
})

/**
 * What there is to remove. "key": an installed machine cannot be reached without it, so it stays
 * as long as there is one. "machine": removed with --disks only.
 */
const generated = [
  {
    what: 'certificates and keys',
    of: 'key',
    paths: ['tls/*.pem', 'tls/ssh_*', 'tls/known_hosts'],
  },
  { what: 'kubeconfigs', of: 'key', paths: ['configs/*.kubeconfig'] },
  { what: 'encryption key', of: 'key', paths: ['configs/encryption-config.yaml'] },
  { what: 'staged configurations', of: 'step', paths: ['cloud-init/*'] },
  { what: 'installer ISO', of: 'step', paths: ['images/*.iso*'] },
  { what: 'disks', of: 'machine', paths: ['images/*.qcow2*', 'images/*-efivars.fd*'] },
  {
    what: 'logs',
    of: 'machine',
    paths: ['images/*-console.log*', 'images/*-install.log*', 'logs/*'],
  },
  { what: 'snapshots and backups', of: 'machine', paths: ['snapshots/*', 'backups/*'] },
  { what: 'downloaded tools', of: 'machine', paths: ['tools/*'] },
  { what: 'sockets and pid files', of: 'machine', paths: ['run/*', '!run/bootstrap.lock*'] },
] as const

const cluster = loadCluster()
const find = (paths: readonly string[]) =>
  glob([...paths], { cwd: cluster.root, onlyFiles: false, dot: true })

if (flags.list) await clean()
else {
  await withClusterLock(cluster, flags.disks ? 'removing everything' : 'cleaning up', clean)
  // Folders that still contain something fail here, and stay.
  const folders = new Set(generated.flatMap(({ paths }) => paths.map((path) => dirname(path))))
  for (const folder of folders) await rmdir(cluster.path(folder)).catch(() => {})
}

async function clean(): Promise<void> {
  await refuseIfInUse()
  if (flags.disks && !flags.list) await runScript('shutdown')

  const installed = cluster.nodes.filter((node) => hasDisk(cluster, node)).map(({ name }) => name)
  const found = await Promise.all(
    generated.map(async (row) => ({ ...row, files: await find(row.paths) })),
  )
  const existing = found.filter(({ files }) => files.length > 0)
  const keepsKeys = installed.length > 0 && !flags.disks
  const kept = existing.filter(({ of }) => of === 'key' && keepsKeys)
  const chosen = existing.filter(
    (row) => !kept.includes(row) && (flags.disks || row.of !== 'machine'),
  )

  const rows = chosen.map(({ what, files, paths }) => [what, `${files.length}`, paths.join(' ')])
  if (rows.length === 0) console.log('There is nothing to remove.')
  else console.log(formatTable([flags.list ? 'TO REMOVE' : 'REMOVED', 'FILES', 'WHERE'], rows))
  if (kept.length > 0) {
    const whats = kept.map(({ what }) => what).join(', ')
    console.log(`Kept, because ${installed.join(', ')} cannot be reached without: ${whats}.`)
    console.log('make clobber removes them together with the disks.')
  }
  for (const { files } of flags.list ? [] : chosen) await $`rm -rf ${files}`
}

/** Nothing is removed during an installation, or while a machine runs that would not be stopped. */
async function refuseIfInUse(): Promise<void> {
  for (const node of cluster.nodes) {
    const found = await machineState(cluster, node)
    if (found.state === 'running' && found.mode === 'install') {
      const hint = 'wait until it has finished, or interrupt it with Ctrl-C'
      throw new StepError(`${node.name} is being installed`, { hint })
    }
  }
  for (const file of flags.disks ? await find(['run/*.pid']) : []) {
    const name = basename(file, '.pid')
    if (cluster.nodes.some((node) => node.name === name)) continue
    const path = cluster.path(file)
    const pid = await pidFrom(path, ['qemu-system-', `-pidfile ${path}`])
    if (pid === undefined) continue
    throw new StepError(`a machine "${name}" runs (pid ${pid}) that cluster.env does not name`, {
      hint: 'add it to WORKER_NODES again, or stop it, then try again',
    })
  }
}
