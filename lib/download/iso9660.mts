// What an ISO 9660 image says of itself (ECMA-119): its size, and the names in its folders.
import { type FileHandle, open } from 'node:fs/promises'

const sector = 2048
/** The first 16 sectors belong to the system; then come the volume descriptors. */
const firstDescriptor = 16
const primary = 1
const terminator = 255

export interface IsoImage {
  /** Bytes that the volume descriptor promises; a shorter file is cut off. */
  size: number
  /** Names in a folder of the image, in capitals; none if there is no such folder. */
  list(...folder: string[]): Promise<string[]>
}

/** A folder's place in the image, in bytes. */
interface Extent {
  start: number
  length: number
}

interface Entry extends Extent {
  name: string
  folder: boolean
}

/**
 * Opens an image, gives it to `use`, closes it.
 *
 * @returns what `use` returns; undefined if the file is no ISO 9660 image
 */
export async function readIso<T>(
  path: string,
  use: (image: IsoImage) => Promise<T>,
): Promise<T | undefined> {
  const file = await open(path, 'r')
  try {
    const descriptor = await primaryDescriptor(file)
    if (!descriptor) return undefined
    const blockSize = descriptor.readUInt16LE(128)
    const root = entryAt(descriptor, 156, blockSize)
    return await use({
      size: descriptor.readUInt32LE(80) * blockSize,
      list: async (...folder) => {
        const found = await find(file, root, folder, blockSize)
        return found ? (await entriesOf(file, found, blockSize)).map(({ name }) => name) : []
      },
    })
  } finally {
    await file.close()
  }
}

async function primaryDescriptor(file: FileHandle): Promise<Buffer | undefined> {
  for (let index = firstDescriptor; index < firstDescriptor + 32; index += 1) {
    const descriptor = await readAt(file, index * sector, sector)
    if (descriptor.length < sector || descriptor.toString('latin1', 1, 6) !== 'CD001') break
    if (descriptor[0] === primary) return descriptor
    if (descriptor[0] === terminator) break
  }
  return undefined
}

async function find(
  file: FileHandle,
  root: Extent,
  folder: readonly string[],
  blockSize: number,
): Promise<Extent | undefined> {
  let at = root
  for (const name of folder) {
    const entries = await entriesOf(file, at, blockSize)
    const next = entries.find((entry) => entry.folder && entry.name === name.toUpperCase())
    if (!next) return undefined
    at = next
  }
  return at
}

/** Directory records (ECMA-119, 9.1). None crosses a sector: the rest of one is filled with 0. */
async function entriesOf(
  file: FileHandle,
  { start, length }: Extent,
  blockSize: number,
): Promise<Entry[]> {
  // No folder of an installer is larger; a corrupt length must not fill the memory.
  const records = await readAt(file, start, Math.min(length, 2 ** 20))
  const entries: Entry[] = []
  for (let at = 0; at + 34 <= records.length; ) {
    const recordLength = records[at] ?? 0
    if (recordLength === 0) at = (Math.floor(at / sector) + 1) * sector
    else {
      if (at + recordLength <= records.length) entries.push(entryAt(records, at, blockSize))
      at += recordLength
    }
  }
  // The folder itself and its parent are named by the bytes 0 and 1.
  return entries.filter(({ name }) => name > '\x01')
}

function entryAt(bytes: Buffer, at: number, blockSize: number): Entry {
  const nameLength = bytes[at + 32] ?? 0
  const name = bytes.toString('latin1', at + 33, at + 33 + nameLength)
  return {
    // "GRUB.CFG;1": a version follows the name of a file; a dot stands even without extension.
    name: name.replace(/\.?;\d+$/, '').toUpperCase(),
    folder: ((bytes[at + 25] ?? 0) & 2) !== 0,
    start: bytes.readUInt32LE(at + 2) * blockSize,
    length: bytes.readUInt32LE(at + 10),
  }
}

async function readAt(file: FileHandle, position: number, length: number): Promise<Buffer> {
  const { buffer, bytesRead } = await file.read(Buffer.alloc(length), 0, length, position)
  return buffer.subarray(0, bytesRead)
}
