// A file from the internet: goes on where it broke off, and takes its name only once verified.
import { createHash } from 'node:crypto'
import { createReadStream } from 'node:fs'
import { mkdir, open, statfs } from 'node:fs/promises'
import type { IncomingMessage } from 'node:http'
import { basename, dirname } from 'node:path'
import { pipeline } from 'node:stream/promises'
import { setTimeout as wait } from 'node:timers/promises'
import { StepError } from '../errors.mts'
import { formatBytes } from '../format.mts'
import { PassingError, type RequestOptions, request, shown, statusError } from './http.mts'
import { PartialFile } from './partial-file.mts'

export interface Progress {
  /** Bytes on the disk, those of earlier attempts among them. */
  received: number
  /** Bytes of the whole file, where the server tells. */
  total: number | undefined
  /** All bytes are there, and are being verified. */
  verifying: boolean
}

export interface DownloadOptions extends RequestOptions {
  /** The file's SHA-256 in hex. Without, only a length that the server tells is checked. */
  sha256?: string | undefined
  /** Looks at the whole file before it gets its name; what it throws refuses the file. */
  verify?: (path: string) => Promise<void>
  onProgress?: (progress: Progress) => void
  /** Milliseconds before the second attempt, doubled for each further one; 1 s unless said. */
  retryDelay?: number
}

/** Failures in a row, without a new byte between them, that end a download. */
const patience = 5

/**
 * Downloads to `path`. The bytes arrive in PATH.partial, which stays when the download breaks
 * off and is continued by the next call, if the server's file is still the same one.
 *
 * @returns the file's size in bytes and its SHA-256 in hex
 * @throws StepError if the file cannot be had or is not the expected one; `path` is as before
 */
export async function download(
  url: string,
  path: string,
  options: DownloadOptions,
): Promise<{ size: number; sha256: string }> {
  await mkdir(dirname(path), { recursive: true })
  const partial = new PartialFile(path)
  const { resumed } = await receiveAll(url, partial, options)
  try {
    const size = await partial.size()
    options.onProgress?.({ received: size, total: size, verifying: true })
    const sha256 = await sha256Of(partial.path, options.signal)
    if (options.sha256 && sha256 !== options.sha256.toLowerCase()) {
      throw new ChecksumError(url, options.sha256, sha256)
    }
    await options.verify?.(partial.path)
    await partial.finish()
    return { size, sha256 }
  } catch (error) {
    options.signal?.throwIfAborted()
    await partial.discard()
    // The first part may have been of another file: once more, from the start.
    if (error instanceof ChecksumError && resumed) return await download(url, path, options)
    throw error
  }
}

/** The SHA-256 of a file, in hex. */
export async function sha256Of(path: string, signal?: AbortSignal): Promise<string> {
  const hash = createHash('sha256')
  await pipeline(createReadStream(path, { highWaterMark: 2 ** 20 }), hash, { signal })
  return hash.digest('hex')
}

class ChecksumError extends StepError {
  constructor(url: string, expected: string, found: string) {
    super(`${shown(url)} is not the expected file: its checksum differs`, {
      output: `expected SHA-256 ${expected}\nreceived SHA-256 ${found}`,
      hint: 'it was thrown away; has the server a newer file, or does a proxy alter downloads?',
    })
  }
}

/** Attempts until all bytes are there. `resumed`: the first of them came from an earlier call. */
async function receiveAll(
  url: string,
  partial: PartialFile,
  options: DownloadOptions,
): Promise<{ resumed: boolean }> {
  const note = await partial.note()
  if (note?.url !== url || note.sha256 !== options.sha256) await partial.discard()
  const resumed = (await partial.size()) > 0
  let most = 0
  for (let failures = 0; ; ) {
    try {
      await receive(url, partial, options)
      return { resumed }
    } catch (error) {
      options.signal?.throwIfAborted()
      if (!(error instanceof PassingError)) throw error
      const size = await partial.size()
      failures = size > most ? 1 : failures + 1
      most = Math.max(most, size)
      if (failures === patience) throw error
    }
    const delay = (options.retryDelay ?? 1000) * 2 ** (failures - 1)
    await wait(delay, undefined, { signal: options.signal }).catch(() => {})
    options.signal?.throwIfAborted()
  }
}

