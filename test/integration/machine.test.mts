// lib/ssh.mts with a real sshd and an idle QEMU in place of a machine.
import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { readFile, writeFile } from 'node:fs/promises'
import { after, afterEach, before, describe, it } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { $ } from 'zx/core'
import { type Cluster, loadCluster } from '../../lib/cluster.mts'
import { StepError } from '../../lib/errors.mts'
import { prepareCommands } from '../../lib/script.mts'
import { connect, NoAnswer, remote, waitForSsh, waitForSystem } from '../../lib/ssh.mts'
import { filesOf } from '../../lib/vm.mts'
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
  const onAlpha = (command: string, options?: Parameters<typeof remote>[2]) =>
    remote(cluster.controlPlane, command, options)
  before(async () => {
    // 150 characters with a space in them: ssh's control socket must work there.
    checkout = await makeCheckout({ long: true })
    await makeSshKeys(checkout)
    qemu = await startIdleQemu(checkout, 'alpha')
    sshd = await startSshd(checkout, 'alpha')
    cluster = loadCluster({ root: checkout.root, env: {} })
    prepareCommands(false)
    $.cwd = checkout.root
    await connect(cluster, cluster.controlPlane)
  })
  after(async () => {
    await sshd?.stop()
    await qemu?.stop()
    await checkout?.remove()
  })

  it('gets the text of a command as it was written', async () => {
    const text = `it's "quoted" $HOME \`id\` \\ *\nsecond line`
    assert.equal(await onAlpha(`cat <<'EOF'\n${text}\nEOF`), `${text}\n`)
  })

  it('stops at the first command that fails, also inside a pipe', async () => {
    const flag = checkout.path('reached')
    await failureOf(onAlpha(`false | cat; touch '${flag}'`))
    await failureOf(onAlpha(`false; touch '${flag}'`))
    await assert.rejects(readFile(flag), /ENOENT/)
  })

  it('fails with the command and its last output when a command fails', async () => {
    const { message, explanation } = await failureOf(onAlpha('echo broken >&2; exit 3'))
    assert.match(message, /alpha .*exit status 3/)
    assert.equal(explanation.output, 'broken')
    assert.equal(explanation.command, "ssh -F tls/ssh_config alpha 'echo broken >&2; exit 3'")
  })

  it('gives a command its input, and none by default', async () => {
    assert.equal(await onAlpha('cat', { input: 'ä\n' }), 'ä\n')
    assert.equal(await onAlpha('cat'), '')
  })

  it('is asked twice over one connection', async () => {
    const first = await onAlpha('echo $SSH_CONNECTION')
    assert.match(first, /^127\.0\.0\.1 \d+ /)
    assert.equal(await onAlpha('echo $SSH_CONNECTION'), first)
  })

  it('does not hold up the script when a command takes too long', async () => {
    const began = performance.now()
    const error = await failureOf(onAlpha('sleep 30', { timeout: 1 }))
    assert.ok(error instanceof NoAnswer)
    assert.match(error.message, /alpha did not answer within 1 s/)
    assert.ok(performance.now() - began < 15_000)
  })

  it('does not hold up the script after an interruption', async () => {
    const controller = new AbortController()
    const { signal } = controller
    const began = performance.now()
    const running = onAlpha('sleep 30', { signal })
    setTimeout(() => controller.abort(new StepError('interrupted')), 300)
    assert.equal((await failureOf(running)).message, 'interrupted')
    assert.equal((await failureOf(onAlpha('true', { signal }))).message, 'interrupted')
    const waiting = waitForSystem(cluster, cluster.controlPlane, { signal })
    assert.equal((await failureOf(waiting)).message, 'interrupted')
    assert.ok(performance.now() - began < 15_000)
  })

  it('lets a command without a signal finish at a Ctrl-C in the terminal', async () => {
    const text = `
      import { $ } from 'zx/core'
      import { interruption } from '../lib/interrupt.mts'
      import { script } from '../lib/script.mts'
      script({ does: '', reads: [], writes: [], examples: [] })
      const signal = interruption()
      await $\`ssh -F tls/ssh_config alpha true\`
      const answer = $\`ssh -F tls/ssh_config alpha 'sleep 2; echo whole'\`
      console.log('asked')
      process.stdout.write((await answer).stdout)
      console.log(signal.aborted ? 'interrupted' : 'not interrupted')
    `
    await writeFile(checkout.path('bin', 'sample.mts'), text)
    // A terminal's Ctrl-C goes to the whole process group.
    const launch = [checkout.path('lib/launch.mjs'), checkout.path('bin/sample.mts')]
    const script = spawn(process.execPath, launch, { detached: true })
    let printed = ''
    script.stdout.setEncoding('utf8').on('data', (text: string) => {
      const first = !printed.includes('asked')
      printed += text
      if (first && printed.includes('asked')) {
        setTimeout(() => process.kill(-(script.pid ?? 0), 'SIGINT'), 500)
      }
    })
    await once(script, 'close')
    assert.equal(printed, 'asked\nwhole\ninterrupted\n')
  })

  describe('and its systemd', () => {
    // There is no systemd in a container: the tests decide what systemctl prints.
    const answers = (text: string) => sshd.program('systemctl', `#!/bin/sh\n${text}\n`)

    it('is running when no unit has failed', async () => {
      await answers('[ "$1" != is-system-running ] || echo running')
      const found = await waitForSystem(cluster, cluster.controlPlane)
      assert.deepEqual(found, { state: 'running', failedUnits: [] })
    })

    it('is degraded with the names of the units that have failed', async () => {
      await answers(`case $1 in
        is-system-running) echo degraded; exit 1;;
        list-units) echo 'etcd.service loaded failed failed etcd, the store'
                    echo 'kubelet.service loaded failed failed The kubelet';;
      esac`)
      assert.deepEqual(await waitForSystem(cluster, cluster.controlPlane), {
        state: 'degraded',
        failedUnits: ['etcd.service', 'kubelet.service'],
      })
    })

    it('is waited for with the units that are still starting', async () => {
      const flag = checkout.path('up')
      await answers(`case $1 in
        is-system-running) [ -e '${flag}' ] && echo running || echo starting;;
        list-jobs) echo '12 etcd.service start running';;
      esac`)
      const details: string[] = []
      const detail = (text: string) => details.push(text)
      const waiting = waitForSystem(cluster, cluster.controlPlane, { detail })
      while (details.length === 0) await sleep(50)
      await writeFile(flag, '')
      assert.equal((await waiting).state, 'running')
      assert.equal(details[0], 'systemd is starting: etcd.service')
    })
  })
})

