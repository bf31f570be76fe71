// A worker's lines in cluster.env, put in and taken out again. All else in the file stays as its
// owner wrote it, to the byte.
import { parseEnvFile } from '../env-file.mts'
import { StepError } from '../errors.mts'
import { perNodeVariables } from '../settings.mts'

/** What cluster.env says of one worker. */
export interface WorkerSettings {
  name: string
  sshPort: number
  ip: string
  mac: string
  podCidr: string
}

/**
 * The text of cluster.env with a block for another worker at its end. The block lengthens
 * WORKER_NODES by itself, so that taking it out leaves nothing.
 */
export function withWorker(text: string, worker: WorkerSettings): string {
  const { name, sshPort, ip, mac, podCidr } = worker
  const variable = name.replaceAll('-', '_')
  const block = [
    '',
    headerOf(name),
    addition(name),
    `SSH_PORT_${variable}=${sshPort}`,
    `NODE_IP_${variable}=${ip}`,
    `MAC_${variable}=${mac}`,
    `POD_CIDR_${variable}=${podCidr}`,
    '',
  ]
  return text + block.join('\n')
}

/** Whether the worker has a block of its own, as `withWorker` writes it. */
export function isAddition(text: string, name: string): boolean {
  return text.split('\n').includes(addition(name))
}

/**
 * The text of cluster.env without a worker: its block, or its lines and its name in WORKER_NODES.
 *
 * @throws StepError if its name stands in WORKER_NODES in a way that cannot be taken out
 */
export function withoutWorker(text: string, name: string): string {
  const lines = text.split('\n')
  const variable = name.replaceAll('-', '_')
  const own = perNodeVariables.map((prefix) => `${prefix}_${variable}`)
  const isOwn = (line: string) => {
    const assigned = line.match(/^[ \t]*(?:export[ \t]+)?(\w+)=/)?.[1]
    const assigns = assigned !== undefined && own.includes(assigned)
    return assigns || line === headerOf(name) || line === addition(name)
  }
  const kept = lines.flatMap((line, index) => {
    if (isOwn(line)) return []
    // The empty line that sets the block off goes with it, unless something else of the
    // paragraph stays.
    const paragraph = line === '' && isOwn(lines[index + 1] ?? '')
    if (paragraph && endsParagraph(lines, index + 1, isOwn)) return []
    return [withoutWord(line, name)]
  })
  // A file that did not end in a line break got its last one with the block.
  const before = lines[lines.indexOf(headerOf(name)) - 1]
  const shorter = before ? kept.join('\n').replace(/\n$/, '') : kept.join('\n')
  const left = parseEnvFile(shorter).assignments.filter((each) => each.name === 'WORKER_NODES')
  if (!left.some(({ value }) => value.split(/\s+/).includes(name))) return shorter
  throw new StepError(`${name} cannot be taken out of WORKER_NODES`, {
    output: lines
      .filter((line) => /^\s*WORKER_NODES=|^\s*export\s+WORKER_NODES=/.test(line))
      .join('\n'),
    hint: 'write it as one list in quotes: WORKER_NODES="sigma gamma"',
  })
}

/** Whether nothing but such lines follow up to an empty line or the end. */
function endsParagraph(
  lines: readonly string[],
  from: number,
  isOwn: (line: string) => boolean,
): boolean {
  const after = lines.slice(from).find((line) => !isOwn(line))
  return after === undefined || after === ''
}

/** The line, without the name if it is an assignment of WORKER_NODES. */
function withoutWord(line: string, name: string): string {
  const [, start, quote, list = '', rest] =
    line.match(/^([ \t]*(?:export[ \t]+)?WORKER_NODES=)(["']?)([^"'#]*?)(\2(?:[ \t].*)?)$/) ?? []
  if (start === undefined || !list.split(/\s+/).includes(name)) return line
  const names = list.split(/\s+/).filter((each) => each !== name && each !== '')
  return `${start}${quote}${names.join(' ')}${rest}`
}

function headerOf(name: string): string {
  return `# ── Worker ${name}, by ./bin/add-worker.mts; ./bin/remove-worker.mts takes it out `.padEnd(
    96,
    '─',
  )
}

function addition(name: string): string {
  return `WORKER_NODES="$WORKER_NODES ${name}"`
}
