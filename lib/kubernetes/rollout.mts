// Waiting for pods, and why they are not there yet.

import { StepError } from '../errors.mts'
import { waitFor } from '../wait.mts'
import type { ApiObject, Kubectl } from './kubectl.mts'

interface Workload extends ApiObject {
  spec: {
    selector: { matchLabels: Record<string, string> }
    template: { spec: { containers: { image: string }[] } }
  }
}

/** A pod, as far as it tells where it is and what it waits for. */
export interface Pod extends ApiObject {
  spec: { nodeName?: string; containers: { image: string }[] }
  status: {
    phase?: string
    podIP?: string
    conditions?: { type: string; status: string; message?: string }[]
    initContainerStatuses?: ContainerStatus[]
    containerStatuses?: ContainerStatus[]
  }
}

interface ContainerStatus {
  state?: { waiting?: { reason?: string; message?: string } }
}

interface Limits {
  namespace: string
  /** Seconds. */
  timeout: number
  /** Is told how far it is. */
  detail?: (text: string) => void
}

/**
 * Waits until all pods of a deployment or daemonset are those of its latest version, and
 * available. Gives up at once for an image that does not exist.
 *
 * @param what such as "deployment/coredns"
 * @throws StepError that says why its pods are not ready
 */
export async function waitForRollout(
  kubectl: Kubectl,
  what: string,
  { namespace, ...limits }: Limits,
): Promise<void> {
  const inNamespace = `--namespace=${namespace}`
  const hint = `kubectl describe ${what} ${inNamespace}`
  const command = `kubectl rollout status ${what} ${inNamespace}`
  await waitFor({ failure: `${what} is not ready`, ...limits, hint, command }, async () => {
    const args = ['rollout', 'status', what, inNamespace, '--watch=false']
    const state = (await kubectl.run(args)).trim()
    if (state.endsWith('successfully rolled out')) return undefined
    const { spec } = await kubectl.get<Workload>(what, inNamespace)
    const labels = Object.entries(spec.selector.matchLabels)
    const selector = labels.map(([name, value]) => `${name}=${value}`).join(',')
    const pods = await getPods(kubectl, inNamespace, `--selector=${selector}`)
    // Those of a former version may be in trouble for the very reason that there is a new one.
    const images = imagesOf(spec.template)
    const latest = pods.filter((pod) => imagesOf(pod) === images && !pod.metadata.deletionTimestamp)
    return troublesOf(latest) || state
  })
}

/**
 * Waits until every pod of a namespace is Ready, or has Succeeded where it is to end.
 *
 * @returns the pods
 * @throws StepError that says why one is not, with the log of one that failed
 */
export async function waitForPods(
  kubectl: Kubectl,
  state: 'Ready' | 'Succeeded',
  { namespace, ...limits }: Limits,
): Promise<Pod[]> {
  const inNamespace = `--namespace=${namespace}`
  const hint = `kubectl describe pods ${inNamespace}`
  let pods: Pod[] = []
  await waitFor({ failure: `not all pods are ${state}`, ...limits, hint }, async () => {
    pods = await getPods(kubectl, inNamespace)
    const failed = pods.find(({ status }) => status.phase === 'Failed')
    if (failed) {
      const { name } = failed.metadata
      const log = await kubectl.execute(['logs', name, inNamespace])
      throw new StepError(`pod ${name} failed`, { output: log.stdout.trim(), hint })
    }
    const missing = pods.filter((pod) => !isIn(pod, state))
    if (missing.length === 0) return undefined
    return troublesOf(missing) || missing.map(({ metadata }) => metadata.name).join(', ')
  })
  return pods
}

async function getPods(kubectl: Kubectl, ...args: string[]): Promise<Pod[]> {
  return (await kubectl.get<{ items: Pod[] }>('pods', ...args)).items
}

function imagesOf({ spec }: Pick<Pod, 'spec'>): string {
  return spec.containers.map(({ image }) => image).join(' ')
}

function isIn({ status }: Pod, state: 'Ready' | 'Succeeded'): boolean {
  const { phase, conditions = [] } = status
  if (state === 'Succeeded') return phase === 'Succeeded'
  return conditions.some(({ type, status }) => type === 'Ready' && status === 'True')
}

/**
 * What pods wait for, a line each; empty for those that have only just been made.
 *
 * @throws StepError for an image that is not there, as no waiting helps
 */
function troublesOf(pods: readonly Pod[]): string {
  return pods
    .flatMap((pod) => troubleOf(pod).map((text) => `${pod.metadata.name}: ${text}`))
    .join('\n')
}

function troubleOf({ metadata, status }: Pod): string[] {
  const { conditions = [], initContainerStatuses = [], containerStatuses = [] } = status
  const unscheduled = conditions.find(
    ({ type, status, message }) => type === 'PodScheduled' && status === 'False' && message,
  )
  if (unscheduled) return [unscheduled.message ?? '']
  return [...initContainerStatuses, ...containerStatuses].flatMap(({ state }) => {
    const { reason, message = '' } = state?.waiting ?? {}
    // How each pod begins.
    if (!reason || reason === 'ContainerCreating' || reason === 'PodInitializing') return []
    const text = message ? `${reason}: ${message}` : reason
    if (isPull.test(reason) && isMissing.test(message)) {
      throw new StepError(`the image of pod ${metadata.name} does not exist`, {
        output: text,
        hint: 'is the version in cluster.env one that was released?',
      })
    }
    return [text]
  })
}

const isPull = /^(ErrImagePull|ImagePullBackOff|InvalidImageName)$/
const isMissing = /: not found|code = NotFound|manifest unknown|couldn't parse image/
