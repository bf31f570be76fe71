// What holds for any input, random and hostile, of the parsers that are ours.
import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { once } from 'node:events'
import { mkdtemp, rm } from 'node:fs/promises'
import { createServer, type Server, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import fc from 'fast-check'
import { parseEnvFile } from '../../lib/env-file.mts'
import { StepError } from '../../lib/errors.mts'
import { firstEntry } from '../../lib/iso.mts'
import { LearningSwitch } from '../../lib/lan-switch.mts'
import { Qmp } from '../../lib/qmp.mts'
import { PlainTextStream, plainText } from '../../lib/terminal.mts'

/** Text in which the given pieces are frequent. */
const textWith = (...pieces: string[]) =>
  fc
    .array(fc.oneof(fc.constantFrom(...pieces), fc.string({ unit: 'binary' })), { maxLength: 40 })
    .map((parts) => parts.join(''))

/** Milliseconds. */
function timeOf(work: () => unknown): number {
  const began = performance.now()
  work()
  return performance.now() - began
}

describe('cluster.env, whatever is in it,', () => {
  const hostile = textWith(
    ...['A=', 'B=', '$A', `\${A}`, '$(date)', '`date`', '"', "'", '\\', '#', ' ', '\t', '=', '~'],
    ...['\n', '\r\n', '\0', '\uFEFF', 'export ', ';', '&', '|', '<', '>', '(', ')', '*', '$'],
  )

  it('is read to its end, and each problem has a line of the file', () => {
    fc.assert(
      fc.property(hostile, (text) => {
        const { assignments, problems } = parseEnvFile(text)
        const lines = text.split('\n').length
        for (const { line } of [...assignments, ...problems]) {
          assert.ok(line >= 1 && line <= lines)
        }
        for (const { name } of assignments) assert.match(name, /^[A-Za-z_]\w*$/)
      }),
      { numRuns: 2000 },
    )
  })

  it('means the same to a shell, where it is accepted', () => {
    // One shell for all of them.
    const accepted: { text: string; expected: string }[] = []
    const word = fc
      .array(
        fc.constantFrom(
          ...['a', '1', '.', '/', ':', '-', '$A', `\${A}`, '"b c"', "'d e'", '\\"', '\\$', '\\x'],
          ...['"$A"', '"\\$A"', '"\\\\"', "'$A'", '"#"', '#', '*', '~', '{b,c}', '"\\x"', '!', '%'],
        ),
        { maxLength: 6 },
      )
      .map((parts) => parts.join(''))
    fc.assert(
      fc.property(word, word, fc.constantFrom('', ' # comment', '\t'), (first, second, end) => {
        const text = `A=${first}${end}\nB=${second}${end}\n`
        const { assignments, problems } = parseEnvFile(text)
        if (problems.length > 0) return
        accepted.push({ text, expected: assignments.map(({ value }) => `${value}\n`).join('') })
      }),
      { numRuns: 1500 },
    )
    assert.ok(accepted.length > 100, `${accepted.length}`)
    const script = accepted.map(({ text }) => `${text}printf '%s\\n' "$A" "$B"\n`).join('')
    const said = execFileSync('sh', { input: script, encoding: 'utf8', env: { HOME: '/home/x' } })
    assert.equal(said, accepted.map(({ expected }) => expected).join(''))
  })

  it('keeps any value that is quoted', () => {
    const value = fc.string({ unit: 'binary' }).map((text) => text.replace(/[\0\r\n']/g, ''))
    fc.assert(
      fc.property(value, value, (single, double) => {
        const quoted = double.replace(/["\\$`]/g, '\\$&')
        const { assignments, problems } = parseEnvFile(`A='${single}'\nB="${quoted}" # c\n`)
        assert.deepEqual(problems, [])
        assert.deepEqual(
          assignments.map((each) => each.value),
          [single, double],
        )
      }),
      // What JavaScript takes for the end of a line is none in a shell.
      { numRuns: 1000, examples: [['\u2028', '\u2029']] },
    )
  })

  it('is read in a time that grows with its length only', () => {
    for (const part of ['"', '\\', '$', '${', "'a'", '"\\', ' ', 'a="']) {
      assert.ok(timeOf(() => parseEnvFile(`A=${part.repeat(50_000)}`)) < 500, part)
    }
  })
})

describe('QMP, whatever QEMU sends,', () => {
  let folder: string
  let server: Server
  let path: string
  let greet: (socket: Socket) => void = () => {}
  before(async () => {
    folder = await mkdtemp(join(tmpdir(), 'qmp-'))
    path = join(folder, 'alpha.qmp')
    server = createServer((socket) => {
      socket.on('error', () => {})
      greet(socket)
    })
    server.listen(path)
    await once(server, 'listening')
  })
  after(async () => {
    server.close()
    await rm(folder, { recursive: true })
  })

  const line = fc.oneof(
    fc.json(),
    fc.string({ unit: 'binary' }),
    fc.constantFrom(
      ...['{"QMP": {}}', '{"return": {}, "id": 1}', '{"error": {"desc": "no"}, "id": 2}', 'null'],
      ...['{"event": "STOP"}', '{"id": "error"}', '{', '', '5', '[]', '{"error": null, "id": 2}'],
    ),
  )

  it('gives an answer or a StepError, and never ends the script', async () => {
    await fc.assert(
      fc.asyncProperty(fc.array(line, { maxLength: 8 }), fc.boolean(), async (lines, ends) => {
        greet = (socket) => {
          socket.write(lines.map((text) => `${text}\n`).join(''))
          if (ends) socket.end()
        }
        const limit = { timeout: 0.03 }
        try {
          const qmp = await Qmp.connect(path, limit)
          await qmp.execute('query-status', undefined, limit).finally(() => qmp.close())
        } catch (error) {
          assert.ok(error instanceof StepError, String(error))
        }
      }),
      { numRuns: 60 },
    )
  })

  /** In ASCII only. */
  const asQemu = (message: object) =>
    JSON.stringify(message).replace(
      /[^\x20-\x7e]/g,
      (unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, '0')}`,
    )

  it('finds its answers among events, in pieces of any size', async () => {
    const value = fc.oneof(fc.integer(), fc.string({ unit: 'grapheme' }), fc.constant({ a: [1] }))
    const events = fc.array(fc.string({ unit: 'grapheme' }), { maxLength: 4 })
    await fc.assert(
      fc.asyncProperty(
        value,
        events,
        fc.integer({ min: 1, max: 40 }),
        async (answer, data, size) => {
          let sent = Promise.resolve()
          const send = (socket: Socket, message: object) => {
            const messages = [...data.map((text) => ({ event: 'E', data: text })), message]
            const bytes = messages.map((each) => `${asQemu(each)}\r\n`).join('')
            sent = sent.then(async () => {
              for (let at = 0; at < bytes.length; at += size) {
                socket.write(bytes.slice(at, at + size))
                await new Promise(setImmediate)
              }
            })
          }
          greet = (socket) => {
            send(socket, { QMP: {} })
            socket.on('data', (text) => {
              const { id, execute } = JSON.parse(String(text))
              send(socket, { id, return: execute === 'qmp_capabilities' ? {} : answer })
            })
          }
          const qmp = await Qmp.connect(path)
          assert.deepEqual(await qmp.execute('query'), answer)
          qmp.close()
        },
      ),
      { numRuns: 40 },
    )
  })
})

describe('text of a terminal, whatever is in it,', () => {
  const hostile = textWith(
    ...['\x1b', '\x1b[', '\x1b[1;32m', '\x1b[?2004h', '\x1b]0;title\x07', '\x1b]0;title\x1b\\'],
    ...['\x1bP+q\x1b\\', '\x1b(B', '\x1b]', '\r', '\n', '\x07', '\x1b\\', '31m', 'nixos', '\0'],
  )

  it('is the same in pieces of any size as in one', () => {
    fc.assert(
      fc.property(hostile, fc.integer({ min: 1, max: 7 }), (text, size) => {
        // Its end is complete, as the stream keeps what may still be continued.
        const whole = `${text}\n.`
        const stream = new PlainTextStream()
        let said = ''
        for (let at = 0; at < whole.length; at += size)
          said += stream.push(whole.slice(at, at + size))
        assert.equal(said, plainText(whole))
      }),
      { numRuns: 3000 },
    )
  })

  it('keeps every letter that belongs to no sequence', () => {
    const sequence = fc.constantFrom(
      '\x1b[1m',
      '\x1b[0;31;4m',
      '\x1b]0;t\x07',
      '\x1b(B',
      '\r',
      '\x1b[K',
    )
    const letters = fc.string({ unit: 'grapheme-ascii' })
    fc.assert(
      fc.property(fc.array(fc.tuple(letters, sequence)), (parts) => {
        const shown = plainText(parts.flat().join(''))
        assert.equal(shown, parts.map(([text]) => text).join(''))
      }),
      { numRuns: 1000 },
    )
  })

  it('is read in a time that grows with its length only', () => {
    for (const part of ['\x1b', '\x1b[', '\x1b]', '\x1bP', '\x1b[;', '\x1b(', '\x1b]0;', '\r']) {
      assert.ok(timeOf(() => plainText(part.repeat(30_000))) < 1500, JSON.stringify(part))
    }
  })
})

describe('grub.cfg, whatever is in it,', () => {
  const hostile = textWith(
    ...['linux ', 'initrd ', '/boot//nix/store/1/bzImage', `\${isoboot}`, '$isoboot', '\n', '  '],
    ...['menuentry {', '}', '#', '\t', '\r\n', 'linux', '/', '//', '\u2028'],
  )

  it('gives a pair of files or none', () => {
    fc.assert(
      fc.property(hostile, (menu) => {
        const entry = firstEntry(menu)
        if (!entry) return
        for (const path of [entry.kernel, entry.initrd]) assert.doesNotMatch(path, /\s|\/\//)
        assert.doesNotMatch(entry.append, /\$\{?isoboot|\n/)
      }),
      { numRuns: 3000 },
    )
  })

  it('gives the first pair, whatever is around it', () => {
    const path = fc
      .array(fc.stringMatching(/^[a-z0-9.+_-]{1,12}$/), { minLength: 1, maxLength: 4 })
      .map((parts) => parts.join('/'))
    const noise = fc.array(fc.constantFrom('# linux', 'set a=1', '', '}', '  terminal_output x'))
    const words = fc.array(fc.stringMatching(/^[a-z]{1,5}=[a-z0-9/]{1,9}$/), { maxLength: 4 })
    fc.assert(
      fc.property(path, path, words, noise, noise, (kernel, initrd, options, above, between) => {
        const menu = [
          ...above,
          `  linux /boot//${kernel} \${isoboot} ${options.join('  ')}`,
          ...between,
          `\tinitrd /boot//${initrd}`,
          '  linux /boot/other quiet',
          '  initrd /boot/other-initrd',
        ]
        assert.deepEqual(firstEntry(menu.join('\n')), {
          kernel: `boot/${kernel}`,
          initrd: `boot/${initrd}`,
          append: options.join(' '),
        })
      }),
      { numRuns: 1000 },
    )
  })

  it('is read in a time that fits a menu of 20 KB', () => {
    for (const part of ['  linux /a b\n', 'linux \n', ' \n', 'linux /a ', ' '.repeat(10)]) {
      const menu = part.repeat(Math.floor(20_000 / part.length))
      assert.ok(timeOf(() => firstEntry(menu)) < 2000, JSON.stringify(part))
    }
  })
})

