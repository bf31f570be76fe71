// Pods as the API server lists them, in as many words as fit on a line.
import { formatTable } from '../format.mts'

export interface PodReport {
  namespace: string
  name: string
  node: string
  phase: string
  ready: boolean
  restarts: number
  reason: string
}

/** The answer of /api/v1/pods, as far as it is read here. */
export interface PodList {
  items: {
    metadata: { namespace: string; name: string }
    spec: { nodeName?: string }
    status: {
      phase: string
      reason?: string
      conditions?: { type: string; status: string; message?: string }[]
      containerStatuses?: {
        restartCount: number
        state?: { waiting?: { reason?: string } }
      }[]
    }
  }[]
}

/** What a pod is up to, and why it is not ready. */
export function podReport({ metadata, spec, status }: PodList['items'][number]): PodReport {
  const { phase, conditions = [], containerStatuses = [] } = status
  const condition = (type: string) => conditions.find((candidate) => candidate.type === type)
  const waiting = containerStatuses.find(({ state }) => state?.waiting)?.state?.waiting?.reason
  const ready = phase === 'Succeeded' || condition('Ready')?.status === 'True'
  return {
    namespace: metadata.namespace,
    name: metadata.name,
    node: spec.nodeName ?? '',
    phase,
    ready,
    restarts: containerStatuses.reduce((sum, { restartCount }) => sum + restartCount, 0),
    reason: ready
      ? ''
      : (waiting ?? status.reason ?? condition('PodScheduled')?.message ?? 'not ready'),
  }
}

/** How many pods of each namespace are ready, and how often their containers were restarted. */
export function podTable(pods: readonly PodReport[]): string {
  const namespaces = [...new Set(pods.map(({ namespace }) => namespace))].sort()
  const rows = namespaces.map((namespace) => {
    const own = pods.filter((pod) => pod.namespace === namespace)
    const ready = own.filter((pod) => pod.ready).length
    const restarts = own.reduce((sum, pod) => sum + pod.restarts, 0)
    return [namespace, `${ready}/${own.length}`, String(restarts)]
  })
  return formatTable(['NAMESPACE', 'PODS READY', 'RESTARTS'], rows)
}
