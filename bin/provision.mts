#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// Machines: NixOS installed from the ISO over the serial console with --iso, else machines started.
import { existsSync } from 'node:fs'
import { mkdir, open, rename, rm } from 'node:fs/promises'
import { resolve } from 'node:path'
import { $ } from 'zx/core'
import { chooseNodes, loadCluster, type Node } from '../lib/cluster.mts'
import { bootFailures } from '../lib/console-log.mts'
import { CommandError, ConsoleShell, markers, waitForPrompt } from '../lib/console-shell.mts'
import { StepError } from '../lib/errors.mts'
import { ExpectError, endOf, type Session, spawn } from '../lib/expect.mts'
import { quote } from '../lib/format.mts'
import { detectHost } from '../lib/host.mts'
import { interruption } from '../lib/interrupt.mts'
import { extractKernel, inspectIso, verifiedIso } from '../lib/iso.mts'
import { withLock } from '../lib/lock.mts'
import { machineProxy } from '../lib/proxy.mts'
import { qemuArguments } from '../lib/qemu.mts'
import { refuseIf, runScript, script } from '../lib/script.mts'
import { suspended } from '../lib/snapshots.mts'
import { waitForSsh, waitForSystem } from '../lib/ssh.mts'
import { inParallel, type Row } from '../lib/steps.mts'
import * as vm from '../lib/vm.mts'
import { awakeTime } from '../lib/wait.mts'

const { flags, args } = script({
  does: `Starts installed machines in the background: all, or those that are named. Suspended machines
continue, always all of them. With --iso it installs NixOS on new disks instead: the machines boot
the installer ISO, the commands are typed on their serial consoles, then they are powered off.`,
  reads: ['cluster.env', 'images/NODE.qcow2', '--iso: images/nixos-VERSION-ARCH.iso, cloud-init/'],
  writes: ['run/', 'logs/', 'images/: efivars, console logs; --iso: disks, install logs'],
  flags: {
    'disks-only': { help: 'boot suspended machines; their memory is lost' },
    wait: { help: 'wait until ssh and systemd of the started machines are up' },
    iso: { help: 'install; without NODE, all machines that have no disk' },
    'iso-file': { value: 'FILE', help: 'install from this ISO' },
    force: { help: 'with --iso: replace existing disks too; all data on them is lost' },
  },
  args: '[NODE...]',
  examples: ['./bin/provision.mts --wait alpha', './bin/provision.mts --iso sigma'],
})

const cluster = loadCluster()
const { NIXOS_VERSION, DISK_SIZE, BOOT_TIMEOUT, INSTALL_TIMEOUT } = cluster.settings
const installing = flags.iso || flags['iso-file'] !== undefined
const starting = flags.wait || flags['disks-only']
refuseIf(installing && starting, '--wait and --disks-only cannot be combined with --iso')
refuseIf(flags.force && !installing, '--force is for --iso: starting a machine replaces nothing')
const chosen = chooseNodes(cluster, args)
// Installing is for machines without a disk, starting for those that have one.
const nodes = chosen.filter((node) => flags.force || vm.hasDisk(cluster, node) !== installing)
const names = nodes.map(({ name }) => name)
const others = chosen.filter((node) => !nodes.includes(node)).map(({ name }) => name)
if (others.length > 0) {
  const list = others.join(' ')
  const reason = `${installing ? 'installed already' : 'not installed yet'}: ${others.join(', ')}`
  const hint = installing
    ? `start: ./bin/provision.mts ${list}\nto reinstall and lose all data: ./bin/provision.mts --iso --force ${list}`
    : `install: ./bin/provision.mts --iso ${list}`
  if (args.length > 0 || (!installing && nodes.length === 0)) throw new StepError(reason, { hint })
  console.error(installing ? `! ${reason}` : `! ${reason}; ${hint}`)
  if (nodes.length === 0) process.exit()
}
const host = await detectHost(cluster)
const signal = interruption()
const noLogin = { pattern: /Dependency failed for .*Serial Getty/, reason: 'no login prompt' }

