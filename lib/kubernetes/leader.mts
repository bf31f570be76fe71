// Who of several does the work: controller-manager and scheduler each hold a lease.
import { StepError } from '../errors.mts'
import type { Kubectl } from './kubectl.mts'

/** A leader renews its lease every two seconds; after this many, nobody does its work. */
const patience = 60

interface Lease {
  spec: { holderIdentity?: string; renewTime?: string }
}

/**
 * The process that leads, "HOST_UUID".
 *
 * @param name of the lease: kube-controller-manager or kube-scheduler
 * @throws StepError if nobody has renewed it of late
 */
export async function leaderOf(kubectl: Kubectl, name: string): Promise<string> {
  const { spec } = await kubectl.get<Lease>(`lease/${name}`, '--namespace=kube-system')
  const age = (Date.now() - Date.parse(spec.renewTime ?? '')) / 1000
  if (spec.holderIdentity && age < patience) return spec.holderIdentity
  throw new StepError(`nobody has renewed the lease/${name} for ${patience} s`)
}
