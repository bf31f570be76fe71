// The control plane machine's services as processes of this computer: the commands of its
// evaluated units, with paths and ports mapped.
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { appendFile, chmod, mkdir, open, readFile, writeFile } from 'node:fs/promises'
import { get as httpGet } from 'node:http'
import { get as httpsGet, type RequestOptions } from 'node:https'
import { dirname, join } from 'node:path'
import { text } from 'node:stream/consumers'
import type { Cluster } from '../../lib/cluster.mts'
import { StepError } from '../../lib/errors.mts'
import { becomes } from '../../lib/wait.mts'
import { type Outcome, run } from '../checkout.mts'
import type { Machine } from '../nixos/evaluate.mts'
import { freePorts } from '../ports.mts'
import {
  commandHere,
  mapped,
  type Place,
  type Ports,
  portsHere,
  type Service,
  services,
} from './mapping.mts'

/** Seconds. On two idle cores each of them takes a few. */
const startTimeout = 300

/** A running (or stopped) control plane. Its data and logs stay in `place.root`. */
export class ControlPlane {
  readonly cluster: Cluster
  readonly machine: Machine
  readonly place: Place
  readonly ports: Ports
  private readonly running = new Map<Service, ChildProcess>()
  /** Counts starts and stops: a start that a later one has overtaken launches nothing more. */
  private round = 0

  private constructor(cluster: Cluster, machine: Machine, place: Place, ports: Ports) {
    this.cluster = cluster
    this.machine = machine
    this.place = place
    this.ports = ports
  }

  /**
   * Prepares a control plane; nothing runs yet.
   *
   * @param machine what the configuration in `place.root` evaluates to; the machine's files are
   *   there as an installation leaves them
   */
  static async prepare(cluster: Cluster, machine: Machine, place: Place): Promise<ControlPlane> {
    const numbers = await freePorts(portsHere.length)
    const ports = Object.fromEntries(
      portsHere.map((name, index) => [name, numbers[index]]),
    ) as Ports
    const controlPlane = new ControlPlane(cluster, machine, place, ports)
    for (const [path, file] of Object.entries(machine.files)) {
      if (!path.startsWith('/etc/kubernetes/') || !('text' in file)) continue
      await mkdir(dirname(join(place.root, path)), { recursive: true })
      await writeFile(join(place.root, path), mapped(file.text, place, ports))
    }
    await mkdir(join(place.root, 'log'), { recursive: true })
    return controlPlane
  }

  /**
   * Starts all four, each once the one before it is ready, and waits for all.
   *
   * @throws StepError with the last lines of the service that ended or was not ready in time
   */
  async start(): Promise<void> {
    this.round += 1
    const { round } = this
    for (const service of services) {
      await this.launch(service, round)
      // As systemd does with those after it.
      if (this.machine.units[service]?.serviceConfig.Type === 'notify') {
        await this.waitUntilReady(service)
      }
    }
    for (const service of services) await this.waitUntilReady(service)
  }

  /** Stops all, the API server before its store. */
  async stop(): Promise<void> {
    this.round += 1
    for (const service of [...services].reverse()) {
      const child = this.running.get(service)
      if (!child) continue
      this.running.delete(service)
      if (child.exitCode !== null || child.signalCode !== null) continue
      const ended = once(child, 'exit')
      child.kill('SIGTERM')
      const limit = setTimeout(() => child.kill('SIGKILL'), 15_000)
      await ended
      clearTimeout(limit)
    }
  }

  /** Everything a service wrote since the first start. */
  log(service: Service): Promise<string> {
    return readFile(this.logFile(service), 'utf8')
  }

  /**
   * Asks a service for its health.
   *
   * @returns undefined if it is healthy, else its answer or why there is none
   */
  async trouble(service: Service, path = '/readyz'): Promise<string | undefined> {
    try {
      const url = `${this.address(service)}${path}`
      const admin = service === 'kube-apiserver' ? await this.adminCertificate() : {}
      const { status, body } = await ask(url, admin)
      return status === 200 ? undefined : `HTTP ${status}: ${body.trim()}`
    } catch (error) {
      return error instanceof Error ? error.message : String(error)
    }
  }

  private async adminCertificate(): Promise<RequestOptions> {
    const [ca, cert, key] = await Promise.all(
      ['ca', 'admin', 'admin-key'].map((name) => readFile(this.cluster.path('tls', `${name}.pem`))),
    )
    return { ca, cert, key, rejectUnauthorized: true }
  }

