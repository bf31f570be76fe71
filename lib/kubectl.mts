// kubectl (and helm) on this cluster and no other, and what the scripts that deploy something share.
import { parseDocument, stringify } from 'yaml'
import { $ } from 'zx/core'
import type { Cluster, Node } from './cluster.mts'
import { StepError } from './errors.mts'
import { privateFolder, readIfThere, writeFileAtomic } from './files.mts'
import { type Flag, refuseIf } from './script.mts'
import { step } from './steps.mts'

/** The part of a kubeconfig that is read here (client-go's api/v1 types). */
interface Kubeconfig {
  clusters?: { name: string; cluster: Record<string, unknown> }[]
  contexts?: { name: string; context: { cluster: string } }[]
}

/**
 * Makes every kubectl and helm command of this script talk to our cluster: they get a copy of
 * configs/admin.kubeconfig with the context "default" alone, so that neither KUBECONFIG nor the
 * current context of the caller matters.
 * @throws StepError if the kubeconfig is missing, or does not lead to our API server with our CA
 */
export async function useCluster(cluster: Cluster): Promise<void> {
  const file = 'configs/admin.kubeconfig'
  const hint = 'make kubeconfigs'
  const text = await readIfThere(cluster.path(file))
  if (text === undefined) throw new StepError(`${file} is missing`, { hint })
  const authority = await readIfThere(cluster.path('tls', 'ca.pem'))
  if (authority === undefined) throw new StepError('tls/ca.pem is missing', { hint: 'make certs' })
  const config: Kubeconfig = parseDocument(text).toJS() ?? {}
  const contexts = config.contexts?.filter(({ name }) => name === 'default')
  const used = contexts?.[0]?.context.cluster
  const found = config.clusters?.find(({ name }) => name === used)?.cluster
  const server = `https://127.0.0.1:${cluster.settings.API_PORT}`
  if (found?.server !== server) {
    throw new StepError(`the context "default" of ${file} does not lead to ${server}`, { hint })
  }
  if (found['certificate-authority-data'] !== Buffer.from(authority).toString('base64')) {
    throw new StepError(`${file} trusts another CA than tls/ca.pem`, { hint })
  }
  const copy = cluster.path('run', 'admin.kubeconfig')
  const fresh = stringify({ ...config, contexts, 'current-context': 'default' })
  await privateFolder(cluster.path('run'))
  if ((await readIfThere(copy)) !== fresh) await writeFileAtomic(copy, fresh, 0o600)
  if ($.verbose && $.env.KUBECONFIG !== copy) {
    console.error('$ export KUBECONFIG=run/admin.kubeconfig')
  }
  $.env = { ...$.env, KUBECONFIG: copy }
}

/** An object of the API, as far as all of them are alike. */
export interface ApiObject {
  apiVersion?: string
  kind?: string
  metadata: {
    name: string
    namespace?: string
    labels?: Record<string, string>
    annotations?: Record<string, string>
    /** Set while the object is being deleted. */
    deletionTimestamp?: string
  }
}

/** The answer of `kubectl ARGS --output=json`, typed by the caller. @throws ProcessOutput */
export async function kubectlJson<T>(...args: string[]): Promise<T> {
  return JSON.parse((await $({ timeout: 60_000 })`kubectl ${args} --output=json`).stdout)
}

/**
 * Server-side apply: the API server merges, and remembers which fields are ours. A dry run comes
 * first, so that a manifest is applied as a whole or not at all.
 * @param manifest YAML of any number of documents, or objects (sent as one List: kubectl 1.32 does
 *   not read several JSON documents)
 * @throws StepError if another owner has a field of the manifest; ProcessOutput
 */
export async function apply(
  manifest: string | readonly object[],
  options: { manager: string; forceConflicts?: boolean; signal?: AbortSignal | undefined },
): Promise<void> {
  const list = { apiVersion: 'v1', kind: 'List', items: manifest }
  const input = typeof manifest === 'string' ? manifest : JSON.stringify(list)
  const $$ = $({ input, timeout: 120_000, signal: options.signal })
  const command = ['apply', '--server-side', `--field-manager=${options.manager}`, '--filename=-']
  if (options.forceConflicts) return void (await $$`kubectl ${command} --force-conflicts`)
  // Other refusals of a dry run may be due to the dry run: a namespace that does not exist yet.
  const { stderr } = await $$({ nothrow: true })`kubectl ${command} --dry-run=server`
  const owner = stderr.match(/conflicts? with "([^"]+)"/)?.[1]
  if (owner) {
    throw new StepError(`a part of it exists already, owned by "${owner}"`, {
      output: stderr.split('Please review the fields above')[0]?.trim() ?? '',
      hint: 'nothing was changed; --force-conflicts takes it over',
    })
  }
  await $$`kubectl ${command}`
}

