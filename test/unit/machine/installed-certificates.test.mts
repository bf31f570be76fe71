import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { mkdir, rm } from 'node:fs/promises'
import { after, before, describe, it } from 'node:test'
import { certificateProbe } from '../../../lib/machine/installed-certificates.mts'
import { type Checkout, makeCheckout, run } from '../../checkout.mts'

describe('the certificates on a machine', () => {
  let checkout: Checkout
  let printed: string
  before(async () => {
    checkout = await makeCheckout({ settings: { CERT_DAYS: 100 } })
    const home = checkout.path('machine')
    await mkdir(home)
    for (const step of ['certs', 'kubeconfigs']) await run(checkout, `bin/generate-${step}.mts`)
    await run(checkout, 'cp', ['-r', 'tls', 'machine/pki'])
    await run(checkout, 'sh', ['-c', 'cp configs/kube-scheduler.kubeconfig machine/'])
    await rm(checkout.path('machine', 'pki', 'known_hosts'))
    const here = certificateProbe.command.replace('/var/lib/kubernetes', `'${home}'`)
    printed = execFileSync('bash', ['-euo', 'pipefail', '-c', here]).toString()
  })
  after(() => checkout.remove())

  it('are those of the files and of the kubeconfigs, with their days left', () => {
    const found = new Map(certificateProbe.read(printed).map((found) => [found.file, found]))
    assert.match(found.get('/var/lib/kubernetes/pki/ca.pem')?.subject ?? '', /CN=Kubernetes$/m)
    assert.equal(found.get('/var/lib/kubernetes/pki/kubernetes.pem')?.daysLeft, 99)
    const scheduler = found.get('/var/lib/kubernetes/kube-scheduler.kubeconfig')
    assert.match(scheduler?.subject ?? '', /CN=system:kube-scheduler$/m)
  })

  it('leave the machine without any private key', () => {
    assert.doesNotMatch(printed, /PRIVATE KEY/)
  })

  it('are told with negative days once they have expired', (t) => {
    t.mock.timers.enable({ apis: ['Date'], now: Date.now() + 150 * 86_400_000 })
    const found = certificateProbe
      .read(printed)
      .find(({ file }) => file.endsWith('/kubernetes.pem'))
    assert.equal(found?.daysLeft, -51)
  })
})