  /** kubectl with a kubeconfig of the cluster, as on the machine that it is for. */
  kubectl(identity: string, args: readonly string[], input = ''): Promise<Outcome> {
    const { cluster } = this
    const worker = cluster.workers.some(({ name }) => name === identity)
    // A worker's kubeconfig has the LAN address, which this computer does not have.
    const here =
      worker || identity === 'kube-proxy'
        ? [
            `--server=https://127.0.0.1:${cluster.settings.API_PORT}`,
            `--tls-server-name=${cluster.controlPlane.ip}`,
          ]
        : []
    const kubeconfig = `--kubeconfig=${cluster.path('configs', `${identity}.kubeconfig`)}`
    return this.run('kubectl', [kubeconfig, ...here, ...args], input)
  }

  /** etcdctl with the certificate of a name in tls/. */
  etcdctl(args: readonly string[], identity = 'kubernetes'): Promise<Outcome> {
    const { cluster } = this
    return this.run('etcdctl', [
      `--endpoints=https://127.0.0.1:${this.ports.etcdClients}`,
      `--cacert=${cluster.path('tls', 'ca.pem')}`,
      `--cert=${cluster.path('tls', `${identity}.pem`)}`,
      `--key=${cluster.path('tls', `${identity}-key.pem`)}`,
      ...args,
    ])
  }

  /** One of the programs, to its end. */
  run(program: string, args: readonly string[], input = ''): Promise<Outcome> {
    const { kubernetes, etcd, root } = this.place
    // HOME, as kubectl keeps what it discovered there.
    const env = { PATH: `${kubernetes}:${etcd}`, HOME: root }
    return run({ root }, program, args, { env, input, timeout: 120_000 })
  }

  private logFile(service: Service): string {
    return join(this.place.root, 'log', `${service}.log`)
  }

  private address(service: Service): string {
    const { etcdMetrics, controllerManager, scheduler } = this.ports
    return {
      etcd: `http://127.0.0.1:${etcdMetrics}`,
      'kube-apiserver': `https://127.0.0.1:${this.cluster.settings.API_PORT}`,
      'kube-controller-manager': `https://127.0.0.1:${controllerManager}`,
      'kube-scheduler': `https://127.0.0.1:${scheduler}`,
    }[service]
  }

  private async launch(service: Service, round: number): Promise<void> {
    const settings = this.machine.units[service]?.serviceConfig ?? {}
    for (const [kind, top] of [
      ['State', '/var/lib'],
      ['Logs', '/var/log'],
    ] as const) {
      const name = settings[`${kind}Directory`]
      if (!name) continue
      const folder = join(this.place.root, top, String(name))
      await mkdir(folder, { recursive: true })
      await chmod(folder, Number.parseInt(String(settings[`${kind}DirectoryMode`]), 8))
    }
    const command = commandHere(this.machine, service, this.place, this.ports)
    const log = await open(this.logFile(service), 'a')
    await log.write(`$ ${command.join(' ')}\n`)
    if (round !== this.round) {
      await log.close()
      throw new StepError(`stopped before ${service} was started`)
    }
    // Ends with this process, however this one ends.
    const child = spawn('setpriv', ['--pdeathsig', 'TERM', ...command], {
      cwd: this.place.root,
      stdio: ['ignore', log.fd, log.fd],
    })
    await log.close()
    child.on('error', (error) => appendFile(this.logFile(service), `${error.message}\n`))
    this.running.set(service, child)
  }

  private async waitUntilReady(service: Service): Promise<void> {
    const child = this.running.get(service)
    const path = service === 'kube-controller-manager' ? '/healthz' : '/readyz'
    let trouble: string | undefined
    const ready = await becomes(async () => {
      if (child?.exitCode !== null || child.signalCode !== null) {
        const end = child?.signalCode ?? `status ${child?.exitCode}`
        throw new StepError(`${service} ended with ${end}`, await this.lastLines(service))
      }
      trouble = await this.trouble(service, path)
      return !trouble
    }, startTimeout)
    if (ready) return
    throw new StepError(
      `${service} is not ready after ${startTimeout} s: ${trouble}`,
      await this.lastLines(service),
    )
  }

  private async lastLines(service: Service): Promise<{ output: string; log: string }> {
    const lines = (await this.log(service)).trimEnd().split('\n')
    return { output: lines.slice(-15).join('\n'), log: this.logFile(service) }
  }
}

/** A GET on loopback. Health ports have self-signed certificates. */
function ask(url: string, options: RequestOptions): Promise<{ status: number; body: string }> {
  return new Promise((resolve, reject) => {
    const get = url.startsWith('https:') ? httpsGet : httpGet
    const limits = { rejectUnauthorized: false, agent: false, timeout: 5000 } as const
    get(url, { ...limits, ...options }, (response) => {
      text(response).then((body) => resolve({ status: response.statusCode ?? 0, body }), reject)
    }).on('error', reject)
  })
}
