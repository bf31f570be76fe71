import assert from 'node:assert/strict'
import { mkdtemp, readFile, rm, stat } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, afterEach, before, describe, it } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { describeError } from '../../lib/errors.mts'
import { ExpectError, type Session, spawn } from '../../lib/expect.mts'

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
  const soon = { timeout: 10 }
  let folder: string
  let session: Session
  before(async () => {
    folder = await mkdtemp(join(tmpdir(), 'expect-'))
  })
  afterEach(() => session.close())
  after(() => rm(folder, { recursive: true }))

  const sh = (script: string, options = {}) => {
    session = spawn('sh', ['-c', script], { name: 'guest', ...options })
    return session
  }

  it('waits for a question and answers it', async () => {
    sh('printf "name? "; read name; echo "hello $name"; exec sleep 100')
    await session.expect('name? ', soon)
    session.send('Ada\n')
    const match = await session.expect(/hello (\w+)\n/, soon)
    assert.deepEqual(match.texts, ['hello Ada\n', 'Ada'])
  })

  it('returns the output before the match, and continues after it', async () => {
    sh('echo one; echo two; echo three; exec sleep 100')
    assert.equal((await session.expect('two', soon)).before, 'one\n')
    assert.equal((await session.expect('three', soon)).before, '\n')
  })

  it('returns which of several patterns matched', async () => {
    sh('echo "permission denied"; exec sleep 100')
    const { index } = await session.expect([/welcome/, 'denied'], soon)
    assert.equal(index, 1)
  })

  it('recognizes a prompt whose colors and title arrive in pieces', async () => {
    sh(
      String.raw`for piece in '\033[1;3' '2m[\033]0;nixos@' 'nixos: ~\007nixos@nix' 'os:~]$ \033[' '0m '; do
        printf "$piece"; sleep 0.05; done; exec sleep 100`,
    )
    await session.expect('[nixos@nixos:~]$ ', soon)
  })

  it('a timeout names what was awaited, for how long, and the last lines', async () => {
    sh('echo starting; echo "still thinking"; exec sleep 100')
    await session.expect('starting', soon)
    await session.expect('thinking', soon)
    const error = await failureOf(session.expect(/\$ /, { timeout: 0.2, what: 'the prompt' }))
    assert.equal(error.kind, 'timeout')
    assert.equal(
      describeError(error),
      'guest: timed out after 0.2s waiting for the prompt\n  | starting\n  | still thinking',
    )
  })

  it('a timeout names the patterns if they have no description', async () => {
    sh('exec sleep 100')
    const error = await failureOf(session.expect([/\$ $/, 'login:'], { timeout: 0.05 }))
    assert.match(error.message, /waiting for \/\\\$ \$\/ or login:/)
  })

  it('does not count the time for which this computer sleeps', async ({ mock }) => {
    sh('sleep 1; echo ready; exec sleep 100')
    const real = performance.now.bind(performance)
    mock.method(performance, 'now', () => real() + (real() - began > 200 ? 3_600_000 : 0))
    const began = real()
    await session.expect('ready', { timeout: 60 })
  })

  it('fails at once when the program ends, with its status and last lines', async () => {
    sh('echo "out of memory"; exit 3')
    const error = await failureOf(session.expect('ready', soon))
    assert.equal(error.kind, 'exit')
    assert.equal(error.message, 'guest: ended with status 3 while waiting for ready')
    assert.match(String(error.explanation.output), /out of memory/)
    const again = await failureOf(session.expect('anything', soon))
    assert.equal(again.kind, 'exit')
  })

  it('names the signal that ended the program', async () => {
    sh('kill -9 $$')
    const error = await failureOf(session.expect('ready', soon))
    assert.match(error.message, /ended by signal 9/)
  })

  it('matches what a program wrote just before its end', async () => {
    sh('seq 1 500; echo last words')
    await session.expect('last words', soon)
    assert.deepEqual(await session.expectExit(soon), { exitCode: 0, signal: 0 })
  })

  it('reports a program that cannot be started as ended', async () => {
    session = spawn('/nonexistent/qemu', [])
    const error = await failureOf(session.expect('ready', soon))
    assert.equal(error.kind, 'exit')
  })

  it('ends a wait with the reason of an abort, and can be used after it', async () => {
    sh('read line; echo "got $line"; exec sleep 100')
    const controller = new AbortController()
    const waiting = session.expect('never', { ...soon, signal: controller.signal })
    const reason = new Error('interrupted')
    setTimeout(() => controller.abort(reason), 50)
    await assert.rejects(waiting, reason)
    await assert.rejects(session.expect('got', { ...soon, signal: controller.signal }), reason)
    session.send('on\n')
    await session.expect('got on', soon)
  })

  it('fails at once on fatal output, even if it came before the wait', async () => {
    const fatalPatterns = [{ pattern: /Kernel panic.*\n/, reason: 'the kernel panicked' }]
    sh('echo "[ 3.1] Kernel panic - not syncing: no init"; echo; echo ready; exec sleep 100', {
      fatalPatterns,
    })
    await sleep(300)
    const error = await failureOf(session.expect('ready', soon))
    assert.equal(error.kind, 'fatal')
    assert.match(error.message, /the kernel panicked while waiting for ready/)
    assert.match(String(error.explanation.output), /not syncing: no init/)
  })

  it('leaves no timer behind, however a wait ends', async () => {
    sh('echo ready; read line')
    const before = timersUnderWay()
    await session.expect('ready', { timeout: 60 })
    await failureOf(session.expect('never', { timeout: 0.02 }))
    const aborted = session.expect('x', { timeout: 60, signal: AbortSignal.abort() })
    await assert.rejects(aborted)
    const ended = failureOf(session.expect('never', { timeout: 60 }))
    session.send('\n')
    await ended
    await session.close()
    assert.equal(timersUnderWay(), before)
  })

  it('refuses two waits at the same time', async () => {
    sh('echo ready; exec sleep 100')
    const first = session.expect('never', { timeout: 0.1 })
    assert.throws(() => session.expect('ready', soon), /one thing at a time/)
    await failureOf(first)
  })

  it('writes a transcript of mode 0600, as plain text, without what was sent', async () => {
    const transcript = join(folder, 'transcript.log')
    sh(
      String.raw`stty -echo; printf '\033[32mready\033[0m\r\n'; read line; echo done; exec sleep 100`,
      {
        transcript,
      },
    )
    await session.expect('ready', soon)
    session.transcript.note('$ answer\n')
    session.send('a secret\n')
    await session.expect('done', soon)
    await session.close()
    assert.equal(await readFile(transcript, 'utf8'), 'ready\n$ answer\ndone\n')
    assert.equal((await stat(transcript)).mode & 0o777, 0o600)
  })

  it('appends to an existing transcript, and names it in errors', async () => {
    const transcript = join(folder, 'twice.log')
    for (const attempt of [1, 2]) {
      sh(`echo attempt ${attempt}`, { transcript })
      const error = await failureOf(session.expect('never', soon))
      assert.equal(error.explanation.log, transcript)
    }
    assert.equal(await readFile(transcript, 'utf8'), 'attempt 1\nattempt 2\n')
  })

  it('keeps what is not recorded out of transcript and errors', async () => {
    const transcript = join(folder, 'secret.log')
    sh('echo public; read line; echo "key: $line"; exec sleep 100', { transcript })
    await session.expect('public', soon)
    session.transcript.recording = false
    session.send('hunter2\n')
    await session.expect('key: hunter2\n', soon)
    session.transcript.recording = true
    const error = await failureOf(session.expect('never', { timeout: 0.02 }))
    assert.doesNotMatch(String(error.explanation.output), /hunter2/)
    assert.doesNotMatch(await readFile(transcript, 'utf8'), /hunter2/)
  })

  it('closes a program that ignores signals', { timeout: 20_000 }, async ({ mock }) => {
    sh(`trap '' HUP TERM INT; echo ready; while :; do sleep 1; done`)
    await session.expect('ready', soon)
    mock.timers.enable({ apis: ['setTimeout'] })
    const closed = session.close()
    mock.timers.tick(5000)
    await closed
    assert.equal(isAlive(session.pid), false)
  })

  it('refuses to send more than a terminal holds before the program has answered', async () => {
    sh('stty -echo; echo ready; read line; echo got $(printf %s "$line" | wc -c); exec sleep 100')
    await session.expect('ready', soon)
    assert.throws(() => session.send('x'.repeat(901)), /901 bytes to send, 900 are free/)
    session.send('x'.repeat(800))
    assert.equal(session.room, 100)
    assert.throws(() => session.send('x'.repeat(101)), /101 bytes to send, 100 are free/)
    session.send('\n')
    await session.expect('got 800', soon)
    assert.equal(session.room, 900)
  })

  it('is not blocked by a program that reads nothing: the wait times out', async () => {
    sh('stty raw -echo; echo ready; exec sleep 100')
    await session.expect('ready', soon)
    session.send('x'.repeat(900))
    assert.equal((await failureOf(session.expect('never', { timeout: 0.1 }))).kind, 'timeout')
  })

  it('keeps up with a flood of output', async () => {
    sh('stty -echo; seq 1 200000; echo the end; exec sleep 100')
    await session.expect(/the end/, { timeout: 30 })
  })
})

describe('a program in a terminal', { timeout: 60_000 }, () => {
  it('ends when its parent is killed', async () => {
    const script = `
      const { spawn } = await import(${JSON.stringify(join(import.meta.dirname, '../../lib/expect.mts'))})
      const session = spawn('sh', ['-c', 'echo ready; exec sleep 100'])
      await session.expect('ready', { timeout: 10 })
      console.log('child ' + session.pid)
      setInterval(() => {}, 1000)`
    const node = spawn(process.execPath, ['--import', 'tsx', '--input-type=module', '-e', script])
    const match = await node.expect(/child (\d+)/, { timeout: 30 })
    const child = Number(match.texts[1])
    assert.ok(isAlive(child))
    process.kill(node.pid, 'SIGKILL')
    for (let tries = 0; isAlive(child) && tries < 100; tries += 1) await sleep(50)
    assert.equal(isAlive(child), false)
    await node.close()
  })
})
