// What this computer has of one worker, and taking it away.
import { readdir, rename, rm } from 'node:fs/promises'
import { basename } from 'node:path'
import type { Cluster, Node } from '../cluster.mts'
import { readIfThere, writeFileAtomic } from '../files.mts'
import { timestamp } from '../format.mts'
import { hasDisk } from '../qemu/disk.mts'
import { filesOf } from '../qemu/machine-files.mts'

/**
 * Removes keys, certificate, kubeconfig, staged configuration, logs and UEFI variables of a worker
 * whose machine is off. Its disk is kept under another name.
 *
 * @param options.purge the disk goes, too
 * @returns what the disk is called now, relative to the project; undefined if there is none
 */
export async function removeWorkerFiles(
  cluster: Cluster,
  node: Node,
  { purge }: { purge: boolean },
): Promise<string | undefined> {
  const { name } = node
  const files = filesOf(cluster, node)
  await forgetHostKey(cluster, node)
  const ours = [
    ...['.pem', '-key.pem'].map((end) => cluster.path('tls', `${name}${end}`)),
    ...['', '.pub'].map((end) => cluster.path('tls', `ssh_host_${name}_ed25519${end}`)),
    cluster.path('configs', `${name}.kubeconfig`),
    cluster.path('cloud-init', name),
    ...[files.partialDisk, files.efiVars, `${files.efiVars}.old`],
    ...[files.consoleLog, `${files.consoleLog}.1`, files.installLog, files.qemuLog],
    ...(await inRun(cluster, node)),
  ]
  for (const path of ours) await rm(path, { recursive: true, force: true })
  if (!hasDisk(cluster, node)) return undefined
  if (purge) {
    await rm(files.disk)
    return undefined
  }
  const kept = `${files.disk}.removed-${timestamp()}`
  await rename(files.disk, kept)
  return `images/${basename(kept)}`
}

/** ssh would otherwise expect this key of the next machine that has the port. */
async function forgetHostKey(cluster: Cluster, { sshPort }: Node): Promise<void> {
  const file = cluster.path('tls', 'known_hosts')
  const lines = (await readIfThere(file))?.split('\n')
  const others = lines?.filter((line) => !line.startsWith(`[127.0.0.1]:${sshPort} `))
  if (lines && others && others.length < lines.length) {
    await writeFileAtomic(file, others.join('\n'))
  }
}

/** Sockets and the like; not the lock, which whoever calls this holds. */
async function inRun(cluster: Cluster, node: Node): Promise<string[]> {
  const names = await readdir(cluster.path('run')).catch(() => [])
  const lock = basename(filesOf(cluster, node).lock)
  return names
    .filter((file) => file.startsWith(`${node.name}.`) || file === `${node.name}-install`)
    .filter((file) => !file.startsWith(lock))
    .map((file) => cluster.path('run', file))
}
