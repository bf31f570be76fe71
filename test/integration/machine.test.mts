import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { readFile, stat, writeFile } from 'node:fs/promises'
import { after, afterEach, before, describe, it } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { type Cluster, loadCluster } from '../../lib/cluster.mts'
import { StepError } from '../../lib/errors.mts'
import { Machine } from '../../lib/machine/machine.mts'
import { NoAnswer } from '../../lib/machine/ssh.mts'
import { filesOf } from '../../lib/qemu/machine-files.mts'
import { type Checkout, makeCheckout } from '../checkout.mts'
import { type IdleQemu, noQemu, startIdleQemu } from '../idle-qemu.mts'
import { makeSshKeys, noSshd, type Sshd, startSshd } from '../sshd.mts'

/** The error that a promise fails with. */
async function failureOf(work: Promise<unknown>): Promise<StepError> {
  const error = await work.then(
    () => assert.fail('it did not fail'),
    (reason: unknown) => reason,
  )
  assert.ok(error instanceof StepError, String(error))
  return error
}

describe('a machine that answers', { skip: noSshd || noQemu }, () => {
  let checkout: Checkout
  let qemu: IdleQemu
  let cluster: Cluster
  let sshd: Sshd
  let alpha: Machine
  before(async () => {
    // 150 characters with a space in them: ssh's control socket must not mind.
    checkout = await makeCheckout({ long: true })
    await makeSshKeys(checkout)
    qemu = await startIdleQemu(checkout, 'alpha')
    sshd = await startSshd(checkout, 'alpha')
    cluster = loadCluster({ root: checkout.root, env: {} })
    alpha = new Machine(cluster, cluster.controlPlane)
  })
  after(async () => {
    await sshd?.stop()
    await qemu?.stop()
    await checkout?.remove()
  })

  it('tells status, output and errors of a command apart', async () => {
    const answer = await alpha.execute('echo out; echo err >&2; exit 7')
    assert.deepEqual(answer, { status: 7, stdout: 'out\n', stderr: 'err\n' })
  })

  it('gets the text of a command as it was written', async () => {
    const text = `it's "quoted" $HOME \`id\` \\ *\nsecond line`
    const there = `cat <<'EOF'\n${text}\nEOF`
    assert.equal(await alpha.succeed(there), `${text}\n`)
  })

  it('stops at the first command that fails, also inside a pipe', async () => {
    assert.equal((await alpha.execute('false | cat; echo not reached')).status, 1)
    assert.equal((await alpha.execute('false; echo not reached')).stdout, '')
  })

  it("does not mistake a command's status 255 for one of ssh", async () => {
    assert.equal((await alpha.execute('exit 255')).status, 254)
  })

  it('fails with the command and its last words when a command has to succeed', async () => {
    const { message, explanation } = await failureOf(alpha.succeed('echo broken >&2; exit 3'))
    assert.match(message, /alpha .*status 3/)
    assert.equal(explanation.output, 'broken')
    assert.equal(explanation.command, 'echo broken >&2; exit 3')
  })

  it('gives a command what it reads, and nothing unless told', async () => {
    assert.equal(await alpha.succeed('cat', { input: 'ä\n' }), 'ä\n')
    assert.equal(await alpha.succeed('cat'), '')
  })

  it('is asked twice over one connection', async () => {
    const first = await alpha.succeed('echo $SSH_CONNECTION')
    assert.match(first, /^127\.0\.0\.1 \d+ /)
    assert.equal(await alpha.succeed('echo $SSH_CONNECTION'), first)
  })

  it('is no longer waited for when a command takes too long', async () => {
    const error = await failureOf(alpha.execute('sleep 30', { timeout: 1 }))
    assert.ok(error instanceof NoAnswer)
    assert.match(error.message, /alpha did not answer within 1 s/)
  })

  it('takes a file with the mode it is to have', async () => {
    const from = checkout.path('secret')
    const to = checkout.path("it's there")
    await writeFile(from, Buffer.from([0, 1, 2, 255, 10]))
    await alpha.upload(from, to, 0o640)
    assert.deepEqual(await readFile(to), Buffer.from([0, 1, 2, 255, 10]))
    assert.equal((await stat(to)).mode & 0o777, 0o640)
  })

  it('keeps the former file when an upload fails', async () => {
    const to = checkout.path('kept')
    await writeFile(to, 'former')
    await assert.rejects(alpha.upload(checkout.path('no such file'), to), /ENOENT/)
    await writeFile(checkout.path('new'), 'new')
    await failureOf(alpha.upload(checkout.path('new'), checkout.path('no folder', 'file')))
    assert.equal(await readFile(to, 'utf8'), 'former')
  })

  it('waits until a command succeeds, and says what for when it gives up', async () => {
    const flag = checkout.path('flag')
    const waiting = alpha.waitUntilSucceeds(`cat '${flag}'`, { timeout: 30 })
    await sleep(300)
    await writeFile(flag, 'raised')
    assert.equal(await waiting, 'raised')
  })

  it('lets a command come to its end at a Ctrl-C in the terminal, if it was not told of it', async () => {
    const text = `
      import { loadCluster } from '../lib/cluster.mts'
      import { interruption } from '../lib/interrupt.mts'
      import { Machine } from '../lib/machine/machine.mts'
      const signal = interruption()
      const cluster = loadCluster()
      const alpha = new Machine(cluster, cluster.controlPlane)
      await alpha.execute('true')
      const answer = alpha.succeed('echo begun >&2; sleep 2; echo whole')
      console.log('asked')
      process.stdout.write(await answer)
      console.log(signal.aborted ? 'interrupted' : 'not interrupted')
    `
    await writeFile(checkout.path('bin', 'sample.mts'), text)
    // A terminal's Ctrl-C goes to all of the group.
    const script = spawn(
      process.execPath,
      [checkout.path('lib/launch.mjs'), checkout.path('bin/sample.mts')],
      {
        detached: true,
      },
    )
    let said = ''
    script.stdout.setEncoding('utf8').on('data', (more: string) => {
      if (!said.includes('asked') && (said + more).includes('asked')) {
        setTimeout(() => process.kill(-(script.pid ?? 0), 'SIGINT'), 500)
      }
      said += more
    })
    await once(script, 'close')
    assert.equal(said, 'asked\nwhole\ninterrupted\n')
  })

  it('ends a wait and a command when the script is interrupted', async () => {
    const controller = new AbortController()
    const machine = new Machine(cluster, cluster.controlPlane, controller.signal)
    const began = performance.now()
    const running = machine.execute('sleep 30')
    setTimeout(() => controller.abort(new StepError('interrupted')), 300)
    assert.equal((await failureOf(running)).message, 'interrupted')
    assert.equal((await failureOf(machine.execute('true'))).message, 'interrupted')

    const later = new AbortController()
    const waiting = new Machine(cluster, cluster.controlPlane, later.signal).waitUntilSucceeds(
      'false',
      { detail: () => later.abort(new StepError('interrupted')) },
    )
    assert.equal((await failureOf(waiting)).message, 'interrupted')
    assert.ok(performance.now() - began < 5000)
  })

  describe('and its systemd', () => {
    // What systemctl prints is a matter of the test; there is no systemd in a container.
    const answers = (text: string) => sshd.program('systemctl', `#!/bin/sh\n${text}\n`)
    const unit = (load: string, state: string, sub: string, more = '') =>
      answers(
        `printf 'LoadState=${load}\\nActiveState=${state}\\nSubState=${sub}\\nResult=exit-code\\n${more}'`,
      )

    it('is running when no unit has failed', async () => {
      await answers('[ "$1" != is-system-running ] || echo running')
      assert.deepEqual(await alpha.systemState(), { state: 'running', failedUnits: [] })
    })

    it('is degraded with the names of the units that have failed', async () => {
      await answers(`case $1 in
        is-system-running) echo degraded; exit 1;;
        list-units) echo 'etcd.service loaded failed failed etcd, the store'
                    echo 'kubelet.service loaded failed failed The kubelet';;
      esac`)
      assert.deepEqual(await alpha.waitForSystem(), {
        state: 'degraded',
        failedUnits: ['etcd.service', 'kubelet.service'],
      })
    })

    it('is up as soon as a unit that starts has become active', async () => {
      const flag = checkout.path('active')
      await answers(`state=activating; [ ! -e '${flag}' ] || state=active
        printf 'LoadState=loaded\\nActiveState=%s\\nSubState=x\\nResult=success\\n' $state`)
      const reasons: string[] = []
      const waiting = alpha.waitForUnit('etcd', { detail: (text) => reasons.push(text) })
      while (reasons.length === 0) await sleep(50)
      await writeFile(flag, '')
      await waiting
      assert.equal(reasons[0], 'etcd is activating (x)')
    })

    it('ends the wait at once when the unit has failed, with the end of its journal', async () => {
      await unit('loaded', 'failed', 'failed')
      await sshd.program('journalctl', '#!/bin/sh\necho "etcd: disk full"\n')
      const { message, explanation } = await failureOf(alpha.waitForUnit('etcd'))
      assert.match(message, /unit etcd of alpha failed: exit-code/)
      assert.equal(explanation.output, 'etcd: disk full')
    })

    it('ends the wait at once for a unit that there is not', async () => {
      await unit('not-found', 'inactive', 'dead')
      const { message } = await failureOf(alpha.waitForUnit('etdc'))
      assert.match(message, /alpha has no unit etdc/)
    })

    it('ends the wait at once for a unit that nothing is going to start', async () => {
      await unit('loaded', 'inactive', 'dead')
      const { message } = await failureOf(alpha.waitForUnit('etcd'))
      assert.match(message, /etcd of alpha is inactive and nothing starts it/)
    })
  })
})

