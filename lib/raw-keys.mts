// Single keys from the terminal, without Enter and unseen. However the process ends, the terminal
// is as it was.

/**
 * Calls back for each key until `end` is called. Ctrl-C and Ctrl-Z mean what they always do.
 *
 * @param pressed gets the key's text: "q", "\x1b[A" for an arrow
 */
export class RawKeys {
  private readonly onData: (typed: Buffer) => void
  private readonly restore = () => {
    if (!process.stdin.isTTY) return
    process.stdin.setRawMode(false)
    process.stderr.write(showCursor)
  }
  private readonly begin = () => {
    process.stdin.setRawMode(true)
    process.stderr.write(hideCursor)
  }

  constructor(pressed: (key: string) => void) {
    this.onData = (typed) => {
      const key = typed.toString()
      // In this mode the terminal leaves it to us to send them.
      if (key.includes('\x03')) process.kill(process.pid, 'SIGINT')
      else if (key.includes('\x1a')) this.suspend()
      else pressed(key)
    }
    process.once('exit', this.restore)
    process.on('SIGCONT', this.begin)
    this.begin()
    process.stdin.on('data', this.onData)
  }

  /** Gives the terminal back. */
  end(): void {
    process.off('exit', this.restore)
    process.off('SIGCONT', this.begin)
    process.stdin.off('data', this.onData).pause()
    this.restore()
  }

  private suspend(): void {
    this.restore()
    process.kill(0, 'SIGTSTP')
  }
}

// DECTCEM, of the VT220; every terminal since knows it.
const hideCursor = '\x1b[?25l'
const showCursor = '\x1b[?25h'
