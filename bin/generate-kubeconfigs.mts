#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// A kubeconfig for each client of the API server: its address, the CA and the client certificate.
import { chmod, readFile } from 'node:fs/promises'
import { isDeepStrictEqual } from 'node:util'
import { parse, stringify } from 'yaml'
import { pairFiles } from '../lib/certificates.mts'
import { loadCluster } from '../lib/cluster.mts'
import { StepError } from '../lib/errors.mts'
import { readIfThere, writeFileAtomic } from '../lib/files.mts'
import { withLock } from '../lib/lock.mts'
import { script } from '../lib/script.mts'
import { step } from '../lib/steps.mts'
import { assertUnchanged, inspectPairs } from '../lib/tls.mts'

const { flags } = script({
  does: `Generates a kubeconfig for the administrator, for each kubelet and for each component.
Entries of your own (contexts, namespaces, clusters, users) and your current context are kept.`,
  reads: ['cluster.env', 'tls/'],
  writes: ['configs/*.kubeconfig'],
  flags: { force: { help: 'write all of them again, without entries of your own' } },
  examples: ['./bin/generate-kubeconfigs.mts', 'make kubeconfigs FLAGS=--force'],
})

const cluster = loadCluster()
const { API_PORT, CLUSTER_NAME } = cluster.settings

// The API server is at 127.0.0.1 for these, here by a forwarded port; workers use its LAN address.
const local = ['admin', 'kube-controller-manager', 'kube-scheduler']
const names = [...local, 'kube-proxy', ...cluster.workers.map(({ name }) => name)]

// The rules of Go's parser, for which an unquoted "on" is true; and no line breaks in long values.
const yaml = { version: '1.1', lineWidth: 0 } as const

// Not while certificates are generated: a certificate could meet the key of another one here.
await withLock(cluster.path('run', 'pki.lock'), 'generating kubeconfigs', generate, { wait: 5 })

async function generate(): Promise<void> {
  // 1. The certificates to embed: signed by the CA, valid, each with its own key.
  const { authority, leaves } = await inspectPairs(cluster)
  const clients = leaves.filter(({ entry }) => names.includes(entry.name))
  const output = [
    // Its key may be kept elsewhere.
    ...authority.pair.problems.map((problem) => `ca: ${problem}`),
    ...clients.flatMap(({ entry, problems }) => problems.map((text) => `${entry.name}: ${text}`)),
  ].join('\n')
  if (output) throw new StepError('certificates are unusable', { output, hint: 'make certs' })

  // 2. A file for each. It is a credential: mode 0600.
  for (const { name, subject } of clients.map(({ entry }) => entry)) {
    const file = `configs/${name}.kubeconfig`
    const ours = await kubeconfig(name, subject.CN)
    const present = flags.force ? undefined : await readKubeconfig(file)
    const wanted = present ? merge(present, ours) : ours
    if (isDeepStrictEqual(present, wanted)) await chmod(cluster.path(file), 0o600)
    else await step(file, () => writeFileAtomic(cluster.path(file), stringify(wanted, yaml), 0o600))
  }
}

type Kubeconfig = Record<'clusters' | 'users' | 'contexts', Entry[]> & { 'current-context': string }
type Entry = { name: string } & Partial<Record<'cluster' | 'user' | 'context', object>>

/** Where the API server is, how to verify it and how to log in, all of it embedded. */
async function kubeconfig(name: string, user: string): Promise<Kubeconfig> {
  const embed = (file: string) => readFile(cluster.path(file), 'base64')
  const files = pairFiles(name)
  const server = {
    server: local.includes(name) ? `https://127.0.0.1:${API_PORT}` : cluster.apiServer,
    'certificate-authority-data': await embed(pairFiles('ca').certificate),
  }
  const credential = {
    'client-certificate-data': await embed(files.certificate),
    'client-key-data': await embed(files.key),
  }
  return {
    ...{ apiVersion: 'v1', kind: 'Config', preferences: {} },
    clusters: [{ name: CLUSTER_NAME, cluster: server }],
    users: [{ name: user, user: credential }],
    contexts: [{ name: 'default', context: { cluster: CLUSTER_NAME, user } }],
    'current-context': 'default',
  }
}

/** The kubeconfig in a file; undefined if it contains none. */
async function readKubeconfig(file: string): Promise<Kubeconfig | undefined> {
  const text = await readIfThere(cluster.path(file))
  await assertUnchanged(cluster, [file])
  try {
    const config = parse(text ?? '', yaml)
    // kubectl writes an empty list as null.
    const list = (entries: Entry[] | null) => (entries ?? []).filter(({ name }) => name)
    const [clusters, users, contexts] = [config.clusters, config.users, config.contexts].map(list)
    return { ...config, clusters, users, contexts }
  } catch {
    return undefined
  }
}

/** Replaces our cluster, user and context. The rest is the user's, also a namespace in our context. */
function merge(present: Kubeconfig, ours: Kubeconfig): Kubeconfig {
  const put = (list: Entry[], own: Entry[]): Entry[] => {
    const added = own.filter(({ name }) => !list.some((entry) => entry.name === name))
    const kept = list.map((former) => {
      const entry = own.find(({ name }) => name === former.name)
      if (!entry?.context) return entry ?? former
      return { ...entry, context: { ...former.context, ...entry.context } }
    })
    return [...kept, ...added]
  }
  const contexts = put(present.contexts, ours.contexts)
  const current = contexts.find(({ name }) => name === present['current-context'])
  return {
    ...{ apiVersion: 'v1', kind: 'Config' },
    ...present,
    clusters: put(present.clusters, ours.clusters),
    users: put(present.users, ours.users),
    contexts,
    'current-context': current?.name ?? ours['current-context'],
  }
}
