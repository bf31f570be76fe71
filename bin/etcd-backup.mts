#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// Saves the cluster's state without the machines, as etcd stores it, and restores it.
import { createHash } from 'node:crypto'
import { createReadStream } from 'node:fs'
import { readdir, readFile, rename, rm, stat } from 'node:fs/promises'
import { relative, resolve } from 'node:path'
import { buffer } from 'node:stream/consumers'
import { $ } from 'zx/core'
import { loadCluster } from '../lib/cluster.mts'
import { describeError, StepError } from '../lib/errors.mts'
import { privateFolder } from '../lib/files.mts'
import { formatBytes, formatDuration, quote, timestamp } from '../lib/format.mts'
import { servicesOf, waitForServices } from '../lib/health.mts'
import { interruption, takingTime } from '../lib/interrupt.mts'
import { useCluster } from '../lib/kubectl.mts'
import { withClusterLock } from '../lib/lock.mts'
import { refuseIf, script } from '../lib/script.mts'
import { connect, remote } from '../lib/ssh.mts'
import { inParallel, type Row, step } from '../lib/steps.mts'
import { isRunning } from '../lib/vm.mts'

const { flags, args } = script({
  does: `snapshot saves etcd's data to backups/etcd-TIME.db (UTC) and verifies it. restore replaces the data
with such a file, by default the newest. The control plane is stopped meanwhile; if it is not healthy
afterwards, it gets its previous data back. Pods keep running; those unknown to the backup then end.`,
  reads: ['cluster.env', 'tls/', 'configs/admin.kubeconfig', 'backups/'],
  writes: ['snapshot: backups/etcd-TIME.db', "restore: etcd's data on the control plane"],
  flags: {
    keep: { value: 'COUNT', number: true, help: 'snapshot: how many backups to keep (10)' },
    force: { help: 'restore: accept a file of a cluster with another CA' },
    timeout: { value: 'SECONDS', number: true, help: 'restore: how long to wait (WAIT_TIMEOUT)' },
  },
  args: 'snapshot|restore [FILE]',
  examples: ['./bin/etcd-backup.mts snapshot --keep 5', './bin/etcd-backup.mts restore'],
})
const [action, file] = args
const keep = flags.keep ?? 10
const saving = action === 'snapshot'
refuseIf(!saving && action !== 'restore', `snapshot or restore, not ${action ?? 'nothing'}`)
refuseIf(saving && file !== undefined, 'snapshot takes no FILE: it is named by the current time')
refuseIf(saving && flags.force, '--force is for restore')
refuseIf(saving && flags.timeout !== undefined, '--timeout is for restore')
refuseIf(!saving && flags.keep !== undefined, '--keep is for snapshot')
refuseIf(!Number.isInteger(keep) || keep < 1, '--keep is at least 1')

const cluster = loadCluster()
const { controlPlane } = cluster
const alpha = controlPlane.name
// Some distributions package etcdctl alone, which can do the same up to etcd 3.5.
const etcdutl = '"$(command -v etcdutl || command -v etcdctl)"'
const signal = interruption()
await withClusterLock(cluster, `etcd-backup ${action}`, saving ? save : restore)

/** Runs shell text on the control plane machine, as root. Without a signal it runs to its end. */
function onAlpha(command: string, options: { signal?: AbortSignal } = {}): Promise<string> {
  return remote(controlPlane, command, { timeout: 600, ...options })
}

async function save(): Promise<void> {
  const path = `backups/etcd-${timestamp()}.db`
  const partial = `${path}.partial`
  const { totalKey, revision, totalSize } = await step('save a snapshot of etcd', async () => {
    const { flag, work } = await etcdOnMachine()
    await privateFolder(cluster.path('backups'))
    try {
      // "save" would wait for an etcd that is down, so its health is asked first. It verifies that
      // etcd sent all of it; "status" verifies that it is a database.
      const save = `umask 077; rm -rf ${work}; mkdir ${work}
        export ETCDCTL_ENDPOINTS=${flag('advertise-client-urls')} ETCDCTL_CACERT=${flag('trusted-ca-file')}
        export ETCDCTL_CERT=${flag('cert-file')} ETCDCTL_KEY=${flag('key-file')}
        etcdctl endpoint health >&2
        etcdctl snapshot save ${work}/snapshot.db >&2
        ${etcdutl} snapshot status --write-out=json ${work}/snapshot.db`
      const status = await onAlpha(save, { signal })
      const copy = `cat ${work}/snapshot.db`
      // cat says why it cannot write; ssh would not.
      await $({ signal })`ssh -F tls/ssh_config ${alpha} ${copy} | (umask 077; cat >${partial})`
      await assertComplete(cluster.path(partial))
      await rename(cluster.path(partial), cluster.path(path))
      return JSON.parse(status) as { totalKey: number; revision: number; totalSize: number }
    } finally {
      await rm(cluster.path(partial), { force: true })
      await onAlpha(`rm -rf ${work}`).catch(() => {})
    }
  })
  console.log(`${path}: ${totalKey} keys at revision ${revision}, ${formatBytes(totalSize)}`)
  for (const old of (await backups()).slice(0, -keep)) {
    if (path.endsWith(old)) continue // The clock was set back.
    await rm(cluster.path('backups', old))
    console.log(`removed backups/${old}: ${keep} are kept`)
  }
}

