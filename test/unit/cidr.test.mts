import assert from 'node:assert/strict'
import { describe, it } from 'node:test'
import { type Cidr, contains, overlap, parseAddress, parseCidr } from '../../lib/settings.mts'

function cidr(text: string): Cidr {
  const range = parseCidr(text)
  assert.ok(range, text)
  return range
}

describe('an address', () => {
  it('is a number of 32 bits', () => {
    assert.equal(parseAddress('0.0.0.0'), 0)
    assert.equal(parseAddress('10.32.0.10'), 0x0a20000a)
    assert.equal(parseAddress('255.255.255.255'), 0xffffffff)
  })

  for (const text of ['', '10.0.0', '10.0.0.1.2', '10.0.0.256', '010.0.0.1', '1e1.0.0.1', '::1']) {
    it(`is not "${text}"`, () => assert.equal(parseAddress(text), undefined))
  }
})

describe('a range', () => {
  it('has a first and a last address', () => {
    const { first, last, text } = cidr('10.32.0.0/24')
    assert.deepEqual([first, last, text], [0x0a200000, 0x0a2000ff, '10.32.0.0/24'])
    assert.deepEqual(cidr('0.0.0.0/0').last, 0xffffffff)
    assert.deepEqual(cidr('192.168.255.255/32').first, cidr('192.168.255.255/32').last)
  })

  for (const text of [
    '10.0.0.0',
    '10.0.0.0/',
    '10.0.0.0/33',
    '10.0.0.0/24/1',
    '10.0.0.0/08',
    'a/24',
    '/24',
  ]) {
    it(`is not "${text}"`, () => assert.equal(parseCidr(text), undefined))
  }

  it('has no bits behind its mask', () => {
    assert.equal(parseCidr('10.32.0.1/24'), undefined)
    assert.ok(parseCidr('10.32.0.128/25'))
  })

  it('overlaps what shares an address, and only that', () => {
    assert.ok(overlap(cidr('10.200.0.0/16'), cidr('10.200.1.0/24')))
    assert.ok(overlap(cidr('10.200.1.0/24'), cidr('10.200.0.0/16')))
    assert.ok(!overlap(cidr('10.200.0.0/24'), cidr('10.200.1.0/24')))
    assert.ok(overlap(cidr('128.0.0.0/1'), cidr('255.255.255.255/32')))
  })

  it('contains addresses and smaller ranges', () => {
    const range = cidr('192.168.100.0/24')
    assert.ok(contains(range, parseAddress('192.168.100.255') ?? -1))
    assert.ok(!contains(range, parseAddress('192.168.101.0') ?? -1))
    assert.ok(contains(range, cidr('192.168.100.128/25')))
    assert.ok(contains(range, range))
    assert.ok(!contains(cidr('192.168.100.128/25'), range))
  })
})
