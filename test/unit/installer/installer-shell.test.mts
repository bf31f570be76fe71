import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { chmod, mkdtemp, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, it } from 'node:test'
import { describeError } from '../../../lib/errors.mts'
import { type Dialogue, ExpectError, spawn } from '../../../lib/installer/expect.mts'
import {
  CommandError,
  InstallerShell,
  waitForPrompt,
} from '../../../lib/installer/installer-shell.mts'

// The machine is a real bash in a terminal, as chatty as one on a serial console: line editing,
// echo, coloured prompts. Only `dmesg` is ours: the real one would change this computer.
describe('a shell on the console', { timeout: 120_000 }, () => {
  let folder: string
  let transcript: string
  let dialogue: Dialogue
  beforeEach(async () => {
    folder = await mkdtemp(join(tmpdir(), 'installer-shell-'))
    transcript = join(folder, 'install.log')
    await writeProgram('dmesg', '#!/bin/sh\n[ "$*" = "-n 1" ]\n')
  })
  afterEach(async () => {
    await dialogue.close()
    await rm(folder, { recursive: true })
  })

  async function writeProgram(name: string, text: string): Promise<void> {
    await writeFile(join(folder, name), text)
    await chmod(join(folder, name), 0o755)
  }

  /** A root shell at its prompt; `before` is run in its terminal first. */
  async function machine(before = ':'): Promise<Dialogue> {
    const prompt = String.raw`\n\[\033[1;31m\][\[\e]0;\u@\h: \w\a\]root@nixos:\w]#\[\033[0m\] `
    const start = `${before}\nexec env PS1=${`'${prompt}'`} bash --noprofile --norc`
    dialogue = spawn('bash', ['-c', start], {
      name: 'alpha',
      transcript,
      cwd: folder,
      env: { ...process.env, PATH: `${folder}:${process.env.PATH}` },
    })
    await waitForPrompt(dialogue, /root@nixos:[^\n]*\]# /, { what: 'the prompt', timeout: 20_000 })
    return dialogue
  }

  const shellOf = async (before?: string) => InstallerShell.open(await machine(before))

  it('gives the exact output of a command and its status', async () => {
    const shell = await shellOf()
    assert.deepEqual(
      await shell.run('echo one; echo two >&2; exit_with() { return $1; }; exit_with 7'),
      {
        status: 7,
        output: 'one\ntwo\n',
      },
    )
    assert.deepEqual(await shell.run(String.raw`printf ' a\nb '`), { status: 0, output: ' a\nb ' })
    assert.deepEqual(await shell.run('true'), { status: 0, output: '' })
  })

  it('keeps variables and the folder from one command to the next', async () => {
    const shell = await shellOf()
    await shell.succeed('cd / && export COLOUR="dark $((40 + 2))"')
    assert.equal(await shell.succeed('echo "$PWD $COLOUR"'), '/ dark 42\n')
  })

  it('takes quotes, dollars, exclamation marks and several lines as they are', async () => {
    const shell = await shellOf()
    const text = `it's "5 $" \`not\` \\ !! !x %s ~`
    const output = await shell.succeed(
      `cat <<'end'\n${text}\nend\nfor i in 1 2; do\n  echo $i\ndone`,
    )
    assert.equal(output, `${text}\n1\n2\n`)
  })

  it('tells a failing command with status and output', async () => {
    const shell = await shellOf()
    const error = await shell.succeed('ls /nonexistent').catch((reason: unknown) => reason)
    assert.ok(error instanceof CommandError)
    assert.equal(error.status, 2)
    assert.match(
      describeError(error),
      /^alpha: a command ended with status 2\n {2}\| ls: .*No such file.*\n {2}command: ls \/nonexistent\n {2}log: /,
    )
  })

  it('survives a command with a syntax error', async () => {
    const shell = await shellOf()
    const { status, output } = await shell.run('if true; then echo "unfinished')
    assert.notEqual(status, 0)
    assert.match(output, /unexpected EOF/)
    assert.equal(await shell.succeed('echo well'), 'well\n')
  })

  it('is not taken in by its own commands echoed', async () => {
    dialogue = await machine()
    const shell = await InstallerShell.open(dialogue)
    await shell.succeed('stty echo')
    assert.equal((await shell.run('echo output; false')).status, 1)
  })

  it('reads output longer than any line or window of a terminal', async () => {
    const shell = await shellOf()
    const output = await shell.succeed('seq -s, 1 20000; seq 1 20000', { timeout: 60_000 })
    const numbers = Array.from({ length: 20_000 }, (_, index) => index + 1)
    assert.equal(output, `${numbers.join(',')}\n${numbers.join('\n')}\n`)
  })

  it('gives lines as they come', async () => {
    const shell = await shellOf()
    const lines: string[] = []
    const { status } = await shell.run(
      String.raw`echo one; read -t 0.3 < <(sleep 9); printf 'two\n\n<three>\nfour'; false`,
      { onLine: (line) => lines.push(line) },
    )
    assert.deepEqual(lines, ['one', 'two', '<three>', 'four'])
    assert.equal(status, 1)
  })

  it('gets through to a shell while the kernel floods the console', async () => {
    // As printk does: into the middle of lines, without regard for who is writing. `dmesg -n 1`
    // is what ends it.
    await writeProgram(
      'dmesg',
      `#!/bin/sh\n[ "$*" = "-n 1" ] && kill "$(cat ${folder}/noise.pid)"\n`,
    )
    const noise = `( while :; do printf '[  12.345678] audit: type=1400 msg\r\n'; sleep 0.002; done ) &
      echo $! > noise.pid`
    const shell = await shellOf(noise)
    assert.equal(await shell.succeed('echo clean'), 'clean\n')
    assert.match(await readFile(transcript, 'utf8'), /audit: type=1400/)
  })

  it('wakes a console that shows its prompt only after Enter', async () => {
    dialogue = spawn('bash', ['-c', 'read line; printf "login ok\n[root@nixos:~]# "; sleep 100'])
    await waitForPrompt(dialogue, /\]# /, { what: 'the prompt', timeout: 30_000 })
  })

  it('gives up when no prompt comes, and says so', async () => {
    dialogue = spawn('bash', ['-c', 'echo "starting udev"; sleep 100'], { name: 'alpha' })
    const waiting = waitForPrompt(dialogue, /\]# /, { what: 'the prompt', timeout: 300 })
    await assert.rejects(waiting, /alpha: waited 0\.3s in vain for the prompt/)
  })

  it('uploads 60 KB unharmed, for root alone, in a few seconds', async (context) => {
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
    await assert.rejects(stat(`${path}.base64`), { code: 'ENOENT' })
  })

  it('changes nothing in the shell by an upload', async () => {
    const shell = await shellOf()
    await shell.succeed('umask 022; cd /')
    await shell.upload(Buffer.from('key'), join(folder, 'key.pem'))
    assert.equal(await shell.succeed('umask; pwd'), '0022\n/\n')
  })

  it('uploads a file of no bytes, and one of a few', async () => {
    const shell = await shellOf()
    for (const text of ['', 'key\n']) {
      await shell.upload(Buffer.from(text), join(folder, 'small'))
      assert.equal(await readFile(join(folder, 'small'), 'utf8'), text)
    }
  })

  it('keeps what is uploaded out of the transcript', async () => {
    const shell = await shellOf()
    const secret = '-----BEGIN RSA PRIVATE KEY-----\n'.repeat(200)
    // Even if the machine should echo it.
    await shell.succeed('stty echo')
    await shell.upload(Buffer.from(secret), join(folder, 'key.pem'))
    const text = await readFile(transcript, 'utf8')
    const encoded = Buffer.from(secret).toString('base64')
    for (let at = 0; at < encoded.length; at += 500) {
      assert.ok(!text.includes(encoded.slice(at, at + 24)))
    }
    assert.match(text, /sha256sum -c/)
  })

  it('notices an upload that arrives damaged', async () => {
    await writeProgram('base64', '#!/bin/sh\n/usr/bin/base64 "$@" | tr "\\0" x\n')
    const shell = await shellOf()
    const path = join(folder, 'damaged')
    await assert.rejects(shell.upload(Buffer.alloc(100), path), (error) => {
      assert.ok(error instanceof CommandError)
      assert.match(String(error.explanation.command), /sha256sum -c/)
      return true
    })
  })

  it('says why an upload fails, without what was uploaded', async () => {
    const shell = await shellOf()
    const data = Buffer.from('secret '.repeat(1000))
    await assert.rejects(shell.upload(data, '/dev/full/x'), (error) => {
      assert.match(describeError(error), /Not a directory/)
      assert.doesNotMatch(describeError(error), /c2VjcmV0/)
      return true
    })
  })

  it('shows something else than a command that holds a secret', async () => {
    const shell = await shellOf()
    const options = { shown: 'export of the proxy settings' }
    const failing = shell.succeed('export http_proxy=http://me:hunter2@proxy; false', options)
    await assert.rejects(failing, (error) => {
      assert.match(describeError(error), /command: export of the proxy settings/)
      assert.doesNotMatch(describeError(error), /hunter2/)
      return true
    })
    assert.doesNotMatch(await readFile(transcript, 'utf8'), /hunter2/)
  })

  it('fails at once when the machine ends in the middle of a command', async () => {
    const shell = await shellOf()
    const running = shell.run('echo shutting down; kill -9 $$')
    await assert.rejects(running, (error) => {
      assert.ok(error instanceof ExpectError)
      assert.match(
        error.message,
        /alpha: ended by signal 9 while waiting for the end of "echo shut/,
      )
      return true
    })
  })

  it('stops in the middle of a command when told to', async () => {
    const controller = new AbortController()
    const shell = await InstallerShell.open(await machine(), controller.signal)
    const reason = new Error('interrupted by SIGINT')
    const running = shell.run('echo begun; sleep 100', {
      onLine: () => controller.abort(reason),
    })
    await assert.rejects(running, reason)
  })

  it('gives up on a command that takes too long', async () => {
    const shell = await shellOf()
    await assert.rejects(
      shell.run('sleep 100', { timeout: 200 }),
      /alpha: waited .* in vain for the end of "sleep 100"/,
    )
  })
})
