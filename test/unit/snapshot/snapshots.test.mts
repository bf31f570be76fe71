import assert from 'node:assert/strict'
import { mkdir, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { after, before, describe, it } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { type Cluster, loadCluster } from '../../../lib/cluster.mts'
import { timestamp } from '../../../lib/format.mts'
import type { Disk, IdleDisk, LiveDisk } from '../../../lib/snapshot/disk-snapshots.mts'
import {
  damagedFiles,
  keepFiles,
  putBackFiles,
  settingsFiles,
} from '../../../lib/snapshot/kept-files.mts'
import { checkSnapshotName } from '../../../lib/snapshot/snapshots.mts'
import { assertRoomToGrow, atOneMoment } from '../../../lib/snapshot/take-snapshot.mts'
import { type Checkout, makeCheckout } from '../../checkout.mts'

let checkout: Checkout
let cluster: Cluster
before(async () => {
  checkout = await makeCheckout()
  cluster = loadCluster({ root: checkout.root, env: {} })
})
after(() => checkout.remove())

describe('the moment of a snapshot', () => {
  const said: string[] = []
  const say = async (what: string) => {
    said.push(`${what} begins`)
    await sleep(Math.random() * 20)
    said.push(`${what} ends`)
  }
  const at = (what: string) => said.indexOf(what)

  function disk(name: string, refuses: string[] = []): LiveDisk {
    const act = async (what: string) => {
      await say(`${what} ${name}`)
      if (refuses.includes(what)) throw new Error(`${name} refuses to ${what}`)
    }
    return {
      node: cluster.node(name),
      running: true,
      flush: () => act('flush'),
      pause: () => act('pause'),
      resume: () => act('resume'),
      create: () => act('create'),
      delete: () => act('delete'),
      content: async () => ({ snapshots: [], bytes: 0 }),
      close: () => {},
    }
  }
  function idleDisk(name: string): IdleDisk {
    const { flush, pause, resume, ...rest } = disk(name)
    return { ...rest, running: false, apply: async () => {} }
  }
  async function moment(disks: Disk[], whilePaused = () => say('copy')): Promise<number> {
    said.length = 0
    return atOneMoment(disks, 'x', whilePaused)
  }

  it('begins when all machines stand still, and ends when all disks are done', async () => {
    await moment([disk('alpha'), disk('sigma'), disk('gamma')])
    const names = ['alpha', 'sigma', 'gamma']
    const lastPause = Math.max(...names.map((name) => at(`pause ${name} ends`)))
    const done = names.map((name) => at(`create ${name} ends`))
    const firstResume = Math.min(...names.map((name) => at(`resume ${name} begins`)))
    for (const name of names) {
      assert.ok(lastPause < at(`create ${name} begins`), said.join('\n'))
      assert.ok(at(`flush ${name} ends`) < at(`pause ${name} begins`))
    }
    assert.ok(lastPause < at('copy begins'))
    assert.ok(Math.max(...done, at('copy ends')) < firstResume, said.join('\n'))
  })

  it('does not wait within the pause for machines that are off', async () => {
    await moment([disk('alpha'), idleDisk('gamma')])
    assert.ok(at('create gamma ends') < at('pause alpha begins'))
    assert.equal(at('pause gamma begins'), -1)
  })

  it('is as long as the machines stood still', async () => {
    const seconds = await moment([disk('alpha')], () => sleep(300))
    assert.ok(seconds >= 0.29 && seconds < 1, `${seconds} s`)
    assert.ok((await moment([idleDisk('gamma')], async () => {})) < 0.1)
  })

  it('lets all machines go on when a disk refuses', async () => {
    const disks = [disk('alpha'), disk('sigma', ['create'])]
    await assert.rejects(moment(disks), /sigma refuses to create/)
    assert.ok(at('resume alpha ends') > at('create sigma ends'))
    assert.ok(at('resume sigma ends') > at('create alpha ends'))
  })

  it('lets all machines go on when one cannot be stopped, or the copying fails', async () => {
    await assert.rejects(
      moment([disk('alpha'), disk('sigma', ['pause'])]),
      /sigma refuses to pause/,
    )
    assert.ok(at('resume alpha ends') > 0)
    assert.equal(at('create alpha begins'), -1)
    const failing = () => Promise.reject(new Error('disk full'))
    await assert.rejects(moment([disk('alpha')], failing), /disk full/)
    assert.ok(at('resume alpha ends') > 0)
  })

  it('fails with the name of a machine that does not go on', async () => {
    const disks = [disk('alpha'), disk('sigma', ['resume'])]
    await assert.rejects(moment(disks), /^StepError: sigma may stand still/)
  })
})

describe('files that are kept', () => {
  const folder = () => checkout.path('kept')
  before(async () => {
    await mkdir(checkout.path('tls'))
    await writeFile(checkout.path('tls', 'ca.pem'), 'CA', { mode: 0o644 })
    await writeFile(checkout.path('tls', 'ca-key.pem'), 'key', { mode: 0o600 })
    await writeFile(checkout.path('tls', '.ca.pem.tmp-1'), 'half')
    await writeFile(checkout.path('configs', 'admin.kubeconfig'), 'admin', { mode: 0o600 })
  })

  it('are settings, keys and kubeconfigs, and neither modules nor what is half written', async () => {
    assert.deepEqual(await settingsFiles(cluster), [
      'cluster.env',
      'tls/ca-key.pem',
      'tls/ca.pem',
      'configs/admin.kubeconfig',
    ])
  })

  it('are nobody else’s to read, and come back with the mode they had', async () => {
    const kept = await keepFiles(cluster, await settingsFiles(cluster), folder())
    assert.equal((await stat(`${folder()}/tls/ca.pem`)).mode & 0o777, 0o600)
    assert.equal((await stat(`${folder()}/tls`)).mode & 0o777, 0o700)
    await rm(checkout.path('tls'), { recursive: true })
    await putBackFiles(cluster, kept, folder())
    assert.equal(await readFile(checkout.path('tls', 'ca-key.pem'), 'utf8'), 'key')
    assert.equal((await stat(checkout.path('tls', 'ca-key.pem'))).mode & 0o777, 0o600)
    assert.equal((await stat(checkout.path('tls', 'ca.pem'))).mode & 0o777, 0o644)
  })

  it('are known to be damaged', async () => {
    const kept = await keepFiles(cluster, await settingsFiles(cluster), folder())
    assert.deepEqual(await damagedFiles(folder(), kept), [])
    await writeFile(`${folder()}/tls/ca.pem`, 'CB')
    await rm(`${folder()}/cluster.env`)
    assert.deepEqual(await damagedFiles(folder(), kept), ['cluster.env', 'tls/ca.pem'])
  })
})

describe('a snapshot', () => {
  it('has a name that is one on every file system, and no number of an image', () => {
    for (const name of ['lab', 'before-lab-3', '2026-11-22-164503', 'a.b_c', 'x'.repeat(63)]) {
      checkSnapshotName(name)
    }
    for (const name of ['', '1', '42', '.a', '-a', 'a b', 'a/b', 'ä', 'a\n', 'x'.repeat(64)]) {
      assert.throws(() => checkSnapshotName(name), /cannot be named/, JSON.stringify(name))
    }
  })

  it('is not taken where the disks could not grow any more', async () => {
    await assertRoomToGrow(cluster, async () => 3 * 2 ** 30)
    await assert.rejects(
      assertRoomToGrow(cluster, async () => 3 * 2 ** 30 - 1),
      /not enough disk space: 3.2 GB are needed, 3.2 GB are free/,
    )
  })

  it('is named by the time of day unless it has a name', () => {
    assert.equal(timestamp(new Date(2026, 0, 2, 3, 4, 5)), '2026-01-02-030405')
  })
})
