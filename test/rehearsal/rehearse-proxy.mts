// A worker behind a corporate proxy that intercepts TLS and is the only way out: it is installed and
// booted, and everything that docs/proxy-configuration.md names must go through the proxy. The proxy
// is a real one, tinyproxy; the internet behind it is simulated. `make rehearse-proxy` calls it:
//   YES=1        install the packages that it needs
import { type ChildProcess, spawn } from 'node:child_process'
import { mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { basename, delimiter, dirname, join } from 'node:path'
import { which } from 'zx'
import { type Cluster, loadCluster, type Node } from '../../lib/cluster.mts'
import { describeError, StepError } from '../../lib/errors.mts'
import { detectHost } from '../../lib/host.mts'
import { interruption } from '../../lib/interrupt.mts'
import { waitFor } from '../../lib/wait.mts'
import { makeCheckout } from '../checkout.mts'
import { freePorts } from '../ports.mts'
import { buildIso } from './build-iso.mts'
import { CheckList } from './check-list.mts'
import { debianLayer } from './debian-layer.mts'
import { ensureHostPackages } from './host-packages.mts'
import { imageArchives } from './images.mts'
import {
  type InterceptedInternet,
  registryPages,
  startInterceptedInternet,
} from './intercepted-internet.mts'
import { Rehearsal } from './rehearsal.mts'
import { smallMachines } from './rehearsal-folder.mts'

const signal = interruption()
const image = 'registry.k8s.io/behind-the-proxy:1'
/** The proxy's address on the machine. */
const proxyInside = '10.0.2.100:3128'

try {
  await ensureHostPackages(Boolean(process.env.YES))
  for (const program of ['tinyproxy', 'openssl']) {
    if (await which(program, { nothrow: true })) continue
    throw new StepError(`${program} is not installed`, {
      command: `apt-get install ${program === 'tinyproxy' ? 'tinyproxy-bin' : program}`,
    })
  }
  const folder = await mkdtemp(join(tmpdir(), 'rehearse-proxy-'))
  await rehearse(folder)
  await rm(folder, { recursive: true })
} catch (error) {
  console.error(`rehearse-proxy: ${describeError(error)}`)
  process.exitCode = error instanceof StepError ? (error.explanation.exitCode ?? 1) : 1
}

async function rehearse(folder: string): Promise<void> {
  const iso = await buildIso()
  const { busybox } = await debianLayer()
  const { archives } = await imageArchives(loadCluster().settings, busybox)
  const pages = registryPages(archives[0] ?? '', image)
  pages.set('https://cache.nixos.org/nix-cache-info', { body: 'StoreDir: /nix/store\n' })
  pages.set('https://registry.k8s.io/', { body: 'good day\n' })
  const internet = await startInterceptedInternet(folder, pages)
  const [port = 0] = await freePorts(1)
  const log = join(folder, 'tinyproxy.log')
  const tinyproxy = await startTinyproxy(folder, { port, log, upstream: internet.port })
  const checkout = await makeCheckout({
    folder: join(folder, 'project'),
    settings: {
      ...smallMachines,
      NIXOS_ISO_URL: iso,
      PROXY_HTTP: `http://${proxyInside}`,
      PROXY_NO: '.corp.example',
      PROXY_CA_FILE: internet.caFile,
    },
  })
  const cluster = loadCluster({ root: checkout.root })
  const [worker = cluster.controlPlane] = cluster.workers
  const rehearsal = new Rehearsal(cluster, [worker], signal)
  try {
    await cutOff(cluster, folder, `${busybox} nc 127.0.0.1 ${port}`)
    await rehearsal.timed('make all', () => rehearsal.script('bootstrap-cluster', worker.name))
    await rehearsal.enter()
    await rehearsal.timed('checks', () => check(rehearsal, worker, internet, { log, port }))
  } finally {
    await rehearsal.script('shutdown').catch((error) => console.error(describeError(error)))
    tinyproxy.kill()
    internet.close()
    console.log(`\n${await rehearsal.timeTable()}`)
  }
}

async function check(
  rehearsal: Rehearsal,
  worker: Node,
  { visits }: InterceptedInternet,
  { log, port }: { log: string; port: number },
): Promise<void> {
  const list = new CheckList(signal)
  const run = (command: string, timeout?: number) => rehearsal.on(worker, command, timeout)
  await list.check('the machine reaches nothing without the proxy', async () => {
    // The host, where the proxy listens on another port.
    const direct = `curl --noproxy '*' --silent --max-time 5 http://10.0.2.2:${port}/`
    if ((await run(`${direct} >/dev/null && echo yes || echo no`)) === 'yes\n')
      throw new StepError('the machine reaches this computer directly')
    return undefined
  })
  await list.check('nixos-install reached the binary cache through it', async () =>
    expectVisit(/^\S+ GET https:\/\/cache\.nixos\.org\/nix-cache-info$/),
  )
  await list.check('a login shell has the proxy', async () => {
    const env = await run('bash --login -c env')
    for (const line of [`https_proxy=http://${proxyInside}`, `http_proxy=http://${proxyInside}`]) {
      if (!env.includes(`${line}\n`)) throw new StepError(`there is no ${line}`, { output: env })
    }
    const no = env.match(/^no_proxy=(.*)$/m)?.[1]?.split(',') ?? []
    const { LAN_CIDR, K8S_SERVICE_CIDR, K8S_POD_CIDR } = rehearsal.cluster.settings
    for (const own of [LAN_CIDR, K8S_SERVICE_CIDR, K8S_POD_CIDR, '.svc', '.corp.example']) {
      if (!no.includes(own)) throw new StepError(`${own} is not in no_proxy`, { output: env })
    }
    return undefined
  })
  await list.check('the machine trusts the company CA', async () => {
    const fetch = 'curl --fail --silent --show-error --max-time 30 https://registry.k8s.io/'
    return (await run(`bash --login -c '${fetch}'`)).trim()
  })
  await list.check('containerd pulls an image through it', async () => {
    await waitFor({ failure: 'containerd is not active', timeout: 300, signal }, async () => {
      const state = (await run('systemctl is-active containerd || true')).trim()
      return state === 'active' ? undefined : state
    })
    // By containerd itself, not by ctr, which has no proxy here.
    const pull = `env --unset=https_proxy --unset=http_proxy ctr images pull --local=false ${image}`
    await run(pull, 180)
    return expectVisit(/^containerd\/\S+ GET https:\/\/registry\.k8s\.io\/v2\/.*\/blobs\/sha256:/)
  })
  await list.check('tinyproxy has logged them', async () => {
    const seen = await readFile(log, 'utf8')
    for (const host of ['cache.nixos.org', 'registry.k8s.io']) {
      if (!seen.includes(`CONNECT ${host}:443`)) throw new StepError(`no request for ${host}`)
    }
    return undefined
  })
  list.assertPassed()

  function expectVisit(pattern: RegExp): string {
    const found = visits.find((visit) => pattern.test(visit))
    if (!found) throw new StepError('there was no such request', { output: visits.join('\n') })
    return found
  }
}

/** Connects QEMU's outside network to the proxy and to nothing else. @param relay a command */
async function cutOff(cluster: Cluster, folder: string, relay: string): Promise<void> {
  const { qemu } = await detectHost(cluster)
  const wrapper = join(folder, 'bin', basename(qemu.path))
  const only = `restrict=on,guestfwd=tcp:${proxyInside}-cmd:${relay}`
  const text = `#!/bin/sh
for word; do
  shift
  case $word in user,id=outside,*) word="$word,${only}" ;; esac
  set -- "$@" "$word"
done
exec ${qemu.path} "$@"
`
  await mkdir(dirname(wrapper))
  await writeFile(wrapper, text, { mode: 0o755 })
  process.env.PATH = `${dirname(wrapper)}${delimiter}${process.env.PATH}`
}

/** Ends with the caller's kill(). */
async function startTinyproxy(
  folder: string,
  { port, log, upstream }: { port: number; log: string; upstream: number },
): Promise<ChildProcess> {
  const configuration = join(folder, 'tinyproxy.conf')
  const lines = [
    `Port ${port}`,
    'Listen 127.0.0.1',
    'Timeout 600',
    `LogFile "${log}"`,
    'LogLevel Connect',
    `Upstream http 127.0.0.1:${upstream}`,
  ]
  await writeFile(configuration, `${lines.join('\n')}\n`)
  return spawn('tinyproxy', ['-d', '-c', configuration], { stdio: 'ignore' })
}
