// Work on a running cluster while a client writes through its API server.
import assert from 'node:assert/strict'
import { Writer } from '../writer.mts'
import type { Rehearsal } from './rehearsal.mts'

let count = 0

/** Few enough that an emulated machine has time for its work: four a second. */
const every = 250

/** Works with a client that writes until the work has ended; its namespace is removed. */
export async function withWriter(
  rehearsal: Rehearsal,
  work: (writer: Writer) => Promise<void>,
): Promise<void> {
  count += 1
  const writer = await Writer.start(rehearsal.cluster, `writer-${process.pid}-${count}`, { every })
  try {
    await work(writer)
  } finally {
    await writer.stop()
    await writer.remove().catch(() => {})
  }
}

/**
 * Works while a client writes, which may be refused for a while.
 *
 * @param atLeast how many writes have to be acknowledged meanwhile
 * @throws if it cannot write afterwards, or a write that was acknowledged is lost
 */
export async function whileWriting(
  rehearsal: Rehearsal,
  work: () => Promise<void>,
  atLeast = 0,
): Promise<void> {
  await withWriter(rehearsal, async (writer) => {
    const before = writer.last
    await work()
    const meanwhile = writer.last - before
    assert.ok(meanwhile >= atLeast, `only ${meanwhile} writes were acknowledged meanwhile`)
    await writer.continues()
    await writer.stop()
    await writer.assertNothingLost()
    console.error(`${meanwhile} writes were acknowledged meanwhile, none is lost`)
  })
}
