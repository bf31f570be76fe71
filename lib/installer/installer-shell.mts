// Commands at a shell on a serial console: each with its exit status and its output, whatever else
// the console shows, and files sent through it.
import { createHash, randomBytes } from 'node:crypto'
import { StepError } from '../errors.mts'
import { type Dialogue, ExpectError } from './expect.mts'

export interface CommandOptions {
  /** Milliseconds; a minute or so for what should take a second. */
  timeout?: number
  signal?: AbortSignal | undefined
  /** What transcript and errors show in place of the command, where it holds a secret. */
  shown?: string
  /** Gets each line of output as it comes, blank ones left out. */
  onLine?: (line: string) => void
}

/** A command of the installation that ended with a status other than 0. */
export class CommandError extends StepError {
  readonly status: number
  readonly output: string

  constructor(name: string, command: string, status: number, output: string, log?: string) {
    const lines = output.split('\n').slice(-25).join('\n')
    super(`${name}: a command ended with status ${status}`, {
      command,
      output: lines,
      ...(log ? { log } : {}),
    })
    this.status = status
    this.output = output
  }
}

/** The lines around each command's output. */
export const markers = /^<(begin|end) [0-9a-f]{12}( \d+)?>$/

// Under emulation, with three machines on two cores, one second becomes many.
const usualTimeout = 300_000
const nudgeEvery = 5000
// A cooked terminal cuts lines at 4095 characters, and a Dialogue sends no more than 4000 at once.
const uploadLine = /.{1,1000}/g
const uploadLines = 3

/**
 * Waits for a prompt. Kernel messages may come in the middle of it, and a getty may want to be
 * woken: Enter, every few seconds, brings another one.
 */
export async function waitForPrompt(
  dialogue: Dialogue,
  prompt: RegExp,
  options: { what: string; timeout?: number; signal?: AbortSignal | undefined },
): Promise<void> {
  const { timeout = usualTimeout } = options
  const nudge = setInterval(() => dialogue.send('\n'), nudgeEvery)
  try {
    await dialogue.expect(prompt, { ...options, timeout })
  } finally {
    clearInterval(nudge)
  }
}

export class InstallerShell {
  private readonly dialogue: Dialogue
  private readonly signal: AbortSignal | undefined

  private constructor(dialogue: Dialogue, signal: AbortSignal | undefined) {
    this.dialogue = dialogue
    this.signal = signal
  }

  /**
   * Takes over the root shell that has just shown its prompt: a plain bash without prompts, echo
   * and history, on a console that the kernel keeps out of.
   *
   * @param signal ends every command, as does that of a single one
   * @throws as `Dialogue.expect`
   */
  static async open(dialogue: Dialogue, signal?: AbortSignal): Promise<InstallerShell> {
    const shell = new InstallerShell(dialogue, signal)
    dialogue.send(String.raw`exec env TERM=dumb PS1='\s-\v\$ ' bash --noprofile --norc --noediting`)
    dialogue.send('\n')
    await waitForPrompt(dialogue, /bash-[\d.]+[$#] /, { what: "the plain shell's prompt", signal })
    dialogue.send('stty -echo -ixon; PS1= PS2=; unset PROMPT_COMMAND HISTFILE; set +H\n')
    await shell.silenceKernel()
    // What is sent later (private keys) must not come back into the transcript.
    const settings = await shell.succeed('stty -a')
    if (!/ -echo\b/.test(settings)) {
      throw new StepError(`${dialogue.name}: the console still echoes what is typed`, {
        output: settings,
      })
    }
    return shell
  }

  /**
   * Runs a command and waits for its end. It runs in the shell itself: `cd` and `export` last.
   *
   * @param command bash, of any number of lines; up to some 3500 bytes
   * @returns its status, and what it wrote to both outputs, exactly
   * @throws as `Dialogue.expect`
   */
  async run(
    command: string,
    options: CommandOptions = {},
  ): Promise<{ status: number; output: string }> {
    const { timeout = usualTimeout, signal = this.signal, shown = command, onLine } = options
    const deadline = performance.now() + timeout
    const what = `the end of "${shown.split('\n')[0]}"`
    const next = (wanted: RegExp | RegExp[]) =>
      this.dialogue.expect(wanted, { what, signal, timeout: deadline - performance.now() })

    // The markers are put together on the machine, so that an echo of this line is none.
    const nonce = randomBytes(6).toString('hex')
    const quoted = `'${command.replaceAll("'", String.raw`'\''`)}'`
    this.dialogue.transcript.note(`# ${shown}\n`)
    this.dialogue.send(
      `printf '<%s %s>\\n' begin ${nonce}; eval ${quoted}; printf '\\n<%s %s %d>\\n' end ${nonce} $?\n`,
    )
    await next(new RegExp(`<begin ${nonce}>\n`))

    const end = new RegExp(`(?:^|\n)<end ${nonce} (\\d+)>\n`)
    let output = ''
    for (;;) {
      const { index, before, texts } = await next(onLine ? [end, /^[^\n]*\n/] : [end])
      const text = index === 0 ? before : texts[0]
      output += text
      if (onLine) for (const line of text.split('\n')) if (line.trim()) onLine(line)
      if (index === 0) return { status: Number(texts[1]), output }
    }
  }

  /** Runs a command that is to succeed. @returns its output @throws CommandError, or as `run` */
  async succeed(command: string, options: CommandOptions = {}): Promise<string> {
    const { status, output } = await this.run(command, options)
    if (status === 0) return output
    const { name, transcript } = this.dialogue
    const shown = options.shown ?? command
    throw new CommandError(name, shown, status, output.trimEnd(), transcript.path)
  }

  /**
   * Writes a file on the machine, readable by root alone, through the console: base64 in blocks
   * that are acknowledged one by one, then its checksum. 60 KB take two to three seconds. Nothing
   * of it is recorded.
   *
   * @param path absolute, without characters that are special to a shell
   * @param progress gets the part that is done, 0 to 1
   */
  async upload(data: Uint8Array, path: string, progress?: (part: number) => void): Promise<void> {
    const lines = Buffer.from(data).toString('base64').match(uploadLine) ?? []
    await this.succeed(`(umask 077; : > ${path}; : > ${path}.base64)`)
    this.dialogue.transcript.recording = false
    try {
      for (let at = 0; at < lines.length; at += uploadLines) {
        const block = lines.slice(at, at + uploadLines).join('\n')
        await this.succeed(`cat >> ${path}.base64 <<end\n${block}\nend`, {
          shown: `upload of ${path}, from line ${at} of ${lines.length}`,
        })
        progress?.(Math.min(1, (at + uploadLines) / lines.length))
      }
    } finally {
      this.dialogue.transcript.recording = true
    }
    const sum = createHash('sha256').update(data).digest('hex')
    await this.succeed(`base64 -d ${path}.base64 > ${path} && rm ${path}.base64`)
    await this.succeed(`echo '${sum}  ${path}' | sha256sum -c`)
  }

  /** Until this has worked a kernel message may damage a marker: again, then, with a new one. */
  private async silenceKernel(): Promise<void> {
    for (let attempt = 1; ; attempt += 1) {
      try {
        await this.succeed('dmesg -n 1', { timeout: nudgeEvery })
        return
      } catch (error) {
        const lost = error instanceof ExpectError && error.kind === 'timeout'
        if (!lost || attempt === 10) throw error
      }
    }
  }
}
