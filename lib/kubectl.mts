// kubectl (and helm) on this cluster and no other, and what the scripts that deploy something share.
import { readFile } from 'node:fs/promises'
import { parse, stringify } from 'yaml'
import { $, ProcessOutput } from 'zx/core'
import type { Cluster, Node } from './cluster.mts'
import { explain, lastLines, StepError } from './errors.mts'
import { privateFolder, readIfThere, writeFileAtomic } from './files.mts'
import type { Flag } from './script.mts'
import { step } from './steps.mts'

/** The part of a kubeconfig that is read here (client-go's api/v1 types). */
interface Kubeconfig {
  clusters?: { name: string; cluster: Record<string, unknown> }[]
  users?: { name: string; user: Record<string, unknown> }[]
  contexts?: { name: string; context: Record<string, unknown> }[]
}

/**
 * Makes every kubectl and helm command of this script talk to our cluster: they get a copy of
 * configs/admin.kubeconfig with the context "default" alone, so that neither KUBECONFIG nor the
 * current context of the caller matters.
 *
 * @throws StepError if the kubeconfig is missing, or does not lead to our API server with our CA
 */
export async function useCluster(cluster: Cluster): Promise<void> {
  const file = 'configs/admin.kubeconfig'
  const text = await readIfThere(cluster.path(file))
  if (text === undefined) throw new StepError(`${file} is missing`, { hint: 'make kubeconfigs' })
  const ours = defaultContext(text)
  const server = `https://127.0.0.1:${cluster.settings.API_PORT}`
  const authority = await readFile(cluster.path('tls', 'ca.pem')).catch((cause) => {
    throw new StepError('tls/ca.pem is missing', { hint: 'make certs', cause })
  })
  const { server: found, 'certificate-authority-data': trusted } =
    ours?.clusters?.[0]?.cluster ?? {}
  if (!ours || found !== server) {
    throw new StepError(`the context "default" of ${file} does not lead to ${server}`, {
      hint: 'make kubeconfigs',
    })
  }
  if (trusted !== authority.toString('base64')) {
    throw new StepError(`${file} trusts another CA than tls/ca.pem`, { hint: 'make kubeconfigs' })
  }
  const copy = cluster.path('run', 'admin.kubeconfig')
  const fresh = stringify(ours)
  await privateFolder(cluster.path('run'))
  if ((await readIfThere(copy)) !== fresh) await writeFileAtomic(copy, fresh, 0o600)
  $.env = { ...$.env, KUBECONFIG: copy }
}

function defaultContext(text: string): Kubeconfig | undefined {
  try {
    const config = parse(text) as Kubeconfig
    const named = <T extends { name: string }>(list: T[] | undefined, name: unknown) =>
      (list ?? []).filter((each) => each.name === name)
    const contexts = named(config.contexts, 'default')
    const { cluster, user } = contexts[0]?.context ?? {}
    return {
      ...{ apiVersion: 'v1', kind: 'Config', 'current-context': 'default', contexts },
      clusters: named(config.clusters, cluster),
      users: named(config.users, user),
    }
  } catch {
    return undefined
  }
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
    creationTimestamp?: string
    /** Set while the object is being deleted. */
    deletionTimestamp?: string
  }
}

/** The answer of `kubectl ARGS --output=json`, typed by the caller. @throws ProcessOutput */
export async function kubectlJson<T>(...args: string[]): Promise<T> {
  return JSON.parse((await $({ timeout: 60_000 })`kubectl ${args} --output=json`).stdout) as T
}

/**
 * Server-side apply: the API server merges, and remembers which fields are ours. A dry run comes
 * first, so that a manifest is applied as a whole or not at all.
 *
 * @param manifest YAML of any number of documents, or objects (sent as one List: kubectl 1.32 does
 *   not read several JSON documents)
 * @param options.manager the owner's name of the fields
 * @param options.forceConflicts takes over fields that have another owner
 * @throws StepError if another owner has a field of the manifest; ProcessOutput
 */
