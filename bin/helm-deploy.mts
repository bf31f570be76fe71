#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// Any chart on this cluster, with Helm.
import { existsSync } from 'node:fs'
import { mkdir, readFile, rename, rm } from 'node:fs/promises'
import { basename, delimiter, join, resolve } from 'node:path'
import { isDeepStrictEqual } from 'node:util'
import { parse } from 'yaml'
import { $, ProcessOutput } from 'zx/core'
import { loadCluster } from '../lib/cluster.mts'
import { commandOf, lastLines, StepError } from '../lib/errors.mts'
import { sha256 } from '../lib/files.mts'
import { interruption } from '../lib/interrupt.mts'
import { readyWorkers, suggest, useCluster } from '../lib/kubectl.mts'
import { withLock } from '../lib/lock.mts'
import { hostEnvironment } from '../lib/proxy.mts'
import { refuseIf, script } from '../lib/script.mts'
import { step } from '../lib/steps.mts'

const { flags, args } = script({
  does: `Installs a chart with Helm (fetched into tools/ if it is not on the PATH), or upgrades it, and
waits until all its objects are ready. CHART is a folder, an archive, REPO/NAME of a repository
that helm knows, an oci:// address, or with --repo a name in that repository.`,
  reads: ['cluster.env', 'configs/admin.kubeconfig'],
  writes: ['tools/helm-VERSION', 'the cluster: the release'],
  args: '[CHART]',
  flags: {
    repo: { value: 'URL', help: 'the repository that has the chart' },
    version: { value: 'VERSION', help: 'of the chart (the latest)' },
    release: { value: 'NAME', help: "the release's name (the chart's)" },
    namespace: { value: 'NAME', help: "where to; created if it is missing (the release's name)" },
    values: { value: 'FILE', help: 'values in YAML' },
    'keep-values': {
      help: 'keep values that FILE does not set; do nothing if the release has VERSION and FILE',
    },
    delete: { help: 'uninstall the release; with --release, CHART is not needed' },
    timeout: {
      ...{ value: 'SECONDS', number: true },
      help: 'how long to wait until it is ready (300); 0: not at all, nor for workers',
    },
  },
  examples: [
    './bin/helm-deploy.mts --repo https://charts.jetstack.io cert-manager',
    './bin/helm-deploy.mts --release web --namespace web --values my-values.yaml ./my-chart',
  ],
})
const { timeout = 300, repo, version } = flags
const [given = ''] = args
// Helm runs in the project's folder, so what is relative to the caller's needs its whole path.
const values = flags.values && resolve(flags.values)
const isLocal = !repo && existsSync(resolve(given))
const chart = isLocal ? resolve(given) : given
const { release = basename(given).replace(/(-v?\d+\.\d+\.\d+.*)?\.tgz$/, '') } = flags
const { namespace = release } = flags
refuseIf(!given && !(flags.delete && flags.release), 'missing argument: CHART')
const cluster = loadCluster()
const signal = interruption()
await useCluster(cluster)

