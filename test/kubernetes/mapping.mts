// What is different when the control plane machine's services run on this computer.
import type { Machine } from '../nixos/evaluate.mts'

export const services = [
  'etcd',
  'kube-apiserver',
  'kube-controller-manager',
  'kube-scheduler',
] as const
export type Service = (typeof services)[number]

/** Where the machine's things are on this computer. */
export interface Place {
  /** Stands for the machine's root folder: /etc and /var are below it. */
  root: string
  /** Folders of programs. */
  kubernetes: string
  etcd: string
}

export const portsHere = [
  'etcdClients',
  'etcdPeers',
  'etcdMetrics',
  'controllerManager',
  'scheduler',
] as const
export type Ports = Record<(typeof portsHere)[number], number>

/**
 * What is different here from the machine; all else is as its units say. The API server's port
 * needs no row: it is API_PORT of cluster.env, as in the kubeconfigs.
 */
function mapping(
  { root, kubernetes, etcd }: Place,
  ports: Ports,
): { there: RegExp; here: string }[] {
  return [
    // First, as the folders put in by the others may be below /var themselves.
    { there: /(?<![\w.-])(?=\/(?:etc|var)\/)/g, here: root },
    { there: /\/nix\/store\/[^/\s]+-kubernetes\/bin(?=\/)/g, here: kubernetes },
    { there: /\/nix\/store\/[^/\s]+-etcd_3_6\/bin(?=\/)/g, here: etcd },
    { there: /\b127\.0\.0\.1:2379\b/g, here: `127.0.0.1:${ports.etcdClients}` },
    { there: /\b127\.0\.0\.1:2380\b/g, here: `127.0.0.1:${ports.etcdPeers}` },
    { there: /\b127\.0\.0\.1:2381\b/g, here: `127.0.0.1:${ports.etcdMetrics}` },
    // What tests open is for this computer alone.
    { there: /(?<=^--bind-address=)0\.0\.0\.0$/g, here: '127.0.0.1' },
  ]
}

/** Flags added, as the program's default port may be taken here. */
const added: Partial<Record<Service, (ports: Ports) => string[]>> = {
  'kube-controller-manager': (ports) => [`--secure-port=${ports.controllerManager}`],
  'kube-scheduler': (ports) => [`--secure-port=${ports.scheduler}`],
}

/** A text of the machine as it is on this computer. */
export function mapped(text: string, place: Place, ports: Ports): string {
  return mapping(place, ports).reduce(
    (result, { there, here }) => result.replace(there, () => here),
    text,
  )
}

/** The command of a service's unit, word by word, as it is run on this computer. */
export function commandHere(
  machine: Machine,
  service: Service,
  place: Place,
  ports: Ports,
): string[] {
  const { command } = machine.units[service] ?? { command: [] }
  const words = command.map((word) => mapped(word, place, ports))
  return [...words, ...(added[service]?.(ports) ?? [])]
}
