// What each machine gets, staged from files with made-up contents: the script reads none of them.
import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import { mkdir, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import { promisify } from 'node:util'
import { withLock } from '../../lib/lock.mts'
import { type Checkout, makeCheckout, type Outcome, run } from '../checkout.mts'

const script = 'bin/generate-nocloud-iso.mts'
const isSecret = (path: string) => /-key\.pem$|\.kubeconfig$|encryption-config|_key$/.test(path)

describe('generate-nocloud-iso', () => {
  let checkout: Checkout
  before(async () => {
    checkout = await makeCheckout()
  })
  after(() => checkout.remove())

  const call = (args: string[] = [], env: Record<string, string> = {}): Promise<Outcome> =>
    run(checkout, script, args, { env })
  const staged = (name: string, path: string) => checkout.path('cloud-init', name, 'nixos', path)
  const clusterJson = async (name: string) =>
    JSON.parse(await readFile(staged(name, 'etc/nixos/cluster.json'), 'utf8'))
  const modeOf = async (path: string) => (await stat(path)).mode & 0o777

  /** What --list says about a node: path on the machine, mode, path here. */
  async function listed(name: string, env: Record<string, string> = {}) {
    const { exitCode, stdout, stderr } = await call(['--list', name], env)
    assert.equal(exitCode, 0, stderr)
    return [...stdout.matchAll(/^ +(\d+) {2}(\S+) {2}from (\S+)$/gm)].map(
      ([, mode = '', target = '', source = '']) => ({ mode: Number(`0o${mode}`), target, source }),
    )
  }
  const targets = async (name: string, env: Record<string, string> = {}) =>
    (await listed(name, env)).map(({ target }) => target)

  it('says which scripts to run first, and writes nothing', async () => {
    const { exitCode, stderr } = await call()
    assert.equal(exitCode, 1)
    assert.match(stderr, /alpha cannot be staged: \d+ files are missing/)
    for (const name of ['generate-certs', 'generate-kubeconfigs', 'generate-encryption-config']) {
      assert.match(stderr, new RegExp(`\\./bin/${name}\\.mts`))
    }
    await assert.rejects(stat(checkout.path('cloud-init')), /ENOENT/)
  })

  it('refuses a node that does not exist, and names those that do', async () => {
    const { exitCode, stderr } = await call(['delta'])
    assert.equal(exitCode, 2)
    assert.match(stderr, /there is no node "delta".*alpha, sigma, gamma/s)
  })

  it("lists for a worker its own key and kubeconfig, and no other machine's", async () => {
    const files = await listed('sigma')
    const secrets = files.filter(({ mode }) => mode === 0o600).map(({ target }) => target)
    assert.deepEqual(secrets.sort(), [
      '/etc/ssh/ssh_host_ed25519_key',
      '/var/lib/kubernetes/pki/sigma-key.pem',
      '/var/lib/kubernetes/sigma.kubeconfig',
    ])
    assert.ok(files.some(({ target }) => target === '/etc/nixos/cluster.json'))
    for (const { mode, target } of files) assert.equal(mode, isSecret(target) ? 0o600 : 0o644)
  })

  it("lists the CA's key for the control plane, and the admin's kubeconfig for no machine", async () => {
    const files = await listed('alpha')
    assert.ok(files.some(({ target }) => target === '/var/lib/kubernetes/pki/ca-key.pem'))
    assert.ok(!files.some(({ target }) => target.includes('admin')))
    for (const { mode, target } of files) assert.equal(mode, isSecret(target) ? 0o600 : 0o644)
  })

  it("lists kube-proxy's kubeconfig for workers on which it runs", async () => {
    const kubeconfig = '/var/lib/kubernetes/kube-proxy.kubeconfig'
    const env = { KUBE_PROXY_MODE: 'nftables' }
    assert.ok((await targets('sigma', env)).includes(kubeconfig))
    assert.ok(!(await targets('alpha', env)).includes(kubeconfig))
  })

  describe('with all files', () => {
    before(async () => {
      const sources = ['tls/ssh_ed25519.pub']
      for (const name of ['alpha', 'sigma', 'gamma']) {
        sources.push(...(await listed(name)).map(({ source }) => source))
      }
      for (const source of sources) {
        if (source.endsWith('.nix') || source === 'cluster.env') continue
        await mkdir(dirname(checkout.path(source)), { recursive: true })
        await writeFile(checkout.path(source), `content of ${source}\n`)
      }
    })

    it('stages only the nodes that are named, from any folder', async () => {
      const cwd = checkout.path('elsewhere')
      await mkdir(cwd)
      const { exitCode, stderr } = await run(checkout, script, ['gamma'], { cwd })
      assert.equal(exitCode, 0, stderr)
      assert.deepEqual(await readdir(checkout.path('cloud-init')), ['gamma'])
    })

    for (const umask of ['077', '000']) {
      it(`writes each file with its mode and place on the machine, with umask ${umask}`, async () => {
        const line = `umask ${umask}; exec ./${script}`
        const { exitCode, stderr } = await run(checkout, 'sh', ['-c', line])
        assert.equal(exitCode, 0, stderr)
        for (const name of ['alpha', 'sigma']) {
          const files = await listed(name)
          const there = await readdir(staged(name, ''), { recursive: true, withFileTypes: true })
          assert.equal(there.filter((entry) => entry.isFile()).length, files.length)
          for (const { source, target, mode } of files) {
            assert.equal(await modeOf(staged(name, target)), mode, target)
            if (source === 'cluster.env') continue
            const [copy, original] = [staged(name, target), checkout.path(source)]
            assert.deepEqual(await readFile(copy), await readFile(original), target)
          }
          // Unpacking the archive of this tree sets the modes of / and /etc on the machine.
          for (const folder of ['', 'etc', 'etc/ssh', 'var/lib', 'var/lib/kubernetes/pki']) {
            assert.equal(await modeOf(staged(name, folder)), 0o755, folder)
          }
          assert.equal(await modeOf(checkout.path('cloud-init', name)), 0o700)
        }
      })
    }

    it('can be packed by tar, and is then as on the machine', async () => {
      const root = checkout.path('machine')
      await mkdir(root)
      const pack = `tar -czf - -C cloud-init/gamma/nixos . | tar -xzpf - --no-same-owner -C machine`
      await promisify(execFile)('sh', ['-c', pack], { cwd: checkout.root })
      for (const { target, mode } of await listed('gamma')) {
        assert.equal(await modeOf(join(root, target)), mode, target)
      }
      assert.equal(await modeOf(root), 0o755)
    })

    it('writes the values of cluster.env, and the public half of the login key', async () => {
      const env = {
        LAN_CIDR: '192.168.96.0/20',
        PROXY_HTTP: 'http://10.0.2.2:3128',
        PROXY_NO: 'intra.example, 10.9.0.0/16',
      }
      assert.equal((await call(['sigma'], env)).exitCode, 0)
      const { node, nodes, lanPrefixLength, proxy, sshKeys } = await clusterJson('sigma')
      assert.equal(node.lanMac.replace(':01:', ':00:'), node.mac)
      assert.deepEqual(
        nodes.map(({ name, podCidr }: { name: string; podCidr: string | null }) => [name, podCidr]),
        [
          ['alpha', null],
          ['sigma', '10.200.1.0/24'],
          ['gamma', '10.200.2.0/24'],
        ],
      )
      assert.equal(lanPrefixLength, 20)
      assert.equal(proxy.https, 'http://10.0.2.2:3128')
      for (const entry of ['192.168.96.0/20', '10.32.0.0/24', '10.200.0.0/16', '.svc']) {
        assert.ok(proxy.no.includes(entry), entry)
      }
      assert.deepEqual(proxy.no.slice(-2), ['intra.example', '10.9.0.0/16'])
      assert.deepEqual(sshKeys, ['content of tls/ssh_ed25519.pub'])
    })

    it('changes the digest of what has changed, drops what is not needed, and leaves no traces', async () => {
      await call(['sigma'])
      const before = (await clusterJson('sigma')).digests
      await writeFile(checkout.path('tls/sigma.pem'), 'renewed\n')
      await writeFile(staged('sigma', 'var/lib/kubernetes/pki/old-key.pem'), 'old')
      // As a killed run leaves them.
      await mkdir(checkout.path('cloud-init/sigma/nixos.new/etc'), { recursive: true })
      await mkdir(checkout.path('cloud-init/sigma/nixos.former/etc'), { recursive: true })
      assert.equal((await call(['sigma'])).exitCode, 0)
      const now = (await clusterJson('sigma')).digests
      const changed = Object.keys(before).filter((name) => before[name] !== now[name])
      assert.deepEqual(changed, ['pki/sigma.pem'])
      assert.deepEqual(await readdir(checkout.path('cloud-init/sigma')), ['nixos'])
      const pki = await readdir(staged('sigma', 'var/lib/kubernetes/pki'))
      assert.deepEqual(pki.sort(), ['ca.pem', 'sigma-key.pem', 'sigma.pem'])
    })

    it('stages nothing while certificates are being generated', async () => {
      await withLock(checkout.path('run', 'pki.lock'), 'generating certificates', async () => {
        const { exitCode, stderr } = await call(['sigma'])
        assert.match(stderr, /another process is generating certificates/)
        assert.equal(exitCode, 1)
      })
    })

    it('says which files are missing and what creates them, and keeps what was staged', async () => {
      const former = await clusterJson('sigma')
      await rm(checkout.path('tls/sigma-key.pem'))
      await rm(checkout.path('configs/sigma.kubeconfig'))
      const { exitCode, stderr } = await call(['sigma'])
      assert.equal(exitCode, 1)
      assert.match(
        stderr,
        /sigma cannot be staged: 2 files are missing\n +\| tls\/sigma-key\.pem\n +\| configs\/sigma\.kubeconfig\n +hint: +\.\/bin\/generate-certs\.mts\n +\.\/bin\/generate-kubeconfigs\.mts\n/,
      )
      assert.deepEqual(await clusterJson('sigma'), former)
    })
  })
})