describe('a machine that does not answer', { skip: noSshd || noQemu }, () => {
  let checkout: Checkout
  let cluster: Cluster
  let alpha: Machine
  let qemu: IdleQemu | undefined
  let sshd: Sshd | undefined
  before(async () => {
    checkout = await makeCheckout()
    await makeSshKeys(checkout)
    cluster = loadCluster({ root: checkout.root, env: {} })
    alpha = new Machine(cluster, cluster.controlPlane)
  })
  afterEach(async () => {
    await sshd?.stop()
    await qemu?.stop()
    await writeFile(filesOf(cluster, cluster.controlPlane).consoleLog, '')
  })
  after(() => checkout.remove())

  it('is waited for until it does', async () => {
    qemu = await startIdleQemu(checkout, 'alpha')
    const reasons: string[] = []
    const waiting = alpha.waitForSsh({ timeout: 30, detail: (text) => reasons.push(text) })
    while (reasons.length === 0) await sleep(50)
    sshd = await startSshd(checkout, 'alpha')
    await waiting
    assert.match(reasons[0] ?? '', /alpha does not answer ssh: .*refused/)
  })

  it('is given up after the time there is, with its last console lines', async () => {
    qemu = await startIdleQemu(checkout, 'alpha')
    const { consoleLog } = filesOf(cluster, cluster.controlPlane)
    await writeFile(consoleLog, 'Reached target Network.\r\nA start job is running for etcd\r\n')
    const { message, explanation } = await failureOf(alpha.waitForSsh({ timeout: 1 }))
    assert.match(message, /alpha did not answer ssh within 1 s: .*refused/)
    assert.equal(explanation.output, 'Reached target Network.\nA start job is running for etcd')
    assert.equal(explanation.log, consoleLog)
  })

  it('is given up at once when its QEMU ends in the middle of the wait', async () => {
    qemu = await startIdleQemu(checkout, 'alpha')
    const ended = qemu.stop
    let asked = 0
    const waiting = alpha.waitForSsh({ detail: () => (asked++ === 0 ? ended() : undefined) })
    assert.match((await failureOf(waiting)).message, /alpha did not answer ssh: its QEMU is not/)
  })

  it('is given up at once when its kernel panics', async () => {
    qemu = await startIdleQemu(checkout, 'alpha')
    const panic = 'Kernel panic - not syncing: Attempted to kill init!'
    await writeFile(filesOf(cluster, cluster.controlPlane).consoleLog, `[    4.2] ${panic}\r\n`)
    const { message } = await failureOf(alpha.waitForSsh())
    assert.equal(message, `alpha did not answer ssh: ${panic}`)
  })

  it('is given up at once when another machine answers in its place', async () => {
    qemu = await startIdleQemu(checkout, 'alpha')
    sshd = await startSshd(checkout, 'alpha', { hostKeyOf: 'sigma' })
    const { message, explanation } = await failureOf(alpha.waitForSsh())
    assert.match(message, /does not have alpha's host key/)
    assert.match(explanation.hint ?? '', /SSH_PORT_alpha/)
  })

  it('is given up at once when it does not know our key', async () => {
    qemu = await startIdleQemu(checkout, 'alpha')
    sshd = await startSshd(checkout, 'alpha')
    const keys = checkout.path('tls', 'ssh_ed25519.pub')
    const text = await readFile(keys)
    await writeFile(keys, '')
    try {
      const { message } = await failureOf(alpha.waitForSsh())
      assert.match(message, /alpha does not accept the key tls\/ssh_ed25519/)
    } finally {
      await writeFile(keys, text)
    }
  })

  it('cannot be asked before there are keys', async () => {
    const bare = await makeCheckout()
    const its = loadCluster({ root: bare.root, env: {} })
    const { message, explanation } = await failureOf(
      new Machine(its, its.controlPlane).execute('true'),
    )
    assert.equal(message, 'tls/ssh_ed25519 is missing')
    assert.equal(explanation.hint, 'make certs')
    await bare.remove()
  })
})
