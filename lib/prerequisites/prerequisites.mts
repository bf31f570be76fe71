// The table of what this computer needs: why, which version, how that is read, and the package
// that brings it on each system. check-prereqs reports and installs from it.
import type { Architecture } from '../qemu/firmware.mts'
import { leastQemuVersion } from '../qemu/host.mts'
import type { System } from '../qemu/processor.mts'
import type { PackageManagerName } from './package-manager.mts'

export interface Prerequisite {
  name: string
  /** What the project does with it. */
  why: string
  /** Names of the program on PATH, the first that is there counts; none for the firmware. */
  programs: readonly string[]
  /** Arguments with which it prints its version, and where the version stands in that. */
  version?: { args: readonly string[]; pattern: RegExp }
  /** The oldest version that will do. */
  least?: string
  /** Names in each system's packages; those that are not there have none that is new enough. */
  packages: Partial<Record<PackageManagerName, string>>
  /** Where a program can be downloaded, for systems without a package. A .sha256 is beside it. */
  download?: string
}

/** @param kubernetes KUBERNETES_VERSION: the kubectl to download where no package has it */
export function prerequisites(
  host: { os: System; arch: Architecture },
  kubernetes: string,
): Prerequisite[] {
  const x86 = host.arch === 'x86_64'
  return [
    {
      name: 'QEMU',
      why: 'runs the machines',
      programs: [`qemu-system-${host.arch}`],
      version: { args: ['--version'], pattern: /version (\d+\.\d+(?:\.\d+)?)/ },
      least: leastQemuVersion,
      packages: {
        brew: 'qemu',
        apt: x86 ? 'qemu-system-x86' : 'qemu-system-arm',
        dnf: x86 ? 'qemu-system-x86' : 'qemu-system-aarch64',
        pacman: x86 ? 'qemu-system-x86' : 'qemu-system-aarch64',
        zypper: x86 ? 'qemu-x86' : 'qemu-arm',
        nix: 'qemu',
      },
    },
    {
      name: 'qemu-img',
      why: "makes the machines' disks and their snapshots",
      programs: ['qemu-img'],
      version: { args: ['--version'], pattern: /version (\d+\.\d+(?:\.\d+)?)/ },
      least: leastQemuVersion,
      packages: {
        brew: 'qemu',
        apt: 'qemu-utils',
        dnf: 'qemu-img',
        pacman: 'qemu-img',
        zypper: 'qemu-tools',
        nix: 'qemu',
      },
    },
    {
      name: 'UEFI firmware',
      why: 'starts the machines',
      programs: [],
      packages: {
        brew: 'qemu',
        apt: x86 ? 'ovmf' : 'qemu-efi-aarch64',
        dnf: x86 ? 'edk2-ovmf' : 'edk2-aarch64',
        pacman: x86 ? 'edk2-ovmf' : 'edk2-aarch64',
        zypper: x86 ? 'qemu-ovmf-x86_64' : 'qemu-uefi-aarch64',
        nix: 'qemu',
      },
    },
    {
      name: 'bsdtar',
      why: 'takes the kernel out of the installer ISO (GNU tar reads no ISO images)',
      programs: host.os === 'darwin' ? ['bsdtar', 'tar'] : ['bsdtar'],
      version: { args: ['--version'], pattern: /bsdtar (\d+\.\d+(?:\.\d+)?)/ },
      packages: {
        brew: 'libarchive',
        apt: 'libarchive-tools',
        dnf: 'bsdtar',
        pacman: 'libarchive',
        zypper: 'bsdtar',
        nix: 'libarchive',
      },
    },
    {
      name: 'ssh',
      why: 'reaches the machines',
      programs: ['ssh'],
      version: { args: ['-V'], pattern: /OpenSSH\w*_(\d+\.\d+)/ },
      packages: {
        brew: 'openssh',
        apt: 'openssh-client',
        dnf: 'openssh-clients',
        pacman: 'openssh',
        zypper: 'openssh-clients',
        nix: 'openssh',
      },
    },
    {
      name: 'kubectl',
      why: 'talks to the API server',
      programs: ['kubectl'],
      version: { args: ['version', '--client', '--output=json'], pattern: /"v(\d+\.\d+\.\d+)/ },
      // The packages of the other systems are years behind, or named after one minor version.
      packages: { brew: 'kubernetes-cli', pacman: 'kubectl', nix: 'kubectl' },
      download: `https://dl.k8s.io/release/v${kubernetes}/bin/linux/${x86 ? 'amd64' : 'arm64'}/kubectl`,
    },
    {
      name: 'bash',
      why: 'runs the commands in the scripts',
      programs: ['bash'],
      version: { args: ['--version'], pattern: /version (\d+\.\d+(?:\.\d+)?)/ },
      packages: {
        brew: 'bash',
        apt: 'bash',
        dnf: 'bash',
        pacman: 'bash',
        zypper: 'bash',
        nix: 'bash',
      },
    },
    {
      name: 'make',
      why: "runs the Makefile's targets",
      programs: ['make'],
      version: { args: ['--version'], pattern: /GNU Make (\d+\.\d+(?:\.\d+)?)/ },
      packages: {
        brew: 'make',
        apt: 'make',
        dnf: 'make',
        pacman: 'make',
        zypper: 'make',
        nix: 'gnumake',
      },
    },
  ]
}
