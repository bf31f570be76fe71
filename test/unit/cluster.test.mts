import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import { authorityOf, certificatesOf } from '../../lib/certificates.mts'
import { type Cluster, chooseNodes, loadCluster } from '../../lib/cluster.mts'
import { StepError } from '../../lib/errors.mts'
import { reservedFor } from '../../lib/nodes.mts'
import { perNodeVariables, variables } from '../../lib/settings.mts'
import { projectRoot, run } from '../checkout.mts'

const original = readFileSync(join(projectRoot, 'cluster.env'), 'utf8')

let root: string
before(() => {
  root = mkdtempSync(join(tmpdir(), 'cluster-'))
})
after(() => rmSync(root, { recursive: true, force: true }))

/** Lines to put in place of a variable's own; null takes it away. */
type Changes = Record<string, string | null>

function load(changes: Changes = {}, env: Record<string, string> = {}): Cluster {
  let text = original
  for (const [name, line] of Object.entries(changes)) {
    const pattern = new RegExp(`^${name}=.*\n`, 'm')
    const replacement = line === null ? '' : `${line}\n`
    text = pattern.test(text) ? text.replace(pattern, () => replacement) : text + replacement
  }
  writeFileSync(join(root, 'cluster.env'), text)
  return loadCluster({ root, env })
}

/** The problems that are reported for a changed cluster.env. */
function problemsOf(changes: Changes, env: Record<string, string> = {}): string[] {
  try {
    load(changes, env)
  } catch (error) {
    assert.ok(error instanceof StepError, String(error))
    const problems = (error.explanation.output ?? '').split('\n')
    const count = problems.length === 1 ? 'a mistake' : `${problems.length} mistakes`
    assert.equal(error.message, `cluster.env has ${count}`)
    return problems
  }
  return []
}

/** The line of a variable in what was loaded last. */
function lineOf(name: string): number {
  const lines = readFileSync(join(root, 'cluster.env'), 'utf8').split('\n')
  return lines.findIndex((line) => line.startsWith(`${name}=`)) + 1
}

/** A third worker, complete. */
const delta: Changes = {
  WORKER_NODES: 'WORKER_NODES="sigma gamma delta-1"',
  SSH_PORT_delta_1: 'SSH_PORT_delta_1=2225',
  NODE_IP_delta_1: 'NODE_IP_delta_1=192.168.100.13',
  MAC_delta_1: 'MAC_delta_1=52:54:00:12:34:59',
  POD_CIDR_delta_1: 'POD_CIDR_delta_1=10.200.3.0/24',
}

describe('cluster.env as it comes', () => {
  it('has no mistakes', () => assert.deepEqual(problemsOf({}), []))

  it('describes three machines', () => {
    const { nodes, controlPlane, workers, apiServer } = load()
    assert.deepEqual(nodes, [controlPlane, ...workers])
    assert.deepEqual(controlPlane, {
      name: 'alpha',
      role: 'control-plane',
      ip: '192.168.100.10',
      mac: '52:54:00:12:34:56',
      lanMac: '52:54:01:12:34:56',
      sshPort: 2222,
      lanPort: 24110,
      memory: 8192,
      cpus: 2,
    })
    assert.deepEqual(
      workers.map(({ name, role, ip, podCidr, sshPort }) => [name, role, ip, podCidr, sshPort]),
      [
        ['sigma', 'worker', '192.168.100.11', '10.200.1.0/24', 2223],
        ['gamma', 'worker', '192.168.100.12', '10.200.2.0/24', 2224],
      ],
    )
    assert.equal(apiServer, 'https://192.168.100.10:6443')
  })

  it('may come to have no worker', () => {
    const gone = ['sigma', 'gamma'].flatMap((node) =>
      perNodeVariables.map((prefix) => [`${prefix}_${node}`, null]),
    )
    const change = { WORKER_NODES: 'WORKER_NODES=""', ...Object.fromEntries(gone) }
    assert.deepEqual(problemsOf(change), [])
    assert.deepEqual(load(change).workers, [])
  })

  it('holds every variable that is read, and no other', () => {
    const written = [...original.matchAll(/^([A-Za-z_]\w*)=/gm)].map(([, name]) => name ?? '')
    const ofNodes = written.filter((name) =>
      perNodeVariables.some((prefix) => name.startsWith(`${prefix}_`)),
    )
    const others = written.filter((name) => !ofNodes.includes(name))
    assert.deepEqual(others.sort(), Object.keys(variables).sort())
  })
})

