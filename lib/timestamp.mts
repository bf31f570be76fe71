// A moment as part of a file's name: in the order of time when sorted, readable, fit for any disk.

/** Local time to the second: "2026-11-22-164503". */
export function timestamp(moment = new Date()): string {
  const two = (value: number) => String(value).padStart(2, '0')
  const date = [moment.getFullYear(), two(moment.getMonth() + 1), two(moment.getDate())]
  const time = [moment.getHours(), moment.getMinutes(), moment.getSeconds()].map(two)
  return `${date.join('-')}-${time.join('')}`
}
