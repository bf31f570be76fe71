// A web server in a pod on every worker, and a service before them: something to talk to.
import type { Cluster, Node } from '../cluster.mts'
import { StepError } from '../errors.mts'
import type { Kubectl } from './kubectl.mts'
import { waitForPods } from './rollout.mts'
import { scratchAccount } from './scratch-namespace.mts'

export interface WebPod {
  name: string
  node: Node
  /** It serves HTTP on port 8080 of this address. */
  ip: string
  /** Runs shell text in it. @returns its output @throws StepError if its status is not 0 */
  succeed(command: string): Promise<string>
}

/**
 * Starts a pod of SMOKE_IMAGE on each of the workers, in a scratch namespace, and a service "web".
 *
 * @param options.timeout seconds until the pods have to be ready
 * @throws StepError that says why they are not
 */
export async function startWebPods(
  cluster: Cluster,
  kubectl: Kubectl,
  options: { namespace: string; workers: readonly Node[]; timeout: number },
): Promise<WebPod[]> {
  const { namespace, workers, timeout } = options
  const objects = [serviceIn(namespace), ...workers.map((node) => podOn(cluster, node, namespace))]
  await kubectl.apply(objects.map((object) => JSON.stringify(object)).join('\n---\n'), {
    manager: 'web-pods',
  })
  const found = await waitForPods(kubectl, 'Ready', { namespace, timeout })
  return workers.map((node) => {
    const name = `web-${node.name}`
    const ip = found.find(({ metadata }) => metadata.name === name)?.status.podIP ?? ''
    return { name, node, ip, succeed: (command) => succeedIn(kubectl, namespace, name, command) }
  })
}

/** The address of their service, which listens on port 80. */
export async function webService(kubectl: Kubectl, namespace: string): Promise<string> {
  const service = await kubectl.get<{ spec: { clusterIP: string } }>(
    ...['service/web', `--namespace=${namespace}`],
  )
  return service.spec.clusterIP
}

async function succeedIn(
  kubectl: Kubectl,
  namespace: string,
  pod: string,
  command: string,
): Promise<string> {
  const shell = ['sh', '-ec', command]
  const { exitCode, stdout, stderr } = await kubectl.exec(pod, shell, { namespace, timeout: 120 })
  if (exitCode === 0) return stdout
  throw new StepError(`in pod ${pod} a command ended with status ${exitCode}`, {
    output: `${stdout}${stderr}`.trim(),
    command: `kubectl exec --namespace=${namespace} ${pod} -- sh -ec '${command}'`,
  })
}

function serviceIn(namespace: string): object {
  return {
    apiVersion: 'v1',
    kind: 'Service',
    metadata: { name: 'web', namespace },
    spec: { selector: { app: 'web' }, ports: [{ port: 80, targetPort: 8080 }] },
  }
}

function podOn(cluster: Cluster, node: Node, namespace: string): object {
  return {
    apiVersion: 'v1',
    kind: 'Pod',
    metadata: { name: `web-${node.name}`, namespace, labels: { app: 'web' } },
    spec: {
      // The scheduler has to find the worker, as it has to for anybody's pods.
      nodeSelector: { 'kubernetes.io/hostname': node.name },
      serviceAccountName: scratchAccount,
      automountServiceAccountToken: false,
      terminationGracePeriodSeconds: 0,
      securityContext: {
        runAsNonRoot: true,
        runAsUser: 101,
        seccompProfile: { type: 'RuntimeDefault' },
      },
      containers: [
        {
          name: 'web',
          image: cluster.settings.SMOKE_IMAGE,
          imagePullPolicy: 'IfNotPresent',
          readinessProbe: {
            httpGet: { path: '/', port: 8080 },
            periodSeconds: 2,
            timeoutSeconds: 5,
          },
          securityContext: {
            allowPrivilegeEscalation: false,
            capabilities: { drop: ['ALL'] },
          },
        },
      ],
    },
  }
}
