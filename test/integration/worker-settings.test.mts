// What add-worker and remove-worker make of cluster.env, by their --dry-run.
import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { readFile, writeFile } from 'node:fs/promises'
import { after, before, describe, it } from 'node:test'
import { loadCluster } from '../../lib/cluster.mts'
import { type Checkout, makeCheckout, run } from '../checkout.mts'

let checkout: Checkout
let original = ''
/** The same with delta, then with delta and epsilon-2 as well, and the blocks that were added. */
let withDelta = ''
let withBoth = ''
let [delta, epsilon] = ['', '']
before(async () => {
  checkout = await makeCheckout()
  original = await readFile(checkout.path('cluster.env'), 'utf8')
  delta = await dryRun('add-worker', original, 'delta')
  withDelta = `${original}\n${delta}`
  epsilon = await dryRun('add-worker', withDelta, 'epsilon-2')
  withBoth = `${withDelta}\n${epsilon}`
})
after(() => checkout?.remove())

/** What a script prints about a text of cluster.env, which stays as it is. */
async function dryRun(script: string, text: string, name: string): Promise<string> {
  await writeFile(checkout.path('cluster.env'), text)
  const args = [name, '--dry-run', ...(script === 'remove-worker' ? ['--force'] : [])]
  const { stdout, stderr, exitCode } = await run(checkout, `bin/${script}.mts`, args)
  assert.equal(exitCode, 0, stderr)
  assert.equal(await readFile(checkout.path('cluster.env'), 'utf8'), text)
  return stdout
}
const without = (text: string, name: string) => dryRun('remove-worker', text, name)
const names = (text: string) =>
  loadCluster({ root: checkout.root, env: {}, text }).nodes.map(({ name }) => name)

