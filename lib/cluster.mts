// The cluster as cluster.env describes it: read once, checked as a whole, then typed data.
import { readFileSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { type Assignment, parseEnvFile } from './env-file.mts'
import { StepError } from './errors.mts'
import { type Node, nodesFrom, type Role } from './nodes.mts'
import {
  caFileProblem,
  perNodeVariables,
  proxyProblem,
  type Settings,
  SettingsReader,
  variables,
} from './settings.mts'

export type { Node, Role }

export interface Cluster {
  /** The project's folder, absolute. */
  root: string
  /** A path below it: `path('tls', 'ca.pem')`. */
  path(...parts: string[]): string
  /** Every value of cluster.env that does not belong to one node, typed, by its name there. */
  settings: Settings
  /** The control plane first, then the workers in their order. */
  nodes: Node[]
  controlPlane: Node
  workers: Node[]
  /** The node of that name. @throws StepError that lists the nodes */
  node(name: string): Node
  /** The API server as the workers reach it: https://192.168.100.10:6443. */
  apiServer: string
}

/**
 * Reads cluster.env, lets variables of the environment win, and checks all of it.
 *
 * @param options.text the content of cluster.env, instead of the file
 * @throws StepError with every problem found, each with file and line
 */
export function loadCluster(
  options: {
    root?: string
    env?: Readonly<Record<string, string | undefined>>
    text?: string
  } = {},
): Cluster {
  const root = resolve(options.root ?? join(import.meta.dirname, '..'))
  const { assignments, problems } = parseEnvFile(options.text ?? readSettingsFile(root))
  const reader = new SettingsReader(assignments, options.env ?? process.env)
  for (const { line, reason } of problems) reader.problems.push(`cluster.env:${line}: ${reason}`)
  const settings = reader.readAll()
  const nodes = nodesFrom(settings, reader)
  checkNames(assignments, settings, nodes, reader)
  checkProxy(root, settings, reader)
  const [controlPlane, ...workers] = nodes
  if (reader.problems.length > 0 || !controlPlane) {
    const count = reader.problems.length
    throw new StepError(`cluster.env has ${count === 1 ? 'a mistake' : `${count} mistakes`}`, {
      output: reader.problems.join('\n'),
      hint: 'each variable is explained in cluster.env itself; the environment wins over the file',
    })
  }
  if (!options.env && !options.root && !options.text) showOverridden(reader)
  return {
    root,
    path: (...parts) => join(root, ...parts),
    settings,
    nodes,
    controlPlane,
    workers,
    node: (name) => findNode(nodes, name),
    apiServer: `https://${controlPlane.ip}:${settings.API_PORT}`,
  }
}

/**
 * The nodes a script is to work on.
 *
 * @param names none means all
 * @throws StepError for a name that no node has
 */
export function chooseNodes(cluster: Cluster, names: readonly string[]): Node[] {
  return names.length === 0 ? cluster.nodes : [...new Set(names)].map(cluster.node)
}

function findNode(nodes: readonly Node[], name: string): Node {
  const found = nodes.find((node) => node.name === name)
  if (found) return found
  const names = nodes.map((node) => node.name).join(', ')
  throw new StepError(`there is no node "${name}"`, {
    hint: `the nodes of cluster.env are ${names}`,
    exitCode: 2,
  })
}

function readSettingsFile(root: string): string {
  try {
    return readFileSync(join(root, 'cluster.env'), 'utf8')
  } catch (cause) {
    throw new StepError(`cluster.env cannot be read in ${root}`, {
      hint: 'it belongs to the project: git checkout cluster.env',
      cause,
    })
  }
}

/** A misspelt variable would otherwise be ignored silently. */
function checkNames(
  assignments: readonly Assignment[],
  settings: Settings,
  nodes: readonly Node[],
  reader: SettingsReader,
): void {
  // Without the list of nodes, which is a mistake already, every one would be unknown.
  const nodesKnown = settings.CONTROL_PLANE_NODE && settings.WORKER_NODES
  // Nodes that the file names stay known when the environment names others.
  const known = assignments
    .filter(({ name }) => name === 'CONTROL_PLANE_NODE' || name === 'WORKER_NODES')
    .flatMap(({ value }) => value.split(/\s+/))
    .concat(nodes.map(({ name }) => name))
    .map((name) => name.replaceAll('-', '_'))
  for (const { name, line } of assignments) {
    if (Object.hasOwn(variables, name)) continue
    const prefix = perNodeVariables.find((candidate) => name.startsWith(`${candidate}_`))
    const suffix = prefix && name.slice(prefix.length + 1)
    if (suffix && (!nodesKnown || known.includes(suffix))) continue
    const reason = suffix
      ? `${name} belongs to a node "${suffix}", which CONTROL_PLANE_NODE and WORKER_NODES do not name`
      : `${name} is not a variable of this project`
    reader.problems.push(`cluster.env:${line}: ${reason}`)
  }
}

function checkProxy(root: string, settings: Settings, reader: SettingsReader): void {
  for (const name of ['PROXY_HTTP', 'PROXY_HTTPS'] as const) {
    const problem = settings[name] && proxyProblem(settings[name])
    if (problem) reader.problem(name, problem)
  }
  const problem = settings.PROXY_CA_FILE && caFileProblem(root, settings.PROXY_CA_FILE)
  if (problem) reader.problem('PROXY_CA_FILE', problem)
}

let shown = process.env.CLUSTER_LOCKS !== undefined

/** Once a command: a script that another one runs leaves it to that. Names only, no passwords. */
function showOverridden({ overridden }: SettingsReader): void {
  if (shown || overridden.length === 0) return
  shown = true
  console.error(`! from the environment instead of cluster.env: ${overridden.join(', ')}`)
}
