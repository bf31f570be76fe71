// deploy-metrics-server. The real metrics-server runs here with the manifest's flags and the
// rights of its service account, before kubelets of the test that have the workers' certificates.
import assert from 'node:assert/strict'
import { type ChildProcess, spawn } from 'node:child_process'
import { X509Certificate } from 'node:crypto'
import { once } from 'node:events'
import { open, readFile, rm, writeFile } from 'node:fs/promises'
import { createServer, request, type Server } from 'node:https'
import type { AddressInfo } from 'node:net'
import { join } from 'node:path'
import { text } from 'node:stream/consumers'
import { after, before, describe, it } from 'node:test'
import type { TLSSocket } from 'node:tls'
import { becomes } from '../../../lib/wait.mts'
import { run } from '../../checkout.mts'
import type { HollowCluster } from '../../kubernetes/hollow-cluster.mts'
import { goPrograms } from '../../kubernetes/programs.mts'
import { freePorts } from '../../ports.mts'
import type { Shared } from './shared.mts'

const metricsServer = await goPrograms('metrics-server')
export const deployMetricsServer = (shared: Shared) =>
  describe('deploy-metrics-server', { skip: metricsServer.reason ?? false }, () => {
    let hollow: HollowCluster
    before(() => {
      hollow = shared.hollow
    })
    after(() => hollow.runsInPods('exit 1'))

    const deploy = (...args: string[]) => hollow.script('deploy-metrics-server', ...args)

    it('says what makes its certificate when it is missing', async () => {
      const path = hollow.checkout.path('tls', 'metrics-server.pem')
      const certificate = await readFile(path)
      await rm(path)
      const { exitCode, stderr } = await deploy()
      await writeFile(path, certificate)
      assert.equal(exitCode, 1)
      assert.match(stderr, /tls\/metrics-server\.pem is missing\n.*make certs/)
      assert.equal((await hollow.kubectl(['get', 'apiservice', '-o=name'])).match(/metrics/), null)
    })

    it('shows the metrics of all workers', async () => {
      const table = 'NAME    CPU(cores)   CPU(%)\nsigma   59m          2%\ngamma   61m          3%'
      topSays(table)
      const { exitCode, stderr, stdout } = await deploy()
      assert.equal(exitCode, 0, stderr)
      assert.ok(stdout.startsWith(table))
    })

    it('is not done while a worker has no metrics', async () => {
      topSays(
        'NAME    CPU(cores)   CPU(%)\nsigma   59m          2%\ngamma   <unknown>    <unknown>',
      )
      const { exitCode, stderr } = await deploy('--timeout', '1')
      assert.equal(exitCode, 1)
      assert.match(stderr, /no metrics after 1 s\n.*no metrics for gamma/)
    })

    it('is not done before kubectl top has metrics', async () => {
      hollow.runsInPods('exit 1')
      const { exitCode, stderr } = await deploy('--timeout', '1')
      assert.equal(exitCode, 1)
      assert.match(stderr, /✓ metrics-server is ready/)
      assert.match(stderr, /kubectl top has no metrics after 1 s/)
      assert.match(stderr, /hint: .*kubectl describe apiservice v1beta1\.metrics\.k8s\.io/)
    })

    it('keeps the key out of the manifest and out of what it prints', async () => {
      const key = await readFile(hollow.checkout.path('tls', 'metrics-server-key.pem'))
      const printed = await deploy('--print')
      const told = await run(hollow.checkout, 'bin/deploy-metrics-server.mts', [
        '--verbose',
        '--timeout=1',
      ])
      const said = printed.stdout + told.stdout + told.stderr
      assert.ok(!said.includes(key.toString('base64').slice(0, 60)))
      assert.ok(!said.includes(key.toString().split('\n')[1] ?? ''))
    })

    describe('the real metrics-server, with the flags of the manifest', () => {
      let server: ChildProcess
      let port: number
      let kubelets: Server[]
      before(async () => {
        kubelets = await Promise.all(hollow.cluster.workers.map(({ name }) => startKubelet(name)))
        await startMetricsServer()
      })
      after(async () => {
        server?.kill()
        if (server?.exitCode === null) await once(server, 'exit')
        for (const kubelet of kubelets ?? []) {
          kubelet.closeAllConnections()
          kubelet.close()
        }
      })

      it('has metrics of kubelets whose certificates the CA has signed', async () => {
        let names: string[] = []
        const isThere = async () => {
          const { items } = JSON.parse((await ask('front-proxy-client')).body) as {
            items?: { metadata: { name: string } }[]
          }
          names = (items ?? []).map(({ metadata }) => metadata.name).sort()
          return names.length > 0
        }
        assert.ok(await becomes(isThere, 90), 'no metrics')
        // That of gamma has the certificate of another authority.
        assert.deepEqual(names, ['sigma'])
      })

      it('proves its service name with a certificate of the CA', async () => {
        const { certificate } = await ask('front-proxy-client')
        assert.ok(certificate.checkHost('metrics-server.kube-system.svc'))
        const ca = new X509Certificate(await readFile(hollow.checkout.path('tls', 'ca.pem')))
        assert.ok(certificate.verify(ca.publicKey))
      })

      it('believes the name of a user only from the API server', async () => {
        assert.equal((await ask('front-proxy-client')).status, 200)
        assert.equal((await ask('sigma')).status, 403)
      })

      /** A GET as admin on behalf of the API server's aggregation, with some client certificate. */
      async function ask(
        client: string,
      ): Promise<{ status: number; body: string; certificate: X509Certificate }> {
        const [ca, cert, key] = await Promise.all(
          ['ca', client, `${client}-key`].map((name) =>
            readFile(hollow.checkout.path('tls', `${name}.pem`)),
          ),
        )
        return new Promise((resolve, reject) => {
          const sent = request(
            {
              ...{ host: '127.0.0.1', port, path: '/apis/metrics.k8s.io/v1beta1/nodes' },
              ...{ ca, cert, key, agent: false, servername: 'metrics-server.kube-system.svc' },
              headers: { 'X-Remote-User': 'admin', 'X-Remote-Group': 'system:masters' },
            },
            async (response) => {
              const { raw } = (response.socket as TLSSocket).getPeerCertificate()
              const certificate = new X509Certificate(raw)
              resolve({ status: response.statusCode ?? 0, body: await text(response), certificate })
            },
          )
          sent.on('error', reject).end()
        })
      }

      /** A kubelet's numbers of a node; gamma's has a certificate that nobody signed. */
      async function startKubelet(name: string): Promise<Server> {
        const tls = (file: string) => readFile(hollow.checkout.path('tls', file))
        const stranger = name === 'gamma' ? await otherAuthority() : undefined
        const cert = stranger?.cert ?? (await tls(`${name}.pem`))
        const key = stranger?.key ?? (await tls(`${name}-key.pem`))
        let seconds = 100
        const kubelet = createServer({ cert, key }, (_, response) => {
          seconds += 1
          const time = Date.now()
          response.setHeader('content-type', 'text/plain; version=0.0.4')
          response.end(
            `node_cpu_usage_seconds_total ${seconds} ${time}\nnode_memory_working_set_bytes 1e+08 ${time}\n`,
          )
        })
        kubelet.listen(0, '127.0.0.1')
        await once(kubelet, 'listening')
        const kubeletEndpoint = { Port: (kubelet.address() as AddressInfo).port }
        await hollow.nodes?.setStatus(name, { daemonEndpoints: { kubeletEndpoint } })
        return kubelet
      }

      async function otherAuthority(): Promise<{ cert: Buffer; key: Buffer }> {
        const [cert, key] = ['stranger.pem', 'stranger-key.pem'].map((name) =>
          hollow.checkout.path(name),
        ) as [string, string]
        const line = `openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=stranger -addext subjectAltName=IP:127.0.0.1 -days 1 -out '${cert}' -keyout '${key}'`
        await hollow.shell(line)
        return { cert: await readFile(cert), key: await readFile(key) }
      }

      async function startMetricsServer(): Promise<void> {
        interface Deployment {
          spec: { template: { spec: { containers: { args: string[] }[] } } }
        }
        const deployment = await hollow.get<Deployment>(
          'deployment/metrics-server',
          '--namespace=kube-system',
        )
        ;[port = 0] = await freePorts(1)
        const tls = (name: string) => hollow.checkout.path('tls', name)
        const kubeconfig = await hollow.kubeconfigOf('metrics-server', 'kube-system')
        const here: Record<string, string> = {
          '--secure-port=10250': `--secure-port=${port}`,
          '--tls-cert-file=/etc/metrics-server/tls/tls.crt': `--tls-cert-file=${tls('metrics-server.pem')}`,
          '--tls-private-key-file=/etc/metrics-server/tls/tls.key': `--tls-private-key-file=${tls('metrics-server-key.pem')}`,
          '--kubelet-certificate-authority=/var/run/secrets/kubernetes.io/serviceaccount/ca.crt': `--kubelet-certificate-authority=${tls('ca.pem')}`,
        }
        const args = deployment.spec.template.spec.containers[0]?.args ?? []
        for (const flag of Object.keys(here)) assert.ok(args.includes(flag), flag)
        const flags = args.map((flag) => here[flag] ?? flag)
        // What in a pod comes from its service account.
        const extra = ['kubeconfig', 'authentication-kubeconfig', 'authorization-kubeconfig'].map(
          (name) => `--${name}=${kubeconfig}`,
        )
        const program = join(metricsServer.folder ?? '', 'metrics-server')
        const logFile = hollow.checkout.path('metrics-server.log')
        const log = await open(logFile, 'w')
        server = spawn(
          'setpriv',
          ['--pdeathsig', 'TERM', program, ...flags, ...extra, '--bind-address=127.0.0.1'],
          { stdio: ['ignore', 'ignore', log.fd] },
        )
        await log.close()
        const isUp = async () => {
          if (server.exitCode !== null) assert.fail(await readFile(logFile, 'utf8'))
          return ask('front-proxy-client').then(
            ({ status }) => status === 200,
            () => false,
          )
        }
        if (!(await becomes(isUp, 60))) assert.fail(await readFile(logFile, 'utf8'))
      }
    })

    it('is deleted with its key, and again', async () => {
      for (const _ of [1, 2]) {
        const { exitCode, stderr } = await deploy('--delete')
        assert.equal(exitCode, 0, stderr)
      }
      const args = [
        'get',
        'all,secrets,serviceaccounts',
        '--namespace=kube-system',
        '--output=name',
      ]
      const metrics = /metrics/
      assert.doesNotMatch(await hollow.kubectl(args), metrics)
      assert.doesNotMatch(await hollow.kubectl(['get', 'apiservices', '--output=name']), metrics)
    })

    /** kubectl top answers this; all else is the real kubectl. */
    function topSays(table: string): void {
      const kubectl = `${hollow.controlPlane.place.kubernetes}/kubectl`
      hollow.programs.add(
        'kubectl',
        `if [ "$1" = top ]; then printf '%s\\n' '${table}'; else exec ${kubectl} "$@"; fi`,
      )
    }
  })
