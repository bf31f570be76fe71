// Tar archives, written in the form that GNU tar and bsdtar both read (ustar, POSIX.1-1988).
// Their command lines differ in how a file becomes root's, the format does not.

export interface TarEntry {
  /** Path in the archive, without leading slash, at most 100 bytes. A folder ends in a slash. */
  path: string
  /** Permission bits. */
  mode: number
  data?: Uint8Array
}

const blockSize = 512

/**
 * An archive of these files and folders, all owned by root.
 *
 * @param time last change of each entry, in seconds since 1970
 */
export function tar(entries: readonly TarEntry[], time: number): Buffer {
  const blocks = entries.flatMap((entry) => {
    const data = Buffer.from(entry.data ?? [])
    const padding = Buffer.alloc((blockSize - (data.length % blockSize)) % blockSize)
    return [header(entry, data.length, time), data, padding]
  })
  // Two empty blocks end an archive.
  return Buffer.concat([...blocks, Buffer.alloc(2 * blockSize)])
}

function header(entry: TarEntry, size: number, time: number): Buffer {
  if (Buffer.byteLength(entry.path) > 100) throw new Error(`path too long for tar: ${entry.path}`)
  const block = Buffer.alloc(blockSize)
  const octal = (value: number, offset: number, length: number) =>
    block.write(value.toString(8).padStart(length - 1, '0'), offset)
  block.write(entry.path, 0)
  octal(entry.mode, 100, 8)
  octal(0, 108, 8)
  octal(0, 116, 8)
  octal(size, 124, 12)
  octal(Math.floor(time), 136, 12)
  block.write(entry.path.endsWith('/') ? '5' : '0', 156)
  block.write('ustar\0' + '00', 257)
  block.write('root', 265)
  block.write('root', 297)
  // The checksum counts its own field as spaces.
  block.fill(' ', 148, 156)
  const sum = block.reduce((total, byte) => total + byte, 0)
  block.write(`${sum.toString(8).padStart(6, '0')}\0 `, 148)
  return block
}
