// Cilium beside kube-proxy: services in either of its modes, and KUBE_PROXY_MODE changed in a
// cluster that runs.
import assert from 'node:assert/strict'
import { $ } from 'zx'
import type { Rehearsal, Step } from '../rehearsal/rehearsal.mts'
import { ciliumStatus, installCilium } from './operations.mts'
import { podNetwork } from './pod-network.mts'

/** For a cluster with KUBE_PROXY_MODE=nftables. */
export const kubeProxySteps: readonly Step[] = [
  ['kube-proxy in nftables mode beside Cilium', ciliumStatus],
  ['pod network with nftables', podNetwork],
  ['KUBE_PROXY_MODE=iptables', (rehearsal) => change(rehearsal, 'iptables')],
  ['pod network with iptables', podNetwork],
  ['KUBE_PROXY_MODE=cilium', (rehearsal) => change(rehearsal, 'cilium')],
  ['pod network without kube-proxy', podNetwork],
  ['KUBE_PROXY_MODE is changed, and nothing else is done', notApplied],
]

async function change(rehearsal: Rehearsal, mode: string): Promise<void> {
  await setMode(mode)
  await rehearsal.script('reconfig')
  await installCilium(rehearsal)
  await ciliumStatus(rehearsal)
}

/** The dashboard and status say what is missing on which machine. */
async function notApplied(rehearsal: Rehearsal): Promise<void> {
  await setMode('nftables')
  try {
    const { problems } = JSON.parse(await rehearsal.output('cluster-status', '--json'))
    for (const { name } of rehearsal.cluster.workers) {
      assert.match(JSON.stringify(problems), new RegExp(`${name}[^"]*kube-proxy`))
    }
  } finally {
    await setMode('cilium')
  }
}

async function setMode(mode: string): Promise<void> {
  const expression = `s/^KUBE_PROXY_MODE=.*/KUBE_PROXY_MODE=${mode}/`
  await $`sed -i ${expression} cluster.env`
}
