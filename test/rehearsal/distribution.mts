// Where the stand-in's packages come from: the host's own apt configuration, with the release
// changed where the host's is too old for Kubernetes (etcd 3.5, containerd 1.7 and newer).
import { readFile } from 'node:fs/promises'
import { $ } from 'zx'
import { StepError } from '../../lib/errors.mts'

export interface Source {
  /** ID of os-release: "debian" or "ubuntu". */
  distribution: string
  release: string
  /** Lines of a sources.list. */
  sources: string
  /** Settings of apt that name proxies, certificates and the like, as apt.conf. */
  settings: string
  kernelPackage: string
}

interface Distribution {
  components: string
  /** The release that serves hosts of an older one. */
  successor: string
  tooOld: readonly string[]
  keyring: string
  kernelPackage: Record<string, string>
}

const distributions: Record<string, Distribution> = {
  debian: {
    components: 'main',
    successor: 'trixie',
    tooOld: ['buster', 'bullseye', 'bookworm'],
    keyring: '/usr/share/keyrings/debian-archive-keyring.gpg',
    kernelPackage: { amd64: 'linux-image-amd64', arm64: 'linux-image-arm64' },
  },
  ubuntu: {
    components: 'main universe',
    successor: 'resolute',
    tooOld: ['focal', 'jammy', 'noble', 'oracular', 'plucky'],
    keyring: '/usr/share/keyrings/ubuntu-archive-keyring.gpg',
    kernelPackage: { amd64: 'linux-image-virtual', arm64: 'linux-image-virtual' },
  },
}

/**
 * Reads os-release and asks apt for the mirror that it takes the host's own packages from.
 *
 * @throws StepError on another distribution or architecture, or without such a mirror
 */
export async function findSource(): Promise<Source> {
  const { ID: id = '', VERSION_CODENAME: codename = '' } = await osRelease()
  const distribution = distributions[id]
  if (!distribution) {
    throw new StepError(`the rehearsal needs Debian or Ubuntu, and this is ${id || 'neither'}`, {
      hint: 'the real installer needs neither: make all',
    })
  }
  const architecture = (await $({ quiet: true })`dpkg --print-architecture`).stdout.trim()
  const kernelPackage = distribution.kernelPackage[architecture]
  if (!kernelPackage) {
    throw new StepError(`there is no stand-in for ${architecture}, only for amd64 and arm64`)
  }
  const mirror = await findMirror(codename)
  const { successor, tooOld, components, keyring } = distribution
  const release = process.env.STAND_IN_RELEASE || (tooOld.includes(codename) ? successor : codename)
  return {
    distribution: id,
    release,
    sources: `deb [signed-by=${keyring}] ${mirror} ${release} ${components}`,
    settings: await acquireSettings(),
    kernelPackage,
  }
}

async function osRelease(): Promise<Record<string, string>> {
  const text = await readFile('/etc/os-release', 'utf8').catch(() => '')
  const pairs = text.matchAll(/^([A-Z_]+)="?([^"\n]*)"?$/gm)
  return Object.fromEntries([...pairs].map(([, key, value]) => [key, value]))
}

/** The URI of the archive that holds main packages of the host's own release. */
async function findMirror(codename: string): Promise<string> {
  const format = '$(REPO_URI) $(RELEASE) $(COMPONENT)'
  const targets = await $({
    quiet: true,
  })`apt-get indextargets --format ${format} ${'Created-By: Packages'}`
  const mirror = targets.stdout
    .split('\n')
    .map((line) => line.split(' '))
    .find(([uri, release, component]) => {
      return component === 'main' && release === codename && /^https?:|^mirror/.test(uri ?? '')
    })?.[0]
  if (mirror) return mirror
  throw new StepError(`apt knows no mirror with the packages of ${codename}`, {
    command: 'apt-get indextargets',
    hint: 'is there a line for it in /etc/apt/sources.list or /etc/apt/sources.list.d?',
  })
}

async function acquireSettings(): Promise<string> {
  const dump = await $({ quiet: true })`apt-config dump`
  return dump.stdout
    .split('\n')
    .filter((line) => /^Acquire::(https?|Check|Retries|Force|By-Hash)\S* "[^"]+";$/i.test(line))
    .join('\n')
}
