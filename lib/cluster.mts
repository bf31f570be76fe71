// The cluster as cluster.env describes it: read once, checked as a whole, then typed data.
import { readFileSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { type Assignment, parseEnvFile } from './env/env-file.mts'
import { nodesFrom } from './env/nodes.mts'
import { checkRanges } from './env/ranges.mts'
import { SettingsReader } from './env/settings.mts'
import { perNodeVariables, type Settings, variables } from './env/variables.mts'
import { StepError } from './step-error.mts'

export type Role = 'control-plane' | 'worker'

/** One virtual machine. */
export interface Node {
  name: string
  role: Role
  /** Address in the machines' own network (the lan). */
  ip: string
  /** MAC address of the card to the outside, and of the one to the lan. */
  mac: string
  lanMac: string
  /** Port on 127.0.0.1 that leads to the machine's ssh. */
  sshPort: number
  /** UDP port on 127.0.0.1 from which its QEMU sends the lan's frames. */
  lanPort: number
  /** The pods' addresses on a worker; the control plane runs no pods. */
  podCidr?: string
  memory: number
  cpus: number
}

export interface Cluster {
  /** The project's folder, absolute. */
  root: string
  /** A path below it: `path('tls', 'ca.pem')`. */
  path(...parts: string[]): string
  /** Every value of cluster.env that is not of one node, typed, by its name there. */
  settings: Settings
  /** The control plane first, then the workers in their order. */
  nodes: Node[]
  controlPlane: Node
  workers: Node[]
  /** The node of that name. @throws StepError that lists the names there are */
  node(name: string): Node
  /** The API server as the workers reach it: https://192.168.100.10:6443. */
  apiServer: string
}

/**
 * Reads cluster.env, lets variables of the environment win, and checks it all.
 *
 * @param options.text what cluster.env would say, instead of what it says
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

  const settings = reader.readAll(variables)
  const nodes = nodesFrom(settings, reader)
  checkNames(assignments, settings, nodes, reader)
  checkRanges(settings, nodes, reader)

  const [controlPlane, ...workers] = nodes
  if (reader.problems.length > 0 || !controlPlane) {
    const count = reader.problems.length
    throw new StepError(`cluster.env has ${count === 1 ? 'a mistake' : `${count} mistakes`}`, {
      output: reader.problems.join('\n'),
      hint: 'each variable is explained in cluster.env itself; the environment wins over the file',
    })
  }
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
 * The nodes a script was told to work on.
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

/** A misspelt variable would otherwise be ignored in silence. */
function checkNames(
  assignments: readonly Assignment[],
  settings: Settings,
  nodes: readonly Node[],
  reader: SettingsReader,
): void {
  // Without the list of nodes, told as a mistake already, every one would be unknown.
  const nodesKnown = settings.CONTROL_PLANE_NODE && settings.WORKER_NODES
  // Those that the file names stay known when the environment has other ones.
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
      ? `${name} is of a node "${suffix}", which CONTROL_PLANE_NODE and WORKER_NODES do not name`
      : `${name} is no variable of this project`
    reader.problems.push(`cluster.env:${line}: ${reason}`)
  }
}
