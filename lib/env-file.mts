// Parses a file of shell assignments: NAME=value, quotes, comments, $NAME of earlier lines. Only
// what means the same in every shell; commands are refused, as nothing here is ever executed.

export interface Assignment {
  name: string
  value: string
  /** Line of the file, from 1. */
  line: number
}

/** A place in the file that a shell, or this reader, would not take. */
export interface Problem {
  line: number
  reason: string
}

/**
 * The assignments of a file in POSIX shell syntax, in their order. All problems are collected,
 * so that they can be reported at once.
 */
export function parseEnvFile(text: string): { assignments: Assignment[]; problems: Problem[] } {
  const assignments: Assignment[] = []
  const problems: Problem[] = []
  const values = new Map<string, string>()
  if (/^(\uFEFF|\uFFFD|\0)/.test(text) || text.includes('\0')) {
    const reason =
      'the file starts with a byte order mark, or is UTF-16: save it as UTF-8 without BOM'
    problems.push({ line: 1, reason })
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
    const match = content.match(/^[ \t]*(?:export[ \t]+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)$/)
    if (!match?.[1]) {
      problems.push({ line, reason: 'not of the form NAME=value' })
      continue
    }
    const word = readWord(match[2] ?? '', values)
    if ('reason' in word) {
      problems.push({ line, reason: word.reason })
      continue
    }
    values.set(match[1], word.value)
    assignments.push({ name: match[1], value: word.value, line })
  }
  return { assignments, problems }
}

type Word = { value: string } | { reason: string }

/** One shell word from the start of `text`; only blanks and a comment may follow it. */
function readWord(text: string, values: ReadonlyMap<string, string>): Word {
  let value = ''
  let at = 0
  while (at < text.length) {
    const char = text.charAt(at)
    if (char === "'") {
      const end = text.indexOf("'", at + 1)
      if (end < 0) return { reason: "the quote ' is not closed on its line" }
      value += text.slice(at + 1, end)
      at = end + 1
    } else if (char === '"') {
      const quoted = readQuoted(text, at + 1, values)
      if ('reason' in quoted) return quoted
      value += quoted.value
      at = quoted.end
    } else if (char === ' ' || char === '\t') {
      const rest = text.slice(at).replace(/^[ \t]+/, '')
      if (rest && !rest.startsWith('#')) return { reason: 'a value with spaces needs quotes' }
      break
    } else if (char === '\\') {
      if (at + 1 === text.length) return { reason: 'ends in a backslash: a value is on one line' }
      value += text.charAt(at + 1)
      at += 2
    } else if (char === '$' || char === '`') {
      const expanded = expand(text, at, values)
      if ('reason' in expanded) return expanded
      value += expanded.value
      at = expanded.end
    } else if (char === '~' && /^$|:$/.test(text.slice(0, at))) {
      return { reason: 'a shell would put a home folder for "~": write the whole path' }
    } else if (/[;&|<>()]/.test(char)) {
      return { reason: `"${char}" outside quotes would end the value in a shell` }
    } else {
      value += char
      at += 1
    }
  }
  return { value }
}

function readQuoted(
  text: string,
  start: number,
  values: ReadonlyMap<string, string>,
): { value: string; end: number } | { reason: string } {
  let value = ''
  let at = start
  while (at < text.length) {
    const char = text.charAt(at)
    if (char === '"') return { value, end: at + 1 }
    if (char === '\\' && /["\\$`]/.test(text.charAt(at + 1))) {
      value += text.charAt(at + 1)
      at += 2
    } else if (char === '$' || char === '`') {
      const expanded = expand(text, at, values)
      if ('reason' in expanded) return expanded
      value += expanded.value
      at = expanded.end
    } else {
      value += char
      at += 1
    }
  }
  return { reason: 'the quote " is not closed on its line' }
}

function expand(
  text: string,
  at: number,
  values: ReadonlyMap<string, string>,
): { value: string; end: number } | { reason: string } {
  const match = text.slice(at).match(/^\$(?:\{([A-Za-z_]\w*)\}|([A-Za-z_]\w*))/)
  const name = match?.[1] ?? match?.[2]
  if (match && name) {
    const value = values.get(name)
    if (value === undefined) return { reason: `$${name} is not set by an earlier line` }
    return { value, end: at + match[0].length }
  }
  return { reason: 'commands and shell expansions other than $NAME are not read here' }
}
