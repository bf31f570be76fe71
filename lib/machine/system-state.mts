// What systemd says of a whole machine.
import type { Probe } from './probe.mts'

export interface SystemState {
  /** running, degraded (some unit failed), starting, … as `systemctl is-system-running` has it. */
  state: string
  failedUnits: string[]
}

export const systemStateProbe: Probe<SystemState> = {
  command: `
    systemctl is-system-running || true
    systemctl list-units --state=failed --plain --no-legend || true`,
  read(output) {
    const [state = '', ...units] = output.trim().split('\n')
    return { state, failedUnits: units.map((line) => line.trim().split(/\s+/)[0] ?? '') }
  },
}