describe('a node name', () => {
  // Locks of scripts, and what YAML would not read as text.
  const odd = ['helm', 'encryption-config', 'default', '1', '1e3', '0x1f', 'true', 'no', 'null']
  const taken = ['ca', 'ca-key', 'admin', 'kubernetes', 'sigma-key', 'alpha-install', 'bootstrap']
  for (const name of [...taken, 'pki', 'lan-switch', 'localhost', 'all', 'kube-proxy', ...odd]) {
    it(`${name} is refused, because it means something else`, () => {
      const problems = problemsOf({ WORKER_NODES: `WORKER_NODES="sigma gamma ${name}"` })
      assert.ok(
        problems.some((problem) =>
          problem.includes(`names a node "${name}", which is the name of`),
        ),
        problems.join('\n'),
      )
    })
  }

  it('is refused for every certificate that is not a node’s', () => {
    const cluster = load()
    const names = cluster.nodes.map(({ name }) => name)
    const others = certificatesOf(cluster).filter(({ name }) => !names.includes(name))
    for (const { name } of [...others, authorityOf(cluster)]) assert.ok(reservedFor(name), name)
  })
})

describe('a file in another encoding', () => {
  const original = readFileSync(join(projectRoot, 'cluster.env'))
  it('is refused by name if it starts with a byte order mark', () => {
    const text = `\uFEFF${original}`
    assert.throws(
      () => loadCluster({ text, env: {} }),
      ({ explanation }: StepError) =>
        /^cluster\.env:1: .*byte order mark/.test(explanation.output ?? ''),
    )
  })

  it('is refused by name if it is UTF-16', () => {
    const text = Buffer.from(original.toString(), 'utf16le').toString('utf8')
    assert.throws(
      () => loadCluster({ text, env: {} }),
      ({ explanation }: StepError) => /^cluster\.env:1: .*UTF-16/.test(explanation.output ?? ''),
    )
  })
})

describe('the environment', () => {
  // What this run of the tests has set itself, such as QEMU_ACCEL, must not count.
  const unset = Object.fromEntries(Object.keys(variables).map((name) => [name, undefined]))
  const show = (env: Record<string, string>) =>
    run(
      { root: '/' },
      process.execPath,
      [
        '--import',
        'tsx',
        '--eval',
        `import(${JSON.stringify(join(projectRoot, 'lib/cluster.mts'))}).then(({ loadCluster }) => loadCluster())`,
      ],
      { env: { ...unset, ...env }, cwd: projectRoot },
    )

  it('is named in one line where it overrides cluster.env, without the values', async () => {
    const { stderr } = await show({ API_PORT: '3000', PROXY_HTTP: 'http://me:secret@proxy:1' })
    assert.equal(stderr, '! from the environment instead of cluster.env: API_PORT, PROXY_HTTP\n')
  })

  it('is not named where it says the same, nor by a script that another one runs', async () => {
    assert.equal((await show({ API_PORT: '6443' })).stderr, '')
    assert.equal((await show({ API_PORT: '3000', CLUSTER_LOCKS: '' })).stderr, '')
  })
})

describe('values', () => {
  it('are typed', () => {
    const { settings } = load()
    assert.equal(settings.DISK_SIZE, 20)
    assert.equal(settings.KUBE_PROXY_MODE, 'cilium')
    assert.deepEqual(settings.WORKER_NODES, ['sigma', 'gamma'])
  })

  it('of the environment win over the file', () => {
    const cluster = load({}, { DISK_SIZE: '40', SSH_PORT_sigma: '3333', WORKER_NODES: 'sigma' })
    assert.equal(cluster.settings.DISK_SIZE, 40)
    assert.equal(cluster.node('sigma').sshPort, 3333)
  })

  it('may be missing where there is a usual one', () => {
    const { settings } = load({ CERT_DAYS: null, PROXY_NO: null })
    assert.deepEqual([settings.CERT_DAYS, settings.PROXY_NO], [365, ''])
  })

  it('of a node with dashes stand under its name with underscores', () => {
    const node = load(delta).node('delta-1')
    assert.deepEqual([node.sshPort, node.lanPort, node.podCidr], [2225, 24113, '10.200.3.0/24'])
  })

  it('are the same for a shell, and for a recipe of make', () => {
    const { settings, nodes } = load({ PROXY_NO: "PROXY_NO='.corp.test it\"s'   # quotes" })
    const list = [...Object.keys(variables), ...nodes.map(({ name }) => `SSH_PORT_${name}`)]
    const expected = list.map((name) => {
      if (name in settings) return [settings[name as keyof typeof settings]].flat().join(' ')
      return String(nodes.find((node) => name === `SSH_PORT_${node.name}`)?.sshPort)
    })
    const print = `. ./cluster.env && printf '%s\\n' ${list.map((name) => `"$${name}"`).join(' ')}`
    writeFileSync(join(root, 'Makefile'), `all:\n\t@${print.replaceAll('$', '$$$$')}\n`)
    for (const [file, ...args] of [
      ['bash', '-c', print],
      ['sh', '-c', print],
      ['make', '-s'],
    ] as const) {
      const output = execFileSync(file, args, { cwd: root, encoding: 'utf8' })
      assert.deepEqual(output.split('\n').slice(0, -1), expected, file)
    }
  })
})

