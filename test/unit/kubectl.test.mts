import assert from 'node:assert/strict'
import { readFile, rm, writeFile } from 'node:fs/promises'
import { after, before, describe, it } from 'node:test'
import { parse, stringify } from 'yaml'
import { $ } from 'zx/core'
import { type Cluster, loadCluster } from '../../lib/cluster.mts'
import { knownProblem } from '../../lib/errors.mts'
import { apply, useCluster } from '../../lib/kubectl.mts'
import { type Checkout, makeCheckout, run } from '../checkout.mts'
import { FakePrograms } from '../fake-programs.mts'

const kubelet = 'https://192.168.100.11:10250'

/** What kubectl prints, and what we say about it. */
const causes: [string, { reason: RegExp; hint: RegExp }][] = [
  [
    'The connection to the server 127.0.0.1:6443 was refused - did you specify the right host or port?',
    { reason: /API server does not answer/, hint: /make status/ },
  ],
  [
    'Unable to connect to the server: tls: failed to verify certificate: x509: certificate has expired or is not yet valid: current time 2028-11-22T10:00:00Z is after 2027-11-22T09:00:00Z',
    { reason: /a certificate has expired, or the clocks/, hint: /make certs-check/ },
  ],
  [
    'Unable to connect to the server: tls: failed to verify certificate: x509: certificate signed by unknown authority',
    { reason: /certificate of another CA than tls\/ca\.pem/, hint: /make reconfig/ },
  ],
  [
    'error: You must be logged in to the server (Unauthorized)',
    {
      reason: /does not accept the admin certificate/,
      hint: /certs-check.*make reconfig/,
    },
  ],
  [
    `Error from server: Get "${kubelet}/containerLogs/default/web/main": dial tcp 192.168.100.11:10250: connect: connection refused`,
    { reason: /API server does not reach the kubelet/, hint: /make logs/ },
  ],
  [
    'error: Internal error occurred: error dialing backend: dial tcp 192.168.100.11:10250: connect: connection refused',
    { reason: /API server does not reach the kubelet/, hint: /make logs/ },
  ],
  [
    `Error from server: Get "${kubelet}/containerLogs/default/web/main": tls: failed to verify certificate: x509: certificate is valid for 192.168.100.12, not 192.168.100.11`,
    { reason: /API server and the kubelet do not accept/, hint: /make certs-check/ },
  ],
  [
    'error: Internal error occurred: error dialing backend: tls: failed to verify certificate: x509: certificate is valid for 192.168.100.12, not 192.168.100.11',
    { reason: /API server and the kubelet do not accept/, hint: /make certs-check/ },
  ],
  [
    'Error from server (InternalError): Internal error occurred: unable to transform key "/registry/secrets/default/kept": output array was not large enough for encryption',
    { reason: /encrypted with another key/, hint: /previous configs\/encryption-config\.yaml/ },
  ],
]

describe('kubectl', () => {
  for (const [message, { reason, hint }] of causes) {
    it(`explains "${message.slice(0, 100)}"`, () => {
      const known = knownProblem('kubectl get pods', message)
      assert.match(known?.reason ?? '', reason)
      assert.match(known?.hint ?? '', hint)
    })
  }

  it('has no explanation for what it says itself', () => {
    const message = 'Error from server (NotFound): pods "web" not found'
    assert.equal(knownProblem('kubectl get pods', message), undefined)
  })

  describe('with a kubeconfig', () => {
    let checkout: Checkout
    let cluster: Cluster
    const environment = $.env
    before(async () => {
      checkout = await makeCheckout()
      cluster = loadCluster({ root: checkout.root, env: {} })
      for (const script of ['generate-certs', 'generate-kubeconfigs']) {
        assert.equal((await run(checkout, `bin/${script}.mts`)).exitCode, 0)
      }
    })
    after(async () => {
      $.env = environment
      await checkout.remove()
    })

    /** Changes configs/admin.kubeconfig for the time of some work. */
    async function changed(
      change: (config: Record<string, never>) => void,
      work: () => Promise<void>,
    ): Promise<void> {
      const file = checkout.path('configs', 'admin.kubeconfig')
      const former = await readFile(file, 'utf8')
      const config = parse(former)
      change(config)
      await writeFile(file, stringify(config))
      await work().finally(() => writeFile(file, former))
    }

    it('uses a copy with the context of this cluster alone', async () => {
      $.env = { ...environment, KUBECONFIG: '/nowhere' }
      const other = { name: 'other', context: { cluster: 'other', user: 'other' } }
      const change = (config: Record<string, unknown>) => {
        config['current-context'] = 'other'
        ;(config.contexts as object[]).push(other)
      }
      await changed(change, () => useCluster(cluster))
      const copy = parse(await readFile($.env.KUBECONFIG ?? '', 'utf8'))
      assert.equal(copy['current-context'], 'default')
      assert.deepEqual(
        copy.contexts.map(({ name }: { name: string }) => name),
        ['default'],
      )
    })

    it('refuses one that leads to another server, or trusts another CA', async () => {
      type Config = { clusters: { cluster: Record<string, string> }[] }
      const set = (name: string, value: string) => (config: unknown) => {
        const [first] = (config as Config).clusters
        if (first) first.cluster[name] = value
      }
      await changed(set('server', 'https://203.0.113.1:6443'), () =>
        assert.rejects(useCluster(cluster), /does not lead to https:\/\/127\.0\.0\.1:/),
      )
      await changed(set('certificate-authority-data', 'b3RoZXI='), () =>
        assert.rejects(useCluster(cluster), /trusts another CA than tls\/ca\.pem/),
      )
    })

    it('names one that is missing', async () => {
      await rm(checkout.path('configs', 'admin.kubeconfig'))
      await assert.rejects(useCluster(cluster), /configs\/admin\.kubeconfig is missing/)
    })
  })

  describe('apply', () => {
    const programs = new FakePrograms()
    const environment = $.env
    before(() => {
      $.env = { ...process.env, PATH: `${programs.path}:${process.env.PATH}` }
    })
    after(() => {
      $.env = environment
      programs.remove()
    })

    it('says that another owner has a field, and changes nothing', async () => {
      const conflict =
        'error: Apply failed with 1 conflict: conflict with "helm": .spec.replicas\nPlease review the fields above--they currently have other managers.'
      programs.add(
        'kubectl',
        `case "$*" in *dry-run*) cat >/dev/null; cat >&2 <<'END'\n${conflict}\nEND\nexit 1;; esac`,
      )
      await assert.rejects(apply('{}', { manager: 'us' }), /exists already, owned by "helm"/)
      assert.equal(programs.calls().length, 1)
    })

    it('sends several objects as one List, which older versions of kubectl read, too', async () => {
      programs.add('kubectl', 'cat >"$BIN/input"')
      await apply([{ kind: 'A' }, { kind: 'B' }], { manager: 'us' })
      const sent = JSON.parse(await readFile(`${programs.path}/input`, 'utf8'))
      assert.equal(sent.kind, 'List')
      assert.deepEqual(sent.items, [{ kind: 'A' }, { kind: 'B' }])
    })
  })
})
