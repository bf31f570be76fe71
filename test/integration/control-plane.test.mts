// The control plane machine's units as processes of this computer: they start, are healthy, accept
// the right certificates and no others, and keep their data.
import assert from 'node:assert/strict'
import { createPrivateKey, createPublicKey, verify, X509Certificate } from 'node:crypto'
import { copyFile, readFile, stat, writeFile } from 'node:fs/promises'
import { get } from 'node:https'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import { checkServerIdentity, connect, type PeerCertificate } from 'node:tls'
import { certificatesOf } from '../../lib/certificates.mts'
import type { Cluster } from '../../lib/cluster.mts'
import { probeApiServer } from '../../lib/health.mts'
import { becomes } from '../../lib/wait.mts'
import { signCertificate } from '../../lib/x509.mts'
import { type Checkout, makeCheckout, type Outcome, run } from '../checkout.mts'
import type { ControlPlane } from '../kubernetes/control-plane.mts'
import { type Service, services } from '../kubernetes/mapping.mts'
import { findTools, prepareControlPlane } from '../kubernetes/prepared.mts'
import { access } from './control-plane/access.mts'
import { flags } from './control-plane/flags.mts'
import type { Shared } from './control-plane/shared.mts'

const tools = await findTools()
const skip = typeof tools === 'string' && tools
// A skipped suite is counted nowhere; a skipped test is.
it('what this needs is there', { skip }, () => {})

