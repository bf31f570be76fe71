// deploy-local-storage with the real provisioner, which runs here with the manifest's configuration
// and the rights of its service account. Its helper pods, as all pods, only seem to run.
import assert from 'node:assert/strict'
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdir, open, readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import type { ApiObject } from '../../../lib/kubectl.mts'
import { becomes } from '../../../lib/wait.mts'
import type { HollowCluster } from '../../kubernetes/hollow-cluster.mts'
import { defaultFate } from '../../kubernetes/hollow-nodes.mts'
import { goPrograms } from '../../kubernetes/programs.mts'
import { freePorts } from '../../ports.mts'
import type { Shared } from './shared.mts'

const localPath = await goPrograms('local-path-provisioner')
interface Deployment {
  spec: { template: { spec: { containers: { command: string[] }[] } } }
}

interface Volume extends ApiObject {
  spec: { local?: { path: string }; storageClassName: string; nodeAffinity: object }
}

export const deployLocalStorage = (shared: Shared) =>
  describe('deploy-local-storage', { skip: localPath.reason ?? false }, () => {
    let hollow: HollowCluster
    let provisioner: ChildProcess | undefined
    let log: string
    before(async () => {
      hollow = shared.hollow
      log = hollow.checkout.path('provisioner.log')
      await hollow.kubectl(['apply', '-f=-'], (await deploy('--print')).stdout)
      provisioner = await startProvisioner()
    })
    after(async () => {
      await stopProvisioner()
    })

    const deploy = (...args: string[]) => hollow.script('deploy-local-storage', ...args)
    const classes = async () =>
      (await hollow.get<{ items: ApiObject[] }>('storageclasses')).items.map(
        (each) => each.metadata,
      )
    const volumes = async () => (await hollow.get<{ items: Volume[] }>('persistentvolumes')).items

    it('makes a default class and one for each worker', async () => {
      const found = (await classes()).map(({ name, annotations = {} }) => {
        const isDefault = annotations['storageclass.kubernetes.io/is-default-class'] === 'true'
        return isDefault ? `${name} (default)` : name
      })
      assert.deepEqual(found.sort(), [
        'local-path (default)',
        'local-path-gamma',
        'local-path-sigma',
      ])
    })

    it('creates volumes for claims of all classes, and removes them', async () => {
      const seen = new Map<string, Volume>()
      let watching = true
      const watch = (async () => {
        while (watching)
          for (const volume of await volumes()) seen.set(volume.metadata.name, volume)
      })()
      const [former] = (await hollow.get<{ items: object[] }>('storageclasses')).items
      const metadata = { name: 'local-path-delta', labels: { 'local-path/worker': 'delta' } }
      await hollow.kubectl(['create', '-f=-'], JSON.stringify({ ...former, metadata }))
      const { exitCode, stderr } = await deploy()
      watching = false
      await watch
      assert.equal(exitCode, 0, stderr + (await readFile(log, 'utf8')))
      const made = [...seen.values()].filter(({ spec }) => spec.local)
      assert.deepEqual(new Set(made.map(({ spec }) => spec.storageClassName)).size, 3)
      for (const { spec } of made) {
        assert.match(spec.local?.path ?? '', /^\/var\/lib\/local-path\/pvc-\S+_storage-probe_/)
        const worker = spec.storageClassName.replace(/^local-path-?/, '')
        assert.match(JSON.stringify(spec.nodeAffinity), new RegExp(worker || 'sigma|gamma'))
      }
      assert.deepEqual(await volumes(), [])
    })

    it('deletes the class of a worker that cluster.env no longer has', async () => {
      const names = (await classes()).map(({ name }) => name)
      assert.deepEqual(names.sort(), ['local-path', 'local-path-gamma', 'local-path-sigma'])
    })

    it('gives the provisioner the rights it needs', async () => {
      const text = await readFile(log, 'utf8')
      assert.match(text, /Creating volume/)
      assert.match(text, /Deleting volume/)
      assert.doesNotMatch(text, /forbidden/)
    })

    it('says why its pods are not there while no volumes are created', async () => {
      // That of the run before goes in its own time.
      const namespaces = () => hollow.kubectl(['get', 'namespaces', '--output=name'])
      assert.ok(await becomes(async () => !(await namespaces()).includes('storage-probe'), 120))
      await stopProvisioner()
      const { exitCode, stderr } = await deploy('--timeout', '1')
      provisioner = await startProvisioner()
      assert.equal(exitCode, 1)
      assert.match(stderr, /✓ local-path-provisioner is ready/)
      assert.match(stderr, /not all pods are Succeeded after 1 s\n.*write-default/)
    })

    it('fails when data is lost', async () => {
      hollow.setFate((pod) => (pod.metadata.name.startsWith('read-') ? 'Failed' : defaultFate(pod)))
      const { exitCode, stderr } = await deploy()
      hollow.setFate()
      assert.equal(exitCode, 1)
      assert.match(stderr, /pod read-\S+ failed/)
    })

    it('is not deleted while there are volumes', async () => {
      // Those of the run before are deleted with its namespace.
      assert.ok(await becomes(async () => (await volumes()).length === 0, 120))
      const claim = {
        apiVersion: 'v1',
        kind: 'PersistentVolumeClaim',
        metadata: { name: 'kept', namespace: 'default' },
        spec: { accessModes: ['ReadWriteOnce'], resources: { requests: { storage: '1Mi' } } },
      }
      const volume = { name: 'data', persistentVolumeClaim: { claimName: 'kept' } }
      const pod = {
        apiVersion: 'v1',
        kind: 'Pod',
        metadata: { name: 'user', namespace: 'default' },
        spec: { containers: [{ name: 'user', image: 'none' }], volumes: [volume] },
      }
      await hollow.kubectl(['create', '-f=-'], `${JSON.stringify(claim)}\n${JSON.stringify(pod)}`)
      assert.ok(await becomes(async () => (await volumes()).length > 0, 120))
      const { exitCode, stderr } = await deploy('--delete')
      assert.equal(exitCode, 1)
      assert.match(stderr, /there are volumes[^\n]*\n.*pvc-\S+ of claim default\/kept/)
      assert.equal((await classes()).length, 3)
      await hollow.kubectl(['delete', 'pod/user', 'pvc/kept', '--namespace=default'])
      assert.ok(await becomes(async () => (await volumes()).length === 0, 120))
    })

    it('is deleted, and again', async () => {
      for (const _ of [1, 2]) {
        const { exitCode, stderr } = await deploy('--delete')
        assert.equal(exitCode, 0, stderr)
      }
      assert.deepEqual(await classes(), [])
      assert.doesNotMatch(await hollow.kubectl(['get', 'namespaces', '-o=name']), /local-path/)
      assert.doesNotMatch(await hollow.kubectl(['get', 'clusterroles', '-o=name']), /local-path/)
    })

    async function stopProvisioner(): Promise<void> {
      provisioner?.kill()
      if (provisioner?.exitCode === null) await once(provisioner, 'exit')
    }

    /** The container's command, with the ConfigMap in a folder and a token in place of a pod's. */
    async function startProvisioner(): Promise<ChildProcess> {
      const namespace = 'local-path-storage'
      const inNamespace = `--namespace=${namespace}`
      const { spec } = await hollow.get<Deployment>(
        'deployment/local-path-provisioner',
        inNamespace,
      )
      const { data } = await hollow.get<{ data: object }>(
        'configmap/local-path-config',
        inNamespace,
      )
      const folder = hollow.checkout.path('config')
      await mkdir(folder, { recursive: true })
      for (const [name, text] of Object.entries(data)) await writeFile(join(folder, name), text)
      const [, ...args] = (spec.template.spec.containers[0]?.command ?? []).map((word) =>
        word.replace('/etc/config', folder),
      )
      const [port = 0] = await freePorts(1)
      const output = await open(log, 'a')
      const child = spawn(
        'setpriv',
        ['--pdeathsig', 'TERM', join(localPath.folder ?? '', 'local-path-provisioner'), ...args],
        {
          env: {
            KUBECONFIG: await hollow.kubeconfigOf('local-path-provisioner', namespace),
            POD_NAMESPACE: namespace,
            HEALTH_PORT: String(port),
          },
          stdio: ['ignore', output.fd, output.fd],
        },
      )
      await output.close()
      const isReady = async () => {
        if (child.exitCode !== null) assert.fail(await readFile(log, 'utf8'))
        const answer = await fetch(`http://127.0.0.1:${port}/ready`).catch(() => undefined)
        return answer?.status === 200
      }
      if (!(await becomes(isReady, 60))) assert.fail(await readFile(log, 'utf8'))
      return child
    }
  })
