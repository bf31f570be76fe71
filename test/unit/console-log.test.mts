import assert from 'node:assert/strict'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import { findBootFailure, lastConsoleLines } from '../../lib/console-log.mts'

const firmware = 'BdsDxe: starting Boot0001 "UEFI Misc Device"\r\n[    0.0] Linux version 6.12\r\n'

describe('the console log', () => {
  let folder: string
  let log: string
  before(async () => {
    folder = await mkdtemp(join(tmpdir(), 'console-log-'))
    log = join(folder, 'alpha-console.log')
  })
  after(() => rm(folder, { recursive: true }))

  it('has no lines before the first start of the machine', async () => {
    assert.deepEqual(await lastConsoleLines(join(folder, 'none.log')), [])
    assert.equal(await findBootFailure(join(folder, 'none.log')), undefined)
  })

  it('returns the last lines, oldest first, without blank ones', async () => {
    await writeFile(log, 'one\r\n\r\ntwo\r\n   \r\nthree\r\n')
    assert.deepEqual(await lastConsoleLines(log, 2), ['two', 'three'])
  })

  it('shows text without colours, titles and cursor movement', async () => {
    await writeFile(
      log,
      '\x1b[0;32m  OK  \x1b[0m Started \x1b[0;1;39msshd\x1b[0m.\r\n\x1b]0;alpha\x07alpha login: \x1b[?2004h',
    )
    assert.deepEqual(await lastConsoleLines(log), ['  OK   Started sshd.', 'alpha login: '])
  })

  it('shows only the final text of a line that was overwritten', async () => {
    await writeFile(log, ' 10 % done\r 90 % done\rall done\r\n')
    assert.deepEqual(await lastConsoleLines(log), ['all done'])
  })

  it('reads only the end of a long log, in whole lines', async () => {
    await writeFile(log, `${'x'.repeat(99)}\n`.repeat(10_000))
    const lines = await lastConsoleLines(log, 100_000)
    assert.ok(lines.length > 1000 && lines.length < 2000)
    assert.equal(lines[0]?.length, 99)
  })

  for (const [line, failure] of [
    [
      '[    3.1] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)',
      'Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)',
    ],
    [
      'An error occurred in stage 1 of the boot process, which must mount the root filesystem',
      'An error occurred in stage 1 of the boot process, which must mount the root filesystem',
    ],
    [
      'You are in emergency mode. After logging in, type "journalctl -xb"',
      'You are in emergency mode. After logging in, type "journalctl -xb"',
    ],
    [
      '[\x1b[0;1;31m TIME \x1b[0m] Timed out waiting for device \x1b[0;1;39m/dev/disk/by-label/nixos\x1b[0m.',
      'Timed out waiting for device /dev/disk/by-label/nixos.',
    ],
    [
      'Cannot open access to console, the root account is locked.',
      'Cannot open access to console, the root account is locked.',
    ],
  ] as const) {
    it(`reports "${failure.slice(0, 40)}…" as a failed boot`, async () => {
      await writeFile(log, `${firmware}${line}\r\n[    3.2] CPU: 0 PID: 1\r\n`)
      assert.equal(await findBootFailure(log), failure)
    })
  }

  it('forgets a panic when the machine has restarted after it', async () => {
    await writeFile(log, `${firmware}[ 9.1] Kernel panic - not syncing: x\r\n`)
    assert.match((await findBootFailure(log)) ?? '', /panic/)
    await writeFile(log, firmware, { flag: 'a' })
    assert.equal(await findBootFailure(log), undefined)
  })

  it('does not mistake the word panic in ordinary messages for one', async () => {
    await writeFile(log, '[    0.0] Command line: root=LABEL=nixos panic=5 console=ttyS0\r\n')
    assert.equal(await findBootFailure(log), undefined)
  })
})
