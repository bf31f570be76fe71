import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { chmod, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { afterEach, beforeEach, describe, it } from 'node:test'
import { type Cluster, loadCluster } from '../../../lib/cluster.mts'
import {
  keepSshKey,
  knownHosts,
  makeSshKey,
  readSshKey,
  type SshKeyEntry,
  sshKeysOf,
} from '../../../lib/pki/ssh-keys.mts'
import { type Checkout, makeCheckout } from '../../checkout.mts'
import { missing } from '../../tools.mts'

describe('the ssh keys of the cluster', () => {
  let checkout: Checkout
  let cluster: Cluster
  let entry: SshKeyEntry
  let publicKey: string
  beforeEach(async () => {
    checkout = await makeCheckout()
    cluster = loadCluster({ root: checkout.root, env: {} })
    entry = sshKeysOf(cluster)[0] as SshKeyEntry
    publicKey = await makeSshKey(cluster, entry)
  })
  afterEach(() => checkout.remove())

  it('are one to log in with, and one for each machine', () => {
    assert.deepEqual(
      sshKeysOf(cluster).map(({ name }) => name),
      ['ssh_ed25519', 'ssh_host_alpha_ed25519', 'ssh_host_sigma_ed25519', 'ssh_host_gamma_ed25519'],
    )
  })

  it("are written for their owner's eyes, the public half for everyone's", async () => {
    assert.equal((await stat(checkout.path('tls/ssh_ed25519'))).mode & 0o777, 0o600)
    assert.equal((await stat(checkout.path('tls/ssh_ed25519.pub'))).mode & 0o777, 0o644)
    const line = await readFile(checkout.path('tls/ssh_ed25519.pub'), 'utf8')
    assert.equal(line, `${publicKey} kubernetes-the-hardest-way\n`)
    assert.deepEqual(await readSshKey(cluster, entry), { present: true, publicKey, problems: [] })
  })

  it('are kept', async () => {
    const before = await readFile(checkout.path('tls/ssh_ed25519'), 'utf8')
    assert.equal(await keepSshKey(cluster, entry), publicKey)
    assert.equal(await readFile(checkout.path('tls/ssh_ed25519'), 'utf8'), before)
  })

  it('are missing until they are made', async () => {
    const [, host] = sshKeysOf(cluster)
    assert.ok(host)
    assert.equal(await keepSshKey(cluster, host), undefined)
    const { problems } = await readSshKey(cluster, host)
    assert.deepEqual(problems, ['tls/ssh_host_alpha_ed25519 is missing'])
  })

  it('get back a public half that is gone or another', async () => {
    const file = checkout.path('tls/ssh_ed25519.pub')
    const right = await readFile(file, 'utf8')
    for (const spoil of [() => rm(file), () => writeFile(file, 'ssh-ed25519 AAAA someone\n')]) {
      await spoil()
      const { problems } = await readSshKey(cluster, entry)
      assert.deepEqual(problems, ['tls/ssh_ed25519.pub is not its other half'])
      await keepSshKey(cluster, entry)
      assert.equal(await readFile(file, 'utf8'), right)
    }
  })

  it('are closed to others again', async () => {
    await chmod(checkout.path('tls/ssh_ed25519'), 0o644)
    const { problems } = await readSshKey(cluster, entry)
    assert.deepEqual(problems, ['tls/ssh_ed25519 can be read by others'])
    await keepSshKey(cluster, entry)
    assert.equal((await stat(checkout.path('tls/ssh_ed25519'))).mode & 0o777, 0o600)
  })

  it('are never replaced by a new one while the file holds something else', async () => {
    await writeFile(checkout.path('tls/ssh_ed25519'), 'a key with a passphrase')
    await assert.rejects(keepSshKey(cluster, entry), /no ed25519 key in OpenSSH's format/)
    const text = await readFile(checkout.path('tls/ssh_ed25519'), 'utf8')
    assert.equal(text, 'a key with a passphrase')
  })

  it('pin each machine to its port', { skip: missing('ssh-keygen') }, async () => {
    const keys = new Map<string, string>()
    for (const each of sshKeysOf(cluster)) {
      keys.set(each.name, await makeSshKey(cluster, each))
    }
    await writeFile(checkout.path('tls/known_hosts'), knownHosts(cluster, keys))
    for (const { name, sshPort } of cluster.nodes) {
      const args = ['-F', `[127.0.0.1]:${sshPort}`, '-f', checkout.path('tls/known_hosts')]
      const found = execFileSync('ssh-keygen', args, { encoding: 'utf8' })
      assert.ok(found.includes(keys.get(`ssh_host_${name}_ed25519`) ?? 'none'), name)
    }
  })
})