describe('a machine that does not answer', { skip: noSshd || noQemu }, () => {
  let checkout: Checkout
  let cluster: Cluster
  let qemu: IdleQemu | undefined
  let sshd: Sshd | undefined
  const consoleLog = () => filesOf(cluster, cluster.controlPlane).consoleLog
  const wait = (limits?: Parameters<typeof waitForSsh>[2]) =>
    waitForSsh(cluster, cluster.controlPlane, limits)
  before(async () => {
    checkout = await makeCheckout()
    await makeSshKeys(checkout)
    cluster = loadCluster({ root: checkout.root, env: {} })
    prepareCommands(false)
    $.cwd = checkout.root
  })
  afterEach(async () => {
    await sshd?.stop()
    await qemu?.stop()
    await writeFile(consoleLog(), '')
  })
  after(() => checkout.remove())

  it('is waited for until it does', async () => {
    qemu = await startIdleQemu(checkout, 'alpha')
    const details: string[] = []
    const waiting = wait({ timeout: 30, detail: (text) => details.push(text) })
    while (details.length === 0) await sleep(50)
    sshd = await startSshd(checkout, 'alpha')
    await waiting
    assert.match(details[0] ?? '', /alpha does not answer ssh: .*refused/)
  })

  it('ends the wait after the timeout, with its last console lines', async () => {
    qemu = await startIdleQemu(checkout, 'alpha')
    const lines = ['Reached target Network.', 'A start job is running for etcd']
    await writeFile(consoleLog(), lines.map((line) => `${line}\r\n`).join(''))
    const { message, explanation } = await failureOf(wait({ timeout: 1 }))
    assert.match(message, /alpha: timed out waiting for ssh after 1 s/)
    assert.match(explanation.output ?? '', /alpha does not answer ssh: .*refused/)
    assert.ok(explanation.output?.endsWith(lines.join('\n')), explanation.output)
    assert.equal(explanation.log, consoleLog())
  })

  it('ends the wait at once when its QEMU ends', async () => {
    qemu = await startIdleQemu(checkout, 'alpha')
    const { stop } = qemu
    let attempts = 0
    const waiting = wait({ detail: () => void (attempts++ === 0 && stop()) })
    assert.match((await failureOf(waiting)).message, /alpha: no ssh: its QEMU is not running/)
  })

  it('ends the wait at once when its kernel panics', async () => {
    qemu = await startIdleQemu(checkout, 'alpha')
    const panic = 'Kernel panic - not syncing: Attempted to kill init!'
    await writeFile(consoleLog(), `[    4.2] ${panic}\r\n`)
    assert.equal((await failureOf(wait())).message, `alpha: no ssh: ${panic}`)
  })

  it('ends the wait at once when another machine answers on its port', async () => {
    qemu = await startIdleQemu(checkout, 'alpha')
    sshd = await startSshd(checkout, 'alpha', { hostKeyOf: 'sigma' })
    const { message, explanation } = await failureOf(wait())
    assert.match(message, /alpha: the host key does not match the one pinned/)
    assert.match(explanation.hint ?? '', /SSH_PORT_/)
  })

  it('ends the wait at once when it does not accept our key', async () => {
    qemu = await startIdleQemu(checkout, 'alpha')
    sshd = await startSshd(checkout, 'alpha')
    const keys = checkout.path('tls', 'ssh_ed25519.pub')
    const text = await readFile(keys)
    await writeFile(keys, '')
    try {
      const { message } = await failureOf(wait())
      assert.match(message, /alpha: the machine does not accept the key tls\/ssh_ed25519/)
    } finally {
      await writeFile(keys, text)
    }
  })

  it('says what creates the keys when they are missing', async () => {
    const bare = await makeCheckout()
    const its = loadCluster({ root: bare.root, env: {} })
    const { message, explanation } = await failureOf(connect(its, its.controlPlane))
    assert.equal(message, 'tls/ssh_config is missing')
    assert.equal(explanation.hint, 'make certs')
    await bare.remove()
  })
})
