// What differs from a real machine in one made of namespaces, each with its reason: the one table,
// which is applied to the evaluated configuration, given to Helm, and printed at each start.
import { existsSync, readFileSync } from 'node:fs'

export interface Difference {
  what: string
  why: string
  /** End of the path of a file of the NixOS configuration that is changed: */
  file?: string
  /** these values of its JSON, */
  json?: Record<string, unknown>
  /** or this text, */
  find?: string
  /** to this one. */
  replace?: string
  /** Helm values of Cilium. */
  cilium?: Record<string, unknown>
}

/** Helm values of Cilium for the image of `ciliumParts`. */
export const imagesBuiltHere = {
  image: { useDigest: false, pullPolicy: 'IfNotPresent' },
  operator: { image: { useDigest: false, pullPolicy: 'IfNotPresent' } },
  envoy: { enabled: false },
  l7Proxy: false,
}

const CAP_SYS_RESOURCE = 24n

/** Those that apply on this computer. */
export function differences(): Difference[] {
  const status = readFileSync('/proc/self/status', 'utf8')
  const capabilities = BigInt(`0x${status.match(/^CapEff:\s*(\w+)$/m)?.[1] ?? '0'}`)
  const limited = ((capabilities >> CAP_SYS_RESOURCE) & 1n) === 0n
  const version1 = existsSync('/sys/fs/cgroup/memory')
  return [...always, ...(limited ? withoutSysResource : []), ...(version1 ? cgroupVersion1 : [])]
}

const always: Difference[] = [
  {
    what: "the kernel is this computer's: no boot loader, no modules, no disk of its own",
    why: 'a machine is a set of namespaces; what needs a boot is rehearsed in virtual machines',
  },
  {
    what: 'the QEMU that the scripts start emulates nothing: it switches namespaces on and off',
    why: 'so provision, shutdown and add-worker do what they do; the LAN is a bridge',
  },
  {
    what: "the installer's console is that of the tests, with a real shell; NixOS is put in place at the first start",
    why: 'there is no disk to install on',
  },
  {
    what: 'a power cut loses nothing that a program has written',
    why: 'it is in the memory of this computer, which runs on',
  },
  {
    what: '/proc/sys/kernel and /proc/sys/vm are copies',
    why: 'these settings are one for the whole computer, and no test may change them',
  },
  {
    what: 'the outside address is set, not asked for by DHCP',
    why: "QEMU's user network has a DHCP server, two ends of a cable have none",
  },
  {
    what: 'network cards are matched by their current address, not by their permanent one',
    why: 'the end of a virtual cable has no permanent address',
    file: '.network',
    find: 'PermanentMACAddress',
    replace: 'MACAddress',
  },
  {
    what: 'no machine can set the clock',
    why: 'there is one clock for all, that of this computer',
  },
  {
    what: 'the images of pods are in the store of containerd from the start',
    why: 'no registry may be in reach; they are unpacked once, when the images are built',
  },
  {
    what: 'the kubelet tolerates swap and a nearly full disk',
    why: "both are this computer's, whose state is no matter of the cluster",
    file: '/etc/kubernetes/kubelet.json',
    json: {
      failSwapOn: false,
      evictionHard: {
        'memory.available': '50Mi',
        'nodefs.available': '1%',
        'imagefs.available': '1%',
        'nodefs.inodesFree': '1%',
      },
      imageGCHighThresholdPercent: 100,
    },
  },
  {
    what: 'kube-proxy does not set the size of the table of connections',
    why: 'a network namespace cannot change it, as it is one for the whole computer',
    file: '/etc/kubernetes/kube-proxy.json',
    json: { conntrack: { maxPerCore: 0, min: 0 } },
  },
  {
    what: "Cilium's images are named without digests, and there is no Envoy",
    why: 'the images are built here from its Go module; Envoy is another project in C++',
    cilium: imagesBuiltHere,
  },
]

const withoutSysResource: Difference[] = [
  {
    what: 'containers keep the OOM score of containerd',
    why: 'without CAP_SYS_RESOURCE runc cannot lower it ("can\'t get final child\'s PID from pipe")',
    file: '-containerd-config-checked.toml',
    find: '["plugins"."io.containerd.grpc.v1.cri"]\n',
    replace: '["plugins"."io.containerd.grpc.v1.cri"]\n"restrict_oom_score_adj" = true\n',
  },
  {
    what: "Cilium's agent runs without CAP_SYS_RESOURCE",
    why: 'a container cannot have a capability that this computer does not give',
    cilium: {
      securityContext: {
        capabilities: {
          // The chart's lists, without that one.
          ciliumAgent: [
            ...['CHOWN', 'KILL', 'NET_ADMIN', 'NET_RAW', 'IPC_LOCK', 'SYS_MODULE', 'SYS_ADMIN'],
            ...['DAC_OVERRIDE', 'FOWNER', 'SETGID', 'SETUID', 'SYSLOG'],
          ],
          cleanCiliumState: ['NET_ADMIN', 'SYS_MODULE', 'SYS_ADMIN'],
        },
      },
    },
  },
]

const cgroupVersion1: Difference[] = [
  {
    what: 'the kubelet accepts cgroups of version 1',
    why: "this computer's controllers are of version 1, and a machine has its kernel",
    file: '/etc/kubernetes/kubelet.json',
    json: { failCgroupV1: false },
  },
  {
    what: 'when containerd restarts, pods may be started again',
    why: 'systemd moves their processes to other cgroups of the devices controller, and containerd does not find them',
  },
  {
    what: 'Cilium attaches to /sys/fs/cgroup/unified',
    why: 'beside controllers of version 1, the hierarchy of version 2 is mounted there',
    cilium: { cgroup: { hostRoot: '/sys/fs/cgroup/unified' } },
  },
]
