// Machines in name only, for what asks them over ssh: a real sshd and an idle QEMU each, and
// programs that answer as on a machine whose services are all well.
import { existsSync } from 'node:fs'
import { copyFile, mkdir, rm, writeFile } from 'node:fs/promises'
import type { Checkout } from './checkout.mts'
import { type IdleQemu, startIdleQemu } from './idle-qemu.mts'
import { type Sshd, startSshd } from './sshd.mts'

// A file broken-UNIT makes systemd say otherwise, absent-UNIT that its program is not there, ill-UNIT
// the health endpoint, and with gone-UNIT nobody listens there. ahead-DAYS is about the clock.
const systemctl = `#!/bin/bash
: 2>/dev/null >"$HERE/asked"
case $1 in
  is-system-running) echo running; exit 0;;
  list-units) exit 0;;
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
      await sshd.program('systemctl', systemctl.replaceAll('$HERE', here))
      await sshd.program('curl', curl.replaceAll('$HERE', here))
      await sshd.program('date', date.replaceAll('$HERE', here))
    }
  }

  /** What the machine has in /var/lib/kubernetes. */
  private async home(name: string): Promise<string> {
    const home = this.checkout.path('homes', name)
    await mkdir(`${home}/pki`, { recursive: true })
    // The control plane is known as "kubernetes".
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

  /** Of a machine that is to run on, but not to answer any more. */
  sshd(name: string): Sshd {
    const found = this.running.get(name)
    if (!found) throw new Error(`${name} does not run`)
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

  /** Takes back all that was set. */
  async reset(name: string): Promise<void> {
    await rm(this.checkout.path('state', name), { recursive: true, force: true })
  }

  /** Whether the machine was asked since something was set. */
  asked(name: string): boolean {
    return existsSync(this.checkout.path('state', name, 'asked'))
  }
}