export const addOnFlags = {
  print: { help: 'only print the manifest: … --print | kubectl apply --server-side -f -' },
  delete: { help: 'delete all that this script deploys' },
  'force-conflicts': { help: 'take over fields that another owner has set' },
  timeout: { value: 'SECONDS', number: true, help: 'how long to wait until it is ready (300)' },
} as const satisfies Record<string, Flag>

/**
 * Does what --print and --delete say and ends the script; without them, returns with kubectl talking
 * to our cluster. @param first what --delete has to do before it deletes the manifest
 */
export async function printOrDelete(
  cluster: Cluster,
  name: string,
  manifest: string,
  flags: { print: boolean; delete: boolean },
  first: () => Promise<unknown> = async () => {},
): Promise<void> {
  refuseIf(flags.print && flags.delete, 'only one of --print and --delete at a time')
  if (flags.print) await printAndExit(manifest)
  await useCluster(cluster)
  if (!flags.delete) return
  await first()
  const $$ = $({ input: manifest, timeout: '210s' })
  const command = ['delete', '--ignore-not-found', '--filename=-', '--timeout=180s']
  await step(`delete ${name}`, () => $$`kubectl ${command}`)
  process.exit(0)
}

/** Writes a text to stdout to its end, and ends the script. */
export async function printAndExit(text: string): Promise<never> {
  await new Promise((resolve) => process.stdout.write(text, resolve))
  process.exit(0)
}

/** Names a command to try. From the project's folder, it talks to this cluster. */
export const suggest = (command: string) =>
  console.log(`Try: KUBECONFIG=configs/admin.kubeconfig ${command}`)

/** A node of the API, as far as it is read here. */
export interface ApiNode extends ApiObject {
  spec: { podCIDR?: string; unschedulable?: boolean }
  status: {
    conditions?: { type: string; status: string; message?: string; lastTransitionTime: string }[]
    addresses?: { type: string; address: string }[]
    nodeInfo: { kubeletVersion: string; containerRuntimeVersion: string }
  }
}

/** All nodes of the API, by name. */
export async function getNodes(): Promise<Map<string, ApiNode>> {
  const { items } = await kubectlJson<{ items: ApiNode[] }>('get', 'nodes')
  return new Map(items.map((node) => [node.metadata.name, node]))
}

const unregistered = 'it has not registered'

/** Why a node is not Ready; undefined if it is. */
export function notReady(node: ApiNode | undefined): string | undefined {
  if (!node) return unregistered
  const ready = node.status.conditions?.find(({ type }) => type === 'Ready')
  return ready?.status === 'True' ? undefined : ready?.message || 'no condition yet'
}

/** Why each of our workers that is not Ready is not, by name. */
export async function unreadyWorkers({ workers }: Cluster): Promise<Map<string, string>> {
  const nodes = await getNodes()
  const reasons = workers.map(({ name }) => [name, notReady(nodes.get(name)) ?? ''] as const)
  return new Map(reasons.filter(([, reason]) => reason !== ''))
}

/** The workers on which pods can start. @throws StepError that says what to run first */
export async function readyWorkers(cluster: Cluster): Promise<Node[]> {
  if (cluster.workers.length === 0) {
    throw new StepError('the cluster has no workers, so no pod can start', {
      hint: 'WORKER_NODES in cluster.env is empty: make add-worker NAME=sigma',
    })
  }
  const unready = await unreadyWorkers(cluster)
  const ready = cluster.workers.filter(({ name }) => !unready.has(name))
  if (ready.length > 0) return ready
  if ([...unready.values()].every((reason) => reason === unregistered)) {
    throw new StepError('no worker has registered yet', { hint: 'make wait' })
  }
  throw new StepError('no worker is Ready, so no pod can start', {
    output: [...unready].map(([name, reason]) => `${name}: ${reason}`).join('\n'),
    hint: 'the pod network is missing: make network',
  })
}
