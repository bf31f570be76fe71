import assert from 'node:assert/strict'
import { describe, it } from 'node:test'
import { $ } from 'zx/core'
import { describeError, StepError } from '../../lib/step-error.mts'

const failure = (run: Promise<unknown>): Promise<unknown> =>
  run.then(
    () => assert.fail('the command should have failed'),
    (error) => error,
  )

describe('an error as it is told', () => {
  it('has the reason first, then output, command, hint and log', () => {
    const error = new StepError('the disk is full', {
      log: 'images/alpha-install.log',
      hint: 'make room\nand try again',
      command: 'qemu-img create …',
      output: 'one\ntwo',
    })
    assert.equal(
      describeError(error),
      [
        'the disk is full',
        '  | one',
        '  | two',
        '  command: qemu-img create …',
        '  hint:    make room',
        '           and try again',
        '  log:     images/alpha-install.log',
      ].join('\n'),
    )
  })

  it('is its reason alone where there is no more to say', () => {
    assert.equal(describeError(new StepError('no luck')), 'no luck')
    assert.equal(describeError(new Error('no luck')), 'no luck')
    assert.equal(describeError('no luck'), 'no luck')
  })

  it('has stacks only when asked, that of the cause too', () => {
    const cause = new RangeError('too far')
    const error = new StepError('no luck', { cause })
    assert.doesNotMatch(describeError(error), /\bat |too far/)
    assert.match(
      describeError(error, true),
      /^no luck\nStepError: no luck\n +at [\s\S]*RangeError: too far\n +at /,
    )
    assert.equal(error.cause, cause)
  })

  it('of a failed command has its status, its errors and the command', async () => {
    const command = 'echo out; echo err >&2; exit 3'
    const error = await failure($({ quiet: true })`sh -c ${command}`)
    assert.equal(
      describeError(error),
      `a command ended with status 3\n  | err\n  command: sh -c $'echo out; echo err >&2; exit 3'`,
    )
  })

  it('of a failed command has its output where there are no errors, the last 15 lines', async () => {
    const error = await failure($({ quiet: true })`sh -c ${'seq 1 20; exit 1'}`)
    const lines = describeError(error).split('\n')
    assert.deepEqual([lines[1], lines[15]], ['  | 6', '  | 20'])
  })

  it('of a killed command names the signal', async () => {
    const error = await failure($({ quiet: true })`sh -c ${'kill -TERM $$'}`)
    assert.match(describeError(error), /^a command was ended by SIGTERM\n/)
  })
})
