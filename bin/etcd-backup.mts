#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// The cluster's state alone, without the machines: what kubectl shows, as etcd stores it.
import { mkdir, readdir, rename, rm } from 'node:fs/promises'
import { join, relative, resolve } from 'node:path'
import { loadCluster } from '../lib/cluster.mts'
import { StepError } from '../lib/errors.mts'
import { restoreSnapshot, saveSnapshot } from '../lib/etcd/etcd.mts'
import { assertOfThisCluster, assertWhole } from '../lib/etcd/etcd-snapshot.mts'
import { formatBytes, formatDuration, timestamp } from '../lib/format.mts'
import { interruption } from '../lib/interrupt.mts'
import { askApiServer } from '../lib/kubernetes/api-server.mts'
import { withClusterLock } from '../lib/lock.mts'
import { Machine } from '../lib/machine/machine.mts'
import { probeApiServer } from '../lib/machine/probes.mts'
import { isRunning } from '../lib/qemu/vm.mts'
import { script } from '../lib/script.mts'
import { inParallel, step } from '../lib/steps.mts'

const { flags, args } = script({
  does: `snapshot saves etcd's data, verified, in backups/, named by the time. restore puts such a file, the
newest unless one is named, in the place of etcd's data: the control plane stops meanwhile, and gets
its former data back if it is not well with the new ones. Pods go on running all the time.`,
  reads: ['cluster.env', 'tls/', 'backups/'],
  writes: ['backups/etcd-TIME.db'],
  flags: {
    keep: {
      value: 'COUNT',
      number: true,
      help: 'snapshot: of those in backups/, keep the last (10)',
    },
    force: { help: 'restore: also a file of a cluster with another CA' },
    timeout: {
      value: 'SECONDS',
      number: true,
      help: 'restore: for the control plane to be well (WAIT_TIMEOUT)',
    },
  },
  args: 'snapshot|restore [FILE]',
  examples: [
    './bin/etcd-backup.mts snapshot --keep 5',
    './bin/etcd-backup.mts restore',
    './bin/etcd-backup.mts restore backups/etcd-2026-11-22-171234.db',
  ],
})
const [action, file] = args
if (action !== 'snapshot' && action !== 'restore') {
  throw new StepError(`snapshot or restore, not ${action ? `"${action}"` : 'nothing'}`, {
    hint: './bin/etcd-backup.mts --help',
    exitCode: 2,
  })
}
const keep = flags.keep ?? 10
if (action === 'snapshot' && file)
  throw new StepError('a snapshot is named by the time', { exitCode: 2 })
if (!Number.isInteger(keep) || keep < 1)
  throw new StepError('--keep is at least 1', { exitCode: 2 })

const cluster = loadCluster()
const { controlPlane } = cluster
const folder = cluster.path('backups')
const signal = interruption()
await withClusterLock(cluster, `etcd-backup ${action}`, action === 'snapshot' ? save : restore)

async function save(): Promise<void> {
  await assertRunning()
  const path = join(folder, `etcd-${timestamp()}.db`)
  const partial = `${path}.partial`
  await mkdir(folder, { recursive: true, mode: 0o700 })
  try {
    const { totalKey, revision, totalSize } = await step('save a snapshot of etcd', async () => {
      await rm(partial, { force: true })
      const status = await saveSnapshot(new Machine(cluster, controlPlane, signal), partial, signal)
      await assertWhole(partial)
      await rename(partial, path)
      return status
    })
    const amount = `${totalKey} keys at revision ${revision}, ${formatBytes(totalSize)}`
    console.log(`${relative(cluster.root, path)}: ${amount}`)
  } finally {
    await rm(partial, { force: true })
  }
  for (const old of (await backups()).slice(0, -keep)) {
    await rm(join(folder, old))
    console.log(`removed backups/${old}, as ${keep} are kept`)
  }
}

async function restore(): Promise<void> {
  const began = performance.now()
  const newest = (await backups()).at(-1)
  const path = file ? resolve(file) : newest && join(folder, newest)
  if (!path) throw new StepError('there is no file in backups/', { hint: 'make etcd-snapshot' })
  await step(`check ${relative(process.cwd(), path)}`, async () => {
    await assertWhole(path)
    if (!flags.force) await assertOfThisCluster(cluster, path)
  })
  await assertRunning()

  const timeout = flags.timeout ?? cluster.settings.WAIT_TIMEOUT
  const [former] = await inParallel([controlPlane.name], (_, row) =>
    // Without the signal: what has begun there is not cut off, but undone.
    restoreSnapshot(new Machine(cluster, controlPlane), path, {
      timeout,
      check: secretsMissing,
      row,
      signal,
    }),
  )
  console.log(`restored in ${formatDuration(performance.now() - began)}`)
  console.log(`the former data are kept on ${controlPlane.name}: ${former}`)
  await tellOfNodes()
}

/** Workers that came or went after the backup: a kubelet registers its node only when it starts. */
async function tellOfNodes(): Promise<void> {
  const { nodes } = await probeApiServer(cluster, { signal })
  if (!nodes) return
  const names = cluster.workers.map(({ name }) => name)
  for (const name of names.filter((each) => !nodes.has(each))) {
    console.error(`! the backup is from before ${name} joined, which has to do so again:`)
    console.error(`!   ./bin/ssh.mts ${name} -- systemctl restart kubelet, then make network`)
  }
  for (const name of [...nodes.keys()].filter((each) => !names.includes(each))) {
    console.error(`! ${name} was removed after the backup: kubectl delete node ${name}`)
  }
}

/** Our own backups, oldest first; other files in the folder are none of our business. */
async function backups(): Promise<string[]> {
  const names = await readdir(folder).catch(() => [])
  return names.filter((name) => /^etcd-\d{4}-\d\d-\d\d-\d{6}\.db$/.test(name)).sort()
}

async function assertRunning(): Promise<void> {
  if (await isRunning(cluster, controlPlane)) return
  throw new StepError(`${controlPlane.name} is not running`, {
    hint: `make boot-${controlPlane.name}`,
  })
}

/** Those of a snapshot from before the encryption key was replaced can never be read again. */
async function secretsMissing(): Promise<string | undefined> {
  // With a limit it is answered from etcd itself, also before the API server has read them all.
  const { status, body } = await askApiServer(cluster, '/api/v1/secrets?limit=100', {
    signal,
  }).catch(() => ({ status: 0, body: '' }))
  if (status === 200) return undefined
  // This is how it tells that decrypting failed.
  if (status !== 500 || !/transform/.test(body)) return 'the API server does not list Secrets yet'
  throw new StepError('the API server cannot decrypt the Secrets of the snapshot', {
    hint: 'it is of a time with another key in configs/encryption-config.yaml',
  })
}
