// A worker's lines in cluster.env, added and taken out again. Everything else in the file stays as
// its owner wrote it, to the byte.
import { parseEnvFile } from './env-file.mts'
import { StepError } from './errors.mts'
import { perNodeVariables } from './settings.mts'

/** What cluster.env says about one worker. */
export interface WorkerSettings {
  name: string
  sshPort: number
  ip: string
  mac: string
  podCidr: string
}

/**
 * The text of cluster.env with a block for another worker at its end. The block itself appends to
 * WORKER_NODES, so that taking it out restores the file.
 */
export function withWorker(text: string, worker: WorkerSettings): string {
  const { name, sshPort, ip, mac, podCidr } = worker
  const header = `# ── Worker ${name}, by ./bin/add-worker.mts; ./bin/remove-worker.mts takes it out `
  const variable = name.replaceAll('-', '_')
  return `${text}
${header.padEnd(96, '─')}
${addition(name)}
SSH_PORT_${variable}=${sshPort}
NODE_IP_${variable}=${ip}
MAC_${variable}=${mac}
POD_CIDR_${variable}=${podCidr}
`
}

/** Whether the worker has a block of its own, as `withWorker` writes it. */
export function isAddition(text: string, name: string): boolean {
  return text.split('\n').includes(addition(name))
}

/**
 * The text of cluster.env without a worker: its block, or its lines and its name in WORKER_NODES.
 *
 * @throws StepError if its name is in WORKER_NODES in a form that cannot be edited safely
 */
export function withoutWorker(text: string, name: string): string {
  const prefixes = perNodeVariables.join('|')
  const own = `^[ \\t]*(?:export[ \\t]+)?(?:${prefixes})_${name.replaceAll('-', '_')}=.*(?:\\n|$)`
  const ownBlock = `\\n# ── Worker ${name},.*\\nWORKER_NODES="\\$WORKER_NODES ${name}"\\n(?:${own})*`
  const shorter = text
    // A file without a line break at its end got one with the block; what follows needs it.
    .replace(new RegExp(ownBlock, 'm'), (block, at: number) => {
      const follows = text.slice(at + block.length)
      return at === 0 || text[at - 1] === '\n' || /^(\n|$)/.test(follows) ? '' : '\n'
    })
    .replace(new RegExp(`(?<=\\n)\\n(?:${own})+(?=\\n|$)`, 'gm'), '')
    .replace(new RegExp(own, 'gm'), '')
    .replace(
      /^([ \t]*(?:export[ \t]+)?WORKER_NODES=)(["']?)([^"'#\n]*?)(\2(?:[ \t].*)?)$/gm,
      (line, start: string, quote: string, list: string, rest: string) => {
        const names = list.split(/\s+/).filter(Boolean)
        if (!names.includes(name)) return line
        return `${start}${quote}${names.filter((each) => each !== name).join(' ')}${rest}`
      },
    )
  const lists = parseEnvFile(shorter).assignments.filter((each) => each.name === 'WORKER_NODES')
  if (!lists.some(({ value }) => value.split(/\s+/).includes(name))) return shorter
  throw new StepError(`${name} cannot be taken out of WORKER_NODES`, {
    output: text.match(/^.*\bWORKER_NODES=.*$/gm)?.join('\n') ?? '',
    hint: 'write it as one list in quotes: WORKER_NODES="sigma gamma"',
  })
}

function addition(name: string): string {
  return `WORKER_NODES="$WORKER_NODES ${name}"`
}
