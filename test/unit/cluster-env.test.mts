import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { cpSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import { loadCluster } from '../../lib/cluster.mts'
import {
  isAddition,
  type WorkerSettings,
  withoutWorker,
  withWorker,
} from '../../lib/cluster-env.mts'
import { StepError } from '../../lib/errors.mts'
import { projectRoot } from '../checkout.mts'

const original = readFileSync(join(projectRoot, 'cluster.env'), 'utf8')
const delta: WorkerSettings = {
  name: 'delta',
  sshPort: 2225,
  ip: '192.168.100.13',
  mac: '52:54:00:12:34:59',
  podCidr: '10.200.3.0/24',
}
const epsilon: WorkerSettings = {
  name: 'epsilon-2',
  sshPort: 2226,
  ip: '192.168.100.14',
  mac: '52:54:00:12:34:5a',
  podCidr: '10.200.4.0/24',
}
const nodesOf = (text: string) => loadCluster({ root: projectRoot, env: {}, text }).nodes
const names = (text: string) => nodesOf(text).map(({ name }) => name)

describe('a worker put into cluster.env', () => {
  it('leaves everything else as it was, and adds one block', () => {
    const text = withWorker(original, delta)
    assert.ok(text.startsWith(original))
    const block = text.slice(original.length)
    assert.match(block, /^\n# ── Worker delta, .*\n([A-Z].*\n){5}$/)
  })

  it('is a node like the others', () => {
    const found = nodesOf(withWorker(original, delta)).at(-1)
    const { name, sshPort, ip, mac, podCidr } = delta
    assert.deepEqual(
      {
        name: found?.name,
        sshPort: found?.sshPort,
        ip: found?.ip,
        mac: found?.mac,
        podCidr: found?.podCidr,
      },
      { name, sshPort, ip, mac, podCidr },
    )
    assert.equal(found?.role, 'worker')
  })

  it('may be one of several, and have dashes in its name', () => {
    const text = withWorker(withWorker(original, delta), epsilon)
    assert.deepEqual(names(text), ['alpha', 'sigma', 'gamma', 'delta', 'epsilon-2'])
    assert.match(text, /^SSH_PORT_epsilon_2=2226$/m)
  })

  it('is known by its block', () => {
    const text = withWorker(original, delta)
    assert.equal(isAddition(text, 'delta'), true)
    assert.equal(isAddition(text, 'sigma'), false)
    assert.equal(isAddition(original, 'delta'), false)
  })
})

describe('a worker taken out of cluster.env', () => {
  const endings = {
    'as it comes': original,
    'without a line break at its end': original.trimEnd(),
    'with empty lines at its end': `${original}\n\n`,
    'with a comment at its end': `${original}# the end\n`,
  }
  for (const [what, text] of Object.entries(endings)) {
    it(`leaves the file ${what}, to the byte, when it was added before`, () => {
      assert.equal(withoutWorker(withWorker(text, delta), 'delta'), text)
    })
  }

  it('leaves the blocks of others, whichever goes first', () => {
    const both = withWorker(withWorker(original, delta), epsilon)
    const one = withoutWorker(both, 'delta')
    assert.equal(one, withWorker(original, epsilon))
    assert.equal(withoutWorker(one, 'epsilon-2'), original)
    assert.equal(withoutWorker(both, 'epsilon-2'), withWorker(original, delta))
  })

  it('leaves lines below its block on lines of their own', () => {
    const text = `${withWorker(original.trimEnd(), delta)}PROXY_HTTP=http://proxy:3128\n`
    assert.equal(
      withoutWorker(text, 'delta'),
      `${original.trimEnd()}\nPROXY_HTTP=http://proxy:3128\n`,
    )
  })

  it('leaves lines that were written below its block', () => {
    const text = `${withWorker(original, delta)}PROXY_HTTP=http://proxy:3128\n`
    const left = withoutWorker(text, 'delta')
    assert.deepEqual(names(left), ['alpha', 'sigma', 'gamma'])
    assert.match(left, /\nPROXY_HTTP=http:\/\/proxy:3128\n$/)
  })

  it('takes values and comments with it that were changed in its block', () => {
    const text = withWorker(original, delta).replace('=2225', '=4444   # mine')
    assert.equal(withoutWorker(text, 'delta'), original)
  })

  it('may be one that was there from the beginning', () => {
    const text = withoutWorker(original, 'sigma')
    assert.deepEqual(names(text), ['alpha', 'gamma'])
    assert.match(text, /^WORKER_NODES="gamma"$/m)
    assert.doesNotMatch(text, /sigma/)
    assert.doesNotMatch(text, /\n\n\n/)
    const added = original.split('\n').filter((line) => !text.split('\n').includes(line))
    assert.equal(added.length, 5, 'nothing else changes')
  })

  it('may be one that was there from the beginning, while another was added', () => {
    const text = withoutWorker(withoutWorker(withWorker(original, delta), 'gamma'), 'sigma')
    assert.deepEqual(names(text), ['alpha', 'delta'])
    assert.match(text, /^WORKER_NODES=""$/m)
  })

  for (const list of ['sigma', "'gamma sigma'  # why", '"  sigma  gamma "', 'sigma # one']) {
    it(`is found in WORKER_NODES=${list}`, () => {
      const text = original.replace('"sigma gamma"', () => list)
      const left = withoutWorker(text, 'sigma')
      assert.doesNotMatch(left.match(/^WORKER_NODES=.*$/m)?.[0] ?? '', /sigma/)
      if (list.includes('#')) assert.match(left, /^WORKER_NODES=.*#/m)
    })
  }

  it('is refused as a whole where the list is written in another form', () => {
    const text = original.replace('"sigma gamma"', '"sigma"" gamma"')
    assert.throws(
      () => withoutWorker(text, 'sigma'),
      (error) =>
        error instanceof StepError && /cannot be taken out of WORKER_NODES/.test(error.message),
    )
  })
})

describe('cluster.env with an added worker', () => {
  let folder: string
  before(() => {
    folder = mkdtempSync(join(tmpdir(), 'worker-settings-'))
    cpSync(join(projectRoot, 'Makefile'), join(folder, 'Makefile'))
    writeFileSync(
      join(folder, 'cluster.env'),
      withWorker(withoutWorker(withWorker(original, delta), 'gamma'), epsilon),
    )
  })
  after(() => rmSync(folder, { recursive: true }))

  const variables = [
    'WORKER_NODES',
    ...['delta', 'epsilon_2', 'gamma'].flatMap((node) => [
      ...[`SSH_PORT_${node}`, `NODE_IP_${node}`, `MAC_${node}`, `POD_CIDR_${node}`],
    ]),
  ]
  const bySource = (shell: string) =>
    variables.map((name) => {
      const script = `. ./cluster.env; printf '%s' "$${name}"`
      return execFileSync(shell, ['-c', script], { cwd: folder, env: {}, encoding: 'utf8' })
    })
  const byUs = () => {
    const { nodes, settings } = loadCluster({ root: folder, env: {} })
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
    const env = { PATH: process.env.PATH ?? '' }
    const printed = execFileSync('make', ['-s', ...goals], { cwd: folder, env, encoding: 'utf8' })
    assert.deepEqual(printed.split('\n').slice(0, -1), byUs())
  })
})
