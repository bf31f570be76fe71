// Parses a file of shell assignments: NAME=value, quotes, comments, $NAME of earlier lines. Only
// what means the same in every shell; commands are refused, as nothing here is ever executed.

export interface Assignment {
  name: string
  value: string
  /** Line of the file, from 1. */
  line: number
}

/** A place in the file that a shell, or this reader, would not take. */
export type Problem = { line: number; reason: string }

/** The assignments of a file in POSIX shell syntax, in their order, and all problems that it has. */
export function parseEnvFile(text: string): { assignments: Assignment[]; problems: Problem[] } {
  const assignments: Assignment[] = []
  const problems: Problem[] = []
  const values = new Map<string, string>()
  if (/^[\uFEFF\uFFFD]|\0/.test(text)) {
    const start = 'the file starts with a byte order mark, or is UTF-16'
    problems.push({ line: 1, reason: `${start}: save it as UTF-8 without BOM` })
    if (text.includes('\0')) return { assignments, problems }
  }
  const lines = text.replace(/^\uFEFF/, '').split('\n')
  const windows = lines.findIndex((content) => content.endsWith('\r'))
  if (windows >= 0) {
    problems.push({ line: windows + 1, reason: 'ends in CR LF: a shell takes the CR for text' })
  }
  for (const [index, ended] of lines.entries()) {
    const line = index + 1
    const content = ended.replace(/\r$/, '')
    if (/^[ \t]*(#|$)/.test(content)) continue
    const [, name, word = ''] =
      content.match(/^[ \t]*(?:export[ \t]+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)$/s) ?? []
    try {
      if (!name) throw new SyntaxError('not of the form NAME=value')
      const value = readWord(word, values)
      values.set(name, value)
      assignments.push({ name, value, line })
    } catch (error) {
      if (!(error instanceof SyntaxError)) throw error
      problems.push({ line, reason: error.message })
    }
  }
  return { assignments, problems }
}

/** What a word consists of: its end with a comment, quoted parts, \x, $NAME, other characters. */
const piece = /([ \t]+(?:#.*)?$)|'([^']*)'|"((?:\\.|[^"\\])*)"|\\(.)|\$(?:\{\w+\}|\w*)|./gs
/** What is replaced in double quotes, and in $NAME; any other "$" or "`" would be a command. */
const expansion = /\\(["\\$`])|\$(?:\{([A-Za-z_]\w*)\}|([A-Za-z_]\w*))|[$`]/g

/** Characters that are refused where they stand on their own, outside quotes. */
const refused = new Map([
  ["'", "the quote ' is not closed on its line"],
  ['"', 'the quote " is not closed on its line'],
  ['\\', 'ends in a backslash: a value is on one line'],
  ...[' ', '\t'].map((blank) => [blank, 'a value with spaces needs quotes'] as const),
  ...[...';&|<>()'].map(
    (char) => [char, `"${char}" outside quotes would end the value in a shell`] as const,
  ),
])

/** The value of one shell word. @throws SyntaxError for what a shell would read in another way */
function readWord(word: string, values: ReadonlyMap<string, string>): string {
  const expand = (_: string, escaped?: string, braced?: string, plain?: string): string => {
    const name = braced ?? plain
    if (escaped !== undefined) return escaped
    if (!name) {
      throw new SyntaxError('commands and shell expansions other than $NAME are not read here')
    }
    const value = values.get(name)
    if (value === undefined) throw new SyntaxError(`$${name} is not set by an earlier line`)
    return value
  }
  type Part = string | undefined
  return word.replace(piece, (found, end: Part, single: Part, double: Part, escaped: Part, at) => {
    if (end !== undefined) return ''
    if (double !== undefined || /^[$`]/.test(found)) {
      return (double ?? found).replace(expansion, expand)
    }
    if (found === '~' && /^$|:$/.test(word.slice(0, at))) {
      throw new SyntaxError('a shell would put a home folder for "~": write the whole path')
    }
    const reason = refused.get(found)
    if (reason) throw new SyntaxError(reason)
    return single ?? escaped ?? found
  })
}
