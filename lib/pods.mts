// Pods: what they wait for, waiting until they run, and pods of our own to look at the network.
import { $ } from 'zx/core'
import type { Cluster, Node } from './cluster.mts'
import { explain, lastLines, StepError } from './errors.mts'
import { takingTime } from './interrupt.mts'
import { type ApiObject, apply, kubectlJson } from './kubectl.mts'
import { awakeTime, type WaitLimits, waitFor } from './wait.mts'

type ContainerStatus = {
  restartCount: number
  state?: { waiting?: { reason?: string; message?: string } }
}

/** A pod, as far as it is read here. */
export interface Pod extends ApiObject {
  metadata: ApiObject['metadata'] & { uid: string }
  spec: { nodeName?: string; containers: { image: string }[] }
  status: {
    phase: string
    reason?: string
    podIP?: string
    conditions?: { type: string; status: string; message?: string }[]
    initContainerStatuses?: ContainerStatus[]
    containerStatuses?: ContainerStatus[]
  }
}

type Limits = WaitLimits & { namespace: string }

async function getPods(...args: string[]): Promise<Pod[]> {
  return (await kubectlJson<{ items: Pod[] }>('get', 'pods', ...args)).items
}

// How every pod begins.
const isBeginning = /^(ContainerCreating|PodInitializing)$/
const isMissing =
  /^(ErrImagePull|ImagePullBackOff|InvalidImageName): .*(: not found|code = NotFound|manifest unknown|couldn't parse image)/s
/** When a pod was first seen without a node or a network, by uid: its node may not be ready yet. */
const stuckSince = new Map<string, number>()

/**
 * What pods wait for, a line each; empty for those that were created a moment ago.
 * @throws StepError for what more waiting does not change: an image that does not exist, and a pod
 *   that has been without a node or a network for two minutes
 */
async function problemsOf(pods: readonly Pod[]): Promise<string> {
  const lines: string[] = []
  for (const pod of pods) {
    const { name, uid, namespace } = pod.metadata
    const { initContainerStatuses = [], containerStatuses = [] } = pod.status
    const problems = [...initContainerStatuses, ...containerStatuses].flatMap(({ state }) => {
      const { reason, message } = state?.waiting ?? {}
      return reason && !isBeginning.test(reason) ? `${reason}${message ? `: ${message}` : ''}` : []
    })
    const output = problems.find((text) => isMissing.test(text))
    if (output) {
      const hint = 'is the version in cluster.env one that was released?'
      throw new StepError(`the image of pod ${name} does not exist`, { output, hint })
    }
    const stuck = problems.length === 0 && (await whyStuck(pod))
    if (stuck) {
      const since = stuckSince.get(uid) ?? awakeTime()
      const hint = `kubectl describe pod ${name} --namespace=${namespace}`
      const reason = `pod ${name} cannot start`
      if (awakeTime() - since > 120_000) throw new StepError(reason, { output: stuck, hint })
      stuckSince.set(uid, since)
      problems.push(stuck)
    } else stuckSince.delete(uid)
    lines.push(...problems.map((text) => `${name}: ${text}`))
  }
  return lines.join('\n')
}

/** Why a pod has no node, or no network on its node. */
async function whyStuck({ metadata, spec, status }: Pod): Promise<string | undefined> {
  const condition = (name: string) => status.conditions?.find(({ type }) => type === name)
  if (condition('PodScheduled')?.status === 'False') return condition('PodScheduled')?.message
  // With a network, what an event says about it is over; it may be pulling its image.
  const hasNetwork = condition('PodReadyToStartContainers')?.status === 'True'
  if (!spec.nodeName || status.phase !== 'Pending' || hasNetwork) return undefined
  const fields = `involvedObject.uid=${metadata.uid},reason=FailedCreatePodSandBox`
  const args = ['get', 'events', `--namespace=${metadata.namespace}`, `--field-selector=${fields}`]
  return (await kubectlJson<{ items: { message: string }[] }>(...args)).items.at(-1)?.message
}

/**
 * Waits until all pods of a deployment or daemonset are those of its latest version, and available.
 * @throws StepError that says why its pods are not ready, at once for an image that does not exist
 */
export async function waitForRollout(what: string, limits: Limits): Promise<void> {
  const inNamespace = `--namespace=${limits.namespace}`
  const hint = `kubectl describe ${what} ${inNamespace}`
  const command = `kubectl rollout status ${what} ${inNamespace}`
  const images = 'jsonpath={.spec.template.spec.containers[*].image}'
  const args = [what, inNamespace]
  const $$ = $({ timeout: '60s' })
  await waitFor({ failure: `${what} is not ready`, ...limits, hint, command }, async () => {
    const status = await $$({ nothrow: true })`kubectl rollout status ${args} --watch=false`
    // After ten minutes without progress kubectl reports a failure, but the rollout continues.
    if (status.exitCode !== 0 && !/progress deadline/.test(status.stderr)) throw status
    const state = (status.stdout || status.stderr).trim()
    if (state.endsWith('successfully rolled out')) return undefined
    const latest = (await $$`kubectl get ${args} --output=${images}`).stdout
    // Pods of a previous version may be failing; that may be why there is a new one.
    const pods = (await getPods(inNamespace)).filter(({ metadata, spec }) => {
      const found = spec.containers.map(({ image }) => image).join(' ')
      return found === latest && !metadata.deletionTimestamp
    })
    return (await problemsOf(pods)) || state
  })
}

/**
 * Waits until every pod of a namespace is Ready, or has Succeeded where it is to end.
 * @throws StepError that says why one is not, with the log of one that failed
 */
export async function waitForPods(state: 'Ready' | 'Succeeded', limits: Limits): Promise<Pod[]> {
  const inNamespace = `--namespace=${limits.namespace}`
  const hint = `kubectl describe pods ${inNamespace}`
  const isDone = ({ status: { phase, conditions = [] } }: Pod) =>
    phase === state || conditions.some(({ type, status }) => type === state && status === 'True')
  let pods: Pod[] = []
  await waitFor({ failure: `not all pods are ${state}`, ...limits, hint }, async () => {
    pods = await getPods(inNamespace)
    const failed = pods.find(({ status }) => status.phase === 'Failed')?.metadata.name
    if (failed) {
      const log = await $({ nothrow: true, timeout: '30s' })`kubectl logs ${failed} ${inNamespace}`
      throw new StepError(`pod ${failed} failed`, { output: log.stdout.trim(), hint })
    }
    const missing = pods.filter((pod) => !isDone(pod))
    if (missing.length === 0) return undefined
    return (await problemsOf(missing)) || missing.map((pod) => pod.metadata.name).join(', ')
  })
  return pods
}

/** The service account of a scratch namespace. The one called default appears a moment later. */
export const scratchAccount = 'probe'

/** Works in a namespace of its own, and deletes it with all its content, however the work ends. */
export async function withScratchNamespace(name: string, limits: WaitLimits, work: () => unknown) {
  try {
    await createScratchNamespace(name, limits)
    await work()
  } finally {
    await deleteScratchNamespace(name)
  }
}

/**
 * Creates a namespace in which Pod Security admits only restricted pods, and first deletes one that
 * an earlier run has left behind. The caller must delete it, also if this throws.
 */
export async function createScratchNamespace(name: string, { timeout, signal }: WaitLimits) {
  const $$ = $({ timeout: (timeout + 30) * 1000, signal })
  await $$`kubectl delete namespace ${name} --ignore-not-found --timeout=${timeout}s`
  const manifest = `\
apiVersion: v1
kind: Namespace
metadata: {name: ${name}, labels: {pod-security.kubernetes.io/enforce: restricted}}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: ${scratchAccount}, namespace: ${name}}
`
  await apply(manifest, { manager: name, forceConflicts: true, signal })
}

/** Deletes it, also after Ctrl-C; does not wait until all of it is gone. */
export async function deleteScratchNamespace(name: string): Promise<void> {
  const $$ = $({ nothrow: true, timeout: '60s' })
  await takingTime(() => $$`kubectl delete namespace ${name} --ignore-not-found --wait=false`)
}

/** A pod that serves HTTP on port 8080 and runs shell text. */
export type WebPod = Awaited<ReturnType<typeof startWebPods>>[number]

const webService = (namespace: string) => `\
apiVersion: v1
kind: Service
metadata: {name: web, namespace: ${namespace}}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
`
// Not nodeName: the scheduler must find the worker, as for everybody's pods.
const webPod = (namespace: string, name: string, image: string) => `\
---
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
`

/**
 * Starts a pod of SMOKE_IMAGE on each of the workers, and a service "web" on port 80 for all of
 * them, in a scratch namespace. @throws StepError that says why they are not Ready
 */
export async function startWebPods(
  cluster: Cluster,
  { workers, ...limits }: Limits & { workers: readonly Node[] },
) {
  const { namespace, signal } = limits
  const podOn = ({ name }: Node) => webPod(namespace, name, cluster.settings.SMOKE_IMAGE)
  const manifest = [webService(namespace), ...workers.map(podOn)].join('')
  await apply(manifest, { manager: 'web-pods', signal })
  const pods = await waitForPods('Ready', limits)
  return workers.map((node) => {
    const name = `web-${node.name}`
    const ip = pods.find(({ metadata }) => metadata.name === name)?.status.podIP ?? ''
    return { name, node, ip, run: (command: string) => execInPod(name, command, limits) }
  })
}

/** Runs shell text in a pod. @returns its output @throws StepError with the reason */
export async function execInPod(
  pod: string,
  command: string,
  { namespace, signal }: Pick<Limits, 'namespace' | 'signal'>,
  reason = `a command in pod ${pod} failed`,
): Promise<string> {
  try {
    const $$ = $({ timeout: '120s', signal })
    return (await $$`kubectl exec --namespace=${namespace} ${pod} -- sh -ec ${command}`).stdout
  } catch (error) {
    signal?.throwIfAborted()
    const inner = explain(error)
    const output = lastLines(`${inner.reason}\n${inner.explanation.output ?? ''}`)
    throw new StepError(reason, { ...inner.explanation, output, cause: error })
  }
}
