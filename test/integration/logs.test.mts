import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { appendFile, writeFile } from 'node:fs/promises'
import { after, before, describe, it } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { type Checkout, makeCheckout, run } from '../checkout.mts'
import { makeSshKeys, noSshd, type Sshd, startSshd } from '../sshd.mts'

const script = 'bin/logs.mts'

describe('logs', { skip: noSshd }, () => {
  let checkout: Checkout
  let sshd: Sshd
  before(async () => {
    checkout = await makeCheckout()
    await makeSshKeys(checkout)
    sshd = await startSshd(checkout, 'alpha')
    // Prints its arguments.
    await sshd.program('journalctl', '#!/bin/sh\necho "$@"\n')
    await run(checkout, 'mkdir', ['images'])
    await writeFile(checkout.path('images', 'alpha-console.log'), 'one\ntwo\nthree\n')
    await writeFile(checkout.path('images', 'sigma-console.log'), 'four\n')
  })
  after(async () => {
    await sshd?.stop()
    await checkout?.remove()
  })

  it('shows the journals of the services that make the cluster', async () => {
    const { stdout, exitCode } = await run(checkout, script, ['alpha'])
    assert.equal(exitCode, 0)
    assert.equal(
      stdout,
      '--no-pager --lines=50 --unit=etcd --unit=kube-apiserver --unit=kube-controller-manager --unit=kube-scheduler\n',
    )
  })

  it('shows one unit or the whole journal, and follows it', async () => {
    const one = await run(checkout, script, ['alpha', '--unit', 'sshd', '--lines', '3'])
    assert.equal(one.stdout, '--no-pager --lines=3 --unit=sshd\n')
    const all = await run(checkout, script, ['alpha', '--all', '--follow'])
    assert.equal(all.stdout, '--no-pager --lines=50 --follow\n')
  })

  it('shows the end of the console without any ssh', async () => {
    const { stdout } = await run(checkout, script, ['--console', '--lines', '2', 'alpha'])
    assert.equal(stdout, 'two\nthree\n')
  })

  it('puts the name of the machine before each line when there are several', async () => {
    const { stdout } = await run(checkout, script, ['--console', '--lines', '1', 'alpha', 'sigma'])
    assert.deepEqual(stdout.trim().split('\n').sort(), ['alpha | three', 'sigma | four'])
  })

  it('follows a console as it grows, until Ctrl-C', async () => {
    const child = spawn(checkout.path(script), ['--console', '--follow', 'alpha'], {
      stdio: ['ignore', 'pipe', 'ignore'],
    })
    let said = ''
    child.stdout.on('data', (chunk) => {
      said += chunk
    })
    const hasSaid = async (text: string) => {
      while (!said.includes(text)) {
        assert.equal(child.exitCode, null, said)
        await sleep(50)
      }
    }
    await hasSaid('three')
    await appendFile(checkout.path('images', 'alpha-console.log'), 'later\n')
    await hasSaid('later')
    child.kill('SIGINT')
    await once(child, 'exit')
    const left = await run(checkout, 'sh', [
      '-c',
      'ps -eo args | grep -F "$0" || true',
      checkout.root,
    ])
    assert.doesNotMatch(left.stdout, /tail -n/)
  })

  it('says of a machine that does not answer how to see its console, and shows the others', async () => {
    const { stdout, stderr, exitCode } = await run(checkout, script, ['alpha', 'gamma'])
    assert.equal(exitCode, 1)
    assert.match(stdout, /^alpha \| --no-pager/m)
    assert.match(stderr, /^gamma \| does not answer ssh; --console/m)
  })

  it('refuses flags that contradict each other', async () => {
    for (const flags of [
      ['--console', '--unit', 'etcd'],
      ['--console', '--all'],
      ['--all', '--unit', 'etcd'],
    ]) {
      assert.equal((await run(checkout, script, flags)).exitCode, 2, flags.join(' '))
    }
  })
})
