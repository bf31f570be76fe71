// A table for people: columns as wide as they need, cells of several lines.

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
    Math.max(...all.map((row) => Math.max(...(row[column] ?? ['']).map((line) => line.length)))),
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
