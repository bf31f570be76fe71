// The installation of NixOS as a dialogue on the machine's console: what one would type there.
import type { Cluster, Node } from '../cluster.mts'
import { StepError } from '../errors.mts'
import { machineProxy } from '../staging/machine-proxy.mts'
import type { Row } from '../steps.mts'
import { type Dialogue, ExpectError, endOf } from './expect.mts'
import { InstallerShell, waitForPrompt } from './installer-shell.mts'

export interface Installation {
  cluster: Cluster
  node: Node
  /** The node's files: a gzipped tar archive, to be unpacked at the root of the new system. */
  archive: Uint8Array
  /** Shows what is being done. */
  row: Row
  signal?: AbortSignal | undefined
}

/** NixOS' manual, "Manual Installation", without swap: the kubelet wants none. */
const partitioning = [
  'parted --script /dev/vda -- mklabel gpt mkpart ESP fat32 1MiB 513MiB set 1 esp on mkpart nixos ext4 513MiB 100%',
  'udevadm settle',
  'mkfs.fat -F 32 -n ESP /dev/vda1',
  'mkfs.ext4 -q -F -L nixos /dev/vda2',
  'mount /dev/vda2 /mnt',
  'mkdir /mnt/boot',
  'mount -o umask=0077 /dev/vda1 /mnt/boot',
]

// The channel goes along to the new system (no --no-channel-copy): nixos-rebuild needs it there.
const nixosInstall = 'nixos-install --root /mnt --no-root-passwd'

/** nixos-install can end well although the machine would not start. */
const bootChecks = [
  {
    fault: 'the ESP is not mounted at /mnt/boot',
    command: 'findmnt --noheadings --output FSTYPE --mountpoint /mnt/boot | grep -x vfat',
  },
  {
    fault: 'there is no boot loader where UEFI looks for one, EFI/BOOT/BOOT*.EFI',
    command: "find /mnt/boot/EFI/BOOT -iname 'boot*.efi' -size +0c | grep .",
  },
  {
    fault: 'the boot loader has no entry',
    command: "grep -hE '^(linux|initrd) ' /mnt/boot/loader/entries/*.conf",
  },
  {
    fault: 'a kernel or initrd that the boot loader is to start is not on the ESP',
    command:
      "sed -nE 's/^(linux|initrd) +//p' /mnt/boot/loader/entries/*.conf | (cd /mnt/boot && while read -r file; do find .$file -size +0c | grep . || exit 1; done)",
  },
]

/**
 * Installs NixOS from its live system, from power-on to power-off.
 *
 * @param console of a machine that has just been started from the installer ISO, with an empty
 *   disk at /dev/vda
 * @throws CommandError for a command that fails, ExpectError for a machine that does not answer,
 *   StepError for a system that would not start; the signal's reason
 */
export async function install(console: Dialogue, installation: Installation): Promise<void> {
  const { cluster, node, archive, row, signal } = installation
  const { BOOT_TIMEOUT, INSTALL_TIMEOUT } = cluster.settings
  const deadline = performance.now() + INSTALL_TIMEOUT * 1000
  const step = (title: string) => {
    row.step(title)
    console.name = `${node.name}, ${title}`
    console.transcript.note(`\n── ${title}\n`)
  }

  step('boot the installer')
  const what = "the installer's prompt"
  // "Welcome to NixOS" comes 20 seconds earlier and says nothing.
  const timeout = Math.min(2 * BOOT_TIMEOUT, INSTALL_TIMEOUT) * 1000
  await waitForPrompt(console, /nixos@nixos:[^\n]*\$ /, { what, timeout, signal })
  console.send('sudo -i\n')
  await waitForPrompt(console, /root@nixos:[^\n]*# /, { what: "root's prompt", signal })
  const shell = await InstallerShell.open(console, signal)
  await checkRelease(shell, cluster, console)

  step('partition the disk')
  for (const command of partitioning) await shell.succeed(command)

  step('copy the configuration')
  const progress = (part: number) => row.detail(`${Math.round(part * 100)} %`)
  await shell.upload(archive, '/tmp/staged.tar.gz', progress)
  await shell.succeed('tar -xzpf /tmp/staged.tar.gz -C /mnt && rm /tmp/staged.tar.gz')
  await useProxy(shell, cluster)

  step('nixos-install')
  await runLong(shell, nixosInstall, row, deadline - performance.now())

  step('check the boot files')
  for (const { fault, command } of bootChecks) {
    const { status, output } = await shell.run(command)
    if (status === 0) continue
    throw new StepError(`${console.name}: ${fault}`, {
      command,
      output: output.trim(),
      hint: 'what nixos-install said is in the log',
      ...(console.transcript.path ? { log: console.transcript.path } : {}),
    })
  }

  step('power off')
  await shell.succeed('sync && umount -R /mnt')
  console.send('poweroff\n')
  const off = { timeout: BOOT_TIMEOUT * 1000, what: 'the machine to go off', signal }
  const end = await console.expectExit(off)
  // What QEMU had yet to write to the disk is lost if it was killed now.
  if (end.exitCode !== 0 || end.signal !== 0) {
    const reason = `${console.name}: QEMU ended ${endOf(end)}`
    throw new ExpectError('exit', reason, { output: console.transcript.lastLines() }, end)
  }
}

/** nixos-install takes NixOS from the ISO's channel: another release would be installed unasked. */
async function checkRelease(
  shell: InstallerShell,
  { settings }: Cluster,
  { name }: Dialogue,
): Promise<void> {
  const release = (await shell.succeed('nixos-version')).trim()
  if (release.startsWith(settings.NIXOS_VERSION)) return
  throw new StepError(
    `${name}: the ISO is NixOS ${release}, cluster.env says ${settings.NIXOS_VERSION}`,
    { hint: 'change NIXOS_VERSION, or run ./bin/download-iso.mts --force' },
  )
}

/** Lets nixos-install reach the outside the way this cluster has to. */
async function useProxy(shell: InstallerShell, cluster: Cluster): Promise<void> {
  const { http, https, no, caFile } = machineProxy(cluster)
  if (http || https) {
    const variables = { http_proxy: http, https_proxy: https, no_proxy: no.join(',') }
    const names = Object.keys(variables).join(' ')
    const values = Object.entries(variables).map(([name, value]) => `${name}=${quoted(value)}`)
    // A proxy's address may hold a password.
    await shell.succeed(`export ${values.join(' ')}`, { shown: `export ${names}` })
  }
  if (caFile) {
    await shell.succeed(
      'cat /etc/ssl/certs/ca-certificates.crt /mnt/etc/nixos/proxy-ca.pem > /tmp/certificates.pem',
    )
    await shell.succeed('export {NIX_SSL_CERT_FILE,SSL_CERT_FILE}=/tmp/certificates.pem')
  }
}

/**
 * Runs a command that takes minutes. Its output goes to a file, so that a slow console does not
 * hold it up, and from there to the console as it comes.
 */
async function runLong(
  shell: InstallerShell,
  command: string,
  row: Row,
  timeout: number,
): Promise<void> {
  const log = '/tmp/command.log'
  await shell.succeed(`: > ${log}`)
  const follow = `tail -n +1 -f --pid=$! ${log}; wait $!`
  await shell.succeed(`(${command} < /dev/null >> ${log} 2>&1 & ${follow})`, {
    shown: command,
    timeout,
    onLine: (line) => row.detail(line),
  })
}

function quoted(text: string): string {
  return `'${text.replaceAll("'", String.raw`'\''`)}'`
}
