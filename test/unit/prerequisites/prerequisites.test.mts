import assert from 'node:assert/strict'
import { createServer } from 'node:net'
import { afterEach, beforeEach, describe, it } from 'node:test'
import { which } from 'zx/core'
import { loadCluster } from '../../../lib/cluster.mts'
import { checkProgram } from '../../../lib/prerequisites/prerequisite-checks.mts'
import { type Prerequisite, prerequisites } from '../../../lib/prerequisites/prerequisites.mts'
import { checkDisk, checkMemory, checkPorts } from '../../../lib/prerequisites/resource-checks.mts'
import type { Architecture } from '../../../lib/qemu/firmware.mts'
import type { System } from '../../../lib/qemu/processor.mts'
import { makeCheckout } from '../../checkout.mts'
import { FakePrograms } from '../../fake-programs.mts'

const hosts: { os: System; arch: Architecture }[] = [
  { os: 'linux', arch: 'x86_64' },
  { os: 'linux', arch: 'aarch64' },
  { os: 'darwin', arch: 'x86_64' },
  { os: 'darwin', arch: 'aarch64' },
]
const table = (host = hosts[0]) => prerequisites(host ?? { os: 'linux', arch: 'x86_64' }, '1.36.3')

function named(name: string, host = hosts[0]): Prerequisite {
  const found = table(host).find((prerequisite) => prerequisite.name === name)
  assert.ok(found, name)
  return found
}

describe('the table of prerequisites', () => {
  it('has for each one a package or a download on every system', () => {
    for (const prerequisite of hosts.flatMap(table)) {
      for (const manager of ['brew', 'apt', 'dnf', 'pacman', 'zypper', 'nix'] as const) {
        const way = prerequisite.packages[manager] ?? prerequisite.download
        assert.ok(way, `${prerequisite.name} with ${manager}`)
      }
    }
  })

  it('names QEMU and firmware of the processor', () => {
    const packages = (arch: Architecture) =>
      ['QEMU', 'UEFI firmware'].map((name) => named(name, { os: 'linux', arch }).packages.apt)
    assert.deepEqual(packages('x86_64'), ['qemu-system-x86', 'ovmf'])
    assert.deepEqual(packages('aarch64'), ['qemu-system-arm', 'qemu-efi-aarch64'])
  })

  it('downloads the kubectl of the cluster’s version for the processor', () => {
    const { download } = named('kubectl', { os: 'linux', arch: 'aarch64' })
    assert.equal(download, 'https://dl.k8s.io/release/v1.36.3/bin/linux/arm64/kubectl')
  })
})

describe('a program', () => {
  let programs: FakePrograms
  const path = process.env.PATH
  beforeEach(() => {
    programs = new FakePrograms()
    process.env.PATH = programs.path
  })
  afterEach(() => {
    process.env.PATH = path
    programs.remove()
  })

  const check = (name: string, host = hosts[0]) => checkProgram(named(name, host), '1.36.3')

  it('is missing if it is not on PATH', async () => {
    const { state, found, advice, prerequisite } = await check('QEMU')
    assert.deepEqual([state, found, advice], ['missing', '-', 'it runs the machines'])
    assert.equal(prerequisite?.packages.dnf, 'qemu-system-x86')
  })

  it('is too old by its number, not by its digits', async () => {
    const versions = [
      ['7.1.9', 'missing'],
      ['7.2.0', 'ok'],
      ['10.0.2', 'ok'],
    ]
    for (const [version, state] of versions) {
      programs.say('qemu-system-x86_64', `QEMU emulator version ${version} (Debian 1:x)`)
      const finding = await check('QEMU')
      assert.deepEqual([finding.found, finding.state], [version, state])
    }
    programs.say('qemu-system-x86_64', 'QEMU emulator version 6.2.0')
    assert.match((await check('QEMU')).advice ?? '', /qemu-system-x86_64 6\.2\.0 is too old/)
  })

  it('is not another of the same name', async () => {
    programs.say('bsdtar', 'tar (GNU tar) 1.34')
    assert.equal((await check('bsdtar')).state, 'missing')
  })

  it('may have the name that it has on a Mac', async () => {
    programs.say('tar', 'bsdtar 3.5.3 - libarchive 3.7.4')
    assert.equal((await check('bsdtar', { os: 'darwin', arch: 'aarch64' })).found, '3.5.3')
    assert.equal((await check('bsdtar', { os: 'linux', arch: 'aarch64' })).state, 'missing')
  })

  it('may tell its version among the errors, as ssh does', async () => {
    programs.add('ssh', 'echo OpenSSH_for_Windows_9.5p1, LibreSSL 3.8.2 >&2')
    assert.equal((await check('ssh')).found, '9.5')
  })

  it('that does not work is missing', async () => {
    programs.add('qemu-img', 'echo "error while loading shared libraries" >&2; exit 127')
    assert.equal((await check('qemu-img')).state, 'missing')
  })

  it('kubectl may be one minor version away, and warns beyond', async () => {
    const states: string[] = []
    for (const minor of [34, 35, 36, 37, 38]) {
      programs.say('kubectl', `{"clientVersion": {"gitVersion": "v1.${minor}.4-dispatcher"}}`)
      const { state, wanted } = await check('kubectl')
      assert.equal(wanted, '1.35 to 1.37')
      states.push(state)
    }
    assert.deepEqual(states, ['warning', 'ok', 'ok', 'ok', 'warning'])
  })
})

