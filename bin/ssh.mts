#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// A shell on a machine, or one command, as root.
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { constants } from 'node:os'
import { loadCluster } from '../lib/cluster.mts'
import { StepError } from '../lib/errors.mts'
import { sshArguments, sshFolder } from '../lib/machine/ssh.mts'
import { machineState } from '../lib/qemu/vm.mts'
import { script } from '../lib/script.mts'

const { args } = script({
  does: `Opens a shell on a running machine, or runs a command there, as root. The cluster's own key
lets us in; the machine has to prove itself by the host key in tls/known_hosts.`,
  reads: ['cluster.env', 'tls/ssh_ed25519', 'tls/known_hosts'],
  writes: [],
  args: 'NODE [COMMAND...]',
  examples: [
    './bin/ssh.mts alpha',
    './bin/ssh.mts alpha -- systemctl status etcd',
    "./bin/ssh.mts sigma -- 'journalctl -u kubelet | tail'",
  ],
})

const [name = '', ...command] = args
const cluster = loadCluster()
const node = cluster.node(name)
const found = await machineState(cluster, node)
if (found.state === 'stopped') {
  throw new StepError(`${node.name} is not running`, { hint: `make boot-${node.name}` })
}
if (found.mode === 'install') {
  throw new StepError(`${node.name} is being installed: it has no ssh yet`)
}

// As ssh itself does it: the words joined are a text for the shell there.
const ssh = spawn('ssh', [...sshArguments(node), ...command], {
  cwd: await sshFolder(cluster),
  stdio: 'inherit',
})
// Ctrl-C is for the command on the machine; ssh ends with it, and then so do we.
process.on('SIGINT', () => {})
const [status, signal] = (await once(ssh, 'exit')) as [number | null, NodeJS.Signals | null]
process.exitCode = status ?? 128 + (signal ? constants.signals[signal] : 0)