describe('the control plane', { skip }, () => {
  let checkout: Checkout
  let cluster: Cluster
  let controlPlane: ControlPlane
  const shared = {} as Shared
  before(async () => {
    if (typeof tools === 'string') return
    ;({ checkout, cluster, controlPlane } = await prepareControlPlane(tools))
    Object.assign(shared, { tools, checkout, cluster, controlPlane })
    await controlPlane.start()
  })
  after(async () => {
    await controlPlane?.stop()
    await checkout?.remove()
  })

  const admin = (...args: string[]) => controlPlane.kubectl('admin', args)
  /** kubectl with certificate files instead of a kubeconfig, all paths in a tls folder. */
  const withCertificate = (name: string, { tls = checkout.path('tls'), ca = '' } = {}) =>
    controlPlane.run('kubectl', [
      `--server=https://127.0.0.1:${cluster.settings.API_PORT}`,
      `--certificate-authority=${ca || checkout.path('tls', 'ca.pem')}`,
      `--client-certificate=${join(tls, `${name}.pem`)}`,
      `--client-key=${join(tls, `${name}-key.pem`)}`,
      ...['get', 'namespaces'],
    ])

  describe('health', () => {
    const endpoints: Record<Service, string[]> = {
      etcd: ['/health', '/livez', '/readyz'],
      'kube-apiserver': ['/livez', '/readyz', '/readyz/etcd', '/readyz/informer-sync'],
      'kube-controller-manager': ['/healthz'],
      'kube-scheduler': ['/livez', '/readyz'],
    }
    for (const service of services) {
      it(`${service} is healthy at ${endpoints[service].join(', ')}`, async () => {
        for (const path of endpoints[service]) {
          assert.equal(await controlPlane.trouble(service, path), undefined, path)
        }
      })
    }

    it('every check of the API server passes', async () => {
      const { stdout } = await admin('get', '--raw', '/readyz?verbose')
      assert.match(stdout, /readyz check passed/)
      assert.doesNotMatch(stdout, /^\[-\]/m)
    })

    for (const service of ['kube-controller-manager', 'kube-scheduler']) {
      it(`${service} has a leader`, async () => {
        const holder = async () => {
          const { stdout } = await admin(
            ...['-n', 'kube-system', 'get', 'lease', service, '-o=jsonpath={.spec.holderIdentity}'],
          )
          return stdout
        }
        assert.ok(await becomes(async () => (await holder()) !== '', 60), 'no leader')
      })
    }

    it('the service "kubernetes" leads to the LAN address of the machine', async () => {
      const { stdout } = await admin(
        ...['get', 'endpointslice', 'kubernetes'],
        '-o=jsonpath={.endpoints[*].addresses[*]}:{.ports[*].port}',
      )
      assert.equal(stdout, `${cluster.controlPlane.ip}:${cluster.settings.API_PORT}`)
    })
  })

  describe('flags', () => {
    for (const service of services) {
      it(`${service} reports none of its flags as deprecated or unknown`, async () => {
        const log = await controlPlane.log(service)
        const complaints = log.split('\n').filter((line) => {
          return /deprecated|unrecognized|unknown (flag|feature)/i.test(line) && !/^I\d/.test(line)
        })
        assert.deepEqual(complaints, [])
      })
    }

    it('the profiler answers nowhere', async () => {
      for (const service of services) {
        assert.match((await controlPlane.trouble(service, '/debug/pprof/')) ?? '', /^HTTP 40[34]/)
      }
    })

    it('a namespace gets no pod that could take over its machine, and a warning of lesser ones', async () => {
      await admin('create', 'namespace', 'work')
      for (const namespace of ['work', 'kube-system']) {
        await admin('create', 'serviceaccount', 'someone', `--namespace=${namespace}`)
      }
      const create = (namespace: string, spec: object) =>
        admin(
          ...['run', 'pod', `--namespace=${namespace}`, '--image=image', '--dry-run=server'],
          `--overrides=${JSON.stringify({ spec: { serviceAccountName: 'someone', ...spec } })}`,
        )
      const host = { hostNetwork: true, hostPID: true }
      const refused = await create('work', host)
      assert.match(refused.stderr, /violates PodSecurity "baseline:latest": host namespaces/)
      const plain = await create('work', {})
      assert.match(plain.stderr, /would violate PodSecurity "restricted:latest"/)
      assert.doesNotMatch(plain.stderr, /violates PodSecurity "baseline/)
      const system = await create('kube-system', host)
      assert.doesNotMatch(system.stderr, /PodSecurity/)

      await admin('label', 'namespace', 'work', 'pod-security.kubernetes.io/enforce=privileged')
      assert.doesNotMatch((await create('work', host)).stderr, /violates/)
    })

    it('the audit log has what is done with a Secret, but not its content', async () => {
      await admin('create', 'secret', 'generic', 'audited', '--from-literal=key=not-for-the-log')
      const path = join(controlPlane.place.root, 'var/log/kubernetes/audit.log')
      const log = await readFile(path, 'utf8')
      assert.match(log, /"verb":"create","user":\{"username":"admin".*"name":"audited"/)
      assert.doesNotMatch(log, /not-for-the-log|bm90LWZvci10aGUtbG9n/)
      assert.equal((await stat(path)).mode & 0o077, 0)
    })
  })

  describe('certificates', () => {
    const handshake = (
      port: number,
      options: { maxVersion?: 'TLSv1.2' } = {},
    ): Promise<PeerCertificate> =>
      new Promise((resolve, reject) => {
        const socket = connect({ host: '127.0.0.1', port, rejectUnauthorized: false, ...options })
        socket.once('secureConnect', () => {
          resolve(socket.getPeerCertificate())
          socket.destroy()
        })
        socket.once('error', reject)
      })

    it('that of the API server has all its names and addresses', async () => {
      const certificate = await handshake(cluster.settings.API_PORT)
      const { controlPlane: alpha } = cluster
      for (const name of [
        ...['127.0.0.1', '10.0.2.2', '10.32.0.1', alpha.ip, alpha.name],
        ...['kubernetes', 'kubernetes.default', 'kubernetes.default.svc'],
        'kubernetes.default.svc.cluster.local',
      ]) {
        assert.equal(checkServerIdentity(name, certificate), undefined, name)
      }
      assert.ok(checkServerIdentity('10.0.2.15', certificate))
    })

    for (const service of services.filter((name) => name !== 'etcd')) {
      it(`${service} accepts no TLS older than 1.3`, async () => {
        const { controllerManager, scheduler } = controlPlane.ports
        const port = {
          'kube-apiserver': cluster.settings.API_PORT,
          'kube-controller-manager': controllerManager,
          'kube-scheduler': scheduler,
        }[service]
        await handshake(port)
        await assert.rejects(handshake(port, { maxVersion: 'TLSv1.2' }), /protocol version/)
      })
    }

    it('are required, also for health', async () => {
      const ca = await readFile(checkout.path('tls', 'ca.pem'))
      const address = { host: '127.0.0.1', port: cluster.settings.API_PORT, ca, agent: false }
      for (const path of ['/api/v1/namespaces', '/version', '/readyz']) {
        const status = await new Promise((resolve, reject) => {
          get({ ...address, path }, (response) => {
            response.resume()
            resolve(response.statusCode)
          }).on('error', reject)
        })
        assert.equal(status, 401, path)
      }
    })

    describe('of another authority', () => {
      let foreign: Checkout
      before(async () => {
        foreign = await makeCheckout()
        const { exitCode, stderr } = await run(foreign, 'bin/generate-certs.mts')
        assert.equal(exitCode, 0, stderr)
      })
      after(() => foreign?.remove())

      it('are refused, whatever their subject', async () => {
        const { stderr, exitCode } = await withCertificate('admin', { tls: foreign.path('tls') })
        assert.notEqual(exitCode, 0)
        assert.match(stderr, /Unauthorized|must be logged in/)
      })

      it('of the API server are refused by kubectl', async () => {
        const { stderr } = await withCertificate('admin', { ca: foreign.path('tls', 'ca.pem') })
        assert.match(stderr, /certificate signed by unknown authority/)
      })

      it('are refused by etcd, as is a client without one', async () => {
        const etcdctl = (timeout: string, ...certificate: string[]) =>
          controlPlane.run('etcdctl', [
            `--endpoints=https://127.0.0.1:${controlPlane.ports.etcdClients}`,
            `--cacert=${checkout.path('tls', 'ca.pem')}`,
            ...certificate,
            ...[`--command-timeout=${timeout}`, 'get', '--prefix', '/', '--limit=1'],
          ])
        const own = (tls: string) => [
          `--cert=${join(tls, 'kubernetes.pem')}`,
          `--key=${join(tls, 'kubernetes-key.pem')}`,
        ]
        assert.equal((await etcdctl('30s', ...own(checkout.path('tls')))).exitCode, 0)
        // It retries until its timeout; etcd must have refused by then.
        const seen = async (timeout: string) => {
          assert.notEqual((await etcdctl(timeout, ...own(foreign.path('tls')))).exitCode, 0)
          assert.notEqual((await etcdctl(timeout)).exitCode, 0)
          const log = await controlPlane.log('etcd')
          return (
            /certificate signed by unknown authority|failed to verify certificate/.test(log) &&
            /client didn't provide a certificate/.test(log)
          )
        }
        assert.ok((await seen('1s')) || (await seen('20s')))
      })
    })

    it('that have expired are refused', async () => {
      const entry = certificatesOf(cluster).find(({ name }) => name === 'admin')
      assert.ok(entry)
      const [certificate, key, adminKey] = await Promise.all(
        ['ca.pem', 'ca-key.pem', 'admin-key.pem'].map((name) =>
          readFile(checkout.path('tls', name), 'utf8'),
        ),
      )
      const aMinute = 1 / 1440
      const expired = signCertificate(
        { ...entry, publicKey: createPublicKey(adminKey ?? ''), days: -aMinute },
        { certificate: certificate ?? '', key: createPrivateKey(key ?? '') },
      )
      await writeFile(checkout.path('tls', 'expired.pem'), expired)
      await writeFile(checkout.path('tls', 'expired-key.pem'), adminKey ?? '', { mode: 0o600 })
      const { stderr, exitCode } = await withCertificate('expired')
      assert.notEqual(exitCode, 0)
      assert.match(stderr, /Unauthorized|must be logged in/)
      assert.match(await controlPlane.log('kube-apiserver'), /certificate has expired/)
      assert.equal((await withCertificate('admin')).exitCode, 0)
    })
  })

  describe('tokens of service accounts', () => {
    let token = ''
    const whoami = (candidate: string): Promise<Outcome> =>
      controlPlane.run('kubectl', [
        `--server=https://127.0.0.1:${cluster.settings.API_PORT}`,
        `--certificate-authority=${checkout.path('tls', 'ca.pem')}`,
        '--kubeconfig=/dev/null',
        `--token=${candidate}`,
        ...['auth', 'whoami', '-o=jsonpath={.status.userInfo.username}'],
      ])
    before(async () => {
      // The controller manager makes the account, with the namespace.
      assert.ok(
        await becomes(
          async () => (await admin('get', 'serviceaccount', 'default')).exitCode === 0,
          30,
        ),
      )
      const created = await admin('create', 'token', 'default', '--duration=1h')
      assert.equal(created.exitCode, 0, created.stderr)
      token = created.stdout.trim()
    })

    it('authenticate pods as their service account', async () => {
      assert.equal((await whoami(token)).stdout, 'system:serviceaccount:default:default')
    })

    it('are signed with the key of the certificate service-account, by the issuer', async () => {
      const [header = '', payload = '', signature = ''] = token.split('.')
      const pem = await readFile(checkout.path('tls', 'service-account.pem'))
      const { publicKey } = new X509Certificate(pem)
      const signed = Buffer.from(`${header}.${payload}`)
      assert.ok(verify('sha256', signed, publicKey, Buffer.from(signature, 'base64url')))
      const claims = JSON.parse(Buffer.from(payload, 'base64url').toString())
      assert.equal(claims.iss, 'https://kubernetes.default.svc.cluster.local')
      assert.deepEqual(claims.aud, [claims.iss])
    })

    it('are refused when changed', async () => {
      const [header = '', payload = '', signature = ''] = token.split('.')
      const claims = JSON.parse(Buffer.from(payload, 'base64url').toString())
      claims.sub = 'system:serviceaccount:kube-system:node-controller'
      const forged = Buffer.from(JSON.stringify(claims)).toString('base64url')
      assert.match(
        (await whoami([header, forged, signature].join('.'))).stderr,
        /logged in|Unauthor/,
      )
    })

    it('have a published key to verify them', async () => {
      const { stdout } = await admin('get', '--raw', '/openid/v1/jwks')
      const pem = await readFile(checkout.path('tls', 'service-account.pem'))
      const { n } = new X509Certificate(pem).publicKey.export({ format: 'jwk' })
      assert.deepEqual(
        JSON.parse(stdout).keys.map((key: { n: string }) => key.n),
        [n],
      )
    })
  })

  access(shared)
  flags(shared)

  describe('Secrets', () => {
    const plain = 'correct-horse-battery-staple'
    const read = (name: string) => admin('get', 'secret', name, '-o=jsonpath={.data.password}')
    const stored = (name: string) =>
      controlPlane.etcdctl(['get', `/registry/secrets/default/${name}`, '--print-value-only'])
    before(() => admin('create', 'secret', 'generic', 'kept', `--from-literal=password=${plain}`))

    it('are ciphertext in etcd, other objects are not', async () => {
      const { stdout } = await stored('kept')
      assert.match(stdout, /^k8s:enc:(aescbc|secretbox):v1:/)
      assert.ok(!stdout.includes(plain))
      const configMap = ['/registry/configmaps/default/kube-root-ca.crt', '--print-value-only']
      assert.match((await controlPlane.etcdctl(['get', ...configMap])).stdout, /^k8s\0/)
    })

    it('are readable through the API', async () => {
      const { stdout } = await read('kept')
      assert.equal(Buffer.from(stdout, 'base64').toString(), plain)
    })

    describe('after a second start with the same data', () => {
      let token = ''
      let uid = ''
      const namespaceUid = async () =>
        (await admin('get', 'namespace', 'kube-system', '-o=jsonpath={.metadata.uid}')).stdout
      before(async () => {
        token = (await admin('create', 'token', 'default', '--duration=1h')).stdout.trim()
        uid = await namespaceUid()
        await controlPlane.stop()
        await controlPlane.start()
      })

      it('are the same', async () => {
        assert.equal(Buffer.from((await read('kept')).stdout, 'base64').toString(), plain)
      })

      it('as is the cluster', async () => {
        assert.notEqual(uid, '')
        assert.equal(await namespaceUid(), uid)
      })

      it('as are the tokens of pods', async () => {
        const review = {
          apiVersion: 'authentication.k8s.io/v1',
          kind: 'TokenReview',
          spec: { token },
        }
        const { stdout } = await controlPlane.kubectl(
          'admin',
          ['create', '-f=-', '-o=jsonpath={.status.authenticated}'],
          JSON.stringify(review),
        )
        assert.equal(stdout, 'true')
      })
    })

    it('are lost with the key, and the API server names one and is not ready', async () => {
      const used = join(controlPlane.place.root, 'var/lib/kubernetes/encryption-config.yaml')
      const former = await readFile(used)
      await controlPlane.stop()
      await run(checkout, 'bin/generate-encryption-config.mts', ['--force'])
      await copyFile(checkout.path('configs/encryption-config.yaml'), used)
      const start: Promise<unknown> = controlPlane.start().catch((error) => error)
      const named = async () => {
        const { stderr } = await admin('get', 'secrets')
        return /unable to transform key "\/registry\/secrets\/default\/\w+"/.test(stderr)
      }
      assert.ok(await becomes(named, 200))
      const trouble = (await controlPlane.trouble('kube-apiserver')) ?? ''
      assert.match(trouble, /^HTTP 500: .*\[-\]informer-sync failed/s)
      const { ready, reason } = await probeApiServer(cluster)
      assert.equal(ready, false)
      assert.match(reason, /not ready: Secrets in etcd are encrypted with another key/)
      await controlPlane.stop()
      assert.match(String(await start), /kube-apiserver ended/)

      await writeFile(used, former)
      await controlPlane.start()
      assert.equal(Buffer.from((await read('kept')).stdout, 'base64').toString(), plain)
    })
  })
})
