// A release's record as Helm writes it: what lib/kubernetes/helm.mts reads, from the other side.
import { gzipSync } from 'node:zlib'
import type { HelmRelease } from '../../lib/kubernetes/helm.mts'

/** The Secret of one revision, in namespace kube-system. */
export function helmRecord(
  name: string,
  { revision, status, chartVersion, values }: Omit<HelmRelease, 'secret'>,
): object {
  const release = {
    name,
    namespace: 'kube-system',
    version: revision,
    info: { status },
    chart: { metadata: { name, version: chartVersion } },
    config: values,
  }
  return {
    apiVersion: 'v1',
    kind: 'Secret',
    metadata: {
      name: `sh.helm.release.v1.${name}.v${revision}`,
      namespace: 'kube-system',
      labels: { owner: 'helm', name, status, version: String(revision) },
    },
    type: 'helm.sh/release.v1',
    stringData: { release: gzipSync(JSON.stringify(release)).toString('base64') },
  }
}
