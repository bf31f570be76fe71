// The programs that a rehearsal brings: those of Kubernetes for its machines, and on this
// computer's PATH their kubectl and the stand-in for the cilium command.
import { delimiter, join } from 'node:path'
import { goPrograms, kubernetesPrograms } from '../kubernetes/programs.mts'

/** Folders of programs for the machines; none, and said why, where Kubernetes cannot be had. */
export async function machinePrograms(): Promise<string[]> {
  const kubernetes = await kubernetesPrograms()
  if (!kubernetes.folder) {
    console.error(`! a rehearsal without Kubernetes, up to ssh: ${kubernetes.reason}`)
    return []
  }
  const etcd = await goPrograms('etcd')
  if (etcd.folder) return [kubernetes.folder, etcd.folder]
  console.error(`! the distribution's etcd has to do: ${etcd.reason}`)
  return [kubernetes.folder]
}

/** Puts kubectl of the first folder and the stand-in for cilium before all that is on the PATH. */
export function preferOnPath(folders: readonly string[]): void {
  const own = join(import.meta.dirname, 'bin')
  const path = [own, ...folders.slice(0, 1), process.env.PATH ?? '']
  process.env.PATH = path.join(delimiter)
}
