#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// The installer ISO of NixOS, in images/: downloaded and verified, or a file of yours.
import { relative } from 'node:path'
import { loadCluster } from '../lib/cluster.mts'
import { download } from '../lib/download/download.mts'
import { hostProxy } from '../lib/download/host-proxy.mts'
import {
  adoptIso,
  findRelease,
  inspectIso,
  isoFile,
  isoRecord,
  isoSource,
  recordIso,
  sourceName,
} from '../lib/download/iso.mts'
import { progressListener } from '../lib/download/progress-bar.mts'
import { StepError } from '../lib/errors.mts'
import { interruption } from '../lib/interrupt.mts'
import { withLock } from '../lib/lock.mts'
import { detectArchitecture, detectSystem } from '../lib/qemu/processor.mts'
import { script } from '../lib/script.mts'
import { step } from '../lib/steps.mts'

const { flags } = script({
  does: `Has the NixOS installer ISO in images/: downloads the minimal one of the channel
NIXOS_VERSION, for this computer's processor, and verifies its checksum. A download that broke
off goes on where it was. An ISO that is there and verified is kept.`,
  reads: ['cluster.env'],
  writes: [
    'images/nixos-VERSION-ARCH.iso',
    'images/nixos-VERSION-ARCH.iso.json (what was verified)',
  ],
  flags: {
    'iso-url': {
      value: 'URL|FILE',
      help: 'another ISO, instead of NIXOS_ISO_URL; a file is linked to, not copied',
    },
    force: { help: 'download even if there is a verified one' },
  },
  examples: [
    './bin/download-iso.mts',
    './bin/download-iso.mts --iso-url ~/Downloads/nixos-minimal.iso',
  ],
})

const cluster = loadCluster()
const host = { arch: await detectArchitecture(detectSystem()) }
const source = isoSource(cluster, host, flags['iso-url'])
const file = isoFile(cluster, host)
const name = relative(cluster.root, file)
const signal = interruption()

await withLock(cluster.path('run', 'download-iso.lock'), 'downloading the ISO', async () => {
  const known = flags.force ? undefined : await isoRecord(file)
  const chosen = source.kind === 'file' || !source.official
  if (known && (!chosen || known.source === sourceName(source))) {
    console.error(`✓ ${name} is there and verified (from ${known.source})`)
    return
  }

  if (source.kind === 'file') {
    const sha256 = await step(`look at ${source.path}`, () =>
      adoptIso(source.path, file, host, signal),
    )
    await recordIso(file, sourceName(source), sha256)
    return
  }

  const request = { proxy: hostProxy(cluster), signal }
  const release = await step(`ask for ${sourceName(source)}`, () =>
    findRelease(source.url, request),
  )
  if (!release.sha256) {
    const reason = `there is no checksum file ${sourceName(source)}.sha256`
    if (source.official) throw new StepError(`${reason}: the ISO cannot be verified`)
    console.error(`! ${reason}: only that it is a whole installer ISO can be verified`)
  }
  const { sha256 } = await step('download the ISO', (detail) =>
    download(release.url, file, {
      ...request,
      sha256: release.sha256,
      verify: (path) => inspectIso(path, host),
      onProgress: progressListener(detail, process.stderr.isTTY ? undefined : console.error),
    }),
  )
  await recordIso(file, sourceName(source), sha256)
  console.error(`✓ ${name} is there and verified`)
})
