// The error that a user can meet, how it is printed, and known problems of the tools that are run.
import { ProcessOutput } from 'zx/core'

/** What is printed below the reason. All of it is shown to the user: no secrets in it. */
export interface Explanation {
  /** The command that failed, fit to paste. */
  command?: string
  /** What to do about it. Never something that loses data for a harmless cause. */
  hint?: string
  /** Path of the log with more details. */
  log?: string
  /** Last lines of a console or of a command's output. */
  output?: string
  /** Exit status of the script; 1 by default. */
  exitCode?: number
  cause?: unknown
}

/** A step that failed, explained to the user. */
export class StepError extends Error {
  override readonly name: string = 'StepError'
  readonly explanation: Explanation

  constructor(reason: string, explanation: Explanation = {}) {
    super(reason, { cause: explanation.cause })
    this.explanation = explanation
  }
}

/** zx does not keep the command in its error; it is found by what script() notes of failures. */
type Failure = { command: string; duration: number; stderr: string }
const failures: Failure[] = []

/** Notes a command that failed, for the error that may be printed. */
export function noteFailure(failure: Failure): void {
  if (failures.push(failure) > 20) failures.shift()
}

/** The command of a zx error, as it could be pasted; empty if it is not known. */
export function commandOf({ duration, stderr }: ProcessOutput): string {
  const alike = failures.filter((one) => one.stderr.trim() === stderr.trim())
  const same = alike.findLast((one) => one.duration === duration)
  return (same ?? alike.at(-1) ?? failures.at(-1))?.command ?? ''
}

/** The last lines of a text, without blank ones at its end. */
export function lastLines(text: string, count = 15): string {
  return text.trim().split('\n').slice(-count).join('\n')
}

/** An error as lines for a person; with `verbose` also its stack, and those of its causes. */
export function describeError(error: unknown, verbose = false): string {
  const { reason, explanation } = explain(error)
  const { output, command, hint, log } = explanation
  const lines = [reason]
  if (output) lines.push(output.replace(/^/gm, '  | '))
  // Without it, kubectl in the user's shell would talk to another cluster.
  const shell = /^(kubectl|helm) /m.test(`${command}\n${hint}`)
  if (shell) lines.push('  first:   export KUBECONFIG="$PWD/configs/admin.kubeconfig"')
  if (command) lines.push(`  command: ${command}`)
  if (hint) lines.push(`  hint:    ${hint.replaceAll('\n', '\n           ')}`)
  if (log) lines.push(`  log:     ${log}`)
  for (let cause = error; verbose && cause instanceof Error; cause = cause.cause) {
    lines.push(cause.stack ?? String(cause))
  }
  return lines.join('\n')
}

/** Reason and explanation of any error; those of a failed command by the table of known problems. */
export function explain(error: unknown): { reason: string; explanation: Explanation } {
  if (error instanceof StepError) return { reason: error.message, explanation: error.explanation }
  if (error instanceof ProcessOutput) {
    const command = commandOf(error)
    const { signal, exitCode, stderr } = error
    const output = lastLines(stderr.trim() || error.stdout)
    const program = command.match(/^\S+/)?.[0] ?? 'a command'
    const end = signal ? `was ended by ${signal}` : `failed (exit status ${exitCode})`
    const { reason = `${program} ${end}`, hint } = knownProblem(command, `${stderr}\n${end}`) ?? {}
    return { reason, explanation: { output, command, hint } }
  }
  if (!(error instanceof Error)) return { reason: String(error), explanation: {} }
  const { code = '', path, syscall } = error as NodeJS.ErrnoException
  const [words, place] = [systemErrors[code], path ?? (syscall === 'write' && 'a file')]
  return { reason: words && place ? `${place}: ${words}` : error.message, explanation: {} }
}

/** System errors by their code, in words. */
const systemErrors: Readonly<Record<string, string>> = {
  EACCES: 'permission denied (was it created by root?)',
  EPERM: 'operation not permitted',
  EROFS: 'the file system is read-only',
  ENOSPC: 'the disk is full',
  EDQUOT: 'the disk quota is used up',
  EMFILE: 'too many open files (ulimit -n)',
  ENOTDIR: 'a part of the path is not a folder',
}

/** What Kubernetes' API server says when it cannot decrypt a Secret. */
export const wrongEncryptionKey =
  'Secrets in etcd are encrypted with another key than that of encryption-config.yaml'

/** A wait continues at this: on a slow computer the API server is silent for seconds. */
export const busyApiServer = 'the API server does not answer in time'

const renew =
  'make certs-check shows the certificates; make certs renews; make reconfig copies them to the machines, make metrics to metrics-server'
const start = 'make status shows what runs; make up starts the machines; make wait waits for them'
// Only Apple's own terminal reaches hosts of the local network without being asked.
const macNetwork =
  '\na host of your own network: System Settings, Privacy & Security, Local Network'
const localNetwork = process.platform === 'darwin' ? macNetwork : ''
const proxy = 'PROXY_HTTP, PROXY_HTTPS and PROXY_NO of cluster.env, or http_proxy, …'

