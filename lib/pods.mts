// Pods: what they wait for, waiting until they run, and pods of our own to look at the network.
import { $ } from 'zx/core'
import type { Cluster, Node } from './cluster.mts'
import { StepError } from './errors.mts'
import { takingTime } from './interrupt.mts'
import { type ApiObject, apply, because, kubectlJson } from './kubectl.mts'
import { waitFor } from './wait.mts'

type ContainerStatus = { state?: { waiting?: { reason?: string; message?: string } } }

/** A pod, as far as it shows where it is and what it waits for. */
export interface Pod extends ApiObject {
  metadata: ApiObject['metadata'] & { uid: string }
  spec: { nodeName?: string; containers: { image: string }[] }
  status: {
    phase?: string
    podIP?: string
    conditions?: { type: string; status: string; message?: string }[]
    initContainerStatuses?: ContainerStatus[]
    containerStatuses?: ContainerStatus[]
  }
}

interface Limits {
  namespace: string
  /** Seconds. */
  timeout: number
  /** Gets what is still missing. */
  detail?: ((text: string) => void) | undefined
  signal?: AbortSignal | undefined
}

async function getPods(...args: string[]): Promise<Pod[]> {
  return (await kubectlJson<{ items: Pod[] }>('get', 'pods', ...args)).items
}

function isIn({ status }: Pod, state: 'Ready' | 'Succeeded'): boolean {
  if (state === 'Succeeded') return status.phase === state
  return (status.conditions ?? []).some(({ type, status }) => type === state && status === 'True')
}

const isPull = /^(ErrImagePull|ImagePullBackOff|InvalidImageName)$/
const isMissing = /: not found|code = NotFound|manifest unknown|couldn't parse image/

/** Seconds. A pod without a node or a network may only be waiting for its node to be ready. */
const maxStuck = 120

/**
 * What pods wait for, a line each; empty for those that were created a moment ago.
 *
 * @param since when each pod was first seen stuck, by uid; kept from one look to the next
 * @throws StepError for what more waiting does not change: an image that does not exist, and a pod
 *   that has been without a node or a network for two minutes
 */
async function troublesOf(pods: readonly Pod[], since: Map<string, number>): Promise<string> {
  const lines: string[] = []
  for (const pod of pods) {
    const { name, uid, namespace } = pod.metadata
    const { initContainerStatuses = [], containerStatuses = [] } = pod.status
    const waiting = [...initContainerStatuses, ...containerStatuses].flatMap(({ state }) => {
      const { reason, message = '' } = state?.waiting ?? {}
      // How every pod begins.
      if (!reason || reason === 'ContainerCreating' || reason === 'PodInitializing') return []
      const text = message ? `${reason}: ${message}` : reason
      if (!isPull.test(reason) || !isMissing.test(message)) return [text]
      throw new StepError(`the image of pod ${name} does not exist`, {
        output: text,
        hint: 'is the version in cluster.env one that was released?',
      })
    })
    const stuck = waiting.length === 0 ? await whyStuck(pod) : undefined
    if (!stuck) since.delete(uid)
    else if (!since.has(uid)) since.set(uid, Date.now())
    if (Date.now() - (since.get(uid) ?? Infinity) > maxStuck * 1000) {
      const hint = `kubectl describe pod ${name} --namespace=${namespace}`
      throw new StepError(`pod ${name} cannot start`, { output: stuck ?? '', hint })
    }
    lines.push(...[...waiting, ...(stuck ? [stuck] : [])].map((text) => `${name}: ${text}`))
  }
  return lines.join('\n')
}

/** Why a pod has no node, or no network on its node. */
async function whyStuck({ metadata, spec, status }: Pod): Promise<string | undefined> {
  const scheduled = status.conditions?.find(({ type }) => type === 'PodScheduled')
  if (scheduled?.status === 'False') return scheduled.message
  if (!spec.nodeName || status.phase !== 'Pending') return undefined
  const fields = `involvedObject.uid=${metadata.uid},reason=FailedCreatePodSandBox`
  const args = ['get', 'events', `--namespace=${metadata.namespace}`, `--field-selector=${fields}`]
  return (await kubectlJson<{ items: { message: string }[] }>(...args)).items.at(-1)?.message
}

/**
 * Waits until all pods of a deployment or daemonset are those of its latest version, and available.
 *
 * @param what such as "deployment/coredns"
 * @throws StepError that says why its pods are not ready, at once for an image that does not exist
 */
export async function waitForRollout(what: string, limits: Limits): Promise<void> {
  const inNamespace = `--namespace=${limits.namespace}`
  const hint = `kubectl describe ${what} ${inNamespace}`
  const command = `kubectl rollout status ${what} ${inNamespace}`
  const since = new Map<string, number>()
  const images = ({ spec }: Pick<Pod, 'spec'>) => spec.containers.map(({ image }) => image).join()
  await waitFor({ failure: `${what} is not ready`, ...limits, hint, command }, async () => {
    const status = $({
      timeout: '60s',
    })`kubectl rollout status ${what} ${inNamespace} --watch=false`
    const state = (await status).stdout.trim()
    if (state.endsWith('successfully rolled out')) return undefined
    const { spec } = await kubectlJson<{
      spec: { selector: { matchLabels: Record<string, string> }; template: Pick<Pod, 'spec'> }
    }>('get', what, inNamespace)
    const labels = Object.entries(spec.selector.matchLabels)
    const selector = `--selector=${labels.map(([name, value]) => `${name}=${value}`).join(',')}`
    // Pods of a previous version may be in trouble for the very reason that there is a new one.
    const latest = (await getPods(inNamespace, selector)).filter(
      (pod) => images(pod) === images(spec.template) && !pod.metadata.deletionTimestamp,
    )
    return (await troublesOf(latest, since)) || state
  })
}

