// Known problems of the tools that the scripts run: what they print, the reason in words, and a hint.

interface Problem {
  /** Of the command line; every command by default. */
  command?: RegExp
  /** Of what the command printed on stderr. */
  pattern: RegExp
  /** A match's groups are $1, $2, … */
  reason: string
  hint?: string
}

/** What Kubernetes' API server says when it cannot decrypt a Secret. */
export const wrongEncryptionKey =
  'Secrets in etcd are encrypted with another key than that of encryption-config.yaml'

const renew =
  'make certs-check shows the certificates; make certs renews; make reconfig copies them to the machines'

const start = 'make status shows what runs; make up starts the machines; make wait waits for them'
const proxyHint = 'PROXY_HTTP, PROXY_HTTPS and PROXY_NO of cluster.env, or http_proxy, …'

/** Known problems of the tools that the scripts run. The first row that matches counts. */
export const problems: readonly Problem[] = [
  {
    command: /\bssh\b/,
    pattern: /UNPROTECTED PRIVATE KEY FILE|bad permissions/,
    reason: 'ssh refuses tls/ssh_ed25519, because other users may read it',
    hint: 'chmod 600 tls/ssh_ed25519',
  },
  {
    command: /\bssh\b/,
    pattern: /Host key verification failed|No .* host key is known/,
    reason: 'the host key does not match the one pinned in tls/known_hosts',
    hint: 'another program may listen on the port (SSH_PORT_… in cluster.env), or tls/ was generated again after the machine was installed',
  },
  {
    command: /\bssh\b/,
    pattern: /Permission denied \(/,
    reason: 'the machine does not accept the key tls/ssh_ed25519',
    hint: 'the machine was installed with another key: restore tls/ from a copy (make restore), or reinstall the machine',
  },
  {
    command: /\bssh\b/,
    pattern: /(Can't open user config file|tls\/ssh_config: No such file)/,
    reason: 'tls/ssh_config is missing',
    hint: 'make certs',
  },
  {
    command: /\bkubectl drain\b/,
    pattern: /disruption budget[\s\S]*unable to drain node "(\S+?)"/,
    reason: 'a disruption budget keeps pods on $1',
    hint: 'kubectl get poddisruptionbudgets --all-namespaces; more replicas, or other workers, let them go. --force deletes them all the same',
  },
  {
    command: /\bkubectl drain\b/,
    pattern: /unable to drain node "(\S+?)"[\s\S]*declare no controller/,
    reason: 'on $1 there are pods that nothing would start again elsewhere',
    hint: 'save what they hold and delete them. --force does so without saving',
  },
  {
    command: /\bkubectl drain\b/,
    pattern: /unable to drain node "(\S+?)"[\s\S]*timeout/,
    reason: 'pods on $1 have not ended in time',
    hint: '--timeout SECONDS gives them more, --force does not wait for them',
  },
  {
    command: /\bkubectl\b/,
    pattern: /command not found/,
    reason: 'kubectl is not installed',
    hint: 'make check says how to install it',
  },
  {
    // The API server answers, but the kubelet behind it does not.
    command: /\bkubectl\b/,
    pattern: /(^Error from server: |error dialing backend: ).*dial tcp/m,
    reason: 'the API server does not reach the kubelet',
    hint: 'make status shows what runs; make logs FLAGS="--unit kubelet"',
  },
  {
    command: /\bkubectl\b/,
    pattern: /(^Error from server: |error dialing backend: ).*(x509|tls): /m,
    reason: "the API server and the kubelet do not accept each other's certificates",
    hint: renew,
  },
  {
    command: /\bkubectl\b/,
    pattern: /unable to transform key/,
    reason: wrongEncryptionKey,
    hint: 'restore the previous configs/encryption-config.yaml, then make reconfig',
  },
  {
    command: /\bhelm\b/,
    pattern: /valid chart repository or cannot be reached|failed to (fetch|do request)/,
    reason: 'the chart repository cannot be reached',
    hint: 'is its address right, and the internet (PROXY_… in cluster.env) reachable from here?',
  },
  {
    command: /\bhelm\b/,
    pattern: /chart "[^"]*" (version|matching) .*not found|no chart version found/,
    reason: 'the chart repository has no such chart or version',
    hint: 'is the version (CILIUM_VERSION in cluster.env, or --version) one that was released?',
  },
  {
    command: /\b(kubectl|helm)\b/,
    pattern: /connection refused|was refused/i,
    reason: 'the API server does not answer: nothing listens there',
    hint: start,
  },
  {
    // QEMU accepts the connection, and closes it when nothing listens on the machine.
    command: /\b(kubectl|helm)\b/,
    pattern: /EOF$|connection reset/im,
    reason: 'the API server does not answer: nothing listens on the machine yet',
    hint: start,
  },
  {
    command: /\b(kubectl|helm)\b/,
    pattern: /timeout|deadline exceeded|no route to host|cluster unreachable/i,
    reason: 'the API server does not answer',
    hint: start,
  },
  {
    command: /\b(kubectl|helm)\b/,
    pattern: /not yet valid: current time \S+ is before/,
    reason:
      "the API server's certificate is not valid yet: the clocks of this computer and the machine differ",
    hint: 'make status shows clocks that are wrong',
  },
  {
    command: /\b(kubectl|helm)\b/,
    pattern: /certificate has expired or is not yet valid/,
    reason: 'a certificate has expired, or the clocks of this computer and the machine differ',
    hint: renew,
  },
  {
    command: /\b(kubectl|helm)\b/,
    pattern: /certificate is valid for .*, not 127\.0\.0\.1|doesn't contain any IP SANs/,
    reason: "the API server's certificate has no SAN 127.0.0.1",
    hint: renew,
  },
  {
    command: /\b(kubectl|helm)\b/,
    pattern: /signed by unknown authority|x509:/,
    reason: 'the API server has a certificate of another CA than tls/ca.pem',
    hint: 'if tls/ was generated again after the machines were installed: make reconfig',
  },
  {
    command: /\b(kubectl|helm)\b/,
    pattern: /Unauthorized|provide credentials/,
    reason: 'the API server does not accept the admin certificate',
    hint: renew,
  },
  {
    command: /\bqemu-(img|system-)/,
    pattern: /Failed to get .* lock/,
    reason: 'another program has this disk open',
    hint: 'make status shows which machines run',
  },
  {
    command: /\bqemu-system-/,
    pattern: /allocate memory/i,
    reason: 'this computer has too little free memory',
    hint: 'CONTROL_PLANE_MEM and WORKER_MEM in cluster.env are what a machine gets',
  },
  {
    command: /\bqemu-system-/,
    pattern: /PID file/,
    reason: 'a QEMU of this machine runs already',
    hint: 'try again in a moment',
  },
  {
    command: /\bcurl\b/,
    pattern: /curl: \((60|77)\)/,
    reason: 'the certificate of the server is not signed by a known CA',
    hint: 'where a proxy intercepts TLS, PROXY_CA_FILE of cluster.env names its CA',
  },
  {
    command: /\bcurl\b/,
    pattern: /resolve proxy|Unsupported proxy|CONNECT tunnel failed|from proxy after CONNECT/,
    reason: 'the proxy cannot be used',
    hint: proxyHint,
  },
  {
    command: /\bcurl\b/,
    pattern: /(?:resolve host:|connect to) (\S+)/,
    reason: '$1 cannot be reached',
    hint: `is this computer online? Behind a proxy: ${proxyHint}`,
  },
  {
    command: /\bcurl\b/,
    pattern: /returned error: (\d+)/,
    reason: 'the server answers with HTTP status $1',
  },
  {
    pattern: /No space left on device/,
    reason: 'the disk is full',
    hint: 'df -h . shows the free space',
  },
  {
    pattern: /Read-only file system/,
    reason: 'the file system is read-only',
  },
]

/** What went wrong in known cases, from a command and its stderr; undefined if it is not known. */
export function knownProblem(
  command: string,
  stderr: string,
): Pick<Problem, 'reason' | 'hint'> | undefined {
  for (const problem of problems) {
    if (problem.command && !problem.command.test(command)) continue
    const match = stderr.match(problem.pattern)
    if (!match) continue
    const reason = problem.reason.replace(/\$(\d)/g, (_, group) => match[Number(group)] ?? '')
    return { reason, ...(problem.hint ? { hint: problem.hint } : {}) }
  }
  return undefined
}
