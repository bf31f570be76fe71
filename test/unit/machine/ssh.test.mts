import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { describe, it } from 'node:test'
import { loadCluster } from '../../../lib/cluster.mts'
import { quoteForShell, sshArguments } from '../../../lib/machine/ssh.mts'

describe('a word quoted for a shell', () => {
  for (const text of ['plain', '', "it's", '$HOME `id` "x" \\', 'two\nlines', '-n', 'ä*?[a]~']) {
    it(`reads back as ${JSON.stringify(text)}`, () => {
      const back = execFileSync('sh', ['-c', `printf '%s|' ${quoteForShell(text)}`])
      assert.equal(back.toString(), `${text}|`)
    })
  }
})

describe('the arguments of ssh', () => {
  const { controlPlane } = loadCluster({ env: {} })
  const args = sshArguments(controlPlane)

  it('are ones that ssh itself accepts and understands', () => {
    const shown = execFileSync('ssh', ['-G', ...args]).toString()
    for (const line of [
      'port 2222',
      'user root',
      'hostname 127.0.0.1',
      'stricthostkeychecking true',
      'batchmode yes',
      'identitiesonly yes',
      'identityagent none',
      'identityfile ../tls/ssh_ed25519',
      'userknownhostsfile ../tls/known_hosts',
      'globalknownhostsfile /dev/null',
      'controlpath alpha.ssh',
    ]) {
      assert.ok(shown.split('\n').includes(line), line)
    }
  })

  it('ignore the ssh configuration of the user and of the system', () => {
    assert.deepEqual(args.slice(0, 2), ['-F', 'none'])
  })

  it('name the control socket without a folder, as its path must stay short', () => {
    assert.ok(args.includes('ControlPath=alpha.ssh'))
  })
})
