// A shell on a serial console: commands with their exit status and exact output, whatever else
// appears on the console, and files that are sent through it.
import { randomBytes } from 'node:crypto'
import { lastLines, StepError } from './errors.mts'
import { ExpectError, type Session, sendLimit, type WaitOptions } from './expect.mts'
import { sha256 } from './files.mts'
import { awakeTime } from './wait.mts'

export interface CommandOptions {
  timeout?: number // seconds; 300 by default
  shown?: string // what transcript and errors show instead of a command with a secret
  onLine?: (line: string) => void // gets each line of output as it arrives, blank ones left out
  onSent?: ((part: number) => void) | undefined // gets the part of a long command sent, 0 to 1
}

/** A command on the machine that failed. */
export class CommandError extends StepError {
  readonly output: string // all that the command printed

  constructor({ name, transcript }: Session, command: string, status: number, output: string) {
    const explanation = { command, output: lastLines(output, 25), log: transcript.path }
    super(`${name}: a command failed (exit status ${status})`, explanation)
    this.output = output
  }
}

/** The lines around the output of each command. */
export const markers = /^<(begin|end|more) [0-9a-f]{12}( \d+)?>$/

// Three emulated machines on two processors may need minutes for what usually takes a second.
const defaultTimeout = 300
const retryAfter = 5
const framing = 110

/** Waits for a prompt. Enter, every few seconds, repeats one that a kernel message has damaged. */
export async function waitForPrompt(session: Session, prompt: RegExp, wait: Partial<WaitOptions>) {
  const retry = setInterval(() => session.room > 0 && session.send('\n'), retryAfter * 1000)
  const awaited = session.expect(prompt, { timeout: defaultTimeout, ...wait })
  await awaited.finally(() => clearInterval(retry))
}

export class ConsoleShell {
  private readonly session: Session
  private readonly signal: AbortSignal | undefined

  private constructor(session: Session, signal?: AbortSignal) {
    this.session = session
    this.signal = signal
  }

  /**
   * Takes over the root shell that has just shown its prompt: a plain bash without prompts, echo
   * and history. `signal` ends every command.
   * @param silence command that stops others from writing to the console. It is repeated until its
   *   own markers arrive undamaged.
   * @throws ExpectError; StepError if the console still echoes
   */
  static async open(session: Session, options: { silence: string; signal?: AbortSignal }) {
    const { silence, signal } = options
    const shell = new ConsoleShell(session, signal)
    const bash = String.raw`exec env TERM=dumb PS1='\s-\v\$ ' bash --noprofile --norc --noediting`
    session.send(`${bash}\n`)
    await waitForPrompt(session, /bash-[\d.]+[$#] /, { what: "the plain shell's prompt", signal })
    session.send('stty -echo -ixon; PS1= PS2=; unset PROMPT_COMMAND HISTFILE; set +H\n')
    for (let timeout = retryAfter; ; timeout *= 2) {
      try {
        await shell.run(silence, { timeout })
        break
      } catch (error) {
        const lost = error instanceof ExpectError && error.kind === 'timeout'
        if (!lost || session.room < 2 * framing) throw error
      }
    }
    // What is sent later (private keys) must not come back into the transcript.
    const settings = await shell.run('stty -a')
    if (/ -echo\b/.test(settings)) return shell
    throw new StepError(`${session.name}: the console still echoes input`, { output: settings })
  }

  /**
   * Runs a bash command that must succeed; `cd` and `export` affect later ones.
   * @returns what it wrote to stdout and stderr
   * @throws CommandError if its exit status is not 0; ExpectError; the signal's reason
   */
  async run(command: string, options: CommandOptions = {}): Promise<string> {
    const { status, output } = await this.execute(command, options)
    if (status === 0) return output
    throw new CommandError(this.session, options.shown ?? command, status, output.trimEnd())
  }

  /** The same for a command that may fail. */
  async execute(command: string, options: CommandOptions = {}) {
    const { timeout = defaultTimeout, shown = command, onLine, onSent } = options
    const deadline = awakeTime() + timeout * 1000
    const what = `the end of "${shown.split('\n')[0]?.slice(0, 100)}"`
    const expect = (wanted: RegExp | RegExp[]) => {
      const left = Math.max(0, (deadline - awakeTime()) / 1000)
      return this.session.expect(wanted, { what, signal: this.signal, timeout: left })
    }
    // The markers are assembled on the machine, so that an echo of this line does not contain them.
    const nonce = randomBytes(6).toString('hex')
    this.session.transcript.note(`# ${shown}\n`)
    const pieces = piecesOf(command)
    const last = pieces.pop() ?? ''
    for (const [index, piece] of pieces.entries()) {
      this.session.send(`typed+='${piece}'; printf '<%s %s>\\n' more ${nonce}\n`)
      await expect(new RegExp(`<more ${nonce}>\n`))
      onSent?.((index + 1) / pieces.length)
    }
    this.session.send(
      `printf '<%s %s>\\n' begin ${nonce}; eval "$typed"'${last}'; printf '\\n<%s %s %d>\\n' end ${nonce} $?; typed=\n`,
    )
    await expect(new RegExp(`<begin ${nonce}>\n`))

    const end = new RegExp(`(?:^|\n)<end ${nonce} (\\d+)>\n`)
    let output = ''
    for (;;) {
      const { index, before, texts } = await expect(onLine ? [end, /^[^\n]*\n/] : [end])
      const text = index === 0 ? before : texts[0]
      output += text
      if (onLine) for (const line of text.split('\n')) if (line.trim()) onLine(line)
      if (index === 0) return { status: Number(texts[1]), output }
    }
  }

  /**
   * Writes a file on the machine, mode 0600: base64 in acknowledged pieces, then its checksum.
   * 60 KB take three seconds. Nothing of it is recorded.
   * @param path absolute, without characters that are special to a shell
   */
  async upload(data: Uint8Array, path: string, onSent?: (part: number) => void): Promise<void> {
    const { transcript } = this.session
    const base64 = Buffer.from(data).toString('base64')
    const command = `(umask 077; base64 -d > ${path}) <<'end'\n${base64}\nend`
    transcript.recording = false
    try {
      await this.run(command, { shown: `upload ${path}`, onSent })
    } finally {
      transcript.recording = true
    }
    await this.run(`echo '${sha256(data)}  ${path}' | sha256sum -c`)
  }
}

/** A command for single quotes, in pieces that fit into the terminal. */
function piecesOf(command: string): string[] {
  const pieces = ['']
  for (const character of command) {
    const quoted = character === "'" ? String.raw`'\''` : character
    const longer = pieces.at(-1) + quoted
    const fits = Buffer.byteLength(longer) <= sendLimit - framing
    pieces.splice(fits ? -1 : pieces.length, 1, fits ? longer : quoted)
  }
  return pieces
}