if (installing) {
  const iso = await chooseIso()
  const warnings = [await vm.assertRoomForDisks(cluster, nodes), host.warning].filter(Boolean)
  for (const warning of warnings) console.error(`! ${warning}`)
  await vm.prepareFolders(cluster)
  await inParallel(names, (name, row) => {
    const lock = cluster.path('run', `${name}-install.lock`)
    return withLock(lock, `installing ${name}`, () => install(cluster.node(name), iso, row))
  })
} else {
  await vm.assertPortsFree(cluster, nodes)
  if (host.warning) console.error(`! ${host.warning}`)
  if (existsSync(cluster.path('snapshots', suspended))) {
    const how = flags['disks-only'] ? ['--disks-only'] : []
    await runScript('restore', ['--start-only', ...how, suspended])
  }
  const width = Math.max(...names.map((name) => name.length))
  const states = await inParallel(names, (name, row) => start(cluster.node(name), row))
  console.log(states.map((state, index) => `${names[index]?.padEnd(width)}  ${state}`).join('\n'))
}

/** Powers a machine on. @returns its state in words */
async function start(node: Node, row: Row): Promise<string> {
  if (flags.wait) row.step('power on')
  const { pid, alreadyRunning } = await vm.startMachine(cluster, node, host)
  if (!flags.wait) return `${alreadyRunning ? 'runs already' : 'started'} (pid ${pid})`
  const limits = { signal, detail: (text: string) => row.detail(text) }
  row.step('waiting for ssh')
  await waitForSsh(cluster, node, limits)
  row.step('waiting for systemd')
  const { state, failedUnits } = await waitForSystem(cluster, node, limits)
  return failedUnits.length > 0 ? `${state}: ${failedUnits.join(', ')} failed` : state
}

/** The ISO of --iso-file, or the one that download-iso has verified. */
async function chooseIso(): Promise<string> {
  if (flags['iso-file'] === undefined) return verifiedIso(cluster, host.arch)
  const file = resolve(flags['iso-file'])
  if (!existsSync(file)) throw new StepError(`there is no ISO ${file}`)
  await inspectIso(file, host.arch)
  return file
}

/** Installs a node; tries a second time where that may help: not after a configuration error. */
async function install(node: Node, iso: string, row: Row): Promise<void> {
  const found = await vm.machineState(cluster, node)
  if (found.state !== 'stopped') {
    const hint = `shut it down first: ./bin/shutdown.mts ${node.name}`
    throw new StepError(`${node.name} is running (pid ${found.pid})`, { hint })
  }
  if (!existsSync(cluster.path('cloud-init', node.name, 'nixos'))) {
    const hint = `./bin/generate-nocloud-iso.mts ${node.name}`
    throw new StepError(`${node.name} has no staged configuration`, { hint })
  }
  const done = !flags.force && vm.hasDisk(cluster, node)
  if (done) throw new StepError(`installed already: ${node.name}`)
  await rm(vm.filesOf(cluster, node).installLog, { force: true })
  try {
    await attempt(node, iso, row)
  } catch (error) {
    if (signal.aborted || !mayHelp(error)) throw error
    row.step(`second attempt, because: ${(error as Error).message}`)
    await attempt(node, iso, row)
  }
}

