// A client that counts up: each number is a ConfigMap of its own, made through the API server.
import assert from 'node:assert/strict'
import { readFile } from 'node:fs/promises'
import { Agent, request } from 'node:https'
import { text } from 'node:stream/consumers'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Cluster } from '../lib/cluster.mts'
import { becomes } from '../lib/wait.mts'

export class Writer {
  /** The last number that the API server has acknowledged. */
  last = 0
  /** Of each number: etcd's revision, and when it was acknowledged, in milliseconds of the epoch. */
  private readonly written: { revision: number; at: number }[] = []
  private readonly namespace: string
  private readonly cluster: Cluster
  private readonly agent: Agent
  private readonly every: number
  /** Whether it has ended, by `stop` or by itself. */
  hasEnded = false
  private ends = false
  private endsWhenRefused = false
  private ended = Promise.resolve()

  private constructor(cluster: Cluster, namespace: string, agent: Agent, every: number) {
    this.cluster = cluster
    this.namespace = namespace
    this.agent = agent
    this.every = every
  }

  /**
   * Creates the namespace and begins to write. Returns when some numbers are there.
   *
   * @param every milliseconds between two writes
   */
  static async start(cluster: Cluster, namespace: string, { every = 20 } = {}): Promise<Writer> {
    const names = ['ca', 'admin', 'admin-key'].map((name) => cluster.path('tls', `${name}.pem`))
    const [ca, cert, key] = await Promise.all(names.map((name) => readFile(name)))
    assert.ok(ca && cert && key)
    const agent = new Agent({ ca, cert, key, keepAlive: true })
    const writer = new Writer(cluster, namespace, agent, every)
    const { status, body } = await writer.ask('POST', '/api/v1/namespaces', namespace)
    assert.equal(status, 201, body)
    writer.ended = writer.count().finally(() => {
      writer.hasEnded = true
    })
    await writer.continues().catch(async (error) => {
      await writer.stop()
      throw error
    })
    return writer
  }

  /** Removes its namespace, and does not wait for that. */
  async remove(): Promise<void> {
    await this.ask('DELETE', `/api/v1/namespaces/${this.namespace}`)
  }

  /** Waits until ten more numbers are acknowledged. */
  async continues(): Promise<void> {
    const from = this.last
    assert.ok(await becomes(() => this.last >= from + 10, 120), `no write after ${from}`)
  }

  async stop(): Promise<void> {
    this.ends = true
    await this.ended
  }

  /** It then ends by itself with the first write that the API server refuses. */
  stopWhenRefused(): void {
    this.endsWhenRefused = true
  }

  /** Waits until it has ended by itself. */
  async untilRefused(): Promise<void> {
    assert.ok(await becomes(() => this.hasEnded, 120), 'no write was refused')
  }

  /** The numbers that are there. */
  async numbers(): Promise<number[]> {
    const path = `/api/v1/namespaces/${this.namespace}/configmaps`
    const { status, body } = await this.ask('GET', path)
    assert.equal(status, 200, body)
    const { items } = JSON.parse(body) as { items: { metadata: { name: string } }[] }
    const found = items.map(({ metadata: { name } }) => Number(name.match(/^n-(\d+)$/)?.[1] ?? 0))
    return found.filter((number) => number > 0).sort((one, other) => one - other)
  }

  /** @throws if a number that was acknowledged is not there; the one after it may be */
  async assertNothingLost(): Promise<void> {
    const numbers = await this.numbers()
    const more = numbers.length - this.last
    assert.ok(more === 0 || more === 1, `${this.last} acknowledged, ${numbers.length} there`)
    assert.deepEqual(numbers, upTo(numbers.length))
  }

  /**
   * @param number the last that must be there
   * @param atMost the last that may be there, where that is known less exactly
   * @throws if the numbers that are there do not begin with 1, have a gap, or end elsewhere
   */
  async assertExactly(number: number, atMost = number): Promise<void> {
    assert.ok(number > 0)
    const numbers = await this.numbers()
    assert.deepEqual(numbers, upTo(Math.min(Math.max(numbers.length, number), atMost)))
  }

  /** The last number that was there at a revision of etcd. */
  numberAt(revision: number): number {
    return this.written.filter((each) => each.revision <= revision).length
  }

  /** The last number that was acknowledged by then, in milliseconds of the epoch. */
  acknowledgedBy(time: number): number {
    return this.written.filter(({ at }) => at <= time).length
  }

  private async count(): Promise<void> {
    while (!this.ends) {
      const next = this.last + 1
      const name = `n-${String(next).padStart(6, '0')}`
      const path = `/api/v1/namespaces/${this.namespace}/configmaps`
      const refused = () => ({ status: 0, body: '' })
      let { status, body } = await this.ask('POST', path, name, 5).catch(refused)
      // An earlier attempt, whose answer was lost, had written it.
      if (status === 409)
        ({ status, body } = await this.ask('GET', `${path}/${name}`, '', 5).catch(refused))
      if (status === 201 || status === 200) {
        this.last = next
        const revision = Number(JSON.parse(body).metadata.resourceVersion)
        this.written.push({ revision, at: Date.now() })
      } else if (this.endsWhenRefused) return
      await sleep(this.every)
    }
  }

  /** @param name of the object to create @param timeout seconds without an answer */
  private ask(
    method: 'GET' | 'POST' | 'DELETE',
    path: string,
    name = '',
    timeout = 60,
  ): Promise<{ status: number; body: string }> {
    const port = this.cluster.settings.API_PORT
    const headers = { 'content-type': 'application/json' }
    return new Promise((resolve, reject) => {
      const limit = timeout * 1000
      const options = { host: '127.0.0.1', port, path, method, headers, timeout: limit }
      const sent = request({ ...options, agent: this.agent }, (answer) => {
        text(answer).then((body) => resolve({ status: answer.statusCode ?? 0, body }), reject)
      })
      sent.on('error', reject).on('timeout', () => sent.destroy(new Error('no answer')))
      sent.end(name && JSON.stringify({ metadata: { name } }))
    })
  }
}

function upTo(last: number): number[] {
  return Array.from({ length: last }, (_, index) => index + 1)
}
