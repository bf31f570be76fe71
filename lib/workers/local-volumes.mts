// Volumes that are folders of one worker: what a pod wrote there is nowhere else.
import type { ApiObject, Kubectl } from '../kubernetes/kubectl.mts'

interface PersistentVolume extends ApiObject {
  spec: {
    claimRef?: { namespace: string; name: string }
    nodeAffinity?: {
      required?: {
        nodeSelectorTerms: {
          matchExpressions?: { key: string; operator: string; values?: string[] }[]
          matchFields?: { key: string; operator: string; values?: string[] }[]
        }[]
      }
    }
  }
}

/** The claims whose volumes can be used on this node only, as "namespace/name". */
export async function claimsOn(kubectl: Kubectl, node: string): Promise<string[]> {
  const { items } = await kubectl.get<{ items: PersistentVolume[] }>('persistentvolumes')
  return items
    .filter((volume) => isOnlyOn(volume, node))
    .flatMap(({ spec: { claimRef } }) =>
      claimRef ? [`${claimRef.namespace}/${claimRef.name}`] : [],
    )
    .sort()
}

/** Terms are alternatives; each of a local volume names the one node it is on. */
function isOnlyOn({ spec }: PersistentVolume, node: string): boolean {
  const terms = spec.nodeAffinity?.required?.nodeSelectorTerms ?? []
  return (
    terms.length > 0 &&
    terms.every(({ matchExpressions = [], matchFields = [] }) =>
      [...matchExpressions, ...matchFields].some(
        ({ key, operator, values = [] }) =>
          /^(kubernetes\.io\/hostname|metadata\.name)$/.test(key) &&
          operator === 'In' &&
          values.length === 1 &&
          values[0] === node,
      ),
    )
  )
}
