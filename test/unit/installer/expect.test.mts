import assert from 'node:assert/strict'
import { mkdtemp, readFile, rm, stat } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, afterEach, before, describe, it } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { describeError } from '../../../lib/errors.mts'
import { type Dialogue, ExpectError, spawn } from '../../../lib/installer/expect.mts'

/** What a promise was rejected with. */
async function failureOf(promise: Promise<unknown>): Promise<ExpectError> {
  const error = await promise.then(
    () => assert.fail('it did not fail'),
    (reason: unknown) => reason,
  )
  assert.ok(error instanceof ExpectError, String(error))
  return error
}

const isAlive = (pid: number) => {
  try {
    return process.kill(pid, 0)
  } catch {
    return false
  }
}

const timersUnderWay = () =>
  process.getActiveResourcesInfo().filter((resource) => resource === 'Timeout').length

describe('expect', { timeout: 120_000 }, () => {
  const soon = { timeout: 10_000 }
  let folder: string
  let dialogue: Dialogue
  before(async () => {
    folder = await mkdtemp(join(tmpdir(), 'expect-'))
  })
  afterEach(() => dialogue.close())
  after(() => rm(folder, { recursive: true }))

  const sh = (script: string, options = {}) => {
    dialogue = spawn('sh', ['-c', script], { name: 'guest', ...options })
    return dialogue
  }

  it('waits for what a program asks, and answers', async () => {
    sh('printf "name? "; read name; echo "hello $name"; sleep 100')
    await dialogue.expect('name? ', soon)
    dialogue.send('Ada\n')
    const match = await dialogue.expect(/hello (\w+)\n/, soon)
    assert.deepEqual(match.texts, ['hello Ada\n', 'Ada'])
  })

  it('says what came before the match, and goes on behind it', async () => {
    sh('echo one; echo two; echo three; sleep 100')
    assert.equal((await dialogue.expect('two', soon)).before, 'one\n')
    assert.equal((await dialogue.expect('three', soon)).before, '\n')
  })

  it('says which of several patterns came', async () => {
    sh('echo "permission denied"; sleep 100')
    const { index } = await dialogue.expect([/welcome/, 'denied'], soon)
    assert.equal(index, 1)
  })

  it('sees a prompt whose colours and title arrive in pieces', async () => {
    sh(
      String.raw`for piece in '\033[1;3' '2m[\033]0;nixos@' 'nixos: ~\007nixos@nix' 'os:~]$ \033[' '0m '; do
        printf "$piece"; sleep 0.05; done; sleep 100`,
    )
    await dialogue.expect('[nixos@nixos:~]$ ', soon)
  })

  it('says what was awaited, for how long, and the last lines, when time is up', async () => {
    sh('echo starting; echo "still thinking"; sleep 100')
    await dialogue.expect('starting', soon)
    await dialogue.expect('thinking', soon)
    const error = await failureOf(dialogue.expect(/\$ /, { timeout: 200, what: 'the prompt' }))
    assert.equal(error.kind, 'timeout')
    assert.equal(
      describeError(error),
      'guest: waited 0.2s in vain for the prompt\n  | starting\n  | still thinking',
    )
  })

  it('names the patterns when it was not told what they mean', async () => {
    sh('sleep 100')
    const error = await failureOf(dialogue.expect([/\$ $/, 'login:'], { timeout: 50 }))
    assert.match(error.message, /in vain for \/\\\$ \$\/ or login:/)
  })

  it('fails at once, with the status and the last lines, when the program ends', async () => {
    sh('echo "out of memory"; exit 3')
    const error = await failureOf(dialogue.expect('ready', soon))
    assert.equal(error.kind, 'exit')
    assert.equal(error.message, 'guest: ended with status 3 while waiting for ready')
    assert.match(String(error.explanation.output), /out of memory/)
    const again = await failureOf(dialogue.expect('anything', soon))
    assert.equal(again.kind, 'exit')
  })

  it('names the signal that ended the program', async () => {
    sh('kill -9 $$')
    const error = await failureOf(dialogue.expect('ready', soon))
    assert.match(error.message, /ended by signal 9/)
  })

  it('finds what a program wrote just before its end', async () => {
    sh('seq 1 500; echo last words')
    await dialogue.expect('last words', soon)
    assert.deepEqual(await dialogue.expectExit(soon), { exitCode: 0, signal: 0 })
  })

  it('says what it means when the program cannot be started', async () => {
    dialogue = spawn('/nonexistent/qemu', [])
    const error = await failureOf(dialogue.expect('ready', soon))
    assert.equal(error.kind, 'exit')
  })

  it('ends a wait with the reason of an abort, and can go on after it', async () => {
    sh('read line; echo "got $line"; sleep 100')
    const controller = new AbortController()
    const waiting = dialogue.expect('never', { ...soon, signal: controller.signal })
    const reason = new Error('interrupted')
    setTimeout(() => controller.abort(reason), 50)
    await assert.rejects(waiting, reason)
    await assert.rejects(dialogue.expect('got', { ...soon, signal: controller.signal }), reason)
    dialogue.send('on\n')
    await dialogue.expect('got on', soon)
  })

  it('raises an alarm at once, even for what came before the wait', async () => {
    const alarms = [{ pattern: /Kernel panic.*\n/, reason: 'the kernel panicked' }]
    sh('echo "[ 3.1] Kernel panic - not syncing: no init"; echo; echo ready; sleep 100', { alarms })
    await sleep(300)
    const error = await failureOf(dialogue.expect('ready', soon))
    assert.equal(error.kind, 'alarm')
    assert.match(error.message, /the kernel panicked while waiting for ready/)
    assert.match(String(error.explanation.output), /not syncing: no init/)
  })

  it('leaves no timer behind, however a wait ends', async () => {
    sh('echo ready; read line')
    const before = timersUnderWay()
    await dialogue.expect('ready', { timeout: 60_000 })
    await failureOf(dialogue.expect('never', { timeout: 20 }))
    const aborted = dialogue.expect('x', { timeout: 60_000, signal: AbortSignal.abort() })
    await assert.rejects(aborted)
    const ended = failureOf(dialogue.expect('never', { timeout: 60_000 }))
    dialogue.send('\n')
    await ended
    await dialogue.close()
    assert.equal(timersUnderWay(), before)
  })

  it('refuses two waits at a time', async () => {
    sh('echo ready; sleep 100')
    const first = dialogue.expect('never', { timeout: 100 })
    assert.throws(() => dialogue.expect('ready', soon), /one thing at a time/)
    await failureOf(first)
  })

  it('keeps the transcript as plain text, for the owner alone, without what was sent', async () => {
    const transcript = join(folder, 'transcript.log')
    sh(String.raw`stty -echo; printf '\033[32mready\033[0m\r\n'; read line; echo done; sleep 100`, {
      transcript,
    })
    await dialogue.expect('ready', soon)
    dialogue.transcript.note('$ answer\n')
    dialogue.send('a secret\n')
    await dialogue.expect('done', soon)
    await dialogue.close()
    assert.equal(await readFile(transcript, 'utf8'), 'ready\n$ answer\ndone\n')
    assert.equal((await stat(transcript)).mode & 0o777, 0o600)
  })

  it('adds to a transcript that is there, and names it in errors', async () => {
    const transcript = join(folder, 'twice.log')
    for (const attempt of [1, 2]) {
      sh(`echo attempt ${attempt}`, { transcript })
      const error = await failureOf(dialogue.expect('never', soon))
      assert.equal(error.explanation.log, transcript)
    }
    assert.equal(await readFile(transcript, 'utf8'), 'attempt 1\nattempt 2\n')
  })

  it('keeps what is not to be recorded out of transcript and errors', async () => {
    const transcript = join(folder, 'secret.log')
    sh('echo public; read line; echo "key: $line"; sleep 100', { transcript })
    await dialogue.expect('public', soon)
    dialogue.transcript.recording = false
    dialogue.send('hunter2\n')
    await dialogue.expect('key: hunter2\n', soon)
    dialogue.transcript.recording = true
    const error = await failureOf(dialogue.expect('never', { timeout: 20 }))
    assert.doesNotMatch(String(error.explanation.output), /hunter2/)
    assert.doesNotMatch(await readFile(transcript, 'utf8'), /hunter2/)
  })

  it('closes a program that will not go', { timeout: 20_000 }, async () => {
    sh(`trap '' HUP TERM INT; echo ready; while :; do sleep 1; done`)
    await dialogue.expect('ready', soon)
    await dialogue.close()
    assert.equal(isAlive(dialogue.pid), false)
  })

  it('refuses to send more at a time than a terminal holds', () => {
    sh('sleep 100')
    assert.throws(() => dialogue.send('x'.repeat(4001)), /over 4000 bytes/)
  })

  it('is not held up by a program that does not read what it is sent', async () => {
    sh('stty raw; echo ready; sleep 100')
    await dialogue.expect('ready', soon)
    dialogue.send('x'.repeat(4000))
    await sleep(10)
  })

  it('keeps up with a flood of output', async () => {
    sh('stty -echo; seq 1 200000; echo the end; sleep 100')
    await dialogue.expect(/the end/, { timeout: 30_000 })
  })
})

describe('a program in a terminal', { timeout: 60_000 }, () => {
  it('ends when we are killed and could not say goodbye', async () => {
    const script = `
      const { spawn } = await import(${JSON.stringify(join(import.meta.dirname, '../../../lib/installer/expect.mts'))})
      const dialogue = spawn('sh', ['-c', 'echo ready; sleep 100'])
      await dialogue.expect('ready', { timeout: 10000 })
      console.log('child ' + dialogue.pid)
      setInterval(() => {}, 1000)`
    const node = spawn(process.execPath, ['--import', 'tsx', '--input-type=module', '-e', script])
    const match = await node.expect(/child (\d+)/, { timeout: 30_000 })
    const child = Number(match.texts[1])
    assert.ok(isAlive(child))
    process.kill(node.pid, 'SIGKILL')
    for (let tries = 0; isAlive(child) && tries < 100; tries += 1) await sleep(50)
    assert.equal(isAlive(child), false)
    await node.close()
  })
})