/**
 * Waits until every pod of a namespace is Ready, or has Succeeded where it is to end.
 *
 * @returns the pods
 * @throws StepError that says why one is not, with the log of one that failed
 */
export async function waitForPods(state: 'Ready' | 'Succeeded', limits: Limits): Promise<Pod[]> {
  const inNamespace = `--namespace=${limits.namespace}`
  const hint = `kubectl describe pods ${inNamespace}`
  const since = new Map<string, number>()
  let pods: Pod[] = []
  await waitFor({ failure: `not all pods are ${state}`, ...limits, hint }, async () => {
    pods = await getPods(inNamespace)
    const failed = pods.find(({ status }) => status.phase === 'Failed')?.metadata.name
    if (failed) {
      const log = await $({ nothrow: true, timeout: '30s' })`kubectl logs ${failed} ${inNamespace}`
      throw new StepError(`pod ${failed} failed`, { output: log.stdout.trim(), hint })
    }
    const missing = pods.filter((pod) => !isIn(pod, state))
    if (missing.length === 0) return undefined
    return (await troublesOf(missing, since)) || missing.map((pod) => pod.metadata.name).join(', ')
  })
  return pods
}

/** The service account of a scratch namespace. The one called default appears a moment later. */
export const scratchAccount = 'probe'

const scratchNamespace = (name: string) => `\
apiVersion: v1
kind: Namespace
metadata: {name: ${name}, labels: {pod-security.kubernetes.io/enforce: restricted}}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: ${scratchAccount}, namespace: ${name}}
`

/** Works in a namespace of its own, and deletes it with all its content, however the work ends. */
export async function withScratchNamespace<T>(
  name: string,
  limits: Pick<Limits, 'timeout' | 'signal'>,
  work: () => Promise<T>,
): Promise<T> {
  try {
    await createScratchNamespace(name, limits)
    return await work()
  } finally {
    await deleteScratchNamespace(name)
  }
}

/**
 * Creates a namespace in which Pod Security admits only restricted pods, and first deletes one that
 * an earlier run has left behind. The caller must delete it, also if this throws.
 */
export async function createScratchNamespace(
  name: string,
  { timeout, signal }: Pick<Limits, 'timeout' | 'signal'>,
): Promise<void> {
  const kubectl = $({ timeout: (timeout + 30) * 1000, signal })
  await kubectl`kubectl delete namespace ${name} --ignore-not-found --timeout=${timeout}s`
  await apply(scratchNamespace(name), { manager: name, forceConflicts: true, signal })
}

/** Deletes it, also after Ctrl-C; does not wait until all of it is gone. */
export async function deleteScratchNamespace(name: string): Promise<void> {
  const kubectl = $({ nothrow: true, timeout: '60s' })
  await takingTime(() => kubectl`kubectl delete namespace ${name} --ignore-not-found --wait=false`)
}

/** A pod that serves HTTP on port 8080 and runs shell text. */
export interface WebPod {
  name: string
  node: Node
  ip: string
  /** Its output. @throws StepError if its status is not 0 */
  run(command: string): Promise<string>
}

// Not nodeName: the scheduler must find the worker, as for everybody's pods.
const webPod = (namespace: string, { name }: Node, image: string) => `\
apiVersion: v1
kind: Pod
metadata: {name: web-${name}, namespace: ${namespace}, labels: {app: web}}
spec:
  nodeSelector: {kubernetes.io/hostname: ${name}}
  serviceAccountName: ${scratchAccount}
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 0
  securityContext: {runAsNonRoot: true, runAsUser: 101, seccompProfile: {type: RuntimeDefault}}
  containers:
    - name: web
      image: ${image}
      imagePullPolicy: IfNotPresent
      readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 2, timeoutSeconds: 5}
      securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
---
`
const webService = (namespace: string) => `\
apiVersion: v1
kind: Service
metadata: {name: web, namespace: ${namespace}}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
`

/**
 * Starts a pod of SMOKE_IMAGE on each of the workers, and a service "web" on port 80 for all of
 * them, in a scratch namespace.
 *
 * @throws StepError that says why they are not Ready
 */
export async function startWebPods(
  cluster: Cluster,
  { workers, ...limits }: Limits & { workers: readonly Node[] },
): Promise<WebPod[]> {
  const { namespace, signal } = limits
  const { SMOKE_IMAGE } = cluster.settings
  const manifest = workers.map((node) => webPod(namespace, node, SMOKE_IMAGE)).join('')
  await apply(manifest + webService(namespace), { manager: 'web-pods', signal })
  const pods = await waitForPods('Ready', limits)
  const kubectl = $({ timeout: '120s', signal })
  return workers.map((node) => {
    const name = `web-${node.name}`
    const ip = pods.find(({ metadata }) => metadata.name === name)?.status.podIP ?? ''
    const run = async (command: string) => {
      try {
        const exec = kubectl`kubectl exec --namespace=${namespace} ${name} -- sh -ec ${command}`
        return (await exec).stdout
      } catch (error) {
        signal?.throwIfAborted()
        throw because(`a command in pod ${name} failed`, error)
      }
    }
    return { name, node, ip, run }
  })
}