/** One attempt. The disk is .partial until NixOS is on it; a failure removes it and ends QEMU. */
async function attempt(node: Node, iso: string, row: Row): Promise<void> {
  const { disk, partialDisk, efiVars, installLog } = vm.filesOf(cluster, node)
  // Always the same paths: what a killed attempt left is removed by the next one.
  const folder = cluster.path('run', `${node.name}-install`)
  await rm(folder, { recursive: true, force: true })
  await rm(partialDisk, { force: true })
  await mkdir(folder)
  try {
    const kernel = await extractKernel(iso, folder, host.arch)
    await $`(umask 077 && qemu-img create -q -f qcow2 ${partialDisk} ${DISK_SIZE}G)`
    await vm.prepareEfiVars(cluster, node, host, { fresh: true })
    const mode = { kind: 'install', iso, kernel } as const
    const options = qemuArguments({ cluster, node, host, mode })
    if (flags.verbose)
      console.error(`$ (cd run; ${[host.qemu.path, ...options].map(quote).join(' ')})`)
    // QEMU in a pseudo-terminal, which is its serial console. It ends with this script, in any case.
    const machine = spawn(host.qemu.path, options, {
      name: node.name,
      cwd: cluster.path('run'),
      transcript: installLog,
      hidden: markers,
      fatalPatterns: [...bootFailures, noLogin],
    })
    try {
      await type(node, machine, row)
    } finally {
      await machine.close()
    }
    const file = await open(partialDisk, 'r+')
    await file.sync().finally(() => file.close())
    await rename(partialDisk, disk)
  } catch (error) {
    await rm(partialDisk, { force: true })
    if (!existsSync(disk)) await rm(efiVars, { force: true })
    throw error
  } finally {
    await rm(folder, { recursive: true, force: true })
  }
}