describe('a worker put into cluster.env', () => {
  it('is one block', () => assert.match(delta, /^# ── Worker delta, .*\n([A-Z].*\n){5}$/))

  it('is a worker like the others', () => {
    const { workers } = loadCluster({ root: checkout.root, env: {}, text: withDelta })
    const { name, role, ip, podCidr } = workers.at(-1) ?? {}
    const expected = ['delta', 'worker', '192.168.100.13', '10.200.3.0/24']
    assert.deepEqual([name, role, ip, podCidr], expected)
  })

  it('may be one of several, and have dashes in its name', () => {
    assert.deepEqual(names(withBoth), ['alpha', 'sigma', 'gamma', 'delta', 'epsilon-2'])
    assert.match(epsilon, /^NODE_IP_epsilon_2=192\.168\.100\.14$/m)
  })

  it('is known by its block', async () => {
    const again = await dryRun('add-worker', withDelta, 'delta')
    assert.equal(again, 'delta is in cluster.env already\n')
  })
})

describe('a worker taken out of cluster.env', () => {
  const endings: [what: string, change: (text: string) => string][] = [
    ['as it comes', (text) => text],
    ['without a line break at its end', (text) => text.trimEnd()],
    ['with empty lines at its end', (text) => `${text}\n\n`],
    ['with a comment at its end', (text) => `${text}# the end\n`],
  ]
  for (const [what, change] of endings) {
    it(`leaves the file ${what}, to the byte, when it was added before`, async () => {
      const text = change(original)
      assert.equal(await without(`${text}\n${delta}`, 'delta'), text)
    })
  }

  it('leaves the blocks of others, whichever goes first', async () => {
    const one = await without(withBoth, 'delta')
    assert.equal(one, `${original}\n${epsilon}`)
    assert.equal(await without(one, 'epsilon-2'), original)
    assert.equal(await without(withBoth, 'epsilon-2'), withDelta)
  })

  it('leaves lines below its block on lines of their own', async () => {
    const proxy = 'PROXY_HTTP=http://proxy:3128\n'
    const text = `${original.trimEnd()}\n${delta}${proxy}`
    assert.equal(await without(text, 'delta'), `${original.trimEnd()}\n${proxy}`)
  })

  it('leaves lines that were written below its block', async () => {
    const left = await without(`${withDelta}PROXY_HTTP=http://proxy:3128\n`, 'delta')
    assert.deepEqual(names(left), ['alpha', 'sigma', 'gamma'])
    assert.match(left, /\nPROXY_HTTP=http:\/\/proxy:3128\n$/)
  })

  it('takes values and comments with it that were changed in its block', async () => {
    const text = withDelta.replace(/(?<=_delta=)\d+$/m, '4444   # mine')
    assert.equal(await without(text, 'delta'), original)
  })

  it('may be one that was there from the beginning', async () => {
    const text = await without(original, 'sigma')
    assert.deepEqual(names(text), ['alpha', 'gamma'])
    assert.match(text, /^WORKER_NODES="gamma"$/m)
    assert.doesNotMatch(text, /sigma/)
    assert.doesNotMatch(text, /\n\n\n/)
    const added = original.split('\n').filter((line) => !text.split('\n').includes(line))
    assert.equal(added.length, 5, 'nothing else changes')
  })

  it('may be one that was there from the beginning, while another was added', async () => {
    const text = await without(await without(withDelta, 'gamma'), 'sigma')
    assert.deepEqual(names(text), ['alpha', 'delta'])
    assert.match(text, /^WORKER_NODES=""$/m)
  })

  for (const list of ['sigma', "'gamma sigma'  # why", '"  sigma  gamma "', 'sigma # one']) {
    it(`is found in WORKER_NODES=${list}`, async () => {
      const text = original.replace('"sigma gamma"', () => list)
      const others = list.includes('gamma') ? text : text.replace(/^.*_gamma=.*\n/gm, '')
      const left = await without(others, 'sigma')
      assert.doesNotMatch(left.match(/^WORKER_NODES=.*$/m)?.[0] ?? '', /sigma/)
      if (list.includes('#')) assert.match(left, /^WORKER_NODES=.*#/m)
    })
  }

  it('is refused as a whole where the list is written in another form', async () => {
    const text = original.replace('"sigma gamma"', '"sigma"" gamma"')
    await writeFile(checkout.path('cluster.env'), text)
    const { stderr, exitCode } = await run(checkout, 'bin/remove-worker.mts', ['sigma'])
    assert.equal(exitCode, 1)
    assert.match(stderr, /sigma cannot be taken out of WORKER_NODES/)
    assert.equal(await readFile(checkout.path('cluster.env'), 'utf8'), text)
  })
})

describe('cluster.env with an added worker', () => {
  before(async () => {
    const text = `${await without(withDelta, 'gamma')}\n${epsilon}`
    await writeFile(checkout.path('cluster.env'), text)
  })

  const variables = [
    'WORKER_NODES',
    ...['delta', 'epsilon_2', 'gamma'].flatMap((node) => [
      ...[`SSH_PORT_${node}`, `NODE_IP_${node}`, `MAC_${node}`, `POD_CIDR_${node}`],
    ]),
  ]
  const bySource = (shell: string) =>
    variables.map((name) => {
      const script = `. ./cluster.env; printf '%s' "$${name}"`
      return execFileSync(shell, ['-c', script], { cwd: checkout.root, env: {}, encoding: 'utf8' })
    })
  const byUs = () => {
    const { nodes, settings } = loadCluster({ root: checkout.root, env: {} })
    return variables.map((variable) => {
      if (variable === 'WORKER_NODES') return settings.WORKER_NODES.join(' ')
      const node = nodes.find(({ name }) => variable.endsWith(`_${name.replaceAll('-', '_')}`))
      if (!node) return ''
      if (variable.startsWith('SSH_PORT')) return String(node.sshPort)
      if (variable.startsWith('NODE_IP')) return node.ip
      return variable.startsWith('MAC') ? node.mac : node.podCidr
    })
  }

  it('says the same to bash and to sh', () => {
    for (const shell of ['/bin/bash', '/bin/sh']) assert.deepEqual(bySource(shell), byUs())
  })

  it('says the same to make', () => {
    const goals = variables.map((name) => `print-${name}`)
    const options = { cwd: checkout.root, env: { PATH: process.env.PATH ?? '' } }
    const printed = execFileSync('make', ['-s', ...goals], { ...options, encoding: 'utf8' })
    assert.deepEqual(printed.split('\n').slice(0, -1), byUs())
  })
})
