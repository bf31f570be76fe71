// Tables, amounts, durations and moments as text.

/**
 * Lays out rows below a header line, two spaces between the columns.
 *
 * @param rows cells; a line break in a cell gives the row another line
 */
export function formatTable(
  header: readonly string[],
  rows: readonly (readonly string[])[],
): string {
  const all = [header, ...rows].map((row) => row.map((cell) => cell.split('\n')))
  const widths = header.map((_, column) =>
    Math.max(...all.flatMap((row) => (row[column] ?? ['']).map((line) => line.length))),
  )
  return all
    .flatMap((row) => {
      const height = Math.max(...row.map((lines) => lines.length))
      return Array.from({ length: height }, (_, index) =>
        widths
          .map((width, column) => (row[column]?.[index] ?? '').padEnd(width))
          .join('  ')
          .trimEnd(),
      )
    })
    .join('\n')
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
  const digits = unit > 0 && amount < 9.95 ? 1 : 0
  return `${amount.toFixed(digits)} ${units[unit]}`
}

/** A duration: "3.2s", "2m 05s". */
export function formatDuration(milliseconds: number): string {
  const seconds = Math.round(milliseconds / 100) / 10
  if (seconds < 60) return `${seconds.toFixed(1)}s`
  const rest = String(Math.floor(seconds % 60)).padStart(2, '0')
  return `${Math.floor(seconds / 60)}m ${rest}s`
}

/** Local time to the second, as part of a file name that sorts by time: "2026-11-22-164503". */
export function timestamp(moment = new Date()): string {
  const two = (value: number) => String(value).padStart(2, '0')
  const date = [moment.getFullYear(), two(moment.getMonth() + 1), two(moment.getDate())]
  const time = [moment.getHours(), moment.getMinutes(), moment.getSeconds()].map(two)
  return `${date.join('-')}-${time.join('')}`
}

/** A word that any POSIX shell reads back as this text. */
export function quote(text: string): string {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`
}
