// kubectl as the admin of this cluster. What a script does with it, a learner can type.
import { $, type ProcessOutput } from 'zx/core'
import type { Cluster } from '../cluster.mts'
import { StepError } from '../errors.mts'
import { wrongEncryptionKey } from './api-server.mts'
import { waitForRollout } from './rollout.mts'

interface RunOptions {
  /** What the command reads from its standard input. */
  input?: string
  /** Seconds. */
  timeout?: number
}

/** An object of the API, as far as all of them are alike. */
export interface ApiObject {
  apiVersion?: string
  kind?: string
  metadata: {
    name: string
    namespace?: string
    labels?: Record<string, string>
    annotations?: Record<string, string>
    creationTimestamp?: string
    /** Set on what is on its way out. */
    deletionTimestamp?: string
  }
}

/** How kubectl's messages are told, and what to do. */
const causes = [
  {
    // The API server answers; whom it asked in turn does not.
    pattern: /(^Error from server: |error dialing backend: ).*dial tcp/m,
    reason: 'the API server does not reach the kubelet',
    hint: 'make status shows what runs; make logs FLAGS="--unit kubelet"',
  },
  {
    pattern: /(^Error from server: |error dialing backend: ).*(x509|tls): /m,
    reason: "the API server and the kubelet do not accept each other's certificates",
    hint: 'make certs-check shows what is wrong; make certs renews; make reconfig brings it to the machines',
  },
  {
    // Of an object in etcd.
    pattern: /unable to transform key/,
    reason: wrongEncryptionKey,
    hint: 'put the former configs/encryption-config.yaml back, then make reconfig',
  },
  {
    pattern: /connection refused|was refused|i\/o timeout|EOF$|connection reset|no route to host/m,
    reason: 'the API server does not answer',
    hint: 'make status shows what runs; make up starts the machines; make wait waits for them',
  },
  {
    pattern: /certificate has expired or is not yet valid/,
    reason: 'a certificate has expired, or the clocks of this computer and the machine differ',
    hint: 'make certs-check shows which; make certs renews; make reconfig brings it to the machines',
  },
  {
    pattern: /signed by unknown authority|x509:/,
    reason: 'the API server has a certificate of another CA than tls/ca.pem',
    hint: 'tls/ was made anew after the machines got theirs: make reconfig',
  },
  {
    pattern: /Unauthorized|provide credentials/,
    reason: 'the API server does not accept the admin certificate',
    hint: 'make certs-check shows whether it has expired; tls/ made anew after the machines got theirs: make reconfig',
  },
] as const

/** kubectl, with the admin's kubeconfig. Every method throws StepError when kubectl fails. */
export class Kubectl {
  readonly kubeconfig: string
  private readonly signal: AbortSignal | undefined

  /** @param signal ends what is running */
  constructor(cluster: Cluster, signal?: AbortSignal) {
    this.kubeconfig = cluster.path('configs', 'admin.kubeconfig')
    this.signal = signal
  }

  /** Runs kubectl, whatever its end. @param args as one would type them */
  async execute(args: readonly string[], options: RunOptions = {}): Promise<ProcessOutput> {
    const { input = '', timeout = 60 } = options
    this.signal?.throwIfAborted()
    const output = await $({
      nothrow: true,
      quiet: true,
      input,
      timeout: timeout * 1000,
      // Without this, kubectl would look into a learner's own configuration as well.
      env: { ...process.env, KUBECONFIG: this.kubeconfig },
      ...(this.signal ? { signal: this.signal } : {}),
    })`kubectl ${args}`
    this.signal?.throwIfAborted()
    if (output.exitCode === 127) {
      throw new StepError('kubectl is not installed', { hint: 'make check says how to install it' })
    }
    return output
  }

  /** What kubectl prints. @throws StepError if its status is not 0 */
  async run(args: readonly string[], options: RunOptions = {}): Promise<string> {
    const output = await this.execute(args, options)
    if (output.exitCode === 0) return output.stdout
    const message = output.stderr.trim()
    const known = causes.find(({ pattern }) => pattern.test(message))
    const reason =
      output.exitCode === null
        ? `kubectl did not end within ${options.timeout ?? 60} s`
        : (known?.reason ?? `kubectl ended with status ${output.exitCode}`)
    throw new StepError(reason, {
      output: message.split('\n').slice(-15).join('\n'),
      command: `KUBECONFIG=configs/admin.kubeconfig kubectl ${args.join(' ')}`,
      ...(known ? { hint: known.hint } : {}),
    })
  }

  /** The answer of `kubectl get ARGS -o json`, as the caller says it looks. */
  async get<T>(...args: string[]): Promise<T> {
    return JSON.parse(await this.run(['get', ...args, '--output=json'])) as T
  }

  /** Whether an object is there: `exists('deployment/coredns', '--namespace=kube-system')`. */
  async exists(...args: string[]): Promise<boolean> {
    return (await this.run(['get', ...args, '--ignore-not-found', '--output=name'])).trim() !== ''
  }

  /**
   * Server-side apply: the API server merges, and remembers which fields are ours. It is asked
   * first whether it would, so that a manifest is applied as a whole or not at all.
   *
   * @param manifest YAML, any number of documents
   * @param options.forceConflicts takes fields that somebody else owns
   * @throws StepError if another owner has a field of the manifest
   */
  async apply(
    manifest: string,
    options: { manager: string; forceConflicts?: boolean },
  ): Promise<void> {
    const args = ['apply', '--server-side', `--field-manager=${options.manager}`, '--filename=-']
    if (options.forceConflicts) args.push('--force-conflicts')
    else refuseConflict(await this.execute([...args, '--dry-run=server'], { input: manifest }))
    await this.run(args, { input: manifest })
  }

  /** Takes away what a manifest describes, and waits until it is gone; what is not there is no error. */
  async delete(manifest: string, options: { timeout?: number } = {}): Promise<void> {
    const { timeout = 180 } = options
    const args = ['delete', '--ignore-not-found', '--filename=-', `--timeout=${timeout}s`]
    await this.run(args, { input: manifest, timeout: timeout + 30 })
  }

  /** Waits until a workload's pods are there and available: `waitForRollout` has the details. */
  rollout(what: string, options: Parameters<typeof waitForRollout>[2]): Promise<void> {
    return waitForRollout(this, what, options)
  }

  /** Runs a program in a pod. @returns what it printed, and its status */
  async exec(
    pod: string,
    command: readonly string[],
    options: { namespace: string; timeout?: number },
  ): Promise<ProcessOutput> {
    const { namespace, ...rest } = options
    return this.execute(['exec', `--namespace=${namespace}`, pod, '--', ...command], rest)
  }
}

/** Other refusals of a trial may be due to the trial: a namespace that is not there yet. */
function refuseConflict({ stderr }: ProcessOutput): void {
  const owner = stderr.match(/conflicts? with "([^"]+)"/)?.[1]
  if (!owner) return
  const advice = stderr.indexOf('Please review the fields above')
  throw new StepError(`something of it is there already, put there by "${owner}"`, {
    output: stderr.slice(0, advice === -1 ? undefined : advice).trim(),
    hint: 'nothing was changed; --force-conflicts takes it over',
  })
}
