// Taking a node out of service: no new pods, then none at all, then no node.
import { StepError } from '../errors.mts'
import type { Kubectl } from './kubectl.mts'

/** Keeps new pods away from the node. @returns whether it took some before */
export async function cordon(kubectl: Kubectl, name: string): Promise<boolean> {
  const { spec } = await kubectl.get<{ spec: { unschedulable?: boolean } }>('node', name)
  await kubectl.run(['cordon', name])
  return spec.unschedulable !== true
}

/** Lets the node take pods again. */
export async function uncordon(kubectl: Kubectl, name: string): Promise<void> {
  await kubectl.run(['uncordon', name])
}

/** Why kubectl drain gives up, and what to do. */
const causes = [
  {
    pattern: /disruption budget/,
    reason: (name: string) => `a disruption budget keeps pods on ${name}`,
    hint: 'kubectl get poddisruptionbudgets --all-namespaces; more replicas, or other workers, let them go. --force removes them all the same',
  },
  {
    pattern: /declare no controller|unmanaged/,
    reason: (name: string) => `on ${name} there are pods that nothing would start anew elsewhere`,
    hint: 'save what they hold and delete them. --force does so without saving',
  },
  {
    pattern: /timeout/,
    reason: (name: string) => `pods on ${name} have not ended in time`,
    hint: '--timeout SECONDS gives them more, --force does not wait for them',
  },
] as const

/**
 * Has all pods but those of DaemonSets leave a node, as far as disruption budgets allow it. What
 * they kept in an emptyDir is lost. The node is cordoned, whatever comes of it.
 *
 * @param options.timeout seconds for all of them to be gone
 * @param options.force deletes them whatever budgets say, also those without a controller
 * @throws StepError that says which pods stay and why
 */
export async function drain(
  kubectl: Kubectl,
  name: string,
  { timeout, force = false }: { timeout: number; force?: boolean },
): Promise<void> {
  const args = ['drain', name, '--ignore-daemonsets', '--delete-emptydir-data']
  if (force) args.push('--force', '--disable-eviction')
  const limit = `--timeout=${Math.max(1, Math.ceil(timeout))}s`
  const { exitCode, stderr } = await kubectl.execute([...args, limit], { timeout: timeout + 60 })
  if (exitCode === 0) return
  const said = [...new Set(stderr.trim().split('\n'))].filter((line) => !/^Warning: /.test(line))
  const cause = causes.find(({ pattern }) => pattern.test(stderr))
  throw new StepError(cause?.reason(name) ?? `${name} cannot be drained`, {
    output: said.slice(-15).join('\n'),
    command: `KUBECONFIG=configs/admin.kubeconfig kubectl ${args.join(' ')}`,
    ...(cause ? { hint: cause.hint } : {}),
  })
}

/**
 * Takes a node out of the API, and the pods that DaemonSets had on it. Its machine has to be off:
 * a kubelet that starts registers its node again.
 */
export async function forgetNode(kubectl: Kubectl, name: string): Promise<void> {
  await kubectl.run(['delete', 'node', name, '--ignore-not-found'])
  const onNode = ['--all-namespaces', `--field-selector=spec.nodeName=${name}`]
  // Nobody is there to say that they have ended.
  const now = ['--force', '--grace-period=0', '--ignore-not-found', '--wait=false']
  await kubectl.run(['delete', 'pods', ...onNode, ...now])
}