describe('a mistake', () => {
  const mistakes: {
    of: string
    change: Changes
    /** The variable whose line is named, and what is said. */
    at: string
    says: RegExp
  }[] = [
    {
      of: 'a per-node variable of an unknown node',
      change: { SSH_PORT_omega: 'SSH_PORT_omega=2299' },
      at: 'SSH_PORT_omega',
      says: /belongs to a node "omega", which CONTROL_PLANE_NODE and WORKER_NODES do not name/,
    },
    {
      of: 'a misspelt variable',
      change: { CONTROLPLANE_MEM: 'CONTROLPLANE_MEM=4096' },
      at: 'CONTROLPLANE_MEM',
      says: /CONTROLPLANE_MEM is not a variable of this project/,
    },
    {
      of: 'one ssh port for two nodes',
      change: { SSH_PORT_gamma: 'SSH_PORT_gamma=2223' },
      at: 'SSH_PORT_gamma',
      says: /is "2223", which sigma has already/,
    },
    {
      of: 'one address for two nodes',
      change: { NODE_IP_sigma: 'NODE_IP_sigma=192.168.100.10' },
      at: 'NODE_IP_sigma',
      says: /is "192\.168\.100\.10", which alpha has already/,
    },
    {
      of: 'one MAC for two nodes, in capitals',
      change: {
        MAC_sigma: 'MAC_sigma=52:54:00:ab:cd:ef',
        MAC_gamma: 'MAC_gamma=52:54:00:AB:CD:EF',
      },
      at: 'MAC_gamma',
      says: /is "52:54:00:ab:cd:ef", which sigma has already/,
    },
    {
      of: 'one pod range for two nodes',
      change: { POD_CIDR_gamma: 'POD_CIDR_gamma=10.200.1.0/24' },
      at: 'POD_CIDR_gamma',
      says: /is "10\.200\.1\.0\/24", which sigma has already/,
    },
    {
      of: 'a worker named twice',
      change: { WORKER_NODES: 'WORKER_NODES="sigma gamma sigma"' },
      at: 'WORKER_NODES',
      says: /names the node "sigma" twice/,
    },
    {
      of: 'the control plane among the workers',
      change: { WORKER_NODES: 'WORKER_NODES="sigma gamma alpha"' },
      at: 'WORKER_NODES',
      says: /names the node "alpha" twice/,
    },
    {
      of: 'a node name that is no RFC 1123 label',
      change: { WORKER_NODES: 'WORKER_NODES="sigma Gamma_2"' },
      at: 'WORKER_NODES',
      says: /is "sigma Gamma_2", not RFC 1123 labels/,
    },
    {
      of: 'a control plane’s name that is no RFC 1123 label',
      change: { CONTROL_PLANE_NODE: `CONTROL_PLANE_NODE=${'a'.repeat(64)}` },
      at: 'CONTROL_PLANE_NODE',
      says: /not an RFC 1123 label/,
    },
    {
      of: 'a port below 1024',
      change: { SSH_PORT_alpha: 'SSH_PORT_alpha=22' },
      at: 'SSH_PORT_alpha',
      says: /is "22", not a port from 1024 to 65535/,
    },
    {
      of: 'a port above 65535',
      change: { API_PORT: 'API_PORT=65536' },
      at: 'API_PORT',
      says: /is "65536", not a port from 1024 to 65535/,
    },
    {
      of: 'a port that ssh and API share',
      change: { SSH_PORT_gamma: 'SSH_PORT_gamma=6443' },
      at: 'SSH_PORT_gamma',
      says: /is also API_PORT/,
    },
    {
      of: 'memory that is no number',
      change: { WORKER_MEM: 'WORKER_MEM=8G' },
      at: 'WORKER_MEM',
      says: /is "8G", not a number of megabytes/,
    },
    {
      of: 'a disk size that is no number',
      change: { DISK_SIZE: 'DISK_SIZE=-20' },
      at: 'DISK_SIZE',
      says: /is "-20", not a number of gigabytes/,
    },
    {
      of: 'services in the range of the pods',
      change: {
        K8S_SERVICE_CIDR: 'K8S_SERVICE_CIDR=10.200.255.0/24',
        K8S_API_SERVICE_IP: 'K8S_API_SERVICE_IP=10.200.255.1',
        K8S_CLUSTER_DNS: 'K8S_CLUSTER_DNS=10.200.255.10',
      },
      at: 'K8S_SERVICE_CIDR',
      says: /\(10\.200\.255\.0\/24\) overlaps K8S_POD_CIDR \(10\.200\.0\.0\/16\)/,
    },
    {
      of: 'pods in the range of the lan',
      change: {
        K8S_POD_CIDR: 'K8S_POD_CIDR=192.168.0.0/16',
        POD_CIDR_sigma: 'POD_CIDR_sigma=192.168.1.0/24',
        POD_CIDR_gamma: 'POD_CIDR_gamma=192.168.2.0/24',
      },
      at: 'K8S_POD_CIDR',
      says: /overlaps LAN_CIDR/,
    },
    {
      of: 'a lan in the range of QEMU’s own network',
      change: {
        LAN_CIDR: 'LAN_CIDR=10.0.2.0/24',
        NODE_IP_alpha: 'NODE_IP_alpha=10.0.2.10',
        NODE_IP_sigma: 'NODE_IP_sigma=10.0.2.11',
        NODE_IP_gamma: 'NODE_IP_gamma=10.0.2.12',
      },
      at: 'LAN_CIDR',
      says: /\(10\.0\.2\.0\/24\) overlaps QEMU's own network \(10\.0\.2\.0\/24\)/,
    },
    {
      of: 'a DNS address outside the services',
      change: { K8S_CLUSTER_DNS: 'K8S_CLUSTER_DNS=10.33.0.10' },
      at: 'K8S_CLUSTER_DNS',
      says: /\(10\.33\.0\.10\) is outside K8S_SERVICE_CIDR \(10\.32\.0\.0\/24\)/,
    },
    {
      of: 'an API address outside the services',
      change: { K8S_API_SERVICE_IP: 'K8S_API_SERVICE_IP=10.31.0.1' },
      at: 'K8S_API_SERVICE_IP',
      says: /is outside K8S_SERVICE_CIDR/,
    },
    {
      of: 'an API address that kube-apiserver does not take',
      change: { K8S_API_SERVICE_IP: 'K8S_API_SERVICE_IP=10.32.0.2' },
      at: 'K8S_API_SERVICE_IP',
      says: /is not the first address of 10\.32\.0\.0\/24/,
    },
    {
      of: 'the API’s address for DNS',
      change: { K8S_CLUSTER_DNS: 'K8S_CLUSTER_DNS=10.32.0.1' },
      at: 'K8S_CLUSTER_DNS',
      says: /is the address of the service "kubernetes"/,
    },
    {
      of: 'a worker’s pods outside the pod range',
      change: { POD_CIDR_sigma: 'POD_CIDR_sigma=10.201.1.0/24' },
      at: 'POD_CIDR_sigma',
      says: /\(10\.201\.1\.0\/24\) is outside K8S_POD_CIDR/,
    },
    {
      of: 'pod ranges that overlap',
      change: { POD_CIDR_gamma: 'POD_CIDR_gamma=10.200.0.0/23' },
      at: 'POD_CIDR_gamma',
      says: /\(10\.200\.0\.0\/23\) overlaps that of sigma \(10\.200\.1\.0\/24\)/,
    },
    {
      of: 'a node outside the lan',
      change: { NODE_IP_gamma: 'NODE_IP_gamma=192.168.101.12' },
      at: 'NODE_IP_gamma',
      says: /\(192\.168\.101\.12\) is outside LAN_CIDR/,
    },
    {
      of: 'a node with the broadcast address of the LAN',
      change: { NODE_IP_gamma: 'NODE_IP_gamma=192.168.100.255' },
      at: 'NODE_IP_gamma',
      says: /\(192\.168\.100\.255\) cannot be a machine's address in 192\.168\.100\.0\/24/,
    },
    {
      of: 'a LAN port above 65535',
      change: { LAN_SWITCH_PORT: 'LAN_SWITCH_PORT=65524' },
      at: 'NODE_IP_gamma',
      says: /gives a LAN port above 65535/,
    },
    {
      of: 'certificates that would outlive the dates of X.509',
      change: { CA_DAYS: 'CA_DAYS=9999999' },
      at: 'CA_DAYS',
      says: /CA_DAYS is "9999999", not a number of days from 1 to 7300/,
    },
    {
      of: 'more seconds than a timer can count',
      change: { BOOT_TIMEOUT: 'BOOT_TIMEOUT=99999999999' },
      at: 'BOOT_TIMEOUT',
      says: /not a number of seconds from 1 to 604800/,
    },
    {
      of: 'a proxy that leads to the machine itself',
      change: { PROXY_HTTP: 'PROXY_HTTP=http://localhost:3128' },
      at: 'PROXY_HTTP',
      says: /leads to the machine itself: .*10\.0\.2\.2/,
    },
    {
      of: 'a proxy of another scheme, without its password',
      change: { PROXY_HTTPS: "PROXY_HTTPS='socks5://me:secret@proxy:1080'" },
      at: 'PROXY_HTTPS',
      says: /is "socks5:\/\/…@proxy:1080", not a proxy address/,
    },
    {
      of: 'a proxy with a blank in it',
      change: { PROXY_HTTP: "PROXY_HTTP='http://proxy: 3128'" },
      at: 'PROXY_HTTP',
      says: /not a proxy address/,
    },
    {
      of: 'a CA file that does not exist',
      change: { PROXY_CA_FILE: 'PROXY_CA_FILE=/no/such/ca.pem' },
      at: 'PROXY_CA_FILE',
      says: /names a file that does not exist/,
    },
    {
      of: 'a CA file that holds no certificate',
      change: { PROXY_CA_FILE: 'PROXY_CA_FILE=cluster.env' },
      at: 'PROXY_CA_FILE',
      says: /holds no PEM certificate/,
    },
    {
      of: 'a CA file that is DER or PKCS#12',
      change: { PROXY_CA_FILE: 'PROXY_CA_FILE=proxy-ca.der' },
      at: 'PROXY_CA_FILE',
      says: /is not PEM\. DER: openssl x509 -inform DER .*PKCS#12: openssl pkcs12 -nokeys/,
    },
    {
      of: 'a CA file with a damaged certificate',
      change: { PROXY_CA_FILE: 'PROXY_CA_FILE=proxy-ca.pem' },
      at: 'PROXY_CA_FILE',
      says: /holds a damaged certificate/,
    },
    {
      of: 'a CA file that is a folder',
      change: { PROXY_CA_FILE: 'PROXY_CA_FILE=/' },
      at: 'PROXY_CA_FILE',
      says: /names a file that does not exist/,
    },
    {
      of: 'a range with bits behind its mask',
      change: { K8S_POD_CIDR: 'K8S_POD_CIDR=10.200.0.1/16' },
      at: 'K8S_POD_CIDR',
      says: /not a CIDR such as 10\.32\.0\.0\/24, with no host bits set/,
    },
    {
      of: 'an address that is none',
      change: { NODE_IP_alpha: 'NODE_IP_alpha=192.168.100.300' },
      at: 'NODE_IP_alpha',
      says: /is "192\.168\.100\.300", not an IPv4 address/,
    },
    {
      of: 'a multicast MAC',
      change: { MAC_alpha: 'MAC_alpha=53:54:00:12:34:56' },
      at: 'MAC_alpha',
      says: /not a unicast MAC address/,
    },
    {
      of: 'an unterminated quote',
      change: { PROXY_NO: 'PROXY_NO="corp.test' },
      at: 'PROXY_NO',
      says: /the quote " is not closed on its line/,
    },
    {
      of: 'a password in the address of the chart, which is not shown',
      change: { CILIUM_CHART: 'CILIUM_CHART=https://me:secret@charts.example/' },
      at: 'CILIUM_CHART',
      says: /is "https:\/\/…@charts\.example\/", not a chart, with no credentials in its address/,
    },
    {
      of: 'a password in the address of a chart, whatever its scheme',
      change: { CILIUM_CHART: 'CILIUM_CHART=git+https://me:secret@charts.example/' },
      at: 'CILIUM_CHART',
      says: /not a chart, with no credentials in its address/,
    },
    {
      of: 'a choice that is none',
      change: { KUBE_PROXY_MODE: 'KUBE_PROXY_MODE=ipvs' },
      at: 'KUBE_PROXY_MODE',
      says: /is "ipvs", not one of cilium, iptables, nftables/,
    },
    {
      of: 'a NixOS release that is none',
      change: { NIXOS_VERSION: 'NIXOS_VERSION=unstable' },
      at: 'NIXOS_VERSION',
      says: /not a NixOS release such as 26\.05/,
    },
  ]
  before(() => {
    writeFileSync(join(root, 'proxy-ca.der'), Buffer.from('3082010a', 'hex'))
    const damaged = '-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n'
    writeFileSync(join(root, 'proxy-ca.pem'), damaged)
  })
  for (const { of, change, at, says } of mistakes) {
    it(`is ${of}, and is reported with file and line`, () => {
      const problems = problemsOf(change)
      assert.equal(problems.length, 1, problems.join('\n'))
      assert.match(problems[0] ?? '', says)
      assert.ok(problems[0]?.startsWith(`cluster.env:${lineOf(at)}: `), problems[0])
    })
  }

  for (const prefix of perNodeVariables) {
    it(`is a worker without ${prefix}`, () => {
      assert.deepEqual(problemsOf({ [`${prefix}_sigma`]: null }), [
        `cluster.env: ${prefix}_sigma is missing`,
      ])
    })
  }

  it('is a missing variable that has no usual value', () => {
    assert.deepEqual(problemsOf({ LAN_SWITCH_PORT: null }), [
      'cluster.env: LAN_SWITCH_PORT is missing',
    ])
  })

  it('of the environment is reported as such', () => {
    assert.deepEqual(problemsOf({}, { API_PORT: '80', NODE_IP_gamma: '192.168.100.10' }), [
      'environment: API_PORT is "80", not a port from 1024 to 65535',
      'environment: NODE_IP_gamma is "192.168.100.10", which alpha has already',
    ])
  })

  it('is reported together with all others', () => {
    const problems = problemsOf({
      PROXY_NO: 'PROXY_NO="open',
      WORKER_MEM: 'WORKER_MEM=much',
      SSH_PORT_sigma: null,
      MAC_gamma: 'MAC_gamma=52:54:00:12:34:56',
      POD_CIDR_sigma: 'POD_CIDR_sigma=10.99.0.0/24',
      SSH_PORT_omega: 'SSH_PORT_omega=2299',
    })
    assert.equal(problems.length, 6, problems.join('\n'))
  })

  it('is a cluster.env that is not there', () => {
    assert.throws(() => loadCluster({ root: join(root, 'nothing'), env: {} }), {
      message: `cluster.env cannot be read in ${join(root, 'nothing')}`,
    })
  })
})

describe('nodes', () => {
  it('are chosen by name, each once; all if none is named', () => {
    const cluster = load()
    const names = (chosen: string[]) => chooseNodes(cluster, chosen).map(({ name }) => name)
    assert.deepEqual(names([]), ['alpha', 'sigma', 'gamma'])
    assert.deepEqual(names(['gamma', 'alpha', 'gamma']), ['gamma', 'alpha'])
  })

  it('may be fewer for once, by the environment; the file’s mistakes are still found', () => {
    assert.deepEqual(load({}, { WORKER_NODES: 'gamma' }).nodes.length, 2)
    const change = { SSH_PORT_omega: 'SSH_PORT_omega=2299' }
    assert.equal(problemsOf(change, { WORKER_NODES: 'gamma' }).length, 1)
  })

  it('that are unknown are reported with those that are not', () => {
    assert.throws(
      () => load().node('omega'),
      (error) => {
        assert.ok(error instanceof StepError)
        assert.equal(error.message, 'there is no node "omega"')
        assert.equal(error.explanation.hint, 'the nodes of cluster.env are alpha, sigma, gamma')
        assert.equal(error.explanation.exitCode, 2)
        return true
      },
    )
  })
})
