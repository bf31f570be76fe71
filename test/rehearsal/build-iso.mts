// Builds the stand-in for the NixOS installer's CD and prints its path:
//   node --import tsx test/rehearsal/build-iso.mts [--kube-bin-dir FOLDER]... [--images]
import { parseArgs } from 'node:util'
import { loadCluster } from '../../lib/cluster.mts'
import { describeError } from '../../lib/errors.mts'
import { type DebianLayer, debianLayer } from './debian-layer.mts'
import { imageArchives, imagesLayer } from './images.mts'
import { isoImage } from './iso.mts'
import { kubernetesLayer } from './kubernetes-layer.mts'
import { forgetOld } from './layer-cache.mts'
import { ownLayer } from './own-layer.mts'

interface Contents {
  /** Folders of Kubernetes programs for the machines. */
  programs?: readonly string[]
  /** Whether workers get the images of pods, too. */
  images?: boolean
  /** Docker archives of further images. */
  further?: readonly string[]
}

/** The image, from the cache where it is there already. @returns its path */
export async function buildIso(contents: Contents = {}): Promise<string> {
  const { programs = [], images = false, further = [] } = contents
  const release = loadCluster().settings.NIXOS_VERSION
  await forgetOld()
  const debian = await debianLayer()
  const own = await ownLayer(debian, release)
  const layers: string[] = []
  if (programs.length > 0) layers.push(await kubernetesLayer(programs))
  if (images) layers.push(await imagesOf(debian, further))
  return isoImage(debian, own, layers, release)
}

async function imagesOf(debian: DebianLayer, further: readonly string[]): Promise<string> {
  const { archives, missing } = await imageArchives(loadCluster().settings, debian.busybox)
  for (const reason of missing) console.error(`! no image: ${reason}`)
  return imagesLayer(debian, [...archives, ...further])
}

if (process.argv[1] === import.meta.filename) {
  try {
    const { values } = parseArgs({
      options: {
        'kube-bin-dir': { type: 'string', multiple: true },
        images: { type: 'boolean' },
      },
    })
    const { 'kube-bin-dir': programs, ...rest } = values
    console.log(await buildIso({ ...(programs ? { programs } : {}), ...rest }))
  } catch (error) {
    console.error(`build-iso: ${describeError(error)}`)
    process.exitCode = 1
  }
}
