import assert from 'node:assert/strict'
import { describe, it } from 'node:test'
import { progressListener, progressText, RateMeter } from '../../../lib/download/progress-bar.mts'

describe('the rate of a transfer', () => {
  it('is that of the last five seconds', () => {
    const meter = new RateMeter()
    for (let second = 0; second <= 10; second += 1) meter.add(second * 1e6, second * 1000)
    assert.equal(meter.rate(), 1e6)
    for (let second = 11; second <= 20; second += 1)
      meter.add(10e6 + (second - 10) * 100, second * 1000)
    assert.equal(meter.rate(), 100)
  })

  it('is not told from the first moment alone', () => {
    const meter = new RateMeter()
    meter.add(0, 0)
    meter.add(5e6, 10)
    assert.equal(meter.rate(), undefined)
  })

  it('begins anew when a transfer starts over', () => {
    const meter = new RateMeter()
    meter.add(9e6, 0)
    meter.add(0, 1000)
    meter.add(2e6, 2000)
    assert.equal(meter.rate(), 2e6)
  })
})

describe('the text of a transfer', () => {
  it('has bar, share, size, rate and time left', () => {
    const progress = { received: 645e6, total: 1.5e9, verifying: false }
    assert.equal(progressText(progress, 22.8e6), '████░░░░░░ 43 % of 1.5 GB, 23 MB/s, 38s left')
    assert.equal(progressText(progress, 2e6), '████░░░░░░ 43 % of 1.5 GB, 2.0 MB/s, 7m 07s left')
    assert.equal(progressText(progress, 100e3), '████░░░░░░ 43 % of 1.5 GB, 100 kB/s, 2h 22m left')
  })

  it('fits on a terminal of 80 columns, with title and time', () => {
    const progress = { received: 1.44e9, total: 1.5e9, verifying: false }
    const line = `⠋ download the ISO · ${progressText(progress, 888e3)} (12m 05s)`
    assert.ok(line.length < 80, `${line.length}: ${line}`)
  })

  it('says what it knows without a size or a rate', () => {
    assert.equal(progressText({ received: 645e6, total: undefined, verifying: false }), '645 MB')
    assert.equal(
      progressText({ received: 0, total: 100, verifying: false }),
      '░░░░░░░░░░ 0 % of 100 B',
    )
    assert.equal(progressText({ received: 5, total: 5, verifying: true }), '5 B, verifying')
  })
})

describe('a transfer without a terminal', () => {
  it('tells every tenth once, and that it is verified', () => {
    const lines: string[] = []
    const listener = progressListener(assert.fail, (text) => lines.push(text))
    for (let received = 0; received <= 100; received += 1) {
      listener({ received: received * 1e6, total: 100e6, verifying: false })
    }
    listener({ received: 100e6, total: 100e6, verifying: true })
    assert.equal(lines.length, 11)
    assert.match(lines[0] ?? '', /^█░{9} 10 % of 100 MB/)
    assert.match(lines[9] ?? '', /^█{10} 100 % of 100 MB/)
    assert.equal(lines[10], '100 MB, verifying')
  })

  it('that goes on begins with the next tenth', () => {
    const lines: string[] = []
    const listener = progressListener(assert.fail, (text) => lines.push(text))
    for (const received of [42e6, 45e6, 51e6])
      listener({ received, total: 100e6, verifying: false })
    assert.equal(lines.length, 1)
  })
})
