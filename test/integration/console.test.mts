import assert from 'node:assert/strict'
import { readFile } from 'node:fs/promises'
import { after, before, describe, it } from 'node:test'
import { type IPty, spawn } from 'node-pty'
import { plainText } from '../../lib/terminal.mts'
import { filesOf, isRunning } from '../../lib/vm.mts'
import { becomes } from '../../lib/wait.mts'
import { run } from '../checkout.mts'
import { type Machines, makeMachines, noMachines, UefiShell } from '../uefi-machine.mts'

describe('bin/console.mts', { skip: noMachines }, () => {
  let machines: Machines
  const terminals: IPty[] = []
  before(async () => {
    machines = await makeMachines()
    const { cluster } = machines
    await machines.start(cluster.controlPlane)
    const shell = await UefiShell.of(cluster, cluster.controlPlane)
    shell.close()
  })
  after(async () => {
    for (const pty of terminals) pty.kill()
    await machines.remove()
  })

  /** A terminal in which a shell starts the console, then shows its status and the mode it left. */
  function terminal(): {
    pty: IPty
    text: () => string
    shows: (what: RegExp) => Promise<boolean>
  } {
    const line =
      'stty -g >before; ./bin/console.mts alpha; echo "status $?"; stty -g | cmp - before && echo "as before"'
    const pty = spawn('sh', ['-c', line], { cwd: machines.checkout.root })
    terminals.push(pty)
    let raw = ''
    pty.onData((data) => {
      raw += data
    })
    const text = () => plainText(raw)
    return { pty, text, shows: (what) => becomes(() => what.test(text()), 30) }
  }

  it('shows the last output, passes on what is typed, and ends with Ctrl-]', async () => {
    const { pty, text, shows } = terminal()
    assert.ok(await shows(/Shell>[\s\S]*Ctrl-\] leaves this console/), text())
    pty.write('\x03')
    pty.write('echo Ctrl-C is for the machine\r')
    assert.ok(await shows(/\nCtrl-C is for the machine/), text())
    pty.write('\x1d')
    assert.ok(await shows(/it keeps running[\s\S]*status 0[\s\S]*as before/), text())
    assert.ok(await isRunning(machines.cluster, machines.cluster.controlPlane))
  })

  it('serves one terminal at a time', async () => {
    const first = terminal()
    assert.ok(await first.shows(/leaves this console/), first.text())
    const second = terminal()
    assert.ok(await second.shows(/another process is attached to the console of alpha/))
    assert.ok(await second.shows(/status 1/))
    first.pty.write('\x1d')
    assert.ok(await first.shows(/as before/), first.text())
  })

  it('restores the terminal when it is ended by a signal', async () => {
    const { text, shows } = terminal()
    assert.ok(await shows(/leaves this console/), text())
    const lock = `${filesOf(machines.cluster, machines.cluster.controlPlane).console}.lock`
    const { pid } = JSON.parse(await readFile(lock, 'utf8'))
    process.kill(pid, 'SIGTERM')
    assert.ok(await shows(/status 0[\s\S]*as before/), text())
  })

  it('needs a terminal, a node and a running machine', async () => {
    const console_ = (...args: string[]) => run(machines.checkout, 'bin/console.mts', args)
    const noTerminal = await console_('alpha')
    assert.equal(noTerminal.exitCode, 1)
    assert.match(noTerminal.stderr, /needs a terminal[\s\S]*tail -f/)
    const stopped = await console_('sigma')
    assert.equal(stopped.exitCode, 1)
    assert.match(stopped.stderr, /sigma is not running/)
    assert.equal((await console_()).exitCode, 2)
    assert.equal((await console_('delta')).exitCode, 2)
  })

  it('ends when the machine does', async () => {
    const { pty, text, shows } = terminal()
    assert.ok(await shows(/leaves this console/), text())
    pty.write('reset -s\r')
    assert.ok(await shows(/the machine has ended[\s\S]*status 0[\s\S]*as before/), text())
  })
})
