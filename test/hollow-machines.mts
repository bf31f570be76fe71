// Simulated machines for scripts that use ssh: a real sshd and an idle QEMU each, and programs that
// answer as on a machine whose services are all healthy.
import { existsSync } from 'node:fs'
import { copyFile, mkdir, rm, writeFile } from 'node:fs/promises'
import type { Checkout } from './checkout.mts'
import { type IdleQemu, startIdleQemu } from './idle-qemu.mts'
import { type Sshd, startSshd } from './sshd.mts'

// A file broken-UNIT makes systemd report it as failing, absent-UNIT its program as missing, ill-UNIT
// its health endpoint as unhealthy, and with gone-UNIT nothing listens there. ahead-DAYS is about the
// clock. Units of systemd-run have their process id in unit-NAME.pid, their exit status in .status.
const systemctl = `#!/bin/bash
: 2>/dev/null >"$HERE/asked"
unit=\${!#} file=$HERE/unit-\${!#}
is_running() { kill -0 "$(cat "$file.pid" 2>/dev/null)" 2>/dev/null; }
case $* in
  is-system-running) echo running; exit 0;;
  list-units*) exit 0;;
  is-active*) is_running; exit;;
  reset-failed*) exit 0;;
  stop*)
    if is_running; then kill -9 -- "-$(cat "$file.pid")"; fi
    rm -f "$file".*
    exit 0;;
  'show --property=SubState'*)
    state=dead
    if is_running; then state=running; elif [ -e "$file.status" ]; then state=exited; fi
    if [[ $* == *--value* ]]; then echo $state; exit 0; fi
    printf 'SubState=%s\\nExecMainStatus=%s\\n' $state "$(cat "$file.status" 2>/dev/null || echo 0)"
    exit 0;;
esac
for unit; do
  case $unit in
    *.service)
      name=\${unit%.service}
      if [ -e "$HERE/broken-$name" ]; then
        printf 'LoadState=loaded\\nActiveState=activating\\nSubState=auto-restart\\nResult=exit-code\\nNRestarts=4\\n\\n'
      elif [ -e "$HERE/absent-$name" ]; then
        printf 'LoadState=loaded\\nActiveState=activating\\nSubState=auto-restart\\nResult=exit-code\\nExecMainStatus=203\\nNRestarts=4\\n\\n'
      else
        printf 'LoadState=loaded\\nActiveState=active\\nSubState=running\\nResult=success\\nNRestarts=0\\n\\n'
      fi;;
  esac
done
`
// A unit continues when the connection is cut. A timer elapses after 30 s whatever it is set to; with
// a file short-timers, after one.
const systemdRun = `#!/bin/bash
log=/dev/null delay=0
while [[ $1 == --* ]]; do
  case $1 in
    --unit=*) unit=\${1#*=};;
    --on-active=*) if [ -e "$HERE/short-timers" ]; then delay=1; else delay=30; fi;;
    --setenv=*=*) export "\${1#--setenv=}";;
    --property=StandardError=append:*) log=\${1##*:};;
  esac
  shift
done
mkdir -p "$HERE"
if [ $delay != 0 ]; then unit=$unit.timer; fi
rm -f "$HERE/unit-$unit".*
setsid --fork bash -c '
  file=$1 delay=$2; shift 2
  echo $$ >"$file.pid"
  sleep $delay
  status=0
  "$@" || status=$?
  echo $status >"$file.status"
' run "$HERE/unit-$unit" $delay "$@" >"$log" 2>&1 </dev/null
until [ -e "$HERE/unit-$unit.pid" ]; do sleep 0.01; done
`
const journalctl = '#!/bin/sh\n'
const curl = `#!/bin/bash
for url; do
  case $url in
    *:2381/*) name=etcd;;
    *:10257/*) name=kube-controller-manager;;
    *:10259/*) name=kube-scheduler;;
    *:10248/*) name=kubelet;;
    *) continue;;
  esac
  if [ -e "$HERE/ill-$name" ]; then body='[-]leaderElection failed' status=503; else body=ok status=200; fi
  if [ -e "$HERE/gone-$name" ]; then printf '\\n== 000 %s Connection refused after %d ms\\n' "$url" $RANDOM; continue; fi
  printf '%s\\n== %s %s \\n' "$body" $status "$url"
done
`
const date = `#!/bin/bash
days=$(ls "$HERE" 2>/dev/null | sed -n 's/^ahead-//p')
echo $(($(/bin/date +%s) + \${days:-0} * 86400))
`

export class HollowMachines {
  private readonly checkout: Checkout
  private readonly running = new Map<string, { sshd: Sshd; qemu: IdleQemu }>()

  /** @param checkout has its keys in tls/ */
  constructor(checkout: Checkout) {
    this.checkout = checkout
  }

  async start(...names: string[]): Promise<void> {
    for (const name of names) {
      if (this.running.has(name)) continue
      const qemu = await startIdleQemu(this.checkout, name)
      const home = await this.home(name)
      const sshd = await startSshd(this.checkout, name, { home })
      this.running.set(name, { sshd, qemu })
      const here = this.checkout.path('state', name)
      const programs = { systemctl, 'systemd-run': systemdRun, journalctl, curl, date }
      for (const [program, text] of Object.entries(programs)) {
        await sshd.program(program, text.replaceAll('$HERE', here))
      }
    }
  }

  /** A folder with what the machine has in /var/lib/kubernetes. */
  private async home(name: string): Promise<string> {
    const home = this.checkout.path('homes', name)
    await mkdir(`${home}/pki`, { recursive: true })
    // The control plane's certificate is "kubernetes".
    const all = ['ca', name, ...(name === 'alpha' ? ['kubernetes', 'kubernetes-key'] : [])]
    for (const file of all) {
      const from = this.checkout.path('tls', `${file}.pem`)
      await copyFile(from, `${home}/pki/${file}.pem`).catch(() => {})
    }
    return home
  }

  async stop(...names: string[]): Promise<void> {
    for (const name of names) {
      await this.running.get(name)?.sshd.stop()
      await this.running.get(name)?.qemu.stop()
      this.running.delete(name)
    }
  }

  /** For a machine that continues to run, but stops to answer. */
  sshd(name: string): Sshd {
    const found = this.running.get(name)
    if (!found) throw new Error(`${name} is not running`)
    return found.sshd
  }

  /** @param what such as "broken-etcd" */
  async set(name: string, what: string): Promise<void> {
    await mkdir(this.checkout.path('state', name), { recursive: true })
    await writeFile(this.checkout.path('state', name, what), '')
  }

  async unset(name: string, what: string): Promise<void> {
    await rm(this.checkout.path('state', name, what), { force: true })
  }

  /** Undoes everything that was set. */
  async reset(name: string): Promise<void> {
    await rm(this.checkout.path('state', name), { recursive: true, force: true })
  }

  /** Whether systemctl was called on the machine since something was set. */
  asked(name: string): boolean {
    return existsSync(this.checkout.path('state', name, 'asked'))
  }
}
