// Builds the stand-in for the NixOS installer's CD and prints its path:
//   node --import tsx test/rehearsal/build-iso.mts [--kube-bin-dir FOLDER]...
import { parseArgs } from 'node:util'
import { loadCluster } from '../../lib/cluster.mts'
import { describeError } from '../../lib/step-error.mts'
import { debianLayer } from './debian-layer.mts'
import { isoImage } from './iso.mts'
import { kubernetesLayer } from './kubernetes-layer.mts'
import { forgetOld } from './layer-cache.mts'
import { ownLayer } from './own-layer.mts'

/**
 * The image, from the cache where it is there already.
 *
 * @param programs folders of Kubernetes programs for the machines
 * @returns its path
 */
export async function buildIso(programs: readonly string[] = []): Promise<string> {
  const release = loadCluster().settings.NIXOS_VERSION
  await forgetOld()
  const debian = await debianLayer()
  const own = await ownLayer(debian, release)
  const kubernetes = programs.length > 0 ? [await kubernetesLayer(programs)] : []
  return isoImage(debian, own, kubernetes, release)
}

if (process.argv[1] === import.meta.filename) {
  try {
    const { values } = parseArgs({
      options: { 'kube-bin-dir': { type: 'string', multiple: true } },
    })
    console.log(await buildIso(values['kube-bin-dir']))
  } catch (error) {
    console.error(`build-iso: ${describeError(error)}`)
    process.exitCode = 1
  }
}
