// Volumes that are folders of one worker: what a pod wrote there is nowhere else.
import type { ApiObject, Kubectl } from '../kubernetes/kubectl.mts'

interface Requirement {
  key: string
  operator: string
  values?: string[]
}

interface PersistentVolume extends ApiObject {
  spec: {
    claimRef?: { namespace: string; name: string }
    nodeAffinity?: {
      required?: {
        nodeSelectorTerms: {
          matchExpressions?: Requirement[]
          matchFields?: Requirement[]
        }[]
      }
    }
  }
}

const hostnameLabel = 'kubernetes.io/hostname'

/** The claims whose volumes can be used on this node only, as "namespace/name". */
export async function claimsOn(kubectl: Kubectl, node: string): Promise<string[]> {
  const hostname = await hostnameOf(kubectl, node)
  const { items } = await kubectl.get<{ items: PersistentVolume[] }>('persistentvolumes')
  return items
    .filter((volume) => isOnlyOn(volume, { node, hostname }))
    .flatMap(({ spec: { claimRef } }) =>
      claimRef ? [`${claimRef.namespace}/${claimRef.name}`] : [],
    )
    .sort()
}

/** What volumes know the node by: its label, which need not be its name. */
async function hostnameOf(kubectl: Kubectl, node: string): Promise<string> {
  const one = `--field-selector=metadata.name=${node}`
  const { items } = await kubectl.get<{ items: ApiObject[] }>('nodes', one)
  return items[0]?.metadata.labels?.[hostnameLabel] ?? node
}

/** Terms are alternatives; each of a local volume names the one node it is on. */
function isOnlyOn(
  { spec }: PersistentVolume,
  { node, hostname }: { node: string; hostname: string },
): boolean {
  const names = ({ key, operator, values = [] }: Requirement, wanted: string, value: string) =>
    key === wanted && operator === 'In' && values.length === 1 && values[0] === value
  const terms = spec.nodeAffinity?.required?.nodeSelectorTerms ?? []
  return (
    terms.length > 0 &&
    terms.every(
      ({ matchExpressions = [], matchFields = [] }) =>
        matchExpressions.some((each) => names(each, hostnameLabel, hostname)) ||
        matchFields.some((each) => names(each, 'metadata.name', node)),
    )
  )
}
