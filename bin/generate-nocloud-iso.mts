#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// Lays out what each machine is given. (No ISO is made; the name is from the original.)
import { relative } from 'node:path'
import { chooseNodes, loadCluster } from '../lib/cluster.mts'
import { script } from '../lib/script.mts'
import { stagedFiles } from '../lib/staging/staged-files.mts'
import { stage, stagingFolder } from '../lib/staging/staging.mts'
import { step } from '../lib/steps.mts'

const { flags, args } = script({
  does: [
    "Stages each node's NixOS configuration with the certificates, kubeconfigs and host key that",
    'this node needs. The installer and reconfig copy it to the machine.',
  ].join('\n'),
  reads: [
    'cluster.env',
    'configs/*.nix',
    'configs/*.kubeconfig',
    'configs/encryption-config.yaml',
    'tls/',
  ],
  writes: ['cloud-init/NODE/nixos/'],
  flags: { list: { help: 'show which file goes where on the machine, and stage nothing' } },
  args: '[NODE...]',
  examples: ['./bin/generate-nocloud-iso.mts', './bin/generate-nocloud-iso.mts --list sigma'],
})

const cluster = loadCluster()
const nodes = chooseNodes(cluster, args)

if (flags.list) {
  for (const node of nodes) {
    console.log(`${node.name}:`)
    for (const { source, target, mode } of stagedFiles(cluster, node)) {
      console.log(`  ${mode.toString(8)}  ${target}  from ${relative(cluster.root, source)}`)
    }
    console.log('  644  /etc/nixos/cluster.json  from cluster.env')
  }
  process.exit()
}

for (const node of nodes) {
  await step(`stage ${node.name}`, async (detail) => {
    const files = await stage(cluster, node)
    detail(`${files.length} files in ${relative(cluster.root, stagingFolder(cluster, node))}`)
  })
}
