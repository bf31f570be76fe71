// The points of the CIS Kubernetes Benchmark 1.12 for the control plane (its sections 1 to 3): how
// each is met, or why it is not. Titles are ours.

/** What points are judged by. */
export interface Facts {
  /** A flag's value in a service's command; undefined if it is not set. */
  flag(service: string, name: string): string | undefined
  /** A setting of a service's unit. */
  unit(service: string, setting: string): unknown
  /** Mode and owner of a file on the machine, "0600 root root"; undefined where none is set. */
  owned(path: string): string | undefined
  /** Paths on the machine of what is brought there. */
  staged: readonly string[]
  /** The text of a file that is brought there, or is part of the configuration. */
  text(path: string): string
  /** The level at which the audit policy logs a request. */
  auditLevel(request: AuditedRequest): string
}

export interface AuditedRequest {
  verb: string
  resource: string
  group?: string
  userGroup?: string
}

export interface Point {
  ids: readonly string[]
  title: string
  met: (facts: Facts) => boolean
  /** Why it is not met. A point that is met must have none. */
  why?: string
}

const home = '/var/lib/kubernetes'
const api = 'kube-apiserver'
const manager = 'kube-controller-manager'
const ownUser = 'it is owned by the user that it is for, who is not root'

const never = () => false
const isPki = (path: string) => path.startsWith(`${home}/pki/`)
const isKey = (path: string) => isPki(path) && path.endsWith('-key.pem')
const isOfRoot = (owned = '') => owned.endsWith(' root root')

/** Whether a mode has no bit that `most` lacks. */
function isWithin(owned: string | undefined, most: number): boolean {
  return owned !== undefined && (Number.parseInt(owned, 8) & ~most) === 0
}

function set(service: string, ...flags: string[]): Point['met'] {
  return ({ flag }) => flags.every((name) => flag(service, name))
}

function unset(service: string, name: string): Point['met'] {
  return ({ flag }) => flag(service, name) === undefined
}

function is(service: string, name: string, value: string): Point['met'] {
  return ({ flag }) => flag(service, name) === value
}

function atLeast(service: string, name: string, value: number): Point['met'] {
  return ({ flag }) => Number(flag(service, name)) >= value
}

function admits(plugin: string): Point['met'] {
  return ({ flag }) => (flag(api, 'enable-admission-plugins') ?? '').split(',').includes(plugin)
}

/** For a plugin that is on unless it is turned off. */
function admitsByDefault(plugin: string): Point['met'] {
  return ({ flag }) => !(flag(api, 'disable-admission-plugins') ?? '').split(',').includes(plugin)
}

