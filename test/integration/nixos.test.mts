// The machines' configuration, staged by the project's own scripts and evaluated by the real
// nix-instantiate against the tables of options and packages in test/nixos/.
import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { cp, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { basename, join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import { type Cluster, loadCluster } from '../../lib/cluster.mts'
import { type Checkout, makeCheckout, projectRoot, run } from '../checkout.mts'
import { evaluate, instantiate, type Machine } from '../nixos/evaluate.mts'

const skip = isThere('nix-instantiate') ? false : 'nix-instantiate is not installed'
const scripts = ['generate-certs', 'generate-kubeconfigs', 'generate-encryption-config']

describe('the staged configuration', { skip }, () => {
  let checkout: Checkout
  let cluster: Cluster
  const machines = new Map<string, Machine>()

  before(async () => {
    checkout = await makeCheckout({ keys: true })
    cluster = loadCluster({ root: checkout.root, env: {} })
    for (const script of [...scripts, 'generate-nocloud-iso']) await succeed(checkout, script)
    for (const { name } of cluster.nodes) {
      machines.set(name, await evaluate(configurationOf(checkout, name)))
    }
  })
  after(() => checkout.remove())

  const machine = (name: string): Machine => {
    const found = machines.get(name)
    assert.ok(found)
    return found
  }
  const textOf = (name: string, path: string): string => {
    const file = machine(name).files[path]
    assert.ok(file && 'text' in file, `${path} on ${name}`)
    return file.text
  }

  it('makes the control plane run its four services, and no kubelet', () => {
    assert.equal(machine('alpha').hostName, 'alpha')
    assert.deepEqual(machine('alpha').wants['multi-user.target']?.sort(), [
      'etcd.service',
      'kube-apiserver.service',
      'kube-controller-manager.service',
      'kube-scheduler.service',
    ])
  })

  it('makes each worker run containerd and a kubelet of its name and lan address', () => {
    for (const { name, ip } of cluster.workers) {
      assert.deepEqual(machine(name).wants['multi-user.target']?.sort(), [
        'containerd.service',
        'kubelet.service',
      ])
      const { command = [] } = machine(name).units.kubelet ?? {}
      assert.ok(command.includes(`--node-ip=${ip}`))
      assert.ok(command.includes(`--hostname-override=${name}`))
    }
  })

  it("gives every machine a route to each other worker's pods, over the lan", () => {
    for (const node of cluster.nodes) {
      const lan = textOf(node.name, '/etc/systemd/network/10-lan.network')
      assert.match(lan, new RegExp(`PermanentMACAddress=${node.lanMac}\n`))
      assert.match(lan, new RegExp(`Address=${node.ip}/24\n`))
      for (const worker of cluster.workers) {
        const route = `Destination=${worker.podCidr}\nGateway=${worker.ip}\n`
        assert.equal(lan.includes(route), worker.name !== node.name, `${node.name}: ${route}`)
      }
    }
  })

  it('gives containers as long to end with their machine as pods have, and no longer', () => {
    assert.match(textOf('sigma', '/etc/systemd/system.conf'), /^DefaultTimeoutStopSec=30s$/m)
    assert.equal(textOf('alpha', '/etc/systemd/system.conf'), '')
  })

  it('lets each name mean the lan address, on its own machine too', () => {
    for (const { name } of cluster.nodes) {
      const hosts = textOf(name, '/etc/hosts').split('\n')
      for (const node of cluster.nodes) {
        const lines = hosts.filter((line) => line.split(/\s+/).includes(node.name))
        assert.deepEqual(lines, [`${node.ip} ${node.name}`])
      }
    }
  })

  it('writes the console where QEMU of either architecture has its serial port', async () => {
    const configuration = configurationOf(checkout, 'alpha')
    const last = async (system: string) =>
      (await evaluate(configuration, { system })).kernelParams.at(-1)
    assert.equal(await last('x86_64-linux'), 'console=ttyS0,115200n8')
    assert.equal(await last('aarch64-linux'), 'console=ttyAMA0,115200n8')
  })

  it("lets root in by the cluster's ssh key alone, and nobody by password", async () => {
    const key = (await readFile(checkout.path('tls/ssh_ed25519.pub'), 'utf8')).trim()
    for (const { name } of cluster.nodes) {
      const root = machine(name).users.find((user) => user.name === 'root')
      assert.deepEqual(root?.authorizedKeys, [key])
      assert.equal(root?.hashedPassword, '!')
      const sshd = textOf(name, '/etc/ssh/sshd_config')
      assert.match(sshd, /^PasswordAuthentication no$/m)
      assert.match(sshd, /^KbdInteractiveAuthentication no$/m)
      assert.deepEqual(sshd.match(/^HostKey .*$/gm), ['HostKey /etc/ssh/ssh_host_ed25519_key'])
    }
  })

  it('hands every secret that is staged to a user by a tmpfiles rule', async () => {
    for (const node of cluster.nodes) {
      const rules = textOf(node.name, '/etc/tmpfiles.d/00-nixos.conf')
        .split('\n')
        .map((rule) => rule.split(' '))
      const { stdout } = await run(checkout, 'bin/generate-nocloud-iso.mts', ['--list', node.name])
      const secrets = [...stdout.matchAll(/^ +600 +(\S+)/gm)].map(([, target]) => target)
      assert.ok(secrets.length >= 3)
      for (const target of secrets) {
        const mode = rules.find((rule) => rule[1] === target)?.[2] ?? 'no rule'
        assert.match(mode, /^06[04]0$/, `${node.name}: ${target}`)
      }
    }
  })

  it('runs etcd and the API server as users of their own', () => {
    assert.equal(machine('alpha').units.etcd?.user, 'etcd')
    for (const name of ['kube-apiserver', 'kube-controller-manager', 'kube-scheduler']) {
      assert.equal(machine('alpha').units[name]?.user, 'kubernetes')
    }
  })

  it('copies no secret into what everybody on the machine can read', async () => {
    const secrets = await Promise.all(
      ['tls/kubernetes-key.pem', 'configs/encryption-config.yaml'].map((path) =>
        readFile(checkout.path(path), 'utf8'),
      ),
    )
    const body = JSON.stringify(machine('alpha'))
    for (const line of secrets.flatMap((text) => text.match(/[A-Za-z0-9+/]{40,}=*/g) ?? [])) {
      assert.ok(!body.includes(line))
    }
  })

  it('lets the kubelet answer nobody without a name, and read no pod range of its own', () => {
    const kubelet = JSON.parse(textOf('sigma', '/etc/kubernetes/kubelet.json'))
    assert.equal(kubelet.authentication.anonymous.enabled, false)
    assert.equal(kubelet.authorization.mode, 'Webhook')
    assert.deepEqual(kubelet.clusterDNS, ['10.32.0.10'])
    assert.equal(kubelet.podCIDR, undefined)
  })

  it('sets a clock that lags from the real-time clock, and leaves a right one alone', async () => {
    const folder = await mkdtemp(join(tmpdir(), 'clock-'))
    const unit = textOf('sigma', '/etc/systemd/system/clock-from-rtc.service')
    const [, command = ''] = unit.match(/^ExecStart=.* -c '(.*)'$/m) ?? []
    // As systemd would pass it on, with another clock and a `date` that only says what it would do.
    const text = command.replaceAll('$$', '$').replaceAll('%%', '%')
    await writeFile(
      join(folder, 'date'),
      '#!/bin/sh\n[ "$*" = +%s ] && exec echo 1000000\necho "$*"\n',
      { mode: 0o755 },
    )
    const env = { PATH: `${folder}:${process.env.PATH}` }
    for (const [rtc, said] of [
      ['1000000', ''],
      ['1000002', ''],
      ['1003600', '--utc --set=@1003600\n'],
      ['999000', '--utc --set=@999000\n'],
    ] as const) {
      await writeFile(join(folder, 'rtc'), `${rtc}\n`)
      const here = text.replace('/sys/class/rtc/rtc0/since_epoch', join(folder, 'rtc'))
      const outcome = await run({ root: folder }, 'bash', ['-c', here], { env })
      assert.deepEqual(outcome, { stdout: said, stderr: '', exitCode: 0 })
    }
    await rm(folder, { recursive: true })
    assert.deepEqual(machine('sigma').wants['timers.target'], ['clock-from-rtc.timer'])
    assert.match(
      textOf('sigma', '/etc/systemd/system/clock-from-rtc.timer'),
      /^OnUnitInactiveSec=30s$/m,
    )
  })

  it('loads on workers the modules that containers cannot load themselves', () => {
    const modules = machine('sigma').kernelModules
    for (const name of ['xt_socket', 'xfrm_user']) assert.ok(modules.includes(name), name)
    assert.ok(!machine('alpha').kernelModules.includes('xt_socket'))
  })

  it('fails to evaluate should NixOS configure containerd in another version', async () => {
    const folder = await mkdtemp(join(tmpdir(), 'nixos-'))
    await cp(join(projectRoot, 'test/nixos'), folder, { recursive: true })
    const nixos = await readFile(join(folder, 'nixos.nix'), 'utf8')
    assert.match(nixos, /version = 2;/)
    await writeFile(join(folder, 'nixos.nix'), nixos.replace('version = 2;', 'version = 3;'))
    const configuration = configurationOf(checkout, 'sigma')
    await assert.rejects(
      instantiate([join(folder, 'system.nix'), '--argstr', 'configuration', configuration]),
      /containerd\.settings\S* (has conflicting|is of)/,
    )
    await rm(folder, { recursive: true })
  })

  it('has units that systemd itself finds no fault with', async (context) => {
    if (!isThere('systemd-analyze')) return context.skip('systemd-analyze is not installed')
    const folder = await mkdtemp(join(tmpdir(), 'units-'))
    // Programs and users are the machine's; everything else is as it would be there.
    const here = (text: string) =>
      text.replace(/^ExecStart=\S+/m, 'ExecStart=/bin/true').replace(/^(User|Group)=.*\n/gm, '')
    for (const name of ['alpha', 'sigma']) {
      for (const path of Object.keys(machine(name).files)) {
        if (!/\.(service|timer)$/.test(path)) continue
        await writeFile(join(folder, basename(path)), here(textOf(name, path)))
      }
    }
    const units = ['etcd', 'kube-apiserver', 'kube-controller-manager', 'kube-scheduler', 'kubelet']
    const files = [...units, 'containerd'].map((unit) => join(folder, `${unit}.service`))
    files.push(join(folder, 'clock-from-rtc.timer'))
    const verify = await run({ root: folder }, 'systemd-analyze', ['verify', '--man=no', ...files])
    const ours = verify.stderr.split('\n').filter((line) => line.includes(folder))
    assert.deepEqual(ours, [])
    await rm(folder, { recursive: true })
  })

  describe('with another cluster.env', () => {
    const staged = async (settings: Record<string, string>, name: string): Promise<Machine> => {
      await succeed(checkout, 'generate-nocloud-iso', [name], settings)
      return evaluate(configurationOf(checkout, name))
    }
    after(() => succeed(checkout, 'generate-nocloud-iso'))

    for (const mode of ['iptables', 'nftables']) {
      it(`runs kube-proxy on workers where KUBE_PROXY_MODE is ${mode}`, async () => {
        const { files, units, wants, kernelModules } = await staged(
          { KUBE_PROXY_MODE: mode },
          'sigma',
        )
        assert.ok(kernelModules.includes('nf_conntrack'))
        assert.ok(wants['multi-user.target']?.includes('kube-proxy.service'))
        assert.ok(units['kube-proxy']?.environment.PATH?.includes('-nftables/bin'))
        const config = files['/etc/kubernetes/kube-proxy.json']
        assert.ok(config && 'text' in config)
        assert.equal(JSON.parse(config.text).mode, mode)
      })
    }

    it('sends shells, Nix and containerd through the proxy, and nothing else', async () => {
      const settings = { PROXY_HTTP: 'http://10.0.2.2:3128', PROXY_NO: 'intra.example' }
      const { sessionVariables, units } = await staged(settings, 'sigma')
      assert.equal(sessionVariables.https_proxy, 'http://10.0.2.2:3128')
      assert.match(sessionVariables.no_proxy ?? '', /10\.32\.0\.0\/24.*,intra\.example$/)
      assert.equal(units.containerd?.environment.http_proxy, 'http://10.0.2.2:3128')
      assert.equal(units.kubelet?.environment.http_proxy, undefined)
      assert.deepEqual(machine('sigma').sessionVariables, {})
    })

    it('trusts the CA of PROXY_CA_FILE, for which containerd is restarted', async () => {
      const { certificateFiles, units } = await staged({ PROXY_CA_FILE: 'tls/ca.pem' }, 'sigma')
      // Its path in the store contains a digest of its content.
      const triggers = String(units.containerd?.restartTriggers)
      assert.match(triggers, /^\/nix\/store\/\w+-proxy-ca\.pem$/)
      assert.deepEqual(
        certificateFiles.map((path) => basename(path)),
        ['proxy-ca.pem'],
      )
      assert.deepEqual(machine('sigma').certificateFiles, [])
    })

    it('takes addresses, ports and the log level from it', async () => {
      const settings = { KUBE_LOG_LEVEL: '4', API_PORT: '7443' }
      const { command = [] } = (await staged(settings, 'alpha')).units['kube-apiserver'] ?? {}
      assert.ok(command.includes('--secure-port=7443'))
      assert.ok(command.includes('--v=4'))
    })
  })

  it('restarts, for a renewed certificate, what reads it and nothing else', async () => {
    const file = checkout.path('cloud-init/sigma/nixos/etc/nixos/cluster.json')
    const text = await readFile(file, 'utf8')
    const values = JSON.parse(text)
    values.digests['pki/sigma.pem'] = 'another'
    await writeFile(file, JSON.stringify(values))
    const renewed = await evaluate(configurationOf(checkout, 'sigma'))
    await writeFile(file, text)
    const changed = Object.keys(renewed.units).filter(
      (unit) =>
        String(renewed.units[unit]?.restartTriggers) !==
        String(machine('sigma').units[unit]?.restartTriggers),
    )
    assert.deepEqual(changed, ['kubelet', 'systemd-tmpfiles-resetup'])
  })

  describe('with a mistake in it', async () => {
    const file = join(projectRoot, 'test/nixos/mistakes.nix')
    const says = 'mistakes: builtins.mapAttrs (_: mistake: mistake.says) mistakes'
    const mistakes = skip ? {} : await instantiate(['--expr', `(${says}) (import ${file})`])
    for (const [attribute, message] of Object.entries(mistakes as Record<string, string>)) {
      it(`is refused: ${attribute}`, async () => {
        const refused = evaluate(configurationOf(checkout, 'alpha'), { file, attribute })
        await assert.rejects(refused, new RegExp(message))
      })
    }

    it('is refused: half a file', async () => {
      const path = checkout.path('cloud-init/alpha/nixos/etc/nixos/control-plane.nix')
      const whole = await readFile(path, 'utf8')
      await writeFile(path, whole.slice(0, whole.length / 2))
      await assert.rejects(evaluate(configurationOf(checkout, 'alpha')), /syntax error/)
      await writeFile(path, whole)
    })
  })

  describe('with what NixOS takes', () => {
    const file = join(projectRoot, 'test/nixos/uses.nix')
    const using = (attribute: string) =>
      evaluate(configurationOf(checkout, 'alpha'), { file, attribute })

    it('lets mkForce win over a plain value, and mkDefault lose to it', async () => {
      const { hostName } = await using('mkForce wins over a plain value, and mkDefault loses to it')
      assert.equal(hostName, 'beta')
    })

    it('orders what mkMerge and mkIf put together', async () => {
      const { kernelModules } = await using(
        'mkBefore and mkAfter order what mkMerge and mkIf put together',
      )
      assert.deepEqual(kernelModules, ['first', 'br_netfilter', 'overlay', 'last'])
    })

    it('leaves out what mkIf turns off', async () => {
      assert.equal((await using('what mkIf turns off is not there')).units.mine, undefined)
    })

    it('makes a command from the configuration', async () => {
      const { units } = await using('a command is made from the configuration')
      assert.equal(units.mine?.command[1], 'http://alpha/')
    })
  })
})

function configurationOf(checkout: Checkout, name: string): string {
  return checkout.path('cloud-init', name, 'nixos/etc/nixos/configuration.nix')
}

async function succeed(
  checkout: Checkout,
  script: string,
  args: string[] = [],
  env: Record<string, string> = {},
): Promise<void> {
  const { exitCode, stderr } = await run(checkout, `bin/${script}.mts`, args, { env })
  assert.equal(exitCode, 0, stderr)
}

function isThere(program: string): boolean {
  try {
    execFileSync(program, ['--version'], { stdio: 'ignore' })
    return true
  } catch {
    return false
  }
}
