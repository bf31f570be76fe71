// Unix sockets at paths of any length: the system's address structure holds 104 bytes (macOS) or
// 108 (Linux), and a checkout may lie deeper than that.
import { connect, type Socket } from 'node:net'
import { basename, dirname } from 'node:path'

const longest = 103

/**
 * Begins to connect to a unix socket. Where its path is too long, the call is made from inside its
 * folder, by its name alone; connect(2) happens before this returns, so nothing else sees that.
 */
export function connectUnixSocket(path: string): Socket {
  if (Buffer.byteLength(path) <= longest) return connect({ path })
  const before = process.cwd()
  process.chdir(dirname(path))
  try {
    return connect({ path: basename(path) })
  } finally {
    process.chdir(before)
  }
}