async function restore(): Promise<void> {
  const began = performance.now()
  const newest = (await backups()).at(-1)
  const path = file ? resolve(file) : newest && cluster.path('backups', newest)
  if (!path) throw new StepError('there is no backup in backups/', { hint: 'make etcd-snapshot' })
  await step(`check ${relative(process.cwd(), path)}`, async () => {
    await assertComplete(path)
    if (!flags.force) await assertOfThisCluster(path)
    await useCluster(cluster)
  })
  const [former] = await inParallel([alpha], (_, row) => replaceData(path, row))
  console.log(`restored in ${formatDuration(performance.now() - began)}`)
  console.log(`the previous data are kept on ${alpha}: ${former}`)
  await reportNodes()
}

/**
 * Makes a data directory next to the one in use while the control plane works; then they change
 * places while it is stopped. Puts the former one back if it is not healthy then, or after Ctrl-C.
 * @returns where the previous data are kept on the machine
 */
async function replaceData(path: string, row: Row): Promise<string> {
  row.step('making the data directory')
  const { flag, work } = await etcdOnMachine()
  const data = flag('data-dir')
  const former = `${data}.former-${timestamp()}`
  // One at a time: a command whose connection was cut still runs to its end on the machine.
  const lock = `exec 9>${data}.lock; flock --timeout 600 9`
  // They stop in the opposite order: an API server that has lost its etcd takes a minute to end.
  const units = servicesOf(cluster, controlPlane)
  const stop = `systemctl stop ${units.toReversed().join(' ')}`
  const start = `sync; systemctl start --no-block ${units.join(' ')}`
  try {
    await onAlpha(`umask 077; ${lock}; rm -rf ${work}; mkdir ${work}`, { signal })
    const copy = `cat >${work}/snapshot.db`
    await $({ signal })`ssh -F tls/ssh_config ${alpha} ${copy} <${path}`
    // Clients that watch the API know the revision of what they have seen, and would miss what the
    // restore changes: the new revision is above every earlier one, of this and of other backups,
    // and everything before it is marked as compacted, so clients list everything again.
    // Milliseconds since 1970 grow faster than etcd's revisions. (The flag's number is added.)
    const prepare = `${lock}; umask 077
      status=$(${etcdutl} snapshot status --write-out=json ${work}/snapshot.db)
      revision=$(sed -E 's/.*"revision":([0-9]+).*/\\1/' <<<"$status")
      now=$(date +%s%3N)
      ${etcdutl} snapshot restore ${work}/snapshot.db --data-dir=${work}/data --name=${flag('name')} \\
        --initial-cluster=${flag('initial-cluster')} \\
        --initial-cluster-token=${flag('initial-cluster-token')} \\
        --initial-advertise-peer-urls=${flag('initial-advertise-peer-urls')} \\
        --bump-revision=$((now > revision ? now - revision : now)) --mark-compacted
      if [ -e ${data} ]; then
        chown -R --reference=${data} ${work}/data
        chmod --reference=${data} ${work}/data
      fi
      sync`
    await onAlpha(prepare, { signal })
    signal.throwIfAborted()
  } catch (error) {
    await onAlpha(`${lock}; rm -rf ${work}`).catch(() => {})
    throw error
  }

  row.step('changing the data')
  const timeout = flags.timeout ?? cluster.settings.WAIT_TIMEOUT
  const wait = { timeout, detail: (text: string) => row.detail(text) }
  try {
    // Ctrl-C from here on: it is undone, but not cut off.
    const swap = `${lock}; ${stop}
      if [ -e ${data} ]; then mv -T ${data} ${former}; fi
      mv -T ${work}/data ${data}; rm -rf ${work}; ${start}`
    await takingTime(() => onAlpha(swap))
    row.step('waiting for the control plane')
    await waitForServices(cluster, controlPlane, { ...wait, check: secretsMissing, signal })
  } catch (error) {
    row.step('putting the previous data back')
    // However far the change came. Without data, etcd would start as an empty one.
    const putBack = `${lock}; ${stop}
      if [ -e ${former} ]; then rm -rf ${data}; mv -T ${former} ${data}; fi
      rm -rf ${work}
      [ -e ${data}/member ] || { echo 'there are no data in ${data}' >&2; exit 1; }
      ${start}`
    const reasons = [describeError(error)]
    let outcome = `${alpha} has its previous data back`
    await takingTime(async () => {
      await onAlpha(putBack)
      await waitForServices(cluster, controlPlane, wait)
    }).catch((second) => {
      reasons.push(describeError(second))
      outcome = `the previous data are not back in place; on ${alpha} they are in ${former}`
    })
    const exitCode = (error instanceof StepError && error.explanation.exitCode) || 1
    const output = reasons.join('\n')
    throw new StepError(`etcd was not restored: ${outcome}`, { output, exitCode, cause: error })
  }
  // Only the most recent previous data are kept.
  await onAlpha(`for each in ${data}.former-*; do [ "$each" = ${former} ] || rm -rf "$each"; done`)
  return former
}

