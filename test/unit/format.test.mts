import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { describe, it } from 'node:test'
import { formatBytes, formatDuration, formatTable, quote, timestamp } from '../../lib/format.mts'

describe('a table', () => {
  it('has columns as wide as their widest line, and no blanks at the ends of lines', () => {
    const rows = [
      ['ca', 'ok'],
      ['kubernetes', 'missing'],
    ]
    assert.equal(
      formatTable(['NAME', 'STATE'], rows),
      ['NAME        STATE', 'ca          ok', 'kubernetes  missing'].join('\n'),
    )
  })

  it('gives a row as many lines as its tallest cell', () => {
    assert.equal(
      formatTable(['NAME', 'SANS', 'STATE'], [['sigma', 'sigma\n127.0.0.1', 'ok']]),
      ['NAME   SANS       STATE', 'sigma  sigma      ok', '       127.0.0.1'].join('\n'),
    )
  })

  it('is its header if there are no rows', () => {
    assert.equal(formatTable(['A', 'B'], []), 'A  B')
  })
})

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

it('durations have seconds, minutes or hours', () => {
  const texts = [0, 1240, 59_949, 59_950, 60_000, 125_000, 3_600_000].map(formatDuration)
  assert.deepEqual(texts, ['0.0s', '1.2s', '59.9s', '1m 00s', '1m 00s', '2m 05s', '1h 00m'])
})

it('a quoted word is read back by a shell as it was', () => {
  for (const text of ['plain', 'two words', "it's", '$HOME `id` "x" \\ *', 'müller\n', '']) {
    assert.equal(execFileSync('sh', ['-c', `printf %s ${quote(text)}`], { encoding: 'utf8' }), text)
  }
})

describe('a moment in a file name', () => {
  it('is in UTC, so that names sort by time wherever a laptop travels', () => {
    const { TZ } = process.env
    process.env.TZ = 'America/New_York'
    try {
      assert.equal(timestamp(new Date('2026-11-22T16:45:03Z')), '2026-11-22-164503')
    } finally {
      if (TZ === undefined) delete process.env.TZ
      else process.env.TZ = TZ
    }
  })
})
