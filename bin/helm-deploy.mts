#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// Any chart on this cluster, with Helm.
import { existsSync } from 'node:fs'
import { basename, resolve } from 'node:path'
import { $, ProcessOutput } from 'zx/core'
import { loadCluster } from '../lib/cluster.mts'
import { commandOf, lastLines, StepError } from '../lib/errors.mts'
import { ensureHelm, usableRelease } from '../lib/helm.mts'
import { interruption } from '../lib/interrupt.mts'
import { readyWorkers, useCluster } from '../lib/kubectl.mts'
import { withLock } from '../lib/lock.mts'
import { hostEnvironment } from '../lib/proxy.mts'
import { script } from '../lib/script.mts'
import { step } from '../lib/steps.mts'

const { flags, args } = script({
  does: `Installs a chart with Helm (fetched into tools/ if it is not on the PATH), or upgrades it, and
waits until all it consists of is ready. CHART is a folder, an archive, REPO/NAME of a repository
that helm knows, an oci:// address, or with --repo a name in that repository.`,
  reads: ['cluster.env', 'configs/admin.kubeconfig'],
  writes: ['tools/helm-VERSION'],
  args: 'CHART',
  flags: {
    repo: { value: 'URL', help: 'the repository that has the chart' },
    version: { value: 'VERSION', help: 'of the chart (the latest)' },
    release: { value: 'NAME', help: "the release's name (the chart's)" },
    namespace: { value: 'NAME', help: "where to; created if it is missing (the release's name)" },
    values: { value: 'FILE', help: 'values in YAML' },
    delete: { help: 'uninstall the release' },
    timeout: { value: 'SECONDS', number: true, help: 'how long to wait until it is ready (300)' },
  },
  examples: [
    './bin/helm-deploy.mts --repo https://charts.jetstack.io cert-manager',
    './bin/helm-deploy.mts --release web --namespace web --values my-values.yaml ./my-chart',
  ],
})
const { timeout = 300, repo, version, values } = flags
const [given = ''] = args
const here = resolve(given)
// Helm runs in the project's folder, so what is relative to the caller's needs its whole path.
const chart = !repo && existsSync(here) ? here : given
const chartName = basename(given).replace(/(-v?\d+\.\d+\.\d+.*)?\.tgz$/, '')
const { release = chartName, namespace = release } = flags
const cluster = loadCluster()
const signal = interruption()
await useCluster(cluster)

await withLock(cluster.path('run', 'helm.lock'), 'running helm', async () => {
  if (flags.delete) {
    return step(`delete ${release}`, async () => {
      await ensureHelm(cluster)
      if (!(await usableRelease(release, namespace))) return
      await $({ signal })`helm uninstall ${release} --namespace ${namespace} --wait`
    })
  }
  await step('pods can start', () => readyWorkers(cluster))
  await step('helm', () => ensureHelm(cluster))
  const notes = await step(`${release} in namespace ${namespace}`, async (detail) => {
    // Repairs what a helm that was killed has left behind.
    await usableRelease(release, namespace)
    const options = [
      ...(repo ? ['--repo', repo] : []),
      ...(version ? ['--version', version] : []),
      ...(values ? ['--values', resolve(values)] : []),
    ]
    // By the label that charts usually give their pods.
    const ofRelease = [
      `--namespace=${namespace}`,
      `--selector=app.kubernetes.io/instance=${release}`,
    ]
    const pods = async () => (await $({ nothrow: true })`kubectl get pods ${ofRelease}`).stdout
    const looking = setInterval(async () => {
      const waiting = (await pods()).split('\n').slice(1)
      detail(waiting.find((pod) => !/ (Running|Completed) /.test(pod)) ?? '')
    }, 3000)
    try {
      const helm = $({ signal, env: { ...$.env, ...(await hostEnvironment(cluster)) } })
      return (
        await helm`helm upgrade --install ${release} ${chart} ${options} --namespace ${namespace} --create-namespace --wait --timeout ${timeout}s`
      ).stdout
    } catch (error) {
      signal.throwIfAborted()
      const table = await pods()
      if (!table || !(error instanceof ProcessOutput)) throw error
      const output = lastLines(`${error.stderr}\n${table}`)
      const hint = `kubectl describe pods ${ofRelease.join(' ')}`
      throw new StepError(`${release} is not ready`, {
        ...{ output, hint, command: commandOf(error), cause: error },
      })
    } finally {
      clearInterval(looking)
    }
  })
  console.log(notes.trim())
  console.log(`\nTry: kubectl get all --namespace=${namespace}`)
})
