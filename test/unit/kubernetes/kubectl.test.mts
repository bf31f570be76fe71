import assert from 'node:assert/strict'
import { after, before, describe, it } from 'node:test'
import { loadCluster } from '../../../lib/cluster.mts'
import { StepError } from '../../../lib/errors.mts'
import { Kubectl } from '../../../lib/kubernetes/kubectl.mts'
import { projectRoot } from '../../checkout.mts'
import { FakePrograms } from '../../fake-programs.mts'

const kubelet = 'https://192.168.100.11:10250'

/** What kubectl says, word by word, to what is said about it. */
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
      hint: /certs-check.*expired.*make reconfig/,
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
    { reason: /encrypted with another key/, hint: /former configs\/encryption-config\.yaml/ },
  ],
  [
    'Error from server (NotFound): pods "web" not found',
    { reason: /kubectl ended with status 1/, hint: /^$/ },
  ],
]

describe('kubectl', () => {
  const programs = new FakePrograms()
  const path = process.env.PATH
  const kubectl = new Kubectl(loadCluster({ root: projectRoot, env: {} }))
  before(() => {
    process.env.PATH = `${programs.path}:${path}`
  })
  after(() => {
    process.env.PATH = path
    programs.remove()
  })
  const failure = async () => {
    const error = await kubectl.run(['get', 'pods']).catch((error: unknown) => error)
    assert.ok(error instanceof StepError)
    return error
  }

  for (const [message, { reason, hint }] of causes) {
    it(`explains "${message.slice(0, 100)}"`, async () => {
      programs.add('kubectl', `cat >&2 <<'END'\n${message}\nEND\nexit 1`)
      const { message: said, explanation } = await failure()
      assert.match(said, reason)
      assert.match(explanation.hint ?? '', hint)
      assert.equal(explanation.output, message)
    })
  }

  it('is told as one would type it', async () => {
    programs.add('kubectl', 'exit 1')
    const { explanation } = await failure()
    assert.equal(explanation.command, 'KUBECONFIG=configs/admin.kubeconfig kubectl get pods')
  })

  it('works with the kubeconfig of the cluster, whatever the environment says', async () => {
    programs.add('kubectl', 'echo "$KUBECONFIG"')
    process.env.KUBECONFIG = '/nowhere'
    const said = await kubectl.run([])
    delete process.env.KUBECONFIG
    assert.match(said, /\/configs\/admin\.kubeconfig$/m)
  })

  it('says that another owner has a field, and changes nothing', async () => {
    const conflict =
      'error: Apply failed with 1 conflict: conflict with "helm": .spec.replicas\nPlease review the fields above--they currently have other managers.'
    programs.add(
      'kubectl',
      `case "$*" in *dry-run*) cat >&2 <<'END'\n${conflict}\nEND\nexit 1;; esac`,
    )
    const before = programs.calls().length
    const applied = kubectl.apply('{}', { manager: 'us' })
    await assert.rejects(applied, /there already, put there by "helm"/)
    assert.equal(programs.calls().length, before + 1)
  })
})
