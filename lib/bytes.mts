// Amounts of bytes for people.

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
