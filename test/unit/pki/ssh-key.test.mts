import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import { fingerprint, generateSshKey, publicHalf } from '../../../lib/pki/ssh-key.mts'
import { missing } from '../../tools.mts'

describe('an ssh key', { skip: missing('ssh-keygen') }, () => {
  let folder: string
  before(() => {
    folder = mkdtempSync(join(tmpdir(), 'ssh-key-'))
  })
  after(() => rmSync(folder, { recursive: true }))

  const keygen = (...args: string[]) =>
    execFileSync('ssh-keygen', args, { cwd: folder, encoding: 'utf8', stdio: 'pipe' }).trim()
  const saved = async (comment: string) => {
    const text = await generateSshKey(comment)
    writeFileSync(join(folder, 'key'), text, { mode: 0o600 })
    return text
  }

  it('is read by ssh-keygen, which finds the same public half and comment', async () => {
    // The padding depends on the comment's length: all its lengths have to come right.
    for (const comment of ['', 'a', 'ab', 'abc', 'abcd', 'abcde', 'abcdef', 'abcdefg']) {
      const text = await saved(comment)
      assert.equal(keygen('-y', '-f', 'key'), `${publicHalf(text)} ${comment}`.trim())
    }
  })

  it('has the fingerprint that ssh-keygen shows', async () => {
    const line = publicHalf(await saved('sigma')) ?? ''
    assert.equal(keygen('-l', '-f', 'key'), `256 ${fingerprint(line)} sigma (ED25519)`)
  })

  it('signs what ssh-keygen verifies', async () => {
    const line = publicHalf(await saved('sigma'))
    writeFileSync(join(folder, 'allowed'), `sigma ${line}\n`)
    writeFileSync(join(folder, 'message'), 'hello')
    keygen('-Y', 'sign', '-f', 'key', '-n', 'test', 'message')
    const verify = ['-Y', 'verify', '-f', 'allowed', '-I', 'sigma', '-n', 'test']
    const answer = execFileSync('ssh-keygen', [...verify, '-s', 'message.sig'], {
      cwd: folder,
      input: 'hello',
      encoding: 'utf8',
    })
    assert.match(answer, /Good "test" signature/)
  })

  it('is another one every time', async () => {
    assert.notEqual(publicHalf(await saved('one')), publicHalf(await saved('one')))
  })

  it('may have been made by ssh-keygen', () => {
    keygen('-q', '-t', 'ed25519', '-N', '', '-C', 'me', '-f', 'theirs')
    const text = readFileSync(join(folder, 'theirs'), 'utf8')
    assert.equal(`${publicHalf(text)} me`, keygen('-y', '-f', 'theirs'))
  })

  it('is none if it has a passphrase, is of RSA, or is no key at all', () => {
    keygen('-q', '-t', 'ed25519', '-N', 'secret', '-f', 'locked')
    keygen('-q', '-t', 'rsa', '-b', '2048', '-N', '', '-f', 'rsa')
    assert.equal(publicHalf(readFileSync(join(folder, 'locked'), 'utf8')), undefined)
    assert.equal(publicHalf(readFileSync(join(folder, 'rsa'), 'utf8')), undefined)
    assert.equal(publicHalf('no key'), undefined)
    assert.equal(publicHalf(''), undefined)
  })
})
