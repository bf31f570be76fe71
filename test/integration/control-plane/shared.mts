// The control plane that the suites share: starting one for each would take too long.
import type { Cluster } from '../../../lib/cluster.mts'
import type { Checkout } from '../../checkout.mts'
import type { ControlPlane } from '../../kubernetes/control-plane.mts'
import type { Tools } from '../../kubernetes/prepared.mts'

/** Set before the first test. */
export interface Shared {
  tools: Tools
  checkout: Checkout
  cluster: Cluster
  controlPlane: ControlPlane
}
