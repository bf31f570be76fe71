import assert from 'node:assert/strict'
import { describe, it } from 'node:test'
import { enlargeBuffers, LearningSwitch } from '../../lib/lan-switch.mts'

const alpha = { port: 24110, mac: '52:54:01:12:34:56' }
const sigma = { port: 24111, mac: '52:54:01:12:34:57' }
const gamma = { port: 24112, mac: '52:54:01:12:34:58' }
const ports = [alpha.port, sigma.port, gamma.port]
const broadcast = 'ff:ff:ff:ff:ff:ff'

function frame(from: string, to: string): Buffer {
  const addresses = Buffer.from((to + from).replaceAll(':', ''), 'hex')
  return Buffer.concat([addresses, Buffer.from('0800', 'hex'), Buffer.from('payload')])
}

describe('the LAN switch', () => {
  it('sends a frame for an unknown address to every other port', () => {
    const lanSwitch = new LearningSwitch(ports)
    const targets = lanSwitch.forward(frame(alpha.mac, sigma.mac), alpha.port, 0)
    assert.deepEqual(targets, [sigma.port, gamma.port])
  })

  it('sends a frame for a known address to its port only', () => {
    const lanSwitch = new LearningSwitch(ports)
    lanSwitch.forward(frame(sigma.mac, broadcast), sigma.port, 0)
    assert.deepEqual(lanSwitch.forward(frame(alpha.mac, sigma.mac), alpha.port, 1), [sigma.port])
  })

  it('sends broadcast and multicast to every other port, always', () => {
    const lanSwitch = new LearningSwitch(ports)
    const others = [sigma.port, gamma.port]
    assert.deepEqual(lanSwitch.forward(frame(alpha.mac, broadcast), alpha.port, 0), others)
    assert.deepEqual(
      lanSwitch.forward(frame(alpha.mac, '01:00:5e:00:00:fb'), alpha.port, 0),
      others,
    )
  })

  it('refuses frames from a port that is not a machine’s, and learns nothing from them', () => {
    const lanSwitch = new LearningSwitch(ports)
    assert.deepEqual(lanSwitch.forward(frame(sigma.mac, alpha.mac), 40000, 0), [])
    assert.equal(lanSwitch.counters.refused, 1)
    assert.equal(lanSwitch.addresses(0), 0)
  })

  it('never sends a frame back to the port it came from', () => {
    const lanSwitch = new LearningSwitch(ports)
    lanSwitch.forward(frame(alpha.mac, broadcast), alpha.port, 0)
    assert.deepEqual(lanSwitch.forward(frame('52:54:01:00:00:01', alpha.mac), alpha.port, 0), [])
  })

  it('follows an address that has moved to another port', () => {
    const lanSwitch = new LearningSwitch(ports)
    lanSwitch.forward(frame(sigma.mac, broadcast), sigma.port, 0)
    lanSwitch.forward(frame(sigma.mac, broadcast), gamma.port, 1)
    assert.deepEqual(lanSwitch.forward(frame(alpha.mac, sigma.mac), alpha.port, 2), [gamma.port])
  })

  it('forgets an address that has sent nothing for five minutes', () => {
    const lanSwitch = new LearningSwitch(ports)
    lanSwitch.forward(frame(sigma.mac, broadcast), sigma.port, 0)
    assert.deepEqual(lanSwitch.forward(frame(alpha.mac, sigma.mac), alpha.port, 300), [sigma.port])
    assert.equal(lanSwitch.forward(frame(alpha.mac, sigma.mac), alpha.port, 301).length, 2)
    assert.equal(lanSwitch.addresses(301), 1)
  })

  it('drops what is too short for a frame, and a frame from a group address', () => {
    const lanSwitch = new LearningSwitch(ports)
    assert.deepEqual(lanSwitch.forward(Buffer.alloc(0), alpha.port, 0), [])
    assert.deepEqual(lanSwitch.forward(Buffer.alloc(13), alpha.port, 0), [])
    assert.deepEqual(lanSwitch.forward(frame(broadcast, sigma.mac), alpha.port, 0), [])
    assert.equal(lanSwitch.counters.dropped, 3)
  })

  it('accepts an added machine and forgets a removed one', () => {
    const lanSwitch = new LearningSwitch([alpha.port, sigma.port])
    lanSwitch.forward(frame(sigma.mac, broadcast), sigma.port, 0)
    lanSwitch.setPorts([alpha.port, gamma.port])
    assert.deepEqual(lanSwitch.forward(frame(alpha.mac, sigma.mac), alpha.port, 1), [gamma.port])
    assert.deepEqual(lanSwitch.forward(frame(sigma.mac, alpha.mac), sigma.port, 1), [])
  })

  it('still knows the other machines when one floods it with made-up addresses', () => {
    const lanSwitch = new LearningSwitch(ports)
    lanSwitch.forward(frame(sigma.mac, broadcast), sigma.port, 0)
    for (let number = 0; number < 10_000; number += 1) {
      const suffix = number
        .toString(16)
        .padStart(6, '0')
        .replace(/(..)(?=.)/g, '$1:')
      lanSwitch.forward(frame(`02:00:00:${suffix}`, broadcast), gamma.port, 1)
    }
    assert.ok(lanSwitch.addresses(1) <= 4096)
    assert.deepEqual(lanSwitch.forward(frame(alpha.mac, sigma.mac), alpha.port, 2), [sigma.port])
  })

  it('counts frames, and the addresses that it has learned', () => {
    const lanSwitch = new LearningSwitch(ports)
    lanSwitch.forward(frame(alpha.mac, broadcast), alpha.port, 0)
    lanSwitch.forward(frame(sigma.mac, alpha.mac), sigma.port, 5)
    const counters = { received: 2, forwarded: 1, flooded: 1, refused: 0, dropped: 0 }
    assert.deepEqual(lanSwitch.counters, counters)
    assert.equal(lanSwitch.addresses(10), 2)
  })
})

describe('the buffers of the LAN switch', () => {
  it('keep their size where the system refuses a larger one, and the switch works', () => {
    const refuse = () => {
      throw new Error('setRecvBufferSize ENOBUFS')
    }
    const messages: string[] = []
    const socket = { setRecvBufferSize: refuse, setSendBufferSize: refuse }
    enlargeBuffers(socket, (text) => messages.push(text))
    assert.match(messages.join(), /no larger socket buffers: .*ENOBUFS/)
  })
})
