// Which versions of Kubernetes may meet in one cluster, as far as an upgrade is concerned.
// https://kubernetes.io/releases/version-skew-policy/
import { StepError } from '../errors.mts'

/** Minor versions that a kubelet may be behind the API server. */
const kubeletMayBeBehind = 3

/** What an upgrade of one node would change, and what it meets; versions as "v1.36.3". */
export interface Upgrade {
  name: string
  role: 'control-plane' | 'worker'
  from: string
  to: string
  apiServer: string
  /** All workers' kubelets. */
  kubelets: ReadonlyMap<string, string>
}

/**
 * Makes sure that an upgrade keeps to the version skew policy: no minor version is left out or gone
 * back to, no kubelet is newer than the API server, and none more than three minor versions older.
 *
 * @throws StepError that names the versions, and what has to come first
 */
export function assertSkew({ name, role, from, to, apiServer, kubelets }: Upgrade): void {
  const refused = (reason: string, hint: string) => new StepError(`${name}: ${reason}`, { hint })
  const step = minorOf(to) - minorOf(from)
  if (step < 0) {
    throw refused(
      `Kubernetes would go back from ${from} to ${to}, which its data do not allow`,
      'NIXOS_VERSION of cluster.env is older than what runs; make restore goes back to a snapshot',
    )
  }
  if (role === 'worker') {
    if (minorOf(to) <= minorOf(apiServer)) return
    throw refused(
      `its kubelet would be ${to}, newer than the API server (${apiServer})`,
      'the control plane comes first: make upgrade NAME=all',
    )
  }
  if (step > 1) {
    throw refused(
      `from ${from} to ${to} leaves ${step - 1} minor version${step > 2 ? 's' : ''} out`,
      'take the releases of NixOS one after the other in NIXOS_VERSION',
    )
  }
  const oldest = minorOf(to) - kubeletMayBeBehind
  const tooOld = [...kubelets].filter(([, version]) => minorOf(version) < oldest)
  if (tooOld.length === 0) return
  throw refused(
    `with ${to} the API server is too new for ${tooOld.map((pair) => pair.join(' ')).join(', ')}`,
    `a kubelet may be ${kubeletMayBeBehind} minor versions behind: upgrade these first`,
  )
}

/** 36 of "v1.36.3". @throws StepError if it is no version */
function minorOf(version: string): number {
  const minor = version.match(/^v1\.(\d+)\./)?.[1]
  if (minor) return Number(minor)
  throw new StepError(`"${version}" is no version of Kubernetes`)
}
