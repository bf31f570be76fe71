import assert from 'node:assert/strict'
import { describe, it } from 'node:test'
import { formatTable } from '../../lib/table.mts'

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
