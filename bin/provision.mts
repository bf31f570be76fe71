#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// Machines: installed from the ISO with --iso, else started from their disks.
import { existsSync } from 'node:fs'
import { resolve } from 'node:path'
import { chooseNodes, loadCluster } from '../lib/cluster.mts'
import { inspectIso, verifiedIso } from '../lib/download/iso.mts'
import { StepError } from '../lib/errors.mts'
import { installNode } from '../lib/installer/install-node.mts'
import { interruption } from '../lib/interrupt.mts'
import { assertDiskSpace, hasDisk } from '../lib/qemu/disk.mts'
import { detectHost } from '../lib/qemu/host.mts'
import { assertPortsFree, startMachine } from '../lib/qemu/vm.mts'
import { script } from '../lib/script.mts'
import { inParallel } from '../lib/steps.mts'

const { flags, args } = script({
  does: `Starts installed machines in the background, all of them unless some are named. With --iso it
installs NixOS on new disks instead: the machines start from the installer ISO, their consoles
are typed on, and at the end they are switched off.`,
  reads: ['cluster.env', 'images/NODE.qcow2', '--iso: images/nixos-VERSION-ARCH.iso, cloud-init/'],
  writes: [
    'run/',
    'images/NODE-efivars.fd',
    'images/NODE-console.log',
    '--iso: images/NODE.qcow2, images/NODE-install.log',
  ],
  flags: {
    iso: { help: 'install; a node that has a disk is refused' },
    'iso-file': { value: 'FILE', help: 'install from this ISO' },
    force: { help: 'with --iso: replace disks that are there, with all that is on them' },
  },
  args: '[NODE...]',
  examples: [
    './bin/provision.mts',
    './bin/provision.mts --iso sigma',
    './bin/provision.mts --iso --iso-file ~/Downloads/nixos-minimal.iso --force sigma',
  ],
})

const cluster = loadCluster()
const nodes = chooseNodes(cluster, args)
const names = nodes.map(({ name }) => name)
const installing = flags.iso || flags['iso-file'] !== undefined
if (flags.force && !installing) {
  throw new StepError('--force is for --iso: a start replaces nothing', { exitCode: 2 })
}
const host = await detectHost(cluster)

if (installing) {
  const given = flags['iso-file'] && resolve(flags['iso-file'])
  const iso = given ?? (await verifiedIso(cluster, host))
  if (given && !existsSync(given)) throw new StepError(`there is no ISO ${given}`)
  if (given) await inspectIso(given, host)

  const taken = nodes.filter((node) => hasDisk(cluster, node)).map(({ name }) => name)
  if (taken.length > 0 && !flags.force) {
    const what = taken.length > 1 ? 'have disks' : 'has a disk'
    throw new StepError(`${taken.join(' and ')} ${what} already, in images/`, {
      hint: `start: ./bin/provision.mts ${taken.join(' ')}\ninstall anew, all on it is lost: --iso --force`,
    })
  }
  await assertDiskSpace(cluster, nodes)
  if (host.warning) console.error(`! ${host.warning}`)
  const signal = interruption()
  await inParallel(names, (name, row) =>
    installNode(cluster, cluster.node(name), { iso, host, row, signal, replace: flags.force }),
  )
} else {
  const missing = nodes.filter((node) => !hasDisk(cluster, node)).map(({ name }) => name)
  if (missing.length > 0) {
    const what = missing.length > 1 ? 'have no disks' : 'has no disk'
    throw new StepError(`${missing.join(' and ')} ${what}: not installed yet`, {
      hint: `install: ./bin/provision.mts --iso ${missing.join(' ')}`,
    })
  }
  await assertPortsFree(cluster, nodes)
  if (host.warning) console.error(`! ${host.warning}`)
  const width = Math.max(...names.map((name) => name.length))
  const lines = await inParallel(names, async (name) => {
    const { pid, alreadyRunning } = await startMachine(cluster, cluster.node(name), host)
    return `${name.padEnd(width)}  ${alreadyRunning ? 'runs already' : 'started'} (pid ${pid})`
  })
  console.log(lines.join('\n'))
}
