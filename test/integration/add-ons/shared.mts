// What the suites of the add-ons share: starting a control plane for each would take too long.
import type { HollowCluster } from '../../kubernetes/hollow-cluster.mts'

export interface Shared {
  /** Started before the first test. */
  hollow: HollowCluster
}
