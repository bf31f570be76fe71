import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { chmod, mkdtemp, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, it } from 'node:test'
import { CommandError, ConsoleShell, waitForPrompt } from '../../lib/console-shell.mts'
import { describeError } from '../../lib/errors.mts'
import { ExpectError, type Session, spawn } from '../../lib/expect.mts'

// The machine is a real bash in a terminal, as chatty as one on a serial console: line editing,
// echo, coloured prompts. Only `dmesg` is ours: the real one would change this computer.
describe('a shell on the console', { timeout: 120_000 }, () => {
  const silence = 'dmesg -n 1'
  let folder: string
  let transcript: string
  let session: Session
  beforeEach(async () => {
    folder = await mkdtemp(join(tmpdir(), 'installer-shell-'))
    transcript = join(folder, 'install.log')
    await writeProgram('dmesg', '#!/bin/sh\n[ "$*" = "-n 1" ]\n')
  })
  afterEach(async () => {
    await session.close()
    await rm(folder, { recursive: true })
  })

  async function writeProgram(name: string, text: string): Promise<void> {
    await writeFile(join(folder, name), text)
    await chmod(join(folder, name), 0o755)
  }

  /** A root shell at its prompt; `before` is run in its terminal first. */
  async function machine(before = ':'): Promise<Session> {
    const prompt = String.raw`\n\[\033[1;31m\][\[\e]0;\u@\h: \w\a\]root@nixos:\w]#\[\033[0m\] `
    const start = `${before}\nexec env PS1=${`'${prompt}'`} bash --noprofile --norc`
    session = spawn('bash', ['-c', start], {
      name: 'alpha',
      transcript,
      cwd: folder,
      env: { ...process.env, PATH: `${folder}:${process.env.PATH}` },
    })
    await waitForPrompt(session, /root@nixos:[^\n]*\]# /, { what: 'the prompt', timeout: 20 })
    return session
  }

  const shellOf = async (before?: string) => ConsoleShell.open(await machine(before), { silence })

  it('returns the exact output of a command and its exit status', async () => {
    const shell = await shellOf()
    assert.deepEqual(
      await shell.execute('echo one; echo two >&2; exit_with() { return $1; }; exit_with 7'),
      {
        status: 7,
        output: 'one\ntwo\n',
      },
    )
    assert.deepEqual(await shell.execute(String.raw`printf ' a\nb '`), {
      status: 0,
      output: ' a\nb ',
    })
    assert.deepEqual(await shell.execute('true'), { status: 0, output: '' })
  })

  it('keeps variables and the current folder from one command to the next', async () => {
    const shell = await shellOf()
    await shell.run('cd / && export COLOUR="dark $((40 + 2))"')
    assert.equal(await shell.run('echo "$PWD $COLOUR"'), '/ dark 42\n')
  })

  it('passes quotes, dollars, exclamation marks and several lines unchanged', async () => {
    const shell = await shellOf()
    const text = `it's "5 $" \`not\` \\ !! !x %s ~`
    const output = await shell.run(`cat <<'end'\n${text}\nend\nfor i in 1 2; do\n  echo $i\ndone`)
    assert.equal(output, `${text}\n1\n2\n`)
  })

  it('an error has the command, its exit status and output', async () => {
    const shell = await shellOf()
    const error = await shell.run('ls /nonexistent').catch((reason: unknown) => reason)
    assert.ok(error instanceof CommandError)
    assert.equal(error.output.split('\n').length, 1)
    assert.match(
      describeError(error),
      /^alpha: a command failed \(exit status 2\)\n {2}\| ls: .*No such file.*\n {2}command: ls \/nonexistent\n {2}log: /,
    )
  })

  it('survives a command with a syntax error', async () => {
    const shell = await shellOf()
    const { status, output } = await shell.execute('if true; then echo "unfinished')
    assert.notEqual(status, 0)
    assert.match(output, /unexpected EOF/)
    assert.equal(await shell.run('echo well'), 'well\n')
  })

  it('is not misled by the echo of its own commands', async () => {
    session = await machine()
    const shell = await ConsoleShell.open(session, { silence })
    await shell.run('stty echo')
    assert.equal((await shell.execute('echo output; false')).status, 1)
  })

  it('reads output longer than any line or window of a terminal', async () => {
    const shell = await shellOf()
    const output = await shell.run('seq -s, 1 20000; seq 1 20000', { timeout: 60 })
    const numbers = Array.from({ length: 20_000 }, (_, index) => index + 1)
    assert.equal(output, `${numbers.join(',')}\n${numbers.join('\n')}\n`)
  })

  it('passes on lines as they arrive', async () => {
    const shell = await shellOf()
    const lines: string[] = []
    const { status } = await shell.execute(
      String.raw`echo one; read -t 0.3 < <(sleep 9); printf 'two\n\n<three>\nfour'; false`,
      { onLine: (line) => lines.push(line) },
    )
    assert.deepEqual(lines, ['one', 'two', '<three>', 'four'])
    assert.equal(status, 1)
  })

  it('silences a kernel that floods the console', async () => {
    // As printk does: into the middle of lines, without regard for who is writing. `dmesg -n 1`
    // is what ends it.
    await writeProgram(
      'dmesg',
      `#!/bin/sh\n[ "$*" = "-n 1" ] && kill "$(cat ${folder}/noise.pid)"\n`,
    )
    const noise = `( while :; do printf '[  12.345678] audit: type=1400 msg\r\n'; sleep 0.002; done ) &
      echo $! > noise.pid`
    const shell = await shellOf(noise)
    assert.equal(await shell.run('echo clean'), 'clean\n')
    assert.match(await readFile(transcript, 'utf8'), /audit: type=1400/)
  })

  it('wakes up a console that shows its prompt only after Enter', async ({ mock }) => {
    session = spawn('bash', [
      '-c',
      'read line; printf "login ok\n[root@nixos:~]# "; exec sleep 100',
    ])
    mock.timers.enable({ apis: ['setInterval'] })
    const prompt = waitForPrompt(session, /\]# /, { what: 'the prompt', timeout: 30 })
    mock.timers.tick(5000)
    await prompt
  })

  it('times out when no prompt appears', async () => {
    session = spawn('bash', ['-c', 'echo "starting udev"; exec sleep 100'], { name: 'alpha' })
    const waiting = waitForPrompt(session, /\]# /, { what: 'the prompt', timeout: 0.3 })
    await assert.rejects(waiting, /alpha: timed out after 0\.3s waiting for the prompt/)
  })

  it('uploads 60 KB as a file of mode 0600, in a few seconds', async (context) => {
    const shell = await shellOf()
    const data = randomBytes(60_000)
    const path = join(folder, 'staged.tar.gz')
    const parts: number[] = []
    const started = performance.now()
    await shell.upload(data, path, (part) => parts.push(part))
    context.diagnostic(`${Math.round(performance.now() - started)} ms`)
    assert.ok(data.equals(await readFile(path)))
    assert.equal((await stat(path)).mode & 0o777, 0o600)
    assert.equal(parts.at(-1), 1)
    assert.ok(parts.length > 10)
  })

  it('sends a command that is longer than what a terminal holds', async () => {
    const shell = await shellOf()
    const text = "it's „long“ ".repeat(1000)
    assert.equal(await shell.run(`cat <<'end'\n${text}\nend`), `${text}\n`)
    assert.equal(await shell.run('echo short'), 'short\n')
  })

  it('an upload to a machine that has stopped reading times out', async () => {
    const shell = await shellOf()
    // The shell stops when it has acknowledged the second piece.
    const stopped = { timeout: 1, onSent: () => process.kill(session.pid, 'SIGSTOP') }
    const hanging = shell.run(`: ${'x'.repeat(100_000)}`, stopped)
    await assert.rejects(hanging, /alpha: timed out after [01]\.\ds waiting for/)
    process.kill(session.pid, 'SIGCONT')
  })

  it('an upload changes neither umask nor folder of the shell', async () => {
    const shell = await shellOf()
    await shell.run('umask 022; cd /')
    await shell.upload(Buffer.from('key'), join(folder, 'key.pem'))
    assert.equal(await shell.run('umask; pwd'), '0022\n/\n')
  })

  it('uploads an empty file, and a small one', async () => {
    const shell = await shellOf()
    for (const text of ['', 'key\n']) {
      await shell.upload(Buffer.from(text), join(folder, 'small'))
      assert.equal(await readFile(join(folder, 'small'), 'utf8'), text)
    }
  })

  it('keeps uploaded data out of the transcript', async () => {
    const shell = await shellOf()
    const secret = '-----BEGIN RSA PRIVATE KEY-----\n'.repeat(200)
    // Even if the machine should echo it.
    await shell.run('stty echo')
    await shell.upload(Buffer.from(secret), join(folder, 'key.pem'))
    const text = await readFile(transcript, 'utf8')
    const encoded = Buffer.from(secret).toString('base64')
    for (let at = 0; at < encoded.length; at += 500) {
      assert.ok(!text.includes(encoded.slice(at, at + 24)))
    }
    assert.match(text, /sha256sum -c/)
  })

  it('detects an upload that arrives damaged', async () => {
    await writeProgram('base64', '#!/bin/sh\n/usr/bin/base64 "$@" | tr "\\0" x\n')
    const shell = await shellOf()
    const path = join(folder, 'damaged')
    await assert.rejects(shell.upload(Buffer.alloc(100), path), (error) => {
      assert.ok(error instanceof CommandError)
      assert.match(String(error.explanation.command), /sha256sum -c/)
      return true
    })
  })

  it('the error of an upload has its reason, and none of the data', async () => {
    const shell = await shellOf()
    const data = Buffer.from('secret '.repeat(1000))
    await assert.rejects(shell.upload(data, '/dev/null/x'), (error) => {
      assert.match(describeError(error), /Not a directory/)
      assert.doesNotMatch(describeError(error), /c2VjcmV0/)
      return true
    })
  })

  it('does not show a command that contains a secret', async () => {
    const shell = await shellOf()
    const options = { shown: 'export of the proxy settings' }
    const failing = shell.run('export http_proxy=http://me:hunter2@proxy; false', options)
    await assert.rejects(failing, (error) => {
      assert.match(describeError(error), /command: export of the proxy settings/)
      assert.doesNotMatch(describeError(error), /hunter2/)
      return true
    })
    assert.doesNotMatch(await readFile(transcript, 'utf8'), /hunter2/)
  })

  it('fails at once when the machine ends during a command', async () => {
    const shell = await shellOf()
    const running = shell.execute('echo shutting down; kill -9 $$')
    await assert.rejects(running, (error) => {
      assert.ok(error instanceof ExpectError)
      assert.match(
        error.message,
        /alpha: ended by signal 9 while waiting for the end of "echo shut/,
      )
      return true
    })
  })

  it('stops during a command when the signal is aborted', async () => {
    const controller = new AbortController()
    const shell = await ConsoleShell.open(await machine(), {
      silence,
      signal: controller.signal,
    })
    const reason = new Error('interrupted by SIGINT')
    const running = shell.execute('echo begun; exec sleep 100', {
      onLine: () => controller.abort(reason),
    })
    await assert.rejects(running, reason)
  })

  it('times out on a command that takes too long', async () => {
    const shell = await shellOf()
    await assert.rejects(
      shell.execute('sleep 100', { timeout: 0.2 }),
      /alpha: timed out after .* waiting for the end of "sleep 100"/,
    )
  })
})