// One row a point; a row of several ids is the same for several files.
export const points: readonly Point[] = [
  // 1.1 Files. What the benchmark calls a pod specification file is a unit here.
  {
    ids: ['1.1.1', '1.1.3', '1.1.5', '1.1.7'],
    title: 'units have mode 0600',
    met: never,
    why: 'they lie in the Nix store, which all may read; no secret is in them',
  },
  {
    ids: ['1.1.2', '1.1.4', '1.1.6', '1.1.8'],
    title: 'units are owned by root',
    // As all is that NixOS puts there.
    met: ({ text }) =>
      [api, manager, 'kube-scheduler', 'etcd'].every((name) =>
        text(`/etc/systemd/system/${name}.service`),
      ),
  },
  {
    ids: ['1.1.9', '1.1.10'],
    title: 'CNI files have mode 0600 and are owned by root',
    met: ({ staged }) => !staged.some((path) => path.includes('/cni/')),
  },
  {
    ids: ['1.1.11'],
    title: "etcd's data has mode 0700",
    met: ({ unit }) =>
      unit('etcd', 'StateDirectory') === 'etcd' && unit('etcd', 'StateDirectoryMode') === '0700',
  },
  {
    ids: ['1.1.12'],
    title: "etcd's data is owned by etcd",
    met: ({ unit }) => unit('etcd', 'User') === 'etcd' && unit('etcd', 'Group') === 'etcd',
  },
  {
    ids: ['1.1.13', '1.1.14'],
    title: "the administrator's kubeconfig has mode 0600 and is owned by root",
    // It never gets to the machine.
    met: ({ staged }) => !staged.some((path) => path.includes('admin')),
  },
  {
    ids: ['1.1.15'],
    title: "the scheduler's kubeconfig has mode 0600",
    met: ({ owned }) => isWithin(owned(`${home}/kube-scheduler.kubeconfig`), 0o600),
  },
  {
    ids: ['1.1.16'],
    title: "the scheduler's kubeconfig is owned by root",
    met: ({ owned }) => isOfRoot(owned(`${home}/kube-scheduler.kubeconfig`)),
    why: ownUser,
  },
  {
    ids: ['1.1.17'],
    title: "the controller manager's kubeconfig has mode 0600",
    met: ({ owned }) => isWithin(owned(`${home}/kube-controller-manager.kubeconfig`), 0o600),
  },
  {
    ids: ['1.1.18'],
    title: "the controller manager's kubeconfig is owned by root",
    met: ({ owned }) => isOfRoot(owned(`${home}/kube-controller-manager.kubeconfig`)),
    why: ownUser,
  },
  {
    ids: ['1.1.19'],
    title: 'the folder of certificates and all in it are owned by root',
    met: ({ owned, staged }) => staged.filter(isPki).every((path) => isOfRoot(owned(path))),
    why: 'keys are owned by the users that read them, none of which is root',
  },
  {
    ids: ['1.1.20'],
    title: 'certificates have mode 0644',
    met: ({ owned, staged }) => staged.filter(isPki).every((path) => isWithin(owned(path), 0o644)),
  },
  {
    ids: ['1.1.21'],
    title: 'keys have mode 0600',
    met: ({ owned, staged }) => staged.filter(isKey).every((path) => isWithin(owned(path), 0o600)),
    why: 'API server and etcd are two users with one certificate: kubernetes-key.pem is 0640',
  },
  {
    ids: ['1.1.21 but for that key'],
    title: 'keys have mode 0600',
    met: ({ owned, staged }) =>
      staged
        .filter((path) => isKey(path) && path !== `${home}/pki/kubernetes-key.pem`)
        .every((path) => isWithin(owned(path), 0o600)),
  },

  // 1.2 API server
  { ids: ['1.2.1'], title: 'no anonymous requests', met: is(api, 'anonymous-auth', 'false') },
  { ids: ['1.2.2'], title: 'no file of tokens', met: unset(api, 'token-auth-file') },
  { ids: ['1.2.3'], title: 'plugin DenyServiceExternalIPs', met: admits('DenyServiceExternalIPs') },
  {
    ids: ['1.2.4'],
    title: 'a client certificate for kubelets',
    met: set(api, 'kubelet-client-certificate', 'kubelet-client-key'),
  },
  {
    ids: ['1.2.5'],
    title: 'kubelets are verified',
    met: set(api, 'kubelet-certificate-authority'),
  },
  {
    ids: ['1.2.6', '1.2.7', '1.2.8'],
    title: 'requests are authorized by Node and RBAC, never all',
    met: is(api, 'authorization-mode', 'Node,RBAC'),
  },
  {
    ids: ['1.2.9'],
    title: 'plugin EventRateLimit',
    met: admits('EventRateLimit'),
    why: 'an alpha interface, against tenants who flood each other; this cluster has one',
  },
  {
    ids: ['1.2.10'],
    title: 'no plugin AlwaysAdmit',
    met: (facts) => !admits('AlwaysAdmit')(facts),
  },
  {
    ids: ['1.2.11'],
    title: 'plugin AlwaysPullImages',
    met: admits('AlwaysPullImages'),
    why: 'no image is private, and without the registry no pod could start again',
  },
  { ids: ['1.2.12'], title: 'plugin ServiceAccount', met: admitsByDefault('ServiceAccount') },
  {
    ids: ['1.2.13'],
    title: 'plugin NamespaceLifecycle',
    met: admitsByDefault('NamespaceLifecycle'),
  },
  { ids: ['1.2.14'], title: 'plugin NodeRestriction', met: admits('NodeRestriction') },
  { ids: ['1.2.15'], title: 'no profiler', met: is(api, 'profiling', 'false') },
  { ids: ['1.2.16'], title: 'an audit log', met: set(api, 'audit-log-path') },
  {
    ids: ['1.2.17'],
    title: 'the audit log is kept 30 days',
    met: atLeast(api, 'audit-log-maxage', 30),
  },
  {
    ids: ['1.2.18'],
    title: 'the audit log is 10 files',
    met: atLeast(api, 'audit-log-maxbackup', 10),
  },
  {
    ids: ['1.2.19'],
    title: 'the audit log is in files of 100 MB',
    met: atLeast(api, 'audit-log-maxsize', 100),
  },
  // By default a minute.
  { ids: ['1.2.20'], title: 'requests end in time', met: unset(api, 'request-timeout') },
  // By default a token ends with its account.
  {
    ids: ['1.2.21'],
    title: 'tokens end with their account',
    met: unset(api, 'service-account-lookup'),
  },
  {
    ids: ['1.2.22'],
    title: 'a key for tokens of its own',
    met: ({ flag }) => flag(api, 'service-account-key-file') === `${home}/pki/service-account.pem`,
  },
  {
    ids: ['1.2.23'],
    title: 'the API server proves to etcd who it is',
    met: set(api, 'etcd-certfile', 'etcd-keyfile'),
  },
  {
    ids: ['1.2.24'],
    title: 'serves TLS',
    met: set(api, 'tls-cert-file', 'tls-private-key-file'),
  },
  { ids: ['1.2.25'], title: 'clients prove who they are', met: set(api, 'client-ca-file') },
  { ids: ['1.2.26'], title: 'etcd is verified', met: set(api, 'etcd-cafile') },
  { ids: ['1.2.27'], title: 'encryption at rest', met: set(api, 'encryption-provider-config') },
  {
    ids: ['1.2.28'],
    title: 'Secrets are encrypted, by a provider that does',
    met: ({ text }) =>
      /resources:\s+- secrets\s+providers:\s+- (aescbc|secretbox|kms):/.test(
        text(`${home}/encryption-config.yaml`),
      ),
  },
  // TLS 1.3 has no weak ciphers.
  { ids: ['1.2.29'], title: 'strong ciphers', met: is(api, 'tls-min-version', 'VersionTLS13') },
  {
    ids: ['1.2.30'],
    title: 'tokens end when they say so',
    met: is(api, 'service-account-extend-token-expiration', 'false'),
    why: 'after an hour of sleep or suspension, all pods would be refused until they have new ones',
  },

  // 1.3 Controller manager
  {
    ids: ['1.3.1'],
    title: 'ended pods are removed',
    met: atLeast(manager, 'terminated-pod-gc-threshold', 1),
  },
  { ids: ['1.3.2'], title: 'no profiler', met: is(manager, 'profiling', 'false') },
  {
    ids: ['1.3.3'],
    title: 'an account for each controller',
    met: is(manager, 'use-service-account-credentials', 'true'),
  },
  {
    ids: ['1.3.4'],
    title: 'a key for tokens of its own',
    met: ({ flag }) =>
      flag(manager, 'service-account-private-key-file') === `${home}/pki/service-account-key.pem`,
  },
  { ids: ['1.3.5'], title: 'pods get the CA', met: set(manager, 'root-ca-file') },
  // RotateKubeletServerCertificate is on by default.
  {
    ids: ['1.3.6'],
    title: 'serving certificates of kubelets can be renewed',
    met: unset(manager, 'feature-gates'),
  },
  { ids: ['1.3.7'], title: 'listens here only', met: is(manager, 'bind-address', '127.0.0.1') },

  // 1.4 Scheduler
  {
    ids: ['1.4.1'],
    title: 'no profiler',
    met: ({ text }) => JSON.parse(text('/etc/kubernetes/scheduler.json')).enableProfiling === false,
  },
  {
    ids: ['1.4.2'],
    title: 'listens here only',
    met: is('kube-scheduler', 'bind-address', '127.0.0.1'),
  },

  // 2 etcd
  { ids: ['2.1'], title: 'serves TLS', met: set('etcd', 'cert-file', 'key-file') },
  {
    ids: ['2.2'],
    title: 'clients prove who they are',
    met: is('etcd', 'client-cert-auth', 'true'),
  },
  { ids: ['2.3'], title: 'no certificates of its own making', met: unset('etcd', 'auto-tls') },
  { ids: ['2.4'], title: 'TLS to peers', met: set('etcd', 'peer-cert-file', 'peer-key-file') },
  {
    ids: ['2.5'],
    title: 'peers prove who they are',
    met: is('etcd', 'peer-client-cert-auth', 'true'),
  },
  {
    ids: ['2.6'],
    title: 'no certificates of its own making for peers',
    met: unset('etcd', 'peer-auto-tls'),
  },
  {
    ids: ['2.7'],
    title: 'an authority of its own',
    met: ({ flag }) => flag('etcd', 'trusted-ca-file') !== flag(api, 'client-ca-file'),
    why: 'one authority is enough to learn from; etcd listens on the loopback of its machine only',
  },

  // 3 The control plane as a whole
  {
    ids: ['3.1.1'],
    title: 'people do not log in by certificate',
    met: never,
    why: 'there is one administrator, and certificates are what this cluster teaches',
  },
  {
    ids: ['3.1.2'],
    title: 'people do not log in by tokens of service accounts',
    met: ({ staged, text }) =>
      staged
        .filter((path) => path.endsWith('.kubeconfig'))
        .every((path) => !text(path).includes('token')),
  },
  {
    ids: ['3.1.3'],
    title: 'people do not log in by bootstrap tokens',
    met: unset(api, 'enable-bootstrap-token-auth'),
  },
  { ids: ['3.2.1'], title: 'an audit policy', met: set(api, 'audit-policy-file') },
  {
    ids: ['3.2.2'],
    title: 'who uses Secrets, tokens and pods is logged, no content is',
    met: ({ auditLevel }) =>
      [
        { verb: 'get', resource: 'secrets' },
        { verb: 'get', resource: 'secrets', userGroup: 'system:nodes' },
        { verb: 'get', resource: 'configmaps', userGroup: 'system:nodes' },
        { verb: 'create', resource: 'tokenreviews', group: 'authentication.k8s.io' },
        { verb: 'create', resource: 'pods' },
        { verb: 'delete', resource: 'deployments', group: 'apps' },
        { verb: 'create', resource: 'pods/exec' },
        { verb: 'create', resource: 'pods/portforward' },
        { verb: 'get', resource: 'services/proxy' },
      ].every((request) => auditLevel(request) === 'Metadata'),
  },
]