// By command: what it says on stderr, the reason ($1: the first group), a hint. First match counts.
type Problem = [pattern: RegExp, reason: string, hint?: string]
// biome-ignore format: a table
const problems: readonly [command: RegExp, ...Problem[]][] = [
  [/\bssh\b/,
    [/UNPROTECTED PRIVATE KEY FILE|bad permissions/,
      'ssh refuses tls/ssh_ed25519, because other users may read it', 'chmod 600 tls/ssh_ed25519'],
    [/Host key verification failed|No .* host key is known/,
      'the host key does not match the one pinned in tls/known_hosts',
      'another program may listen on the port (SSH_PORT_… in cluster.env), or tls/ was generated again after the machine was installed'],
    [/Permission denied \(/, 'the machine does not accept the key tls/ssh_ed25519',
      'the machine was installed with another key: restore tls/ from a copy (make restore), or reinstall the machine'],
    [/Can't open user config file|tls\/ssh_config: No such file/,
      'tls/ssh_config is missing', 'make certs'],
    [/^failed \(exit status 255\)$/m, 'the connection to the machine was lost', 'make status']],
  [/\bkubectl drain\b/,
    [/disruption budget[\s\S]*unable to drain node "(\S+?)"/,
      'a disruption budget keeps pods on $1',
      'kubectl get poddisruptionbudgets --all-namespaces\nmore replicas or more workers let them go; --force deletes them all the same'],
    [/unable to drain node "(\S+?)"[\s\S]*declare no controller/,
      'on $1 there are pods that nothing would start again elsewhere',
      'save what they hold and delete them. --force does so without saving'],
    [/unable to drain node "(\S+?)"[\s\S]*timeout/, 'pods on $1 have not ended in time',
      '--timeout SECONDS gives them more time; remove-worker --force continues without them']],
  [/\bkubectl exec\b/, [/^was ended by SIGTERM$/m, 'kubectl exec did not end in time', start]],
  [/\bkubectl\b/,
    // Of `kubectl exec`: what precedes it is the program's own message.
    [/command terminated with exit code (\d+)/, 'a command in the pod failed (exit status $1)'],
    [/command not found/, 'kubectl is not installed', 'make check says how to install it'],
    // The API server answers, but the kubelet behind it does not.
    [/(^Error from server: |error dialing backend: ).*dial tcp/m,
      'the API server does not reach the kubelet',
      'make status shows what runs; make logs FLAGS="--unit kubelet"'],
    [/(^Error from server: |error dialing backend: ).*(x509|tls): /m,
      "the API server and the kubelet do not accept each other's certificates", renew],
    [/unable to transform key/, wrongEncryptionKey,
      'restore the previous configs/encryption-config.yaml, then make reconfig']],
  [/\bhelm\b/,
    [/valid chart repository or cannot be reached|failed to (fetch|do request)/,
      'the chart repository cannot be reached',
      'is its address right, and the internet (PROXY_… in cluster.env) reachable from here?'],
    [/chart "[^"]*" (version|matching) .*not found|no chart version found/,
      'the chart repository has no such chart or version',
      'is the version (CILIUM_VERSION in cluster.env, or --version) one that was released?']],
  [/\b(kubectl|helm)\b/,
    [/failed calling webhook "([^"]+)"/, 'the webhook $1 cannot be called', 'kubectl get services,pods --all-namespaces'],
    [/connection refused|was refused/i,
      'the API server does not answer: nothing listens there', start],
    // QEMU accepts the connection, and closes it when nothing listens on the machine.
    [/EOF$|connection reset/im,
      'the API server does not answer: nothing listens on the machine yet', start],
    [/timeout|deadline exceeded|^was ended by SIGTERM$/im, busyApiServer, start],
    [/no route to host|cluster unreachable/i, 'the API server does not answer', start],
    [/not yet valid: current time \S+ is before/,
      "the API server's certificate is not valid yet: the clocks of this computer and the machine differ",
      'make status shows clocks that are wrong'],
    [/certificate has expired or is not yet valid/,
      'a certificate has expired, or the clocks of this computer and the machine differ', renew],
    [/certificate is valid for .*, not 127\.0\.0\.1|doesn't contain any IP SANs/,
      "the API server's certificate has no SAN 127.0.0.1", renew],
    [/signed by unknown authority|x509:/,
      'the API server has a certificate of another CA than tls/ca.pem',
      'if tls/ was generated again after the machines were installed: make reconfig'],
    [/Unauthorized|provide credentials/,
      'the API server does not accept the admin certificate', renew]],
  [/\bqemu-(img|system-)/,
    [/Failed to get .* lock/, 'another program has this disk open',
      'make status shows which machines run']],
  [/\bqemu-system-/,
    [/allocate memory/i, 'this computer has too little free memory',
      'CONTROL_PLANE_MEM and WORKER_MEM in cluster.env are what a machine gets'],
    [/PID file/, 'a QEMU of this machine runs already', 'try again in a moment']],
  [/\bcurl\b/,
    [/curl: \((60|77)\)/, 'the certificate of the server is not signed by a known CA',
      'where a proxy intercepts TLS, PROXY_CA_FILE of cluster.env names its CA'],
    [/resolve proxy|Unsupported proxy|CONNECT tunnel failed|from proxy after CONNECT/,
      'the proxy cannot be used', proxy],
    [/(?:resolve host:|connect to) (\S+)/, '$1 cannot be reached',
      `is this computer online? Behind a proxy: ${proxy}${localNetwork}`],
    [/returned error: (\d+)/, 'the server answers with HTTP status $1']],
  [/^/,
    [/No space left on device/, 'the disk is full', 'df -h . shows the free space'],
    [/Read-only file system/, 'the file system is read-only']],
]

/** What went wrong in known cases, from a command and its stderr; undefined if it is not known. */
export function knownProblem(command: string, stderr: string) {
  const rows = problems.flatMap(([of, ...rows]) => (of.test(command) ? rows : []))
  for (const [pattern, reason, hint] of rows) {
    const match = stderr.match(pattern)
    if (match) return { reason: reason.replace('$1', () => match[1] ?? ''), hint }
  }
  return undefined
}
