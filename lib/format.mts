// Tables, amounts, durations and moments as text.

/** Rows below a header line, in columns; a line break in a cell gives its row another line. */
export function formatTable(header: readonly string[], rows: readonly (readonly string[])[]) {
  const lines = [header, ...rows].flatMap((row) => {
    const cells = row.map((cell) => cell.split('\n'))
    const height = Math.max(...cells.map(({ length }) => length))
    return Array.from({ length: height }, (_, line) => cells.map((cell) => cell[line] ?? ''))
  })
  const width = (column: number) => Math.max(...lines.map((line) => line[column]?.length ?? 0))
  const widths = header.map((_, column) => width(column))
  const padded = lines.map((line) => line.map((cell, column) => cell.padEnd(widths[column] ?? 0)))
  return padded.map((line) => line.join('  ').trimEnd()).join('\n')
}

const units = ['B', 'kB', 'MB', 'GB', 'TB'] as const

/** Decimal units, as disks and networks are measured: "640 MB", "1.5 GB". */
export function formatBytes(bytes: number): string {
  let amount = bytes
  let unit = 0
  while (amount >= 999.5 && unit < units.length - 1) {
    amount /= 1000
    unit += 1
  }
  return `${amount.toFixed(unit > 0 && amount < 9.95 ? 1 : 0)} ${units[unit]}`
}

/** A duration: "3.2s", "2m 05s", "26h 40m". */
export function formatDuration(milliseconds: number): string {
  const seconds = Math.round(milliseconds / 100) / 10
  if (seconds < 60) return `${seconds.toFixed(1)}s`
  const two = (amount: number) => String(Math.floor(amount % 60)).padStart(2, '0')
  if (seconds < 3600) return `${Math.floor(seconds / 60)}m ${two(seconds)}s`
  return `${Math.floor(seconds / 3600)}h ${two(seconds / 60)}m`
}

/** UTC to the second, as part of a file name that sorts by time: "2026-11-22-164503". */
export function timestamp(moment = new Date()): string {
  return moment.toISOString().slice(0, 19).replace('T', '-').replaceAll(':', '')
}

/** A word that any POSIX shell reads back as this text. */
export function quote(text: string): string {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`
}
