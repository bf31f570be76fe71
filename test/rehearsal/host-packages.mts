// What the rehearsal needs on this computer beside Node, and the Debian package that brings it.
import { existsSync } from 'node:fs'
import { $, which } from 'zx'
import { StepError } from '../../lib/errors.mts'

interface HostPackage {
  package: string
  why: string
  /** It is there if all of these are: programs by name, files by path. */
  brings: readonly string[]
  /** Needed by others than root only. */
  withoutRoot?: true
}

const arm = process.arch === 'arm64'

export const hostPackages: readonly HostPackage[] = [
  { package: 'mmdebstrap', why: "builds the stand-in's root file system", brings: ['mmdebstrap'] },
  { package: 'uidmap', why: 'lets mmdebstrap do it', brings: ['newuidmap'], withoutRoot: true },
  { package: 'squashfs-tools', why: 'packs it', brings: ['mksquashfs', 'sqfstar'] },
  { package: 'libcap2-bin', why: "sets a program's file capabilities", brings: ['setcap'] },
  {
    package: arm ? 'grub-efi-arm64-bin' : 'grub-efi-amd64-bin',
    why: 'starts the ISO',
    brings: ['grub-mkimage', `/usr/lib/grub/${arm ? 'arm64' : 'x86_64'}-efi`],
  },
  { package: 'mtools', why: "fills the ISO's EFI partition", brings: ['mformat', 'mmd', 'mcopy'] },
  { package: 'xorriso', why: 'writes the ISO', brings: ['xorriso'] },
  { package: 'libarchive-tools', why: 'packs its ramdisk', brings: ['bsdtar'] },
  arm
    ? {
        package: 'qemu-system-arm',
        why: 'runs the machines',
        brings: ['qemu-system-aarch64'],
      }
    : {
        package: 'qemu-system-x86',
        why: 'runs the machines',
        brings: ['qemu-system-x86_64'],
      },
  { package: 'qemu-utils', why: 'makes their disks', brings: ['qemu-img'] },
  arm
    ? { package: 'qemu-efi-aarch64', why: 'starts them', brings: ['/usr/share/AAVMF'] }
    : { package: 'ovmf', why: 'starts them', brings: ['/usr/share/OVMF'] },
  { package: 'openssh-client', why: 'reaches them', brings: ['ssh'] },
  { package: 'iproute2', why: 'shows which ports listen', brings: ['ss'] },
  { package: 'kubernetes-client', why: 'talks to the cluster', brings: ['kubectl'] },
]

/**
 * Makes sure that all of them are there.
 *
 * @param install do it with apt-get, which asks for a password where sudo does
 * @throws StepError with the command that installs what is missing
 */
export async function ensureHostPackages(install: boolean): Promise<void> {
  let missing = await missingPackages()
  if (missing.length === 0) return
  const names = missing.map((each) => each.package)
  const command = `apt-get update && apt-get install --no-install-recommends ${names.join(' ')}`
  if (install) {
    const sudo = process.getuid?.() === 0 ? [] : ['sudo']
    const env = { ...process.env, DEBIAN_FRONTEND: 'noninteractive' }
    const run = $({ env, stdio: ['inherit', process.stderr, 'inherit'], verbose: true })
    await run`${sudo} apt-get update -qq`
    await run`${sudo} apt-get install -y -qq --no-install-recommends ${names}`
    missing = await missingPackages()
    if (missing.length === 0) return
  }
  throw new StepError('the rehearsal needs packages that are not installed', {
    output: missing.map((each) => `${each.package.padEnd(20)} ${each.why}`).join('\n'),
    command: process.getuid?.() === 0 ? command : `sudo sh -c '${command}'`,
    hint: 'or let it be done: make rehearse YES=1',
  })
}

async function missingPackages(): Promise<HostPackage[]> {
  const path = `${process.env.PATH}:/usr/sbin:/sbin`
  const there = async (what: string) =>
    what.startsWith('/') ? existsSync(what) : (await which(what, { path, nothrow: true })) !== null
  const missing: HostPackage[] = []
  for (const candidate of hostPackages) {
    if (candidate.withoutRoot && process.getuid?.() === 0) continue
    const found = await Promise.all(candidate.brings.map(there))
    if (found.includes(false)) missing.push(candidate)
  }
  return missing
}
