// How long our steps take compared with the programs that they replace, on this computer: cold
// starts of both, in turn, several rounds. Ends with status 1 if a ratio is above its target.
import { mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises'
import { availableParallelism, loadavg, tmpdir } from 'node:os'
import { join } from 'node:path'
import { parse } from 'yaml'
import { authorityOf, type CertificateEntry, certificatesOf } from '../lib/certificates.mts'
import { type Cluster, loadCluster } from '../lib/cluster.mts'
import { formatTable } from '../lib/format.mts'
import { type Checkout, makeCheckout, projectRoot, run } from './checkout.mts'

interface Contest {
  name: string
  /** Our median, divided by the other's, has to be at most this. */
  target: number
  rounds: number
  prepare?(): Promise<void>
  ours(): Promise<void>
  theirs(): Promise<void>
}

const checkout = await makeCheckout()
const scratch = await mkdtemp(join(tmpdir(), 'bench-'))
try {
  const cluster = loadCluster({ root: checkout.root, env: {} })
  await must(checkout, 'bin/generate-certs.mts')
  await must(checkout, 'bin/generate-kubeconfigs.mts')
  await prepareCfssl(cluster)
  const kubeconfigs = await prepareKubectl()
  const contests: Contest[] = [
    {
      name: `${certificatesOf(cluster).length + 1} certificates: generate-certs / cfssl`,
      target: 0.6,
      // The time to find a prime is random; the median needs some rounds.
      rounds: 9,
      prepare: () => rm(checkout.path('tls'), { recursive: true }),
      ours: () => must(checkout, 'bin/generate-certs.mts'),
      theirs: () => must({ root: scratch }, 'bash', ['-e', 'cfssl.sh']),
    },
    {
      name: `${kubeconfigs} kubeconfigs: generate-kubeconfigs / kubectl config`,
      target: 0.3,
      rounds: 5,
      ours: () => must(checkout, 'bin/generate-kubeconfigs.mts', ['--force']),
      theirs: () => must({ root: scratch }, 'bash', ['-e', 'kubectl.sh']),
    },
    {
      name: 'start of a script: directly / by tsx',
      target: 1.2,
      rounds: 7,
      ours: () => must(checkout, 'bin/generate-certs.mts', ['--help']),
      theirs: () =>
        must({ root: projectRoot }, 'node_modules/.bin/tsx', [
          checkout.path('bin', 'generate-certs.mts'),
          '--help',
        ]),
    },
  ]
  const rows: string[][] = []
  for (const contest of contests) {
    const [ours, theirs] = await measure(contest)
    const ratio = ours / theirs
    const met = ratio <= contest.target
    if (!met) process.exitCode = 1
    rows.push([
      contest.name,
      `${ours.toFixed(0)} ms`,
      `${theirs.toFixed(0)} ms`,
      ratio.toFixed(2),
      `${met ? 'at most' : 'NOT at most'} ${contest.target}`,
    ])
  }
  const [load = 0] = loadavg()
  if (load > availableParallelism() + 1) {
    console.log(`This computer is busy (load ${load.toFixed(1)}): the ratios mean little.`)
  }
  console.log(formatTable(['MEDIANS', 'OURS', 'OTHER', 'RATIO', 'TARGET'], rows))
} finally {
  await rm(scratch, { recursive: true, force: true })
  await checkout.remove()
}

/** Medians of both, in milliseconds. */
async function measure(contest: Contest): Promise<[number, number]> {
  const ours: number[] = []
  const theirs: number[] = []
  for (let round = 0; round < contest.rounds; round += 1) {
    await contest.prepare?.()
    ours.push(await timed(contest.ours))
    theirs.push(await timed(contest.theirs))
  }
  return [median(ours), median(theirs)]
}

async function timed(work: () => Promise<void>): Promise<number> {
  const start = performance.now()
  await work()
  return performance.now() - start
}

function median(values: readonly number[]): number {
  return values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)] ?? Number.NaN
}

async function must(where: Pick<Checkout, 'root'>, program: string, args: string[] = []) {
  const { exitCode, stderr } = await run(where, program, args)
  if (exitCode !== 0) throw new Error(`${program} ${args.join(' ')} failed:\n${stderr}`)
}

/** The same table for cfssl: a CSR and a line of shell for each certificate. */
async function prepareCfssl(cluster: Cluster): Promise<void> {
  const expiry = `${cluster.settings.CERT_DAYS * 24}h`
  const uses = ['signing', 'key encipherment', 'server auth', 'client auth']
  await writeJson('ca-config.json', {
    signing: { default: { expiry }, profiles: { kubernetes: { usages: uses, expiry } } },
  })
  await writeJson('ca-csr.json', csrOf(authorityOf(cluster)))
  const lines = ['cfssl gencert -loglevel=4 -initca ca-csr.json | cfssljson -bare ca']
  for (const entry of certificatesOf(cluster)) {
    await writeJson(`${entry.name}-csr.json`, csrOf(entry))
    const ca = '-ca=ca.pem -ca-key=ca-key.pem -config=ca-config.json -profile=kubernetes'
    const csr = `${entry.name}-csr.json`
    lines.push(`cfssl gencert -loglevel=4 ${ca} ${csr} | cfssljson -bare ${entry.name}`)
  }
  await writeFile(join(scratch, 'cfssl.sh'), lines.join('\n'))
}

function csrOf({ subject: { C, ST, L, O, OU, CN }, sans }: CertificateEntry): object {
  return { CN, hosts: sans, key: { algo: 'rsa', size: 2048 }, names: [{ C, ST, L, O, OU }] }
}

/** The four commands with which kubectl writes a kubeconfig, for each of ours. @returns how many */
async function prepareKubectl(): Promise<number> {
  const files = (await readdir(checkout.path('configs'))).filter((file) => /kubeconfig$/.test(file))
  const lines: string[] = []
  for (const file of files) {
    const { clusters, users } = parse(await readFile(checkout.path('configs', file), 'utf8'))
    const [{ name, cluster }] = clusters
    const tls = checkout.path('tls')
    const pem = join(tls, file.replace('.kubeconfig', ''))
    const user = users[0].name
    for (const command of [
      `set-cluster ${name} --certificate-authority=${tls}/ca.pem --embed-certs=true --server=${cluster.server}`,
      `set-credentials ${user} --client-certificate=${pem}.pem --client-key=${pem}-key.pem --embed-certs=true`,
      `set-context default --cluster=${name} --user=${user}`,
      'use-context default',
    ]) {
      lines.push(`kubectl config --kubeconfig=${file} ${command}`)
    }
  }
  await writeFile(join(scratch, 'kubectl.sh'), lines.join('\n'))
  return files.length
}

async function writeJson(name: string, value: unknown): Promise<void> {
  await writeFile(join(scratch, name), JSON.stringify(value))
}