describe('each real program', () => {
  for (const prerequisite of table({
    os: process.platform === 'darwin' ? 'darwin' : 'linux',
    arch: process.arch === 'arm64' ? 'aarch64' : 'x86_64',
  })) {
    const { name, programs } = prerequisite
    if (programs.length === 0) continue
    it(`tells the version of ${name}`, async (t) => {
      const paths = await Promise.all(programs.map((program) => which(program, { nothrow: true })))
      if (!paths.some(Boolean)) return t.skip(`${name} is not installed`)
      assert.match((await checkProgram(prerequisite, '1.36.3')).found, /^\d+\.\d+(\.\d+)?$/)
    })
  }
})

describe('what this computer has left', () => {
  it('is compared with the memory of all machines; too little is a warning', async () => {
    const checkout = await makeCheckout({
      settings: { CONTROL_PLANE_MEM: 2048, WORKER_MEM: 1024 },
    })
    const cluster = loadCluster({ root: checkout.root, env: {} })
    const enough = await checkMemory(cluster, async () => 4096 * 2 ** 20)
    assert.deepEqual([enough.state, enough.wanted], ['ok', '4.3 GB'])
    const short = await checkMemory(cluster, async () => 4096 * 2 ** 20 - 1)
    assert.equal(short.state, 'warning')
    assert.match(short.advice ?? '', /lower CONTROL_PLANE_MEM and WORKER_MEM/)
    await checkout.remove()
  })

  it('is compared with the disks to be; too little is a problem', async () => {
    const checkout = await makeCheckout()
    const cluster = loadCluster({ root: checkout.root, env: {} })
    const enough = await checkDisk(cluster, async () => 100 * 2 ** 30)
    assert.deepEqual([enough.state, enough.wanted], ['ok', 'for 3 new machines'])
    const short = await checkDisk(cluster, async () => 1e9)
    assert.deepEqual([short.state, short.found], ['problem', '1.0 GB'])
    assert.match(short.advice ?? '', /^not enough disk space: alpha, sigma, gamma need/)
    await checkout.remove()
  })

  it('may lack a port, whose holder is named', async () => {
    const checkout = await makeCheckout()
    const cluster = loadCluster({ root: checkout.root, env: {} })
    assert.equal((await checkPorts(cluster)).state, 'ok')
    const server = createServer()
    const port = cluster.settings.API_PORT
    await new Promise<void>((resolve) => server.listen(port, '127.0.0.1', resolve))
    const { state, advice } = await checkPorts(cluster)
    server.close()
    assert.equal(state, 'problem')
    assert.match(advice ?? '', new RegExp(`TCP port ${port} \\(API_PORT\\) is taken by .*pid`))
    await checkout.remove()
  })
})
