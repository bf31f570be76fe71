// The cluster as cluster.env describes it: read once, checked as a whole, then typed data.
import { readFileSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { type Assignment, parseEnvFile } from './env-file.mts'
import { StepError } from './errors.mts'
import { checkTogether, type Node, nodeVariable, readNode } from './nodes.mts'
import { perNodeVariables, type Settings, SettingsReader, variables } from './settings.mts'

export type { Node }

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

let overridesShown = process.env.CLUSTER_LOCKS !== undefined

/**
 * Reads cluster.env, lets variables of the environment win, and checks all of it.
 * @param options.text the content of cluster.env, instead of the file
 * @throws StepError with every problem found, each with file and line
 */
export function loadCluster(
  options: { root?: string; env?: NodeJS.ProcessEnv; text?: string } = {},
): Cluster {
  const root = resolve(options.root ?? join(import.meta.dirname, '..'))
  const { assignments, problems } = parseEnvFile(options.text ?? readSettingsFile(root))
  const reader = new SettingsReader(assignments, options.env ?? process.env)
  for (const { line, reason } of problems) reader.problems.push(`cluster.env:${line}: ${reason}`)
  const settings = reader.readAll()
  // An invalid list is undefined here, whatever its type says.
  const names = [settings.CONTROL_PLANE_NODE ?? [], settings.WORKER_NODES ?? []].flat()
  const nodes = [...new Set(names)].map((name) => readNode(name, settings, reader))
  const [controlPlane, ...workers] = nodes
  checkTogether(root, names, nodes, settings, reader)
  checkNames(assignments, settings, nodes, reader)
  if (reader.problems.length > 0 || !controlPlane) {
    const count = reader.problems.length
    throw new StepError(`cluster.env has ${count === 1 ? 'a mistake' : `${count} mistakes`}`, {
      output: reader.problems.join('\n'),
      hint: 'each variable is explained in cluster.env itself; the environment wins over the file',
    })
  }
  // Printed once: not by scripts that another one runs. Names only: values may be passwords.
  if (Object.keys(options).length === 0 && !overridesShown && reader.overridden.length > 0) {
    overridesShown = true
    console.error(`! from the environment instead of cluster.env: ${reader.overridden.join(', ')}`)
  }
  const apiServer = `https://${controlPlane.ip}:${settings.API_PORT}`
  const path = (...parts: string[]) => join(root, ...parts)
  const node = (name: string) => {
    const found = nodes.find((each) => each.name === name)
    if (found) return found
    throw new StepError(`there is no node "${name}"`, {
      hint: `the nodes of cluster.env are ${nodes.map((each) => each.name).join(', ')}`,
      exitCode: 2,
    })
  }
  return { root, path, settings, nodes, controlPlane, workers, node, apiServer }
}

/** The nodes of these names; all if there are no names. @throws StepError for an unknown one */
export function chooseNodes(cluster: Cluster, names: readonly string[]): Node[] {
  return names.length === 0 ? cluster.nodes : [...new Set(names)].map(cluster.node)
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
  // Nodes that the file names stay known when the environment names others.
  const inFile = assignments
    .filter(({ name }) => name === 'CONTROL_PLANE_NODE' || name === 'WORKER_NODES')
    .flatMap(({ value }) => value.split(/\s+/))
  const known = new Set(
    [...nodes.map(({ name }) => name), ...inFile].flatMap((name) =>
      perNodeVariables.map((prefix) => nodeVariable(prefix, name)),
    ),
  )
  // Without the list of nodes, which is a mistake already, every one would be unknown.
  const nodesKnown = settings.CONTROL_PLANE_NODE && settings.WORKER_NODES
  for (const { name, line } of assignments) {
    if (Object.hasOwn(variables, name) || known.has(name)) continue
    const suffix = name.match(`^(?:${perNodeVariables.join('|')})_(.+)`)?.[1]
    if (suffix && !nodesKnown) continue
    const reason = suffix
      ? `belongs to a node "${suffix}", which CONTROL_PLANE_NODE and WORKER_NODES do not name`
      : 'is not a variable of this project'
    reader.problems.push(`cluster.env:${line}: ${name} ${reason}`)
  }
}
