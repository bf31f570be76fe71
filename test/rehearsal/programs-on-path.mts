// The programs that a rehearsal needs: those of Kubernetes for its machines, and kubectl and Helm on
// this computer's PATH.
import { delimiter } from 'node:path'
import { goPrograms, kubernetesPrograms } from '../kubernetes/programs.mts'

/** Folders of programs for the machines; none, with the reason printed, if Kubernetes is missing. */
export async function machinePrograms(): Promise<string[]> {
  const kubernetes = await kubernetesPrograms()
  if (!kubernetes.folder) {
    console.error(`! a rehearsal without Kubernetes, up to ssh: ${kubernetes.reason}`)
    return []
  }
  const etcd = await goPrograms('etcd')
  if (etcd.folder) return [kubernetes.folder, etcd.folder]
  console.error(`! etcd of the distribution is used: ${etcd.reason}`)
  return [kubernetes.folder]
}

/** Puts kubectl of the first folder, and Helm, at the beginning of the PATH. */
export async function preferOnPath(folders: readonly string[]): Promise<void> {
  const { folder: helm, reason } = await goPrograms('helm')
  if (!helm) console.error(`! the helm on the PATH is used: ${reason}`)
  const path = [...folders.slice(0, 1), ...(helm ? [helm] : []), process.env.PATH ?? '']
  process.env.PATH = path.join(delimiter)
}