/** The flags of etcd's unit, as shell words, and a folder for our work next to its data. */
async function etcdOnMachine(): Promise<{ flag: (name: string) => string; work: string }> {
  if (!(await isRunning(cluster, controlPlane))) {
    throw new StepError(`${alpha} is not running`, { hint: `make boot-${alpha}` })
  }
  await connect(cluster, controlPlane, { signal })
  const unit = await onAlpha('systemctl show --property=ExecStart --value etcd', { signal })
  const flag = (name: string) => {
    const word = unit.split(/\s+/).find((each) => each.startsWith(`--${name}=`))
    if (word) return quote(word.slice(name.length + 3))
    const hint = 'make reconfig installs the configuration of this project'
    throw new StepError(`the unit etcd of ${alpha} has no flag --${name}`, { hint })
  }
  return { flag, work: `${flag('data-dir')}.new` }
}

/** Secrets from before the encryption key was replaced could never be read again. */
async function secretsMissing(): Promise<string | undefined> {
  // With a limit the answer comes from etcd, even before the API server has read all of them.
  const $$ = $({ nothrow: true, timeout: '20s', signal })
  const { exitCode, stderr } = await $$`kubectl get --raw '/api/v1/secrets?limit=100' >/dev/null`
  signal.throwIfAborted()
  if (exitCode === 0) return undefined
  if (!/unable to transform key/.test(stderr)) return 'the API server does not list Secrets yet'
  throw new StepError('the API server cannot decrypt the Secrets of the snapshot', {
    hint: 'it was saved when configs/encryption-config.yaml had another key',
  })
}

/** Workers that were added or removed after the backup: a kubelet registers when it starts. */
async function reportNodes(): Promise<void> {
  const { exitCode, stdout } = await $({ nothrow: true, signal })`kubectl get nodes --output=name`
  if (exitCode !== 0) return
  const registered: string[] = stdout.match(/(?<=^node\/).+/gm) ?? []
  const workers = cluster.workers.map(({ name }) => name)
  for (const name of workers.filter((each) => !registered.includes(each))) {
    console.error(`! ${name} joined after the backup and has to register again:`)
    console.error(`!   ./bin/ssh.mts ${name} -- systemctl restart kubelet && make network`)
  }
  for (const name of registered.filter((each) => !workers.includes(each))) {
    console.error(
      `! ${name} was removed after the backup: KUBECONFIG=configs/admin.kubeconfig kubectl delete node ${name}`,
    )
  }
}

/** Our own backups, oldest first; other files in the folder are left alone. */
async function backups(): Promise<string[]> {
  const names = await readdir(cluster.path('backups')).catch(() => [])
  return names.filter((name) => /^etcd-\d{4}-\d\d-\d\d-\d{6}\.db$/.test(name)).sort()
}

/**
 * Checks that a file is an etcd snapshot from its first byte to its last: a bbolt database with its
 * SHA-256 behind it, as etcd sends it. (`etcdutl snapshot status` accepts a file without its end.)
 */
async function assertComplete(path: string): Promise<void> {
  const found = await stat(path).catch(() => undefined)
  if (!found?.isFile()) throw new StepError(`there is no file ${path}`)
  const fail = (reason: string) => {
    const hint = 'nothing was changed; try another file of backups/'
    throw new StepError(`${path} is not a complete etcd snapshot: ${reason}`, { hint })
  }
  const part = (start: number, end: number) => buffer(createReadStream(path, { start, end }))
  // bbolt's first page: 16 bytes, then the magic number 0xed0cdaed, little endian.
  const begins = (await part(16, 19)).toString('hex') === 'edda0ced'
  if (!begins) fail('it does not begin like a database of etcd')
  const size = found.size - 32
  if (size <= 0 || size % 512 !== 0) fail('it does not end with a checksum')
  const hash = createHash('sha256')
  for await (const chunk of createReadStream(path, { end: size - 1 })) hash.update(chunk)
  if (!hash.digest().equals(await part(size, size + 31))) fail('its checksum does not match')
}

/** Every namespace has the CA's certificate in a ConfigMap, kube-root-ca.crt, not encrypted. */
async function assertOfThisCluster(path: string): Promise<void> {
  const certificate = await readFile(cluster.path('tls', 'ca.pem'), 'utf8').catch((cause) => {
    throw new StepError('tls/ca.pem is missing', { hint: 'make certs', cause })
  })
  // The last whole line of its signature, which no other certificate has.
  const line = certificate.trim().split('\n').at(-3) ?? ''
  if ((await $({ nothrow: true })`grep -aqF ${line} ${path}`).exitCode === 0) return
  throw new StepError(`${path} is of another cluster: the certificate tls/ca.pem is not in it`, {
    hint: 'its tokens and Secrets could not be used here; --force restores it anyway',
  })
}
