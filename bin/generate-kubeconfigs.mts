#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// A kubeconfig for everyone who logs in to the API server (the table is in lib/pki/kubeconfig.mts).
import { chmod } from 'node:fs/promises'
import { loadCluster } from '../lib/cluster.mts'
import { StepError } from '../lib/errors.mts'
import { readIfThere, writeFileAtomic } from '../lib/files.mts'
import { withLock } from '../lib/lock.mts'
import { problemsOf } from '../lib/pki/certificate-check.mts'
import { authorityOf } from '../lib/pki/certificates.mts'
import { formatKubeconfig, isUpToDate, kubeconfigsOf } from '../lib/pki/kubeconfig.mts'
import { readPair } from '../lib/pki/pki.mts'
import { script } from '../lib/script.mts'
import { step } from '../lib/steps.mts'

const { flags } = script({
  does:
    'Makes a kubeconfig for the administrator, for each kubelet and for each component.\n' +
    'One that is there stays, unless its certificate or the address of the API server changed.',
  reads: ['cluster.env', 'tls/'],
  writes: ['configs/*.kubeconfig'],
  flags: { force: { help: 'make all of them anew' } },
  examples: [
    './bin/generate-kubeconfigs.mts',
    './bin/generate-kubeconfigs.mts && KUBECONFIG=configs/admin.kubeconfig kubectl get nodes',
  ],
})

const cluster = loadCluster()
const kubeconfigs = kubeconfigsOf(cluster)

// Not while certificates are being made: one of them could meet another one's key here.
await withLock(cluster.path('run', 'pki.lock'), 'making kubeconfigs', generate, { wait: 5 })

async function generate(): Promise<void> {
  // 1. What will be embedded has to be worth it: signed by the authority, and with its own key.
  const authority = await readPair(cluster, authorityOf(cluster).name)
  const logins = await step('reading certificates', async () => {
    const measure = {
      authority: authority.certificate,
      renewDays: cluster.settings.CERT_RENEW_DAYS,
    }
    const problems: string[] = []
    const read = kubeconfigs.map(async (entry) => {
      const pair = await readPair(cluster, entry.certificate.name)
      const found = problemsOf(pair, entry.certificate, measure)
      problems.push(...found.map((problem) => `${entry.certificate.name}: ${problem}`))
      return { entry, pair }
    })
    const all = await Promise.all(read)
    if (problems.length === 0) return all
    throw new StepError('certificates are missing or not right', {
      output: problems.join('\n'),
      hint: './bin/generate-certs.mts',
    })
  })

  // 2. A file for each. Whoever has it is that user, so it is for its owner's eyes alone.
  for (const { entry, pair } of logins) {
    const file = cluster.path('configs', `${entry.name}.kubeconfig`)
    const fresh = formatKubeconfig(cluster, entry, {
      authority: authority.pem ?? '',
      certificate: pair.pem ?? '',
      key: pair.keyPem ?? '',
    })
    const present = await readIfThere(file)
    if (!flags.force && present !== undefined && (await isUpToDate(present, fresh))) {
      await chmod(file, 0o600)
      continue
    }
    await step(`configs/${entry.name}.kubeconfig`, () => writeFileAtomic(file, fresh, 0o600))
  }
}
