import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import { parseEnvFile } from '../../lib/env-file.mts'

let folder: string
before(async () => {
  folder = await mkdtemp(join(tmpdir(), 'env-file-'))
})
after(() => rm(folder, { recursive: true, force: true }))

const values = (text: string) =>
  parseEnvFile(text).assignments.map(({ name, value }) => [name, value])
const problems = (text: string) =>
  parseEnvFile(text).problems.map(({ line, reason }) => `${line}: ${reason}`)

/** Lines of every form that is read, each with the value it stands for. */
const forms: [line: string, value: string][] = [
  ['V=8192', '8192'],
  ['V=', ''],
  ['V=8192     # MB', '8192'],
  ['V=8192\t# MB', '8192'],
  ['V=   # nothing', ''],
  ['V=a#b', 'a#b'],
  ['V=#a', '#a'],
  ['  V=indented', 'indented'],
  ['export V=exported', 'exported'],
  ['V="two words"', 'two words'],
  ["V='two words' # why", 'two words'],
  ['V="a # b"', 'a # b'],
  ['V=""', ''],
  [`V='a"b'`, 'a"b'],
  [`V="it's"`, "it's"],
  [`V='it'"'"'s'`, "it's"],
  ['V=one" two "three', 'one two three'],
  ['V="say \\"yes\\""', 'say "yes"'],
  ['V="a\\\\b \\$x \\`"', 'a\\b $x `'],
  ['V="a\\nb"', 'a\\nb'],
  ["V='a\\nb'", 'a\\nb'],
  ['V=a\\ b\\#', 'a b#'],
  ['V=http://user@host:8080/~me?a=b*', 'http://user@host:8080/~me?a=b*'],
  ['V="~/file"', '~/file'],
  ['V=é…ü', 'é…ü'],
]

describe('a file of assignments', () => {
  for (const [line, value] of forms) {
    it(`reads ${line.trim()} as ${JSON.stringify(value)}`, () => {
      assert.deepEqual(parseEnvFile(line), {
        assignments: [{ name: 'V', value, line: 1 }],
        problems: [],
      })
    })
  }

  it('may use variables of earlier lines', () => {
    const text = `A=10.0\nB=$A.1\nC="\${B}/24"\nD='$A'\n`
    assert.deepEqual(values(text), [
      ['A', '10.0'],
      ['B', '10.0.1'],
      ['C', '10.0.1/24'],
      ['D', '$A'],
    ])
  })

  it('counts lines, those of comments too', () => {
    const { assignments } = parseEnvFile('# one\n\nA=1\n  # four\nB=2\n')
    assert.deepEqual(
      assignments.map(({ name, line }) => [name, line]),
      [
        ['A', 3],
        ['B', 5],
      ],
    )
  })

  const refused: [line: string, reason: RegExp][] = [
    ['V="open', /the quote " is not closed/],
    ["V='open", /the quote ' is not closed/],
    ['V=a"b', /the quote " is not closed/],
    ['V="ends in a backslash\\"', /the quote " is not closed/],
    ['V=two words', /a value with spaces needs quotes/],
    ['V="two" words', /a value with spaces needs quotes/],
    ['A=1 B=2', /a value with spaces needs quotes/],
    ['V = 1', /not of the form NAME=value/],
    ['V', /not of the form NAME=value/],
    ['V+=1', /not of the form NAME=value/],
    ['my-name=1', /not of the form NAME=value/],
    ['if true; then', /not of the form NAME=value/],
    ['V=$(date)', /commands and shell expansions/],
    ['V=`date`', /commands and shell expansions/],
    ['V="$(date)"', /commands and shell expansions/],
    [`V=\${A:-b}`, /commands and shell expansions/],
    ["V=$'a'", /commands and shell expansions/],
    ['V=$LATER', /\$LATER is not set by an earlier line/],
    ['V=a;b', /";" outside quotes/],
    ['V=a&', /"&" outside quotes/],
    ['V=(a)', /"\(" outside quotes/],
    ['V=a\\', /ends in a backslash/],
    ['V=~/ca.pem', /a shell would put a home folder/],
    ['V=/a:~/b', /a shell would put a home folder/],
  ]
  for (const [line, reason] of refused) {
    it(`refuses ${line}`, () => {
      const result = parseEnvFile(line)
      assert.equal(result.problems.length, 1)
      assert.match(result.problems[0]?.reason ?? '', reason)
      assert.deepEqual(result.assignments, [])
    })
  }

  it('tells all problems, each with its line, and reads the other lines', () => {
    const text = 'A="1\nB=2\nC=$NONE\nwhat\nD=4\n'
    assert.deepEqual(problems(text), [
      '1: the quote " is not closed on its line',
      '3: $NONE is not set by an earlier line',
      '4: not of the form NAME=value',
    ])
    assert.deepEqual(values(text), [
      ['B', '2'],
      ['D', '4'],
    ])
  })

  it('tells lines of Windows once', () => {
    assert.deepEqual(problems('A=1\r\nB=2\r\n'), [
      '1: ends in CR LF: a shell takes the CR for text',
    ])
  })
})

describe('a shell', () => {
  const shells = ['sh', 'bash']

  /** What a shell makes of lines, each read on its own after A and B are set. */
  async function read(shell: string, lines: readonly string[]): Promise<string[]> {
    const file = join(folder, 'lines.sh')
    const script = lines.map((line) => `unset V\nA=1 B='x y'\n${line}\nprintf '%s\\0' "$V"\n`)
    await writeFile(file, script.join(''))
    const output = execFileSync(shell, [file], { encoding: 'utf8', maxBuffer: 64 * 2 ** 20 })
    return output.split('\0').slice(0, -1)
  }

  for (const shell of shells) {
    it(`${shell} reads every form as we do`, async () => {
      const lines = forms.map(([line]) => line)
      assert.deepEqual(
        await read(shell, lines),
        forms.map(([, value]) => value),
      )
    })

    it(`${shell} reads whatever we take as we do`, async () => {
      const pieces = ['a', 'b c', ' ', '\t', '"', "'", '\\', '$A', `\${B}`, '$', '#', '~', '/', ':']
      pieces.push('=', '!', '*', '?', '[z]', '{p,q}', ';', '&', '|', '(', '<', '`', '-', '%', 'ü')
      // A fixed sequence: a failure can be repeated.
      let state = 20_261_122
      const next = (limit: number) => {
        state = (state * 1_103_515_245 + 12_345) % 2 ** 31
        return Math.floor((state / 2 ** 31) * limit)
      }
      const taken: { line: string; value: string }[] = []
      while (taken.length < 3000) {
        const line = `V=${Array.from({ length: next(8) }, () => pieces[next(pieces.length)]).join('')}`
        const result = parseEnvFile(`A=1\nB='x y'\n${line}`)
        const value = result.assignments.find(({ name }) => name === 'V')?.value
        if (result.problems.length === 0 && value !== undefined) taken.push({ line, value })
      }
      const shown = await read(
        shell,
        taken.map(({ line }) => line),
      )
      for (const [index, { line, value }] of taken.entries()) {
        assert.equal(value, shown[index], line)
      }
    })
  }
})
