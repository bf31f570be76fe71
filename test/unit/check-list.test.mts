import assert from 'node:assert/strict'
import { describe, it, mock } from 'node:test'
import { CheckList } from '../../lib/check-list.mts'
import { StepError } from '../../lib/errors.mts'

describe('a list of checks', () => {
  mock.method(process.stderr, 'write', () => true)
  const pass = async () => 'fine'
  const fail = async () => {
    throw new StepError('it is broken', { hint: 'mend it' })
  }

  it('goes on after a failure, and fails in the end', async () => {
    const list = new CheckList()
    assert.equal(await list.check('first', {}, pass), true)
    assert.equal(await list.check('second', {}, fail), false)
    assert.equal(await list.check('third', {}, pass), true)
    assert.deepEqual(
      list.results.map(({ name, result, detail }) => [name, result, detail]),
      [
        ['first', 'passed', 'fine'],
        ['second', 'failed', 'it is broken\n  hint:    mend it'],
        ['third', 'passed', 'fine'],
      ],
    )
    assert.throws(() => list.assertPassed(), /1 of 3 checks failed/)
    assert.match(list.summary(), /^2 passed, 1 failed, 0 skipped/)
  })

  it('does not do what there is no reason to do, and says why', async () => {
    const list = new CheckList()
    const work = mock.fn(pass)
    assert.equal(await list.check('dns', { skip: 'not deployed' }, work), false)
    assert.equal(work.mock.callCount(), 0)
    assert.equal(list.results[0]?.detail, 'not deployed')
    list.assertPassed()
  })
})
