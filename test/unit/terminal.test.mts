import assert from 'node:assert/strict'
import { describe, it } from 'node:test'
import { PlainTextStream, plainText } from '../../lib/terminal.mts'

// As the NixOS installer writes it: a title stands between the bracket and the name.
const prompt = '\r\n\x1b[1;32m[\x1b]0;nixos@nixos: ~\x07nixos@nixos:~]$\x1b[0m '

describe('plain text of a terminal', () => {
  for (const [what, raw, expected] of [
    ['the prompt of the NixOS installer', prompt, '\n[nixos@nixos:~]$ '],
    ['colors', '[\x1b[0;32m  OK  \x1b[0m] Started', '[  OK  ] Started'],
    ['bracketed paste, on and off', '\x1b[?2004h$ \x1b[?2004l', '$ '],
    ['sequences of the firmware', '\x1b[2J\x1b[01;01H\x1b[=3h\x1b[8;25;80tBdsDxe', 'BdsDxe'],
    ['a title that ends in ESC \\', '\x1b]0;title\x1b\\text', 'text'],
    ['the context marks of systemd', `\x1b]3008;start=${'a1'.repeat(200)}\x1b\\text`, 'text'],
    ['a query of the terminal', '\x1bP+q544e\x1b\\text', 'text'],
    ['a character set selection', '\x1b(Btext\x1b7\x1b8\x1bc', 'text'],
    ['carriage returns, bells and NULs', 'a\r\r\nb\x07\0\r\n', 'a\nb\n'],
    ['tabs and characters beyond ASCII', '\tä „—“ 😀\n', '\tä „—“ 😀\n'],
  ] as const) {
    it(`has no sequences: ${what}`, () => assert.equal(plainText(raw), expected))
  }

  it('loses at most one line to a title whose end is missing', () => {
    assert.match(plainText('\x1b]0;title [   1.0] message\nnext line\n'), /\nnext line\n$/)
  })

  it('is the same wherever a stream is cut', () => {
    const raw = `${prompt}\x1b]3008;start=1;type=shell\x1b\\ls\x1b(B\r\n\x1bP+q\x1b\\a\x1b[?25hb\x1b]lost\nend`
    const whole = plainText(raw)
    for (let first = 0; first <= raw.length; first += 1) {
      for (let second = first; second <= raw.length; second += 1) {
        const stream = new PlainTextStream()
        const pieces = [raw.slice(0, first), raw.slice(first, second), raw.slice(second)]
        assert.equal(pieces.map((piece) => stream.push(piece)).join(''), whole)
      }
    }
  })

  it('holds back only what may still become a sequence', () => {
    const stream = new PlainTextStream()
    assert.equal(stream.push('$ \x1b[1;3'), '$ ')
    assert.equal(stream.push('2mgreen'), 'green')
  })

  it('processes 50,000 lines in two seconds', () => {
    const stream = new PlainTextStream()
    const line = '\x1b[0;32m[  123.456789] audit: type=1400 apparmor\x1b[0m\r\n'
    const started = performance.now()
    for (let count = 0; count < 50_000; count += 1) stream.push(line)
    assert.ok(performance.now() - started < 2000)
  })
})