describe('frames of the LAN switch, whatever is in them,', () => {
  const ports = [24110, 24111, 24112]
  const mac = fc.oneof(
    fc.constantFrom('525400123456', '525400123457', '525400123458', 'ffffffffffff', '01005e000001'),
    fc
      .uint8Array({ minLength: 6, maxLength: 6 })
      .map((bytes) => Buffer.from(bytes).toString('hex')),
  )
  const frame = fc.oneof(
    {
      weight: 4,
      arbitrary: fc.tuple(mac, mac).map(([to, from]) => Buffer.from(`${to}${from}0800`, 'hex')),
    },
    { weight: 1, arbitrary: fc.uint8Array({ maxLength: 1600 }).map((bytes) => Buffer.from(bytes)) },
  )
  const traffic = fc.array(
    fc.record({ frame, from: fc.constantFrom(...ports, 24113, 53, 0), pause: fc.nat(200) }),
    { maxLength: 60 },
  )
  const isGroup = (address: Buffer) => ((address[0] ?? 0) & 1) === 1

  it('reach what a switch of IEEE 802.1D would send them to', () => {
    fc.assert(
      fc.property(traffic, (frames) => {
        const lan = new LearningSwitch(ports)
        const learned = new Map<string, { port: number; at: number }>()
        let now = 0
        for (const { frame, from, pause } of frames) {
          now += pause
          const targets = lan.forward(frame, from, now)
          const [to, source] = [frame.subarray(0, 6), frame.subarray(6, 12)]
          if (!ports.includes(from) || frame.length < 14 || isGroup(source)) {
            assert.deepEqual(targets, [])
            continue
          }
          learned.set(source.toString('hex'), { port: from, at: now })
          const known = learned.get(to.toString('hex'))
          const others = ports.filter((port) => port !== from)
          const isKnown = !isGroup(to) && known && now - known.at <= 300
          assert.deepEqual(targets, isKnown ? others.filter((port) => port === known.port) : others)
        }
        const { received, forwarded, flooded, refused, dropped } = lan.counters
        assert.equal(received + refused, frames.length)
        assert.equal(forwarded + flooded + dropped, received)
      }),
      { numRuns: 1500 },
    )
  })

  it('never fill its memory, and machines with good addresses are served all the same', () => {
    const lan = new LearningSwitch(ports)
    const good = Buffer.from('5254001234565254001234570800', 'hex')
    lan.forward(good, ports[1] ?? 0, 0)
    fc.assert(
      fc.property(fc.uint8Array({ minLength: 14, maxLength: 14 }), (bytes) => {
        for (let each = 0; each < 100; each += 1) {
          bytes[10] = each
          lan.forward(Buffer.from(bytes), ports[0] ?? 0, 1)
        }
      }),
      { numRuns: 200 },
    )
    assert.ok(lan.addresses(1) <= 4096)
    const answer = Buffer.from('5254001234575254001234560800', 'hex')
    assert.deepEqual(lan.forward(answer, ports[0] ?? 0, 1), [ports[1]])
  })
})