/** From power-on to power-off: what a person would type. (NixOS manual, "Manual Installation") */
async function type(node: Node, machine: Session, row: Row): Promise<void> {
  const deadline = awakeTime() + INSTALL_TIMEOUT * 1000
  const step = (title: string) => {
    row.step(title)
    machine.name = `${node.name}, ${title}`
    machine.transcript.note(`\n── ${title}\n`)
  }

  step('boot the installer')
  // "Welcome to NixOS" comes 20 seconds before the prompt and is no sign of readiness.
  const timeout = Math.min(2 * BOOT_TIMEOUT, INSTALL_TIMEOUT)
  const what = "the installer's prompt"
  await waitForPrompt(machine, /nixos@nixos:[^\n]*\$ /, { what, timeout, signal })
  machine.send('sudo -i\n')
  await waitForPrompt(machine, /root@nixos:[^\n]*# /, { what: 'the root prompt', signal })
  // Keep kernel messages and systemd's status lines off the console.
  const silence = 'dmesg -n 1; kill -s SIGRTMIN+21 1'
  const shell = await ConsoleShell.open(machine, { silence, signal })
  // nixos-install takes NixOS from the ISO: another release would be installed silently.
  const release = (await shell.run('nixos-version')).trim()
  if (!release.startsWith(NIXOS_VERSION)) {
    const reason = `the ISO is NixOS ${release}, cluster.env says ${NIXOS_VERSION}`
    const hint = 'change NIXOS_VERSION, or run ./bin/download-iso.mts --force'
    throw new StepError(`${machine.name}: ${reason}`, { hint })
  }

  step('partition the disk')
  // No swap: by default, a kubelet refuses to start with it.
  await shell.run(
    'parted --script /dev/vda -- mklabel gpt mkpart ESP fat32 1MiB 513MiB set 1 esp on',
  )
  await shell.run('parted --script /dev/vda -- mkpart nixos ext4 513MiB 100%')
  await shell.run('udevadm settle')
  await shell.run('mkfs.fat -F 32 -n ESP /dev/vda1')
  await shell.run('mkfs.ext4 -q -F -L nixos /dev/vda2')
  await shell.run('mount /dev/vda2 /mnt')
  await shell.run('mkdir /mnt/boot && mount -o umask=0077 /dev/vda1 /mnt/boot')

  step('copy the configuration')
  // Staged as it lies on the machine: etc/nixos, var/lib/kubernetes, …; there all of it is root's.
  const archive = await $`tar -czf - -C cloud-init/${node.name}/nixos . | base64`
  const percent = (part: number) => row.detail(`${Math.round(part * 100)} %`)
  await shell.upload(Buffer.from(archive.stdout, 'base64'), '/tmp/staged.tar.gz', percent)
  await shell.run('tar -xzpf /tmp/staged.tar.gz --no-same-owner --no-overwrite-dir -C /mnt')

  const { http, https, no, caFile } = machineProxy(cluster)
  if (http || https) {
    // The address of a proxy may contain a password.
    const secret = { shown: 'export http_proxy=… https_proxy=…' }
    await shell.run(`export http_proxy=${quote(http)} https_proxy=${quote(https)}`, secret)
    await shell.run(`export no_proxy=${quote(no.join(','))}`)
  }
  if (caFile) {
    const bundle = '/etc/ssl/certs/ca-certificates.crt /mnt/etc/nixos/proxy-ca.pem'
    await shell.run(`cat ${bundle} > /tmp/ca.pem`)
    await shell.run('export NIX_SSL_CERT_FILE=/tmp/ca.pem SSL_CERT_FILE=/tmp/ca.pem')
  }

  step('nixos-install')
  // The channel is copied to the new system (no --no-channel-copy): nixos-rebuild needs it there.
  const nixosInstall = 'nixos-install --root /mnt --no-root-passwd'
  // Its output goes to a file, so that a slow console does not slow it down.
  await shell.run(': > /tmp/install.log')
  const follow = 'tail -n +1 -f --pid=$! /tmp/install.log; wait $!'
  await shell.run(`(${nixosInstall} < /dev/null >> /tmp/install.log 2>&1 & ${follow})`, {
    shown: nixosInstall,
    timeout: (deadline - awakeTime()) / 1000,
    onLine: (line) => row.detail(line),
  })

  step('check the boot files')
  // nixos-install may succeed although the machine would not boot.
  for (const [fault, command] of [
    ['the ESP is not mounted at /mnt/boot', 'findmnt -n -o FSTYPE -M /mnt/boot | grep -x vfat'],
    [
      'there is no boot loader where UEFI looks for one, EFI/BOOT/BOOT*.EFI',
      "find /mnt/boot/EFI/BOOT -iname 'boot*.efi' -size +0c | grep .",
    ],
    ['the boot loader has no entry', "grep -hE '^(linux|initrd) ' /mnt/boot/loader/entries/*.conf"],
    [
      'a kernel or initrd of a boot loader entry is not on the ESP',
      "sed -nE 's/^(linux|initrd) +//p' /mnt/boot/loader/entries/*.conf | (cd /mnt/boot && while read -r file; do find .$file -size +0c | grep . || exit 1; done)",
    ],
  ] as const) {
    const { status, output } = await shell.execute(command)
    if (status === 0) continue
    const logged = { hint: 'the log has the output of nixos-install', log: machine.transcript.path }
    throw new StepError(`${machine.name}: ${fault}`, { command, output: output.trim(), ...logged })
  }

  step('power off')
  await shell.run('sync && umount -R /mnt')
  machine.send('poweroff\n')
  const end = await machine.expectExit({ timeout: BOOT_TIMEOUT, what: 'power-off', signal })
  // A QEMU that was killed has not written all data to the disk.
  const how = endOf(end)
  if (how !== 'with status 0') throw new ExpectError('exit', `QEMU ended ${how}`, machine)
}

/** Whether a second attempt may succeed: after a network failure, or if the machine was lost. */
function mayHelp(error: unknown): boolean {
  const network =
    /unable to download|could ?n[o']t resolve|timeout was reached|timed out|connection (refused|reset)|HTTP error 5\d\d|SSL connect error/i
  if (error instanceof CommandError) return network.test(error.output)
  if (!(error instanceof ExpectError)) return false
  // Status 1: QEMU cannot run at all. "terminating on signal": it was ended on purpose.
  return error.exit?.exitCode !== 1 && !/terminating on signal/.test(error.explanation.output ?? '')
}
