import assert from 'node:assert/strict'
import { describe, it } from 'node:test'
import { $, ProcessOutput } from 'zx/core'
import {
  busyApiServer,
  describeError,
  knownProblem,
  noteFailure,
  StepError,
} from '../../lib/errors.mts'
import { prepareCommands } from '../../lib/script.mts'

prepareCommands(false)

const failure = (run: Promise<unknown>): Promise<unknown> =>
  run.then(
    () => assert.fail('the command should have failed'),
    (error) => error,
  )

describe('a described error', () => {
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
      `sh failed (exit status 3)\n  | err\n  command: sh -c $'echo out; echo err >&2; exit 3'`,
    )
  })

  it('of a failed command has its output where there are no errors, the last 15 lines', async () => {
    const error = await failure($({ quiet: true })`sh -c ${'seq 1 20; exit 1'}`)
    const lines = describeError(error).split('\n')
    assert.deepEqual([lines[1], lines[15]], ['  | 6', '  | 20'])
  })

  it('of a killed command names the signal', async () => {
    const error = await failure($({ quiet: true })`sh -c ${'kill -TERM $$'}`)
    assert.match(describeError(error), /^sh was ended by SIGTERM\n/)
  })

  it('of commands that fail at the same time names the right one', async () => {
    const commands = ['exit 3', 'sleep 0.1; exit 3', 'sleep 0.2; exit 3']
    const errors = await Promise.all(commands.map((command) => failure($`sh -c ${command}`)))
    for (const [index, error] of errors.entries()) {
      assert.ok(describeError(error).endsWith(`${commands[index]}'`), describeError(error))
    }
  })

  it('of commands that took equally long names the one with its errors', () => {
    for (const name of ['sigma', 'gamma']) {
      noteFailure({ command: `ssh ${name}`, duration: 5, stderr: `${name}: refused` })
    }
    const error = new ProcessOutput(255, null, '', 'sigma: refused\n', '', '', 5)
    assert.match(describeError(error), /command: ssh sigma$/m)
  })

  it('with a kubectl command says which kubeconfig it needs', () => {
    const first = /^ {2}first: {3}export KUBECONFIG="\$PWD\/configs\/admin\.kubeconfig"$/m
    const hint = 'use another name, or:\nkubectl delete node sigma'
    assert.match(describeError(new StepError('no', { hint })), first)
    assert.match(describeError(new StepError('no', { command: 'kubectl get nodes' })), first)
    assert.doesNotMatch(describeError(new StepError('no', { hint: 'install kubectl so' })), first)
  })

  it('of an ssh that ended without a word says that the connection was lost', async () => {
    const error = await failure($({ quiet: true })`sh -c 'exit 255' ssh`)
    assert.match(describeError(error), /^the connection to the machine was lost\n/)
  })

  it('of a known problem has its reason and its hint', () => {
    const known = knownProblem(
      'kubectl get nodes',
      'error: x509: certificate signed by unknown authority',
    )
    assert.equal(known?.reason, 'the API server has a certificate of another CA than tls/ca.pem')
    assert.match(known?.hint ?? '', /make reconfig/)
    assert.equal(knownProblem('qemu-img info', 'x509: unknown'), undefined)
    // A call that was ended at its own limit, and a webhook's own time limit.
    assert.equal(knownProblem('kubectl get nodes', 'was ended by SIGTERM')?.reason, busyApiServer)
    const webhook = 'failed calling webhook "w.example": Post "…": context deadline exceeded'
    assert.equal(
      knownProblem('kubectl apply', webhook)?.reason,
      'the webhook w.example cannot be called',
    )
    // What a program in a pod says is nothing about the API server.
    const inPod = 'wget: Connection refused\ncommand terminated with exit code 1\n'
    assert.equal(
      knownProblem('kubectl exec web -- wget x', inPod)?.reason,
      'a command in the pod failed (exit status 1)',
    )
    assert.equal(
      knownProblem('kubectl exec web -- sleep 999', 'was ended by SIGTERM')?.reason,
      'kubectl exec did not end in time',
    )
  })

  it('of the file system has the path and words instead of a code', () => {
    const error = Object.assign(new Error('EACCES: permission denied, open'), {
      code: 'EACCES',
      path: 'tls/ca.pem',
    })
    assert.equal(describeError(error), 'tls/ca.pem: permission denied (was it created by root?)')
    // What fails while a file is written does not name it.
    const full = { code: 'ENOSPC', syscall: 'write' }
    const error2 = Object.assign(new Error('ENOSPC: no space left on device, write'), full)
    assert.equal(describeError(error2), 'a file: the disk is full')
  })
})
