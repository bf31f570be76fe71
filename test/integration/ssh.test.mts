import assert from 'node:assert/strict'
import { mkdir, symlink } from 'node:fs/promises'
import { after, before, describe, it } from 'node:test'
import { type Checkout, makeCheckout, run } from '../checkout.mts'
import { type IdleQemu, noQemu, startIdleQemu } from '../idle-qemu.mts'
import { makeSshKeys, noSshd, type Sshd, startSshd } from '../sshd.mts'

const script = 'bin/ssh.mts'

describe('ssh', { skip: noSshd || noQemu }, () => {
  let checkout: Checkout
  let qemu: IdleQemu
  let sshd: Sshd
  before(async () => {
    checkout = await makeCheckout({ long: true })
    await makeSshKeys(checkout)
    qemu = await startIdleQemu(checkout, 'alpha')
    sshd = await startSshd(checkout, 'alpha')
  })
  after(async () => {
    await sshd?.stop()
    await qemu?.stop()
    await checkout?.remove()
  })

  it('runs a command on the machine, as root', async () => {
    const { stdout, exitCode } = await run(checkout, script, ['alpha', '--', 'id', '-un'])
    assert.equal(exitCode, 0)
    assert.equal(stdout, 'root\n')
  })

  it('hands on what is typed, and the status of the command', async () => {
    const { stdout, exitCode } = await run(checkout, script, ['alpha', 'cat; exit 7'], {
      input: 'typed\n',
    })
    assert.equal(stdout, 'typed\n')
    assert.equal(exitCode, 7)
  })

  it('opens a shell when there is no command', async () => {
    const { stdout } = await run(checkout, script, ['alpha'], { input: 'echo $((20 + 22))\n' })
    assert.match(stdout, /^42$/m)
  })

  it('works through a link in another folder, and from there', async () => {
    const bin = checkout.path('..', 'bin')
    await mkdir(bin)
    await symlink(checkout.path(script), `${bin}/kssh`)
    const { stdout } = await run({ root: bin }, './kssh', ['alpha', '--', 'echo', 'there'])
    assert.equal(stdout, 'there\n')
  })

  it('shows its command with --verbose, fit to paste', async () => {
    const { stderr } = await run(checkout, script, ['--verbose', 'alpha', 'echo "$HOME"'])
    const [, command = ''] = stderr.match(/^\$ (ssh -F tls\/ssh_config alpha .*)$/m) ?? []
    const pasted = await run(checkout, 'bash', ['-c', command])
    assert.match(pasted.stdout, /sshd-alpha$/m)
  })

  it('says that a machine does not run, and how to start it', async () => {
    const { stderr, exitCode } = await run(checkout, script, ['sigma'])
    assert.equal(exitCode, 1)
    assert.match(stderr, /sigma is not running\n +hint: +make boot-sigma/)
  })

  it('refuses an unknown node, and to run without one', async () => {
    const { stderr, exitCode } = await run(checkout, script, ['omega'])
    assert.equal(exitCode, 2)
    assert.match(stderr, /there is no node "omega"\n.*alpha, sigma, gamma/)
    assert.equal((await run(checkout, script)).exitCode, 2)
  })
})
