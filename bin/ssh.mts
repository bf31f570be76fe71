#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// A shell on a machine, or one command, as root.
import { constants } from 'node:os'
import { $ } from 'zx/core'
import { loadCluster } from '../lib/cluster.mts'
import { StepError } from '../lib/errors.mts'
import { script } from '../lib/script.mts'
import { machineState } from '../lib/vm.mts'

const { args } = script({
  does: `Opens a shell on a running machine, or runs a command there, as root. Logs in with the cluster's
own key, and only if the machine has the host key that is pinned in tls/known_hosts.`,
  reads: ['cluster.env', 'tls/ssh_config', 'tls/ssh_ed25519', 'tls/known_hosts'],
  writes: [],
  args: 'NODE [COMMAND...]',
  examples: ['./bin/ssh.mts alpha', './bin/ssh.mts alpha -- systemctl status etcd'],
})

const [name = '', ...command] = args
const cluster = loadCluster()
const machine = await machineState(cluster, cluster.node(name))
const reason = `${name} is not running`
if (machine.state === 'stopped') throw new StepError(reason, { hint: `make boot-${name}` })
if (machine.state === 'installing') {
  throw new StepError(`${name} is being installed: it has no ssh yet`)
}

// ssh gets this terminal itself, and joins the words of the command for the shell on the machine.
const $$ = $({ stdio: 'inherit', detached: false, nothrow: true })
const { exitCode, signal } = await $$`ssh -F tls/ssh_config ${name} ${command}`
process.exitCode = exitCode ?? 128 + (signal ? constants.signals[signal] : 0)
