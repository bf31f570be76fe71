import assert from 'node:assert/strict'
import { describe, it } from 'node:test'
import { LearningSwitch } from '../../../lib/lan/learning-switch.mts'

const alpha = { port: 24110, mac: '52:54:01:12:34:56' }
const sigma = { port: 24111, mac: '52:54:01:12:34:57' }
const gamma = { port: 24112, mac: '52:54:01:12:34:58' }
const ports = [alpha.port, sigma.port, gamma.port]
const broadcast = 'ff:ff:ff:ff:ff:ff'

function frame(from: string, to: string): Buffer {
  const addresses = Buffer.from((to + from).replaceAll(':', ''), 'hex')
  return Buffer.concat([addresses, Buffer.from('0800', 'hex'), Buffer.from('payload')])
}

describe('the switch', () => {
  it('sends a frame for an address it does not know to every other port', () => {
    const lan = new LearningSwitch(ports)
    const targets = lan.forward(frame(alpha.mac, sigma.mac), alpha.port, 0)
    assert.deepEqual(targets, [sigma.port, gamma.port])
  })

  it('sends a frame for an address it has heard from to its port alone', () => {
    const lan = new LearningSwitch(ports)
    lan.forward(frame(sigma.mac, broadcast), sigma.port, 0)
    assert.deepEqual(lan.forward(frame(alpha.mac, sigma.mac), alpha.port, 1), [sigma.port])
  })

  it('sends broadcast and multicast to every other port, always', () => {
    const lan = new LearningSwitch(ports)
    const others = [sigma.port, gamma.port]
    assert.deepEqual(lan.forward(frame(alpha.mac, broadcast), alpha.port, 0), others)
    assert.deepEqual(lan.forward(frame(alpha.mac, '01:00:5e:00:00:fb'), alpha.port, 0), others)
  })

  it('accepts nothing from a port that is no machine’s, and learns nothing from it', () => {
    const lan = new LearningSwitch(ports)
    assert.deepEqual(lan.forward(frame(sigma.mac, alpha.mac), 40000, 0), [])
    assert.equal(lan.counters.refused, 1)
    assert.deepEqual(lan.addresses(0), [])
  })

  it('never sends a frame back to the port it came from', () => {
    const lan = new LearningSwitch(ports)
    lan.forward(frame(alpha.mac, broadcast), alpha.port, 0)
    assert.deepEqual(lan.forward(frame('52:54:01:00:00:01', alpha.mac), alpha.port, 0), [])
  })

  it('follows an address that has moved to another port', () => {
    const lan = new LearningSwitch(ports)
    lan.forward(frame(sigma.mac, broadcast), sigma.port, 0)
    lan.forward(frame(sigma.mac, broadcast), gamma.port, 1)
    assert.deepEqual(lan.forward(frame(alpha.mac, sigma.mac), alpha.port, 2), [gamma.port])
  })

  it('forgets an address it has not heard from for five minutes', () => {
    const lan = new LearningSwitch(ports)
    lan.forward(frame(sigma.mac, broadcast), sigma.port, 0)
    assert.deepEqual(lan.forward(frame(alpha.mac, sigma.mac), alpha.port, 300), [sigma.port])
    assert.equal(lan.forward(frame(alpha.mac, sigma.mac), alpha.port, 301).length, 2)
    assert.deepEqual(
      lan.addresses(301).map(({ mac }) => mac),
      [alpha.mac],
    )
  })

  it('drops what is too short for a frame, and a frame from a group address', () => {
    const lan = new LearningSwitch(ports)
    assert.deepEqual(lan.forward(Buffer.alloc(0), alpha.port, 0), [])
    assert.deepEqual(lan.forward(Buffer.alloc(13), alpha.port, 0), [])
    assert.deepEqual(lan.forward(frame(broadcast, sigma.mac), alpha.port, 0), [])
    assert.equal(lan.counters.dropped, 3)
  })

  it('takes a new machine in, and forgets one that is gone', () => {
    const lan = new LearningSwitch([alpha.port, sigma.port])
    lan.forward(frame(sigma.mac, broadcast), sigma.port, 0)
    lan.setPorts([alpha.port, gamma.port])
    assert.deepEqual(lan.forward(frame(alpha.mac, sigma.mac), alpha.port, 1), [gamma.port])
    assert.deepEqual(lan.forward(frame(sigma.mac, alpha.mac), sigma.port, 1), [])
  })

  it('goes on when a machine floods it with made-up addresses', () => {
    const lan = new LearningSwitch(ports)
    lan.forward(frame(sigma.mac, broadcast), sigma.port, 0)
    for (let number = 0; number < 10_000; number += 1) {
      const suffix = number
        .toString(16)
        .padStart(6, '0')
        .replace(/(..)(?=.)/g, '$1:')
      lan.forward(frame(`02:00:00:${suffix}`, broadcast), gamma.port, 1)
    }
    assert.ok(lan.addresses(1).length <= 4096)
    assert.deepEqual(lan.forward(frame(alpha.mac, sigma.mac), alpha.port, 2), [sigma.port])
  })

  it('counts what it does and shows what it has learned', () => {
    const lan = new LearningSwitch(ports)
    lan.forward(frame(alpha.mac, broadcast), alpha.port, 0)
    lan.forward(frame(sigma.mac, alpha.mac), sigma.port, 5)
    const counters = { received: 2, forwarded: 1, flooded: 1, refused: 0, dropped: 0 }
    assert.deepEqual(lan.counters, counters)
    assert.deepEqual(lan.addresses(10), [
      { mac: alpha.mac, port: alpha.port, age: 10 },
      { mac: sigma.mac, port: sigma.port, age: 5 },
    ])
  })
})