await withLock(cluster.path('run', 'helm.lock'), 'running helm', async () => {
  if (flags.delete) {
    return step(`delete ${release}`, async () => {
      await ensureHelm()
      if (!(await usableRelease())) return
      await $({ signal })`helm uninstall ${release} --namespace ${namespace} --wait`
    })
  }
  if (timeout > 0) await step('pods can start', () => readyWorkers(cluster))
  await step('helm', ensureHelm)
  const notes = await step(`${release} in namespace ${namespace}`, async (detail) => {
    const former = await usableRelease()
    if (flags['keep-values'] && former?.status === 'deployed' && former.version === version) {
      const changed = await changedValues()
      if (changed.length === 0) {
        detail('is there already')
        return ''
      }
      detail(`changed: ${changed.join(', ')}`)
    }
    // Helm ignores --version for a folder or an archive.
    if (isLocal && version) {
      const { version: found } = parse((await $`helm show chart ${chart}`).stdout)
      if (found !== version) {
        throw new StepError(`${given} is version ${found} of the chart, not ${version}`)
      }
    }
    const options = [
      ...(repo ? ['--repo', repo] : []),
      ...(version ? ['--version', version] : []),
      ...(values ? ['--values', values] : []),
      ...(flags['keep-values'] ? ['--reset-then-reuse-values'] : []),
      ...(timeout > 0 ? ['--wait', '--timeout', `${timeout}s`] : []),
    ]
    // By the label that charts usually give their pods.
    const instance = `app.kubernetes.io/instance=${release}`
    const ofRelease = [`--namespace=${namespace}`, `--selector=${instance}`]
    const pods = () => $({ nothrow: true, timeout: '20s' })`kubectl get pods ${ofRelease}`
    let looking = timeout > 0 ? setTimeout(look, 3000) : undefined
    async function look() {
      const waiting = (await pods()).stdout.split('\n').slice(1)
      detail(waiting.find((pod) => !/ (Running|Completed) /.test(pod)) ?? '')
      if (looking) looking = setTimeout(look, 3000)
    }
    try {
      const proxy = await hostEnvironment(cluster)
      // Go ignores SSL_CERT_FILE on macOS alone, and --ca-file can make Helm bypass the proxy.
      const ca = process.platform === 'darwin' && !isLocal && proxy.SSL_CERT_FILE
      if (ca) options.push('--ca-file', ca)
      const $$ = $({ signal, env: { ...$.env, ...proxy } })
      const upgrade =
        await $$`helm upgrade --install ${release} ${chart} ${options} --namespace ${namespace} --create-namespace`
      return upgrade.stdout
    } catch (error) {
      signal.throwIfAborted()
      if (timeout === 0 || !(error instanceof ProcessOutput)) throw error
      const { stdout: table, exitCode } = await pods()
      const late = /(?<!webhook.*)(context deadline(?!.*\(Client)|timed out waiting)/
      if (exitCode !== 0 || !late.test(error.stderr)) throw error
      const output = lastLines(`${error.stderr}\n${table}`)
      const hint = `kubectl describe pods ${ofRelease.join(' ')}`
      throw new StepError(`${release} is not ready`, {
        ...{ output, hint, command: commandOf(error), cause: error },
      })
    } finally {
      clearTimeout(looking)
      looking = undefined
    }
  })
  if (notes) console.log(`${notes.trim()}\n`)
  if (notes) suggest(`kubectl get all --namespace=${namespace}`)
})

/**
 * Makes `helm …` work: with the one on the PATH if it is 3.14 or later (for
 * --reset-then-reuse-values), else with HELM_VERSION in tools/, which is fetched if it is missing.
 */
async function ensureHelm(): Promise<void> {
  const { stdout } = await $({ nothrow: true })`helm version --template '{{.Version}}'`
  const [, major = 0, minor = 0] = (stdout.match(/^v(\d+)\.(\d+)\./) ?? []).map(Number)
  if (major > 3 || (major === 3 && minor >= 14)) return

  const wanted = cluster.settings.HELM_VERSION
  const folder = cluster.path('tools', `helm-${wanted}`)
  $.env = { ...$.env, PATH: `${folder}${delimiter}${$.env.PATH}` }
  if (existsSync(join(folder, 'helm'))) return
  const computer = (await $`uname -sm`).stdout.trim().toLowerCase()
  const target = computer.replace(' ', '-').replace('x86_64', 'amd64').replace('aarch64', 'arm64')
  if (!/^(linux|darwin)-(amd64|arm64)$/.test(target)) {
    throw new StepError(`this script cannot download Helm for ${computer}`, {
      hint: 'install it (https://helm.sh/docs/intro/install/) so that helm is on the PATH',
    })
  }
  const url = `https://get.helm.sh/helm-v${wanted}-${target}.tar.gz`
  const partial = `${folder}.partial`
  const [archive, checksum] = [join(partial, 'helm.tar.gz'), join(partial, 'helm.sha256sum')]
  await rm(partial, { recursive: true, force: true })
  await mkdir(partial, { recursive: true })
  try {
    const $$ = $({ env: { ...$.env, ...(await hostEnvironment(cluster)) }, nothrow: true })
    const { exitCode, stderr } =
      await $$`curl -q -fsSL --retry 2 --fail-early -o ${checksum} ${url}.sha256sum -o ${archive} ${url}`
    if (exitCode !== 0) {
      throw new StepError(`Helm ${wanted} for ${target} could not be downloaded`, {
        output: stderr.trim(),
        command: `curl -fLO ${url}`,
        hint: 'is HELM_VERSION in cluster.env a released version, and the internet (PROXY_…) reachable?',
      })
    }
    const expected = await readFile(checksum, 'utf8')
    if (!expected.startsWith(`${sha256(await readFile(archive))} `)) {
      throw new StepError(`the checksum of ${url} does not match, so it was deleted`)
    }
    await $`tar -xzf ${archive} -C ${partial} ${target}/helm`
    await rename(join(partial, target), folder)
  } finally {
    await rm(partial, { recursive: true, force: true })
  }
}

/** A release's latest revision; its status is deployed, failed, pending-upgrade, …; its chart's version. */
type Release = { revision: number; status: string; version: string }

/**
 * The release, undefined if there is none. If a helm that was killed left it pending, so that every
 * change is refused, it is repaired first: by a rollback to the interrupted revision itself, which
 * completes it and deletes nothing.
 */
async function usableRelease(): Promise<Release | undefined> {
  const metadata = async (): Promise<Release | undefined> => {
    const $$ = $({ nothrow: true })
    const found = await $$`helm get metadata ${release} --namespace ${namespace} --output json`
    if (found.exitCode === 0) return JSON.parse(found.stdout)
    if (/release: not found/.test(found.stderr)) return undefined
    throw found
  }
  const found = await metadata()
  if (found?.status.startsWith('pending-')) {
    // If this fails, the release counts as failed, which an upgrade repairs.
    await $({ nothrow: true })`helm rollback ${release} ${found.revision} --namespace ${namespace}`
  }
  if (found?.status === 'uninstalling') await $`helm uninstall ${release} --namespace ${namespace}`
  return found && metadata()
}

/** The names of values in FILE that the release was not given, or given differently. */
async function changedValues(): Promise<string[]> {
  const isMap = (value: unknown): value is Record<string, unknown> =>
    typeof value === 'object' && value !== null && !Array.isArray(value)
  const compare = (wanted: unknown, has: unknown, path: string[]): string[] => {
    const isSame = isDeepStrictEqual(wanted ?? null, has ?? null)
    if (!isMap(wanted)) return isSame ? [] : [path.join('.')]
    const former = isMap(has) ? has : {}
    return Object.keys(wanted).flatMap((key) => compare(wanted[key], former[key], [...path, key]))
  }
  const given = await $`helm get values ${release} --namespace ${namespace} --output json`
  return compare(values ? parse(await readFile(values, 'utf8')) : {}, JSON.parse(given.stdout), [])
}
