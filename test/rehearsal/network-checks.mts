// What no script of the project checks of the network: from this computer through the API server to
// pods, packets of full size, and the way out.
import { spawn } from 'node:child_process'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { createInterface } from 'node:readline'
import { $ } from 'zx'
import { StepError } from '../../lib/errors.mts'
import { startWebPods, type WebPod, withScratchNamespace } from '../../lib/pods.mts'
import { contains, parseAddress, parseCidr } from '../../lib/settings.mts'
import { CheckList } from './check-list.mts'
import { webServiceIp } from './pods-talk.mts'
import type { Rehearsal } from './rehearsal.mts'

const namespace = 'network-checks'
const timeout = 300

/** All checks, each a line. @throws StepError at the end if one has failed */
export async function networkChecks(rehearsal: Rehearsal): Promise<void> {
  const { cluster, signal } = rehearsal
  const list = new CheckList(signal)
  await withScratchNamespace(namespace, { timeout, signal }, async () => {
    const options = { namespace, workers: cluster.workers, timeout, signal }
    const pods = await startWebPods(cluster, options)
    for (const [what, check] of checks) {
      await list.check(what, () => check({ rehearsal, pods }))
    }
  })
  list.assertPassed()
}

interface Place {
  rehearsal: Rehearsal
  /** One on each worker. */
  pods: readonly WebPod[]
}

const checks: readonly [what: string, check: (place: Place) => Promise<string | undefined>][] = [
  ['pods have addresses of their own worker', podsInTheirRanges],
  ['logs are the output of a pod', logs],
  ['exec passes on its input', execWithInput],
  ['port-forward leads from this computer to a pod', portForward],
  ['every worker reaches the service', serviceOnMachines],
  ['megabytes pass between workers', megabytes],
  ['pods reach this computer, from the address of their machine', wayOut],
]

async function podsInTheirRanges({ pods }: Place): Promise<string> {
  for (const { name, ip, node } of pods) {
    const range = parseCidr(node.podCidr ?? '')
    const address = parseAddress(ip)
    const inside = range !== undefined && address !== undefined && contains(range, address)
    expect(inside, `${name} has ${ip}, which is not of ${node.podCidr}`)
  }
  return pods.map(({ ip }) => ip).join(', ')
}

async function logs({ pods }: Place): Promise<undefined> {
  for (const { name, run } of pods) {
    await run(`echo written by ${name} >/proc/1/fd/1`)
    const found = (await $`kubectl logs ${name} --namespace=${namespace}`).stdout
    expect(found.includes(`written by ${name}\n`), `the log of ${name} is: ${found}`)
  }
}

async function execWithInput({ pods }: Place): Promise<undefined> {
  for (const { name } of pods) {
    const input = `to ${name}\n`.repeat(10_000)
    const kubectl = $({ input, timeout: '120s' })
    const found = (await kubectl`kubectl exec --stdin --namespace=${namespace} ${name} -- cat`)
      .stdout
    expect(found === input, `${name} gives back ${found.length} of ${input.length} bytes`)
  }
}

async function portForward({ pods }: Place): Promise<undefined> {
  for (const { name } of pods) {
    const child = spawn(
      'kubectl',
      ['port-forward', `--namespace=${namespace}`, `pod/${name}`, ':8080', '--address=127.0.0.1'],
      { env: $.env, stdio: ['ignore', 'pipe', 'inherit'] },
    )
    try {
      let port: string | undefined
      for await (const line of createInterface(child.stdout)) {
        port = line.match(/127\.0\.0\.1:(\d+) ->/)?.[1]
        if (port) break
      }
      expect(port !== undefined, `port-forward to ${name} ended`)
      const answer = await fetch(`http://127.0.0.1:${port}/`, {
        signal: AbortSignal.timeout(60_000),
      })
      expect(answer.ok, `${name} answers with HTTP ${answer.status}`)
    } finally {
      child.kill()
    }
  }
}

async function serviceOnMachines({ rehearsal }: Place): Promise<string> {
  const ip = await webServiceIp(namespace)
  for (const node of rehearsal.cluster.workers) {
    await rehearsal.on(
      node,
      `for i in 1 2 3 4 5 6; do curl -fsS -m 10 -o /dev/null http://${ip}/; done`,
    )
  }
  return ip
}

/** A path that drops what is larger than its MTU lets small pages through all the same. */
async function megabytes({ pods }: Place): Promise<undefined> {
  for (const from of pods) {
    // The largest file there is: the program itself.
    const sum = await from.run('httpd -p 8090 -h /bin; md5sum </bin/busybox')
    for (const to of pods.filter((pod) => pod !== from)) {
      const url = `http://${from.ip}:8090/busybox`
      const found = await to.run(`wget -q -T 60 -O - ${url} | md5sum`)
      expect(found === sum, `${to.name} gets another file from ${from.name} than that has`)
    }
  }
}

/** QEMU leads its gateway's address to this computer's loopback. */
async function wayOut({ pods }: Place): Promise<undefined> {
  const server = createServer((_, response) => response.end('from the host'))
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  try {
    const { port } = server.address() as AddressInfo
    for (const { name, run } of pods) {
      const found = await run(`wget -q -T 20 -O - http://10.0.2.2:${port}/`)
      expect(found === 'from the host', `${name} got: ${found}`)
    }
  } finally {
    server.close()
  }
}

function expect(holds: boolean, reason: string): void {
  if (!holds) throw new StepError(reason)
}
