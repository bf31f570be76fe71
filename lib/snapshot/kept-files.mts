// The files of this computer that belong to a moment of the cluster: keys, kubeconfigs and settings
// without which the machines' disks of that moment could be neither reached nor understood.
import { createHash } from 'node:crypto'
import { chmod, copyFile, mkdir, readdir, readFile, stat } from 'node:fs/promises'
import { dirname, join, relative } from 'node:path'
import type { Cluster } from '../cluster.mts'
import { writeFileAtomic } from '../files.mts'
import { filesOf } from '../qemu/machine-files.mts'

/** A file that was kept. */
export interface KeptFile {
  /** Relative to the project, and to the folder where it is kept. */
  path: string
  /** Permission bits that it had; what is kept is for its owner alone. */
  mode: number
  sha256: string
}

/** Certificates, keys, kubeconfigs and cluster.env, as far as they are there. */
export async function settingsFiles(cluster: Cluster): Promise<string[]> {
  const listed = async (folder: string, pattern: RegExp) => {
    const entries = await readdir(cluster.path(folder), { withFileTypes: true }).catch(() => [])
    return entries
      .filter((entry) => entry.isFile() && pattern.test(entry.name))
      .map(({ name }) => join(folder, name))
      .sort()
  }
  return [
    'cluster.env',
    // Not what is just being written.
    ...(await listed('tls', /^[^.]/)),
    ...(await listed('configs', /^[^.].*\.kubeconfig$|^encryption-config\.yaml$/)),
  ]
}

/** The machines' UEFI variables, as far as they are there. They do not change while QEMU pauses. */
export async function firmwareFiles(cluster: Cluster): Promise<string[]> {
  const paths = cluster.nodes.map((node) => relative(cluster.root, filesOf(cluster, node).efiVars))
  const there = await Promise.all(
    paths.map((path) =>
      stat(cluster.path(path)).then(
        () => true,
        () => false,
      ),
    ),
  )
  return paths.filter((_, index) => there[index])
}

/** Copies files into a folder, each at its own path. */
export async function keepFiles(
  cluster: Cluster,
  paths: readonly string[],
  folder: string,
): Promise<KeptFile[]> {
  return Promise.all(
    paths.map(async (path) => {
      const copy = join(folder, path)
      await mkdir(dirname(copy), { recursive: true, mode: 0o700 })
      await copyFile(cluster.path(path), copy)
      await chmod(copy, 0o600)
      const { mode } = await stat(cluster.path(path))
      return { path, mode: mode & 0o777, sha256: await digestOf(copy) }
    }),
  )
}

/** The paths of those that are missing in the folder, or are not any more what was kept. */
export async function damagedFiles(folder: string, files: readonly KeptFile[]): Promise<string[]> {
  const digests = await Promise.all(
    files.map(({ path }) => digestOf(join(folder, path)).catch(() => undefined)),
  )
  return files.filter(({ sha256 }, index) => digests[index] !== sha256).map(({ path }) => path)
}

/** Puts them back to where they were, each whole or not at all. Other files stay. */
export async function putBackFiles(
  cluster: Cluster,
  files: readonly KeptFile[],
  folder: string,
): Promise<void> {
  for (const { path, mode } of files) {
    await writeFileAtomic(cluster.path(path), await readFile(join(folder, path)), mode)
  }
}

async function digestOf(path: string): Promise<string> {
  return createHash('sha256')
    .update(await readFile(path))
    .digest('hex')
}
