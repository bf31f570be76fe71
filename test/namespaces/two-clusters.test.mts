// Clusters of namespaces as such; what runs in them is tested by `npm run test:cluster`.
import assert from 'node:assert/strict'
import { existsSync, readdirSync } from 'node:fs'
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import { becomes } from '../../lib/wait.mts'
import { run } from '../checkout.mts'
import {
  cannotRun,
  clusterFolder,
  idOf,
  makeParts,
  type NamespaceCluster,
  raise,
  takeAway,
} from './namespace-cluster.mts'

const skip = cannotRun()
// A skipped suite is counted nowhere; a skipped test is.
it('what this needs is there', { skip }, () => {})

describe('two clusters of namespaces at the same time', { skip }, () => {
  const folders = ['one', 'two'].map((name) => join(clusterFolder, name))
  const [first = ''] = folders
  let clusters: NamespaceCluster[]
  before(async () => {
    await makeParts()
    clusters = await Promise.all(folders.map((folder) => raise({ folder })))
  })
  after(async () => {
    for (const folder of folders) await takeAway(folder)
  })

  const on = (cluster: NamespaceCluster | undefined, name: string, command: string) =>
    run({ root: cluster?.root ?? '' }, 'bin/ssh.mts', [name, '--', command])

  it('do not meet, although their machines have the same addresses', async () => {
    for (const cluster of clusters) {
      const answers = async () => (await on(cluster, 'sigma', 'true')).exitCode === 0
      assert.ok(await becomes(answers, 60), 'sigma does not answer ssh')
      const pki = '/var/lib/kubernetes/pki'
      const keys = `--cacert ${pki}/ca.pem --cert ${pki}/sigma.pem --key ${pki}/sigma-key.pem`
      const patient = '--retry 60 --retry-delay 1 --retry-all-errors'
      const url = `https://${cluster.cluster.controlPlane.ip}:${cluster.cluster.settings.API_PORT}/livez`
      const { stdout, stderr } = await on(cluster, 'sigma', `curl -sSf ${keys} ${patient} ${url}`)
      assert.equal(stdout, 'ok', stderr)
    }
  })

  it('leave nothing when one is killed, and the other runs', async () => {
    const pid = Number(await readFile(join(first, 'supervisor.pid'), 'utf8'))
    process.kill(pid, 'SIGKILL')
    const nothingRuns = async () => (await processesOf(`${first}/bin`)).length === 0
    assert.ok(await becomes(nothingRuns, 30), 'machines run without their supervisor')
    // What the next start does at first.
    await takeAway(first)
    assert.deepEqual(await processesOf(first), [])
    const groups = ['/sys/fs/cgroup', '-maxdepth', '2', '-name', `khw-${idOf(first)}-*`]
    assert.equal((await run({ root: '/' }, 'find', groups)).stdout, '')
    assert.ok(!(await readFile('/proc/self/mounts', 'utf8')).includes(`${first}/`))
    assert.equal(existsSync(first), false)
    assert.equal((await on(clusters[1], 'gamma', 'uname -n')).stdout, 'gamma\n')
  })
})

/** Command lines that have a text. */
async function processesOf(text: string): Promise<string[]> {
  const pids = readdirSync('/proc').filter((name) => /^\d+$/.test(name))
  const lines = await Promise.all(
    pids.map((pid) => readFile(`/proc/${pid}/cmdline`, 'utf8').catch(() => '')),
  )
  return lines.filter((line) => line.includes(text))
}
