// helm-deploy with a real Helm and small charts.
import assert from 'node:assert/strict'
import { mkdir, writeFile } from 'node:fs/promises'
import { before, describe, it } from 'node:test'
import type { HollowCluster } from '../../kubernetes/hollow-cluster.mts'
import { goPrograms } from '../../kubernetes/programs.mts'
import type { Shared } from './shared.mts'

const helm = await goPrograms('helm')

const template = `\
apiVersion: apps/v1
kind: Deployment
metadata: {name: {{ .Release.Name }}}
spec:
  replicas: {{ .Values.replicas }}
  selector: {matchLabels: {app.kubernetes.io/{{ .Values.label }}: {{ .Release.Name }}}}
  template:
    metadata: {labels: {app.kubernetes.io/{{ .Values.label }}: {{ .Release.Name }}}}
    spec: {containers: [{name: web, image: registry.example/web}]}
`

export const helmDeploy = (shared: Shared) =>
  describe('helm-deploy', { skip: helm.reason ?? false }, () => {
    let hollow: HollowCluster
    before(async () => {
      hollow = shared.hollow
      hollow.programs.add('helm', `exec '${helm.folder}/helm' "$@"`)
      const chart = hollow.checkout.path('my chart')
      await mkdir(`${chart}/templates`, { recursive: true })
      await writeFile(`${chart}/Chart.yaml`, 'apiVersion: v2\nname: web\nversion: 1.2.3\n')
      await writeFile(`${chart}/values.yaml`, 'replicas: 1\nlabel: instance\n')
      await writeFile(`${chart}/templates/web.yaml`, template)
      await writeFile(`${chart}/templates/NOTES.txt`, 'Enjoy {{ .Release.Name }}.\n')
    })

    const deploy = (...args: string[]) => hollow.script('helm-deploy', ...args)
    const replicas = async (namespace: string) => {
      const found = ['deployment/web', `--namespace=${namespace}`]
      return (await hollow.get<{ spec: { replicas: number } }>(...found)).spec.replicas
    }

    it('installs a chart of a folder, in a namespace of its own', async () => {
      const { exitCode, stdout, stderr } = await deploy('--release', 'web', 'my chart')
      assert.equal(exitCode, 0, stderr)
      assert.match(stdout, /Enjoy web\./)
      assert.equal(await replicas('web'), 1)
    })

    it('upgrades it with other values', async () => {
      const values = hollow.checkout.path('web.yaml')
      await writeFile(values, 'replicas: 2\n')
      const { exitCode, stderr } = await deploy('--release=web', `--values=${values}`, 'my chart')
      assert.equal(exitCode, 0, stderr)
      assert.equal(await replicas('web'), 2)
    })

    it('takes an archive, and names the release after its chart', async () => {
      await hollow.shell("helm package 'my chart'")
      const { exitCode, stderr } = await deploy('--namespace', 'other', 'web-1.2.3.tgz')
      assert.equal(exitCode, 0, stderr)
      assert.equal(await replicas('other'), 1)
    })

    it('shows the pods when they do not become ready in time', async () => {
      hollow.setFate(() => ({ reason: 'CrashLoopBackOff', message: 'back-off restarting' }))
      const { exitCode, stderr } = await deploy('--timeout=4', '--release=stuck', 'my chart')
      hollow.setFate()
      assert.equal(exitCode, 1)
      assert.match(stderr, /stuck is not ready\n/)
      assert.match(stderr, /stuck-\S+ +0\/1 +CrashLoopBackOff/)
      assert.match(stderr, /command: helm upgrade --install stuck /)
    })

    it('says that they are not ready even if it cannot find them', async () => {
      await writeFile(hollow.checkout.path('label.yaml'), 'label: name\n')
      hollow.setFate(() => ({ reason: 'CrashLoopBackOff', message: 'back-off restarting' }))
      const options = ['--timeout=4', '--release=unseen', '--values=label.yaml']
      const { exitCode, stderr } = await deploy(...options, 'my chart')
      hollow.setFate()
      assert.equal(exitCode, 1)
      assert.match(stderr, /: unseen is not ready\n/)
      assert.doesNotMatch(stderr, /API server/)
    })

    it('says that a chart cannot be fetched, also for a release that has pods', async () => {
      const release = ['--release=web', '--namespace=web']
      const { exitCode, stderr } = await deploy('--repo=http://127.0.0.1:1/', ...release, 'nginx')
      assert.equal(exitCode, 1)
      assert.match(stderr, /the chart repository cannot be reached/)
      assert.doesNotMatch(stderr, /is not ready/)
    })

    it('deletes releases, and again', async () => {
      for (const [release, namespace] of [
        ['web', 'web'],
        ['web', 'other'],
        ['stuck', 'stuck'],
        ['unseen', 'unseen'],
        ['web', 'web'],
      ] as const) {
        const { exitCode, stderr } = await deploy(
          ...['--delete', `--release=${release}`, `--namespace=${namespace}`, 'my chart'],
        )
        assert.equal(exitCode, 0, stderr)
      }
      const left = await hollow.kubectl(['get', 'deployments', '--all-namespaces', '-o=name'])
      assert.doesNotMatch(left, /web|stuck|unseen/)
    })
  })
