// What every add-on's script has in common: its flags, --print and --delete, and the condition
// that pods can run at all.
import type { Cluster, Node } from '../cluster.mts'
import { StepError } from '../errors.mts'
import type { Flag } from '../script.mts'
import { step } from '../steps.mts'
import type { ApiObject, Kubectl } from './kubectl.mts'

export const addOnFlags = {
  print: { help: 'write the manifest to stdout and do nothing: … --print | kubectl apply -f -' },
  delete: { help: 'take it away' },
  'force-conflicts': { help: 'take over fields that somebody else has set' },
  timeout: { value: 'SECONDS', number: true, help: 'how long to wait until it is ready (300)' },
} as const satisfies Record<string, Flag>

export interface AddOnFlags {
  print: boolean
  delete: boolean
}

/**
 * Does what --print and --delete say, and ends the script; returns if neither is given.
 *
 * @param name as the user calls the add-on
 * @param takeAway for what --delete has to do beside deleting the manifest's objects
 */
export async function printOrDelete(
  name: string,
  manifest: string,
  flags: AddOnFlags,
  takeAway: () => Promise<unknown>,
): Promise<void> {
  if (flags.print && flags.delete) {
    throw new StepError('only one of --print and --delete at a time', { exitCode: 2 })
  }
  if (flags.print) await printAndExit(manifest)
  if (flags.delete) {
    await step(`taking ${name} away`, takeAway)
    process.exit(0)
  }
}

/** Writes a text to stdout to its end, and ends the script. */
export async function printAndExit(text: string): Promise<never> {
  // Who reads may have enough of it: `| head`.
  process.stdout.on('error', () => process.exit(0))
  await new Promise((resolve) => process.stdout.write(text, resolve))
  process.exit(0)
}

/** A node of the API, as far as it tells whether it is Ready. */
export interface ApiNode extends ApiObject {
  spec: { podCIDR?: string }
  status: { conditions?: { type: string; status: string; message?: string }[] }
}

/** What the API knows of nodes. */
export async function getNodes(kubectl: Kubectl): Promise<ApiNode[]> {
  return (await kubectl.get<{ items: ApiNode[] }>('nodes')).items
}

/** Why a node is not Ready; undefined if it is. */
export function notReady(node: ApiNode | undefined): string | undefined {
  if (!node) return 'it has not registered'
  const ready = node.status.conditions?.find(({ type }) => type === 'Ready')
  return ready?.status === 'True' ? undefined : (ready?.message ?? 'it has not said anything yet')
}

/**
 * The workers on which pods can start. Without a pod network there is none.
 *
 * @throws StepError that says what to run first
 */
export async function readyWorkers(cluster: Cluster, kubectl: Kubectl): Promise<Node[]> {
  const nodes = await getNodes(kubectl)
  const reasons = cluster.workers.map((worker) => {
    return { worker, reason: notReady(nodes.find(({ metadata }) => metadata.name === worker.name)) }
  })
  const ready = reasons.filter(({ reason }) => reason === undefined)
  if (ready.length > 0) return ready.map(({ worker }) => worker)
  throw new StepError(
    nodes.length === 0 ? 'no worker has registered yet' : 'no worker is Ready, so no pod can start',
    {
      output: reasons.map(({ worker, reason }) => `${worker.name}: ${reason}`).join('\n'),
      hint: nodes.length === 0 ? 'make wait' : 'the pod network is missing: make network',
    },
  )
}
