// A pod on every worker, to look at the network from inside: what a pod sees is what counts.
import type { Cluster, Node } from '../cluster.mts'
import type { Kubectl } from './kubectl.mts'
import { waitForPods } from './rollout.mts'
import { scratchAccount, withScratchNamespace } from './scratch-namespace.mts'

const namespace = 'network-probe'

/** What a command in a probe pod answered. */
export interface ProbeAnswer {
  status: number | null
  stdout: string
  stderr: string
}

/** A pod that does nothing but run what it is told. */
export interface ProbePod {
  node: Node
  /** Its address, of the worker's POD_CIDR. */
  ip: string
  /** Runs a program in it. @param timeout seconds */
  exec(command: readonly string[], timeout?: number): Promise<ProbeAnswer>
}

/**
 * Runs one pod of SMOKE_IMAGE on each of the workers, and takes them away again, however the work
 * ends.
 *
 * @param options.timeout seconds until the pods have to be ready
 * @throws StepError if they are not; what `work` throws
 */
export async function withProbePods<T>(
  cluster: Cluster,
  kubectl: Kubectl,
  options: { workers: readonly Node[]; timeout: number; detail?: (text: string) => void },
  work: (pods: ProbePod[]) => Promise<T>,
): Promise<T> {
  const { workers, ...limits } = options
  const image = cluster.settings.SMOKE_IMAGE
  return withScratchNamespace(cluster, kubectl, { name: namespace, ...limits }, async () => {
    const manifest = workers.map((node) => JSON.stringify(podOn(node, image))).join('\n---\n')
    await kubectl.apply(manifest, { manager: 'probe-pods', forceConflicts: true })
    const pods = await waitForPods(kubectl, 'Ready', { namespace, ...limits })
    return work(
      workers.map((node) => {
        const name = `probe-${node.name}`
        const found = pods.find(({ metadata }) => metadata.name === name)
        return { node, ip: found?.status.podIP ?? '', exec: execIn(kubectl, name) }
      }),
    )
  })
}

function execIn(kubectl: Kubectl, pod: string): ProbePod['exec'] {
  return async (command, timeout = 30) => {
    const { exitCode, stdout, stderr } = await kubectl.exec(pod, command, { namespace, timeout })
    return { status: exitCode, stdout, stderr }
  }
}

function podOn(node: Node, image: string): object {
  return {
    apiVersion: 'v1',
    kind: 'Pod',
    metadata: { name: `probe-${node.name}`, namespace },
    spec: {
      nodeName: node.name,
      serviceAccountName: scratchAccount,
      automountServiceAccountToken: false,
      terminationGracePeriodSeconds: 0,
      securityContext: {
        runAsNonRoot: true,
        runAsUser: 65534,
        seccompProfile: { type: 'RuntimeDefault' },
      },
      containers: [
        {
          name: 'probe',
          image,
          imagePullPolicy: 'IfNotPresent',
          command: ['sleep', '3600'],
          securityContext: {
            allowPrivilegeEscalation: false,
            capabilities: { drop: ['ALL'] },
          },
        },
      ],
    },
  }
}
