import assert from 'node:assert/strict'
import { it } from 'node:test'
import { formatBytes } from '../../lib/bytes.mts'

it('amounts of bytes have two or three digits and a decimal unit', () => {
  const amounts = [0, 999, 1000, 9949, 9950, 640e6, 999.4e6, 999.6e6, 1.5e9, 20e9, 5e15]
  assert.deepEqual(amounts.map(formatBytes), [
    '0 B',
    '999 B',
    '1.0 kB',
    '9.9 kB',
    '10 kB',
    '640 MB',
    '999 MB',
    '1.0 GB',
    '1.5 GB',
    '20 GB',
    '5000 TB',
  ])
})