/** One attempt: from the end of the partial file on, or from the start. */
async function receive(url: string, partial: PartialFile, options: DownloadOptions): Promise<void> {
  const { sha256 } = options
  const validator = (await partial.note())?.validator
  // With neither of them a mixture of two files would not be noticed.
  const from = validator || sha256 ? await partial.size() : 0
  const headers: Record<string, string> = { 'accept-encoding': 'identity' }
  if (from > 0) headers.range = `bytes=${from}-`
  if (from > 0 && validator) headers['if-range'] = validator

  const { response, url: final } = await request(url, { ...options, headers })
  try {
    const { start, size } = contentRange(response)
    if (response.statusCode === 416 && size === from) return
    if (response.statusCode === 416 || (start !== undefined && start !== from)) {
      await partial.discard()
      throw new PassingError(`${shown(url)}: the server cannot continue the part that is here`)
    }
    if (response.statusCode !== 200 && response.statusCode !== 206) {
      throw statusError(final, response)
    }
    const begin = response.statusCode === 206 ? from : 0
    const length = response.headers['content-length']
    const total = length === undefined ? undefined : begin + Number(length)
    await checkSpace(partial.path, (total ?? begin) - begin)
    await partial.writeNote({ url, sha256, validator: validatorOf(response) })
    await append(response, partial.path, begin, total, options)
  } finally {
    response.destroy()
  }
}

/** Writes what arrives behind the first `begin` bytes of the file. */
async function append(
  response: IncomingMessage,
  path: string,
  begin: number,
  total: number | undefined,
  { onProgress, signal }: DownloadOptions,
): Promise<void> {
  const file = await open(path, begin > 0 ? 'r+' : 'w')
  let received = begin
  try {
    for await (const chunk of chunksOf(response)) {
      await file.write(chunk, 0, chunk.length, received)
      received += chunk.length
      onProgress?.({ received, total, verifying: false })
    }
  } finally {
    await file.close()
  }
  signal?.throwIfAborted()
  if (total !== undefined && received < total) {
    throw new PassingError(`the connection ended after ${received} of ${total} bytes`)
  }
}

async function* chunksOf(response: IncomingMessage): AsyncGenerator<Buffer> {
  try {
    yield* response
  } catch (cause) {
    throw new PassingError(`the connection broke off: ${(cause as Error).message}`, { cause })
  }
}

/** Content-Range of RFC 9110, 14.4: "bytes 100-199/200" or "bytes *\/200". */
function contentRange({ headers }: IncomingMessage): { start?: number; size?: number } {
  const [, start, size] =
    headers['content-range']?.match(/^bytes (?:(\d+)-\d+|\*)\/(\d+|\*)$/) ?? []
  return { ...(start ? { start: Number(start) } : {}), ...(size ? { size: Number(size) } : {}) }
}

/** If-Range wants a strong ETag, or a date (RFC 9110, 13.1.5). */
function validatorOf({ headers }: IncomingMessage): string | undefined {
  return headers.etag?.startsWith('"') ? headers.etag : headers['last-modified']
}

async function checkSpace(path: string, bytes: number): Promise<void> {
  const { bavail, bsize } = await statfs(dirname(path))
  if (bytes <= bavail * bsize) return
  const [needed, free] = [formatBytes(bytes), formatBytes(bavail * bsize)]
  throw new StepError(
    `not enough disk space for ${basename(path, '.partial')}: ${needed} needed, ${free} free`,
    { hint: `make room in ${dirname(path)}` },
  )
}