export async function apply(
  manifest: string | readonly object[],
  options: { manager: string; forceConflicts?: boolean; signal?: AbortSignal | undefined },
): Promise<void> {
  const { manager, forceConflicts = false, signal } = options
  const list = { apiVersion: 'v1', kind: 'List', items: manifest }
  const input = typeof manifest === 'string' ? manifest : JSON.stringify(list)
  const kubectl = $({ input, timeout: 120_000, ...(signal ? { signal } : {}) })
  const command = ['apply', '--server-side', `--field-manager=${manager}`, '--filename=-']
  if (!forceConflicts) {
    // Other refusals of a dry run may be due to the dry run: a namespace that does not exist yet.
    const { stderr } = await kubectl({ nothrow: true })`kubectl ${command} --dry-run=server`
    const owner = stderr.match(/conflicts? with "([^"]+)"/)?.[1]
    const advice = stderr.indexOf('Please review the fields above')
    if (owner) {
      throw new StepError(`a part of it exists already, owned by "${owner}"`, {
        output: stderr.slice(0, advice === -1 ? undefined : advice).trim(),
        hint: 'nothing was changed; --force-conflicts takes it over',
      })
    }
  }
  await kubectl`kubectl ${command} ${forceConflicts ? ['--force-conflicts'] : []}`
}

export const addOnFlags = {
  print: { help: 'write the manifest to stdout and do nothing: … --print | kubectl apply -f -' },
  delete: { help: 'delete what the manifest describes' },
  'force-conflicts': { help: 'take over fields that another owner has set' },
  timeout: { value: 'SECONDS', number: true, help: 'how long to wait until it is ready (300)' },
} as const satisfies Record<string, Flag>

/**
 * Does what --print and --delete say and ends the script; returns if neither is given.
 *
 * @param name as the user calls the add-on
 * @param remove for what --delete has to do: `deleteManifest`, and more if need be
 */
export async function printOrDelete(
  name: string,
  manifest: string,
  flags: { print: boolean; delete: boolean },
  remove: () => Promise<unknown>,
): Promise<void> {
  if (flags.print && flags.delete) {
    throw new StepError('only one of --print and --delete at a time', { exitCode: 2 })
  }
  if (flags.print) await printAndExit(manifest)
  if (!flags.delete) return
  await step(`delete ${name}`, remove)
  process.exit(0)
}

/** Deletes what a manifest describes and waits until it is gone. Missing objects are no error. */
export async function deleteManifest(manifest: string, timeout = 180): Promise<void> {
  const kubectl = $({ input: manifest, timeout: (timeout + 30) * 1000 })
  await kubectl`kubectl delete --ignore-not-found --filename=- --timeout=${timeout}s`
}

/** Writes a text to stdout to its end, and ends the script. */
export async function printAndExit(text: string): Promise<never> {
  await new Promise((resolve) => process.stdout.write(text, resolve))
  process.exit(0)
}

/** A node of the API, as far as it shows whether it is Ready. */
export interface ApiNode extends ApiObject {
  spec: { podCIDR?: string }
  status: { conditions?: { type: string; status: string; message?: string }[] }
}

/** All nodes of the API. */
export async function getNodes(): Promise<ApiNode[]> {
  return (await kubectlJson<{ items: ApiNode[] }>('get', 'nodes')).items
}

/** Why a node is not Ready; undefined if it is. */
export function notReady(node: ApiNode | undefined): string | undefined {
  if (!node) return 'it has not registered'
  const ready = node.status.conditions?.find(({ type }) => type === 'Ready')
  return ready?.status === 'True' ? undefined : (ready?.message ?? 'no condition yet')
}

/**
 * The workers on which pods can start. Without a pod network there is none.
 *
 * @throws StepError that says what to run first
 */
export async function readyWorkers(cluster: Cluster): Promise<Node[]> {
  if (cluster.workers.length === 0) {
    throw new StepError('the cluster has no workers, so no pod can start', {
      hint: 'WORKER_NODES in cluster.env is empty: make add-worker NAME=sigma',
    })
  }
  const nodes = await getNodes()
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

/** The error of a failed command, with another reason in front. */
export function because(reason: string, error: unknown, hint?: string): unknown {
  if (!(error instanceof ProcessOutput) && !(error instanceof StepError)) return error
  const { reason: inner, explanation } = explain(error)
  return new StepError(reason, {
    ...explanation,
    output: lastLines([inner, explanation.output].filter(Boolean).join('\n')),
    ...(hint ? { hint } : {}),
    cause: error,
  })
}
