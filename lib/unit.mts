// A command of minutes on a machine, as a unit of systemd: a lost connection does not end it.
import type { Cluster, Node } from './cluster.mts'
import { StepError } from './errors.mts'
import { quote } from './format.mts'
import { connect, noAnswer, remote } from './ssh.mts'
import { isRunning } from './vm.mts'
import { waitFor } from './wait.mts'

/** How the command ended. */
export interface Ended {
  status: number
  /** The last lines, up to 200, that it wrote to both outputs. */
  lines: string[]
}

/**
 * Runs shell text on a machine to its end, as root, with `set -euo pipefail`.
 *
 * @param unit name of the unit; refused while a previous one of that name runs
 * @param options.timeout seconds
 * @param options.detail gets the last line of its output
 * @param options.signal ends the wait; the unit continues
 * @throws StepError if it does not end: the machine was stopped or restarted, or time is up
 */
export async function runUnit(
  cluster: Cluster,
  node: Node,
  unit: string,
  command: string,
  options: { timeout: number; detail?: (text: string) => void; signal?: AbortSignal | undefined },
): Promise<Ended> {
  const { name } = node
  const log = `/var/log/${unit}.log`
  const bootId = 'cat /proc/sys/kernel/random/boot_id'
  // --remain-after-exit: its exit status is kept until the unit is stopped.
  const run = `systemd-run --quiet --unit=${unit} --remain-after-exit --setenv=PATH="$PATH" --setenv=HOME=/root`
  const output = `--property=StandardOutput=truncate:${log} --property=StandardError=append:${log}`
  const forget = `systemctl stop ${unit} 2>/dev/null || true; systemctl reset-failed ${unit} 2>/dev/null || true`
  const boot = await remote(
    node,
    `for attempt in 1 2 3 4 5 6; do
      [ "$(systemctl show --property=SubState --value ${unit})" = running ] || break
      # It may just be ending.
      [ $attempt -lt 6 ] || { echo 'the last change is still running' >&2; exit 75; }
      sleep 1
    done
    ${forget}
    ${run} ${output} bash -euo pipefail -c ${quote(command)}
    ${bootId}`,
  )
  const show = `systemctl show --property=SubState,ExecMainStatus ${unit}`
  let ended: Ended = { status: 1, lines: [] }
  const failure = `a command on ${name} did not end`
  await waitFor({ failure, ...options }, async () => {
    if (!(await isRunning(cluster, node)))
      throw new StepError(`${name} was switched off during a change`)
    const answer = await remote(
      node,
      `${bootId}; ${show}; echo '== log'; tail -n 200 ${log}`,
    ).catch((error) => {
      // Its network or its sshd may be restarting.
      if (noAnswer(error)) return undefined
      throw error
    })
    if (answer === undefined)
      return connect(cluster, node).then(
        () => 'no answer',
        () => 'no answer',
      )
    const [head = '', text = ''] = answer.split('== log\n')
    const lines = text.trimEnd().split('\n')
    if (!head.startsWith(boot.trim())) {
      const last = lines.slice(-15).join('\n')
      throw new StepError(`${name} was restarted during a change`, { output: last })
    }
    if (/^SubState=(running|start.*)$/m.test(head)) return lines.at(-1) || 'running'
    ended = { status: Number(head.match(/^ExecMainStatus=(\d+)$/m)?.[1] ?? 1), lines }
    return undefined
  })
  await remote(node, forget)
  return ended
}
