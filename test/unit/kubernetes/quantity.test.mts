import assert from 'node:assert/strict'
import { describe, it } from 'node:test'
import { parseQuantity } from '../../../lib/kubernetes/quantity.mts'

const quantities: [text: string, number: number][] = [
  ['0', 0],
  ['2', 2],
  ['250m', 0.25],
  ['123456789n', 0.123456789],
  ['1500u', 0.0015],
  ['0.5', 0.5],
  ['1024Ki', 2 ** 20],
  ['1.5Gi', 1.5 * 2 ** 30],
  ['8G', 8e9],
  ['12e6', 12e6],
  ['1E', 1e18],
]

describe('a quantity', () => {
  for (const [text, number] of quantities) {
    it(`of ${text} is ${number}`, () => {
      const found = parseQuantity(text) ?? Number.NaN
      assert.ok(Math.abs(found - number) <= number * 1e-12, `${found}`)
    })
  }

  it('is none in another form', () => {
    for (const text of ['', 'm', '1 Gi', '1KiB', 'two', '1..2', '5K']) {
      assert.equal(parseQuantity(text), undefined, text)
    }
  })
})
