#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
// A changed flag, module or certificate on running machines, one after another.
import { X509Certificate } from 'node:crypto'
import { readFile, stat } from 'node:fs/promises'
import { $ } from 'zx/core'
import { chooseNodes, loadCluster, type Node } from '../lib/cluster.mts'
import { describeError, lastLines, StepError } from '../lib/errors.mts'
import { sha256 } from '../lib/files.mts'
import { quote } from '../lib/format.mts'
import { probeApiServer, waitForReady, waitForServices } from '../lib/health.mts'
import { interruption, takingTime } from '../lib/interrupt.mts'
import { withClusterLock } from '../lib/lock.mts'
import { refuseIf, runScript, script } from '../lib/script.mts'
import { connect, NoAnswer, remote, setClocks, waitForSsh } from '../lib/ssh.mts'
import { inParallel, type Row } from '../lib/steps.mts'
import { isRunning } from '../lib/vm.mts'
import { waitFor } from '../lib/wait.mts'

const { flags } = script({
  does: `Applies changes of cluster.env, configs/*.nix and certificates to running machines: stages the
configurations, shows what changes, copies each as a whole and runs nixos-rebuild switch, which
restarts the services concerned. The control plane first, then one worker after another, each when
the previous one is healthy. One that is not is rolled back to its previous configuration.

For a switch by hand: --push-only, then nixos-rebuild switch (or boot, and a restart) on the
machine; ./bin/reconfig.mts then checks it and finishes. --take-back undoes the push.
./bin/rolling-upgrade.mts uses --build, --restart and --take-back for another release of NixOS.`,
  reads: ['cluster.env', 'configs/', 'tls/'],
  writes: ['configs/*.kubeconfig', 'cloud-init/NODE/nixos/', 'on the machines: /etc/nixos, keys'],
  flags: {
    'dry-run': { help: 'show what would change, and change nothing on the machines' },
    node: { value: 'NODES', help: 'only this node; several separated by commas' },
    'push-only': { help: 'copy the files to their places, but do not switch' },
    build: { help: 'copy the files, and build the release NIXOS_VERSION with them' },
    restart: { help: 'restart the machine with what was built, and wait until it is healthy' },
    'take-back': { help: 'restore the files and the release from before the last push; no switch' },
    timeout: { value: 'SECONDS', number: true, help: 'for services to be healthy (WAIT_TIMEOUT)' },
  },
  examples: ['./bin/reconfig.mts --dry-run', './bin/reconfig.mts --node sigma'],
})
const modes = [flags['dry-run'], flags['push-only'], flags.build, flags.restart, flags['take-back']]
const modeNames = '--dry-run, --push-only, --build, --restart and --take-back'
refuseIf(modes.filter(Boolean).length > 1, `only one of ${modeNames} at a time`)

const cluster = loadCluster()
const { INSTALL_TIMEOUT, NIXOS_VERSION, STOP_TIMEOUT, WAIT_TIMEOUT, BOOT_TIMEOUT } =
  cluster.settings
const chosen = chooseNodes(cluster, flags.node?.split(',') ?? [])
// The control plane first, in whatever order they were named.
const nodes = cluster.nodes.filter((node) => chosen.includes(node))
const names = nodes.map(({ name }) => name)
const timeout = flags.timeout ?? WAIT_TIMEOUT
const signal = interruption()
/**
 * Our folder on the machine. new/ and back/: files that are about to be moved to their places. former/:
 * the files from before the change, former-channel: the release. unfinished: names the system from
 * before a change that has not finished. guarded: a switch that is not confirmed, which the machine
 * undoes after three minutes; undone: it has. result: what was built. lock: held by what changes these.
 */
const home = '/var/lib/reconfig'
/** Below /. */
const ourFiles = 'etc/nixos var/lib/kubernetes etc/ssh/ssh_host_ed25519_key{,.pub}'
const bootId = 'cat /proc/sys/kernel/random/boot_id'
const system = 'readlink -f /run/current-system'

await withClusterLock(cluster, 'changing configurations', async () => {
  if (flags['take-back']) {
    return void (await takingTime(() => inParallel(names, (name) => putBack(name))))
  }
  if (flags.restart) return oneByOne(nodes, restart)

  // 1. A renewed certificate has to be in its kubeconfig, and both in the staged files.
  await runScript('generate-kubeconfigs')
  await runScript('generate-nocloud-iso', names)

  // 2. All machines must answer before the first one is changed.
  const found = await inParallel(names, (name) => compare(cluster.node(name))).catch((error) => {
    signal.throwIfAborted()
    throw new StepError('not all machines can be changed, so none was', {
      output: describeError(error),
      hint: 'make up starts machines; --node NODES leaves some out',
    })
  })

  // 3. What changes.
  for (const { node, changes, unfinished } of found) {
    const count = `${changes.length || 'no'} ${changes.length < 2 ? 'file changes' : 'files change'}`
    const again = unfinished ? '; the last change did not finish and is made again' : ''
    console.log(`${node.name}: ${count}${again}`)
    process.stdout.write(changes.join(''))
  }
  if (flags['dry-run']) return
  await setClocks(cluster, signal)

  // 4. One after another: the others keep the pods running, and a mistake affects only one.
  const differ = found.filter(({ changes }) => changes.length > 0).map(({ node }) => node)
  const concerned = found.filter((each) => flags.build || each.changes.length || each.unfinished)
  await oneByOne(
    concerned.map(({ node }) => node),
    (node, row) => change(node, differ.includes(node), row),
  )
})

/** @param work returns the outcome in words */
async function oneByOne(all: Node[], work: (node: Node, row: Row) => Promise<string>) {
  for (const [index, node] of all.entries()) {
    const [outcome] = await inParallel([node.name], (_, row) => work(node, row)).catch((error) => {
      const rest = all.slice(index + 1).map(({ name }) => name)
      if (rest.length > 0) console.error(`! not touched: ${rest.join(', ')}`)
      throw error
    })
    console.log(`${node.name}: ${outcome}`)
  }
}

// ── What a machine has, and what it is to have ───────────────────────────────────────────────

/**
 * @returns how each changed file is shown, as a unified diff or a line of words; and whether an
 *   earlier change did not finish, which has to be made again whatever the files say
 */
async function compare(node: Node) {
  const { name } = node
  if (!(await isRunning(cluster, node))) throw new StepError(`${name} is not running`)
  await connect(cluster, node, { signal })
  const look = `
    cd /
    find ${ourFiles} -type f -exec sha256sum {} + 2>/dev/null || true
    if [ -d ${home} ]; then cd ${home}; else exit 0; fi
    if [ -e lock ] && ! flock --nonblock lock true; then echo busy; fi
    if [ -e unfinished ]; then echo unfinished; fi
    if [ -e former-channel ]; then echo upgrading; fi`
  const lines = (await remote(node, look, { signal })).trim().split('\n')
  if (lines.includes('busy')) {
    const hint = 'wait until it has finished, then try again'
    throw new StepError(`the last change on ${name} is still running`, { hint })
  }
  // A switch would bring the release of the new channel, which nobody has asked for here.
  if (lines.includes('upgrading') && !flags['push-only'] && !flags.build) {
    const hint = `make upgrade NAME=${name} finishes it`
    throw new StepError(`an upgrade of ${name} has not finished`, { hint })
  }
  // "DIGEST  etc/nixos/cluster.json"
  const sums = lines.filter((line) => /^[0-9a-f]{64} /.test(line))
  const there = new Map(sums.map((line) => [line.slice(66), line.slice(0, 64)]))
  const folder = `cloud-init/${name}/nixos`
  const { stdout } = await $`cd ${folder} && find * -type f`
  const staged = stdout.trim().split('\n')
  const changes: string[] = []
  for (const path of [...new Set([...there.keys(), ...staged])].sort()) {
    if (!staged.includes(path)) changes.push(`/${path} is not needed any more\n`)
    else if (there.get(path) !== sha256(await readFile(cluster.path(folder, path)))) {
      changes.push(await describe(name, path, there.has(path)))
    }
  }
  return { node, changes, unfinished: lines.includes('unfinished') }
}

/** The change of one file: the configuration as a diff; of secrets only that they change. */
async function describe(name: string, path: string, known: boolean): Promise<string> {
  const file = `cloud-init/${name}/nixos/${path}`
  if (path.startsWith('etc/nixos/')) {
    const labels = [`--label=/${path} (on the machine)`, `--label=/${path} (staged)`]
    const now = known ? `cat /${path}` : 'true'
    const $$ = $({ signal, nothrow: true })
    const { stdout, stderr, exitCode } =
      await $$`ssh -F tls/ssh_config ${name} ${now} | diff -u ${labels} - ${file}`
    // Without the password that the URL of a proxy may contain.
    const password = /(?<=:\/\/|"https?": ")[^/\s"@]*@/g
    if (exitCode === 1 && !stderr) return stdout.replace(password, '…@')
    throw new StepError(`/${path} on ${name} cannot be compared`, { output: stderr })
  }
  const what = known ? 'changes' : 'is new'
  if (((await stat(cluster.path(file))).mode & 0o077) === 0) return `/${path} ${what} (secret)\n`
  if (!path.endsWith('.pem')) return `/${path} ${what}\n`
  const { subject, validTo } = new X509Certificate(await readFile(cluster.path(file)))
  const until = new Date(validTo).toISOString().slice(0, 10)
  return `/${path} ${what}: certificate of ${subject.match(/^CN=(.*)$/m)?.[1]}, valid until ${until}\n`
}

// ── The change of one machine ────────────────────────────────────────────────────────────────

/** Copies the files, switches and checks; goes back if the machine is not healthy. */
async function change(node: Node, copying: boolean, row: Row): Promise<string> {
  const { name } = node
  signal.throwIfAborted()
  const wasReady = (await probeApiServer(cluster)).nodes?.get(name)?.ready
  row.step('copying the files')
  if (copying) await takingTime(() => push(node))
  if (copying && signal.aborted) await takingTime(() => putBack(name))
  signal.throwIfAborted()
  if (flags['push-only']) return 'files copied, not switched yet'
  try {
    if (flags.build) return await build(node, row)
    const before = await kubeletStart(node)
    const outcome = await switchTo(node, row, { guarded: true, signal })
    const start = await kubeletStart(node)
    if (wasReady) await untilReady(node, row, start === before ? undefined : start)
    await remote(node, `rm -f ${home}/unfinished`)
    return outcome
  } catch (error) {
    if (signal.aborted) {
      // The switch continues; the machine must not undo it.
      await remote(node, `rm -f ${home}/guarded`).catch(() => {})
      throw new StepError(`interrupted: the change on ${name} continues in the background`, {
        ...(signal.reason as StepError).explanation,
        hint: `make ${flags.build ? 'upgrade' : 'reconfig'} checks the result and completes the change`,
      })
    }
    row.step('rolling back to the previous configuration')
    throw await takingTime(() => goBack(node, row, error))
  }
}

/** How long to wait, where to show what is missing, and what ends the wait. */
function limits(row: Row, signal?: AbortSignal) {
  return { timeout, detail: (text: string) => row.detail(text), signal }
}

/** When the kubelet was started last. (A lease renewed since then shows that it works.) */
async function kubeletStart(node: Node): Promise<string | undefined> {
  const show = 'systemctl show --timestamp=us+utc --property=ExecMainStartTimestamp kubelet'
  const [, day, time] = (await remote(node, show)).match(/(\d+-\d+-\d+) (\S+) UTC/) ?? []
  return day && `${day}T${time}Z`
}

async function untilReady(node: Node, row: Row, since?: string): Promise<void> {
  row.step('waiting for Ready')
  await waitForReady(cluster, node, limits(row, signal), since)
}

/**
 * Sends the staged files as an archive, which is unpacked in a folder and checked; only then is
 * each file renamed into its place. The former files are kept.
 */
async function push(node: Node): Promise<void> {
  const { name } = node
  // base64, because zx takes all output for text.
  const packed = await $`tar -czf - -C cloud-init/${name}/nixos . | base64`
  const archive = Buffer.from(packed.stdout, 'base64')
  const receive = `
    umask 077
    mkdir -p ${home}
    cd ${home}
    exec 9>lock
    flock --timeout 60 9
    rm -rf new archive
    trap '[ $? = 0 ] || rm -rf new archive' EXIT
    cat >archive
    echo '${sha256(archive)}  archive' | sha256sum --check --quiet
    mkdir new
    tar -xzpf archive --no-same-owner -C new
    rm archive
    # If the last change finished, the present files work: they are kept to go back to.
    if [ ! -e unfinished ]; then
      rm -rf former
      mkdir former
      (cd /; cp -a --parents ${ourFiles} ${home}/former)
    fi
    # Services may read their keys at any time: each keeps its owner and its mode.
    cd new
    find . -type f | while read -r file; do
      if [ -e "/$file" ]; then
        chown --reference="/$file" "$file"
        chmod --reference="/$file" "$file"
      fi
    done
    sync
    [ -e ../unfinished ] || ${system} >../unfinished
    ${move('new')}`
  try {
    await remote(node, receive, { input: archive, timeout: 300 })
  } catch (error) {
    // It may have finished on the machine, and only the answer was lost.
    const outcome = await putBack(name).then(
      () => 'nothing was changed there',
      () => 'and it does not say what has arrived: run make reconfig again',
    )
    const reason = `the configuration did not get to ${name}; ${outcome}`
    throw new StepError(reason, { output: describeError(error), cause: error })
  }
}

/** Moves the files of a prepared folder to their places, and removes ours that are not in it. */
function move(folder: 'new' | 'back'): string {
  return `
    cd ${home}/${folder}
    find . -type f | sed 's/^.//' | sort >../files
    find /etc/nixos /var/lib/kubernetes -type f | sort >../there
    find . -type d | while read -r folder; do mkdir -p "/$folder"; done
    find . -type f | while read -r file; do mv -fT "$file" "/$file"; done
    comm -13 ../files ../there | while read -r file; do rm -f "$file"; done
    cd ..
    rm -rf ${folder} files there
    sync`
}

/**
 * Puts the former files back, unless they are in place, and the former release unless the machine
 * runs the new one. If nothing was switched to, that is all.
 */
async function putBack(name: string): Promise<void> {
  await waitForSsh(cluster, cluster.node(name))
  const back = `
    mkdir -p ${home}
    cd ${home}
    exec 9>lock
    # A push or a switch whose connection was lost continues to its end.
    flock --timeout 600 9
    if [ -e former-channel ] && { read -r url; read -r generation; read -r former; } <former-channel &&
      [ "$former" = "$(${system})" ]; then
      nix-channel --add "$url" nixos
      # channels-3-link
      generation=\${generation#channels-}
      nix-channel --rollback "\${generation%-link}"
      rm -f former-channel result
    fi
    [ -e unfinished ] || exit 0
    rm -rf back
    cp -a former back
    ${move('back')}
    [ "$(cat unfinished)" != "$(${system})" ] || rm unfinished`
  await remote(cluster.node(name), back, { timeout: 900 })
}

/**
 * Switches to what /etc/nixos on the machine says, and waits until the services are healthy.
 * @param options.guarded the machine undoes a switch after which it is not reached any more
 * @returns which units were restarted
 */
async function switchTo(
  node: Node,
  row: Row,
  { guarded, signal }: { guarded: boolean; signal?: AbortSignal },
): Promise<string> {
  const { name } = node
  row.step('nixos-rebuild switch')
  // Also for a run that was killed before it could confirm its switch.
  const disarm = `
    systemctl stop reconfig-undo.timer 2>/dev/null || true
    while systemctl is-active --quiet reconfig-undo.service; do sleep 1; done`
  const nixosRebuild = `${disarm}
    rm -f undone
    ${guarded ? 'touch' : 'rm -f'} guarded
    status=0
    began=$(date +%s.%6N)
    nixos-rebuild switch || status=$?
    # Some versions of nixos-rebuild leave what the switch says to its unit.
    unit='nixos-rebuild-switch-to-configuration*'
    { journalctl --sync; journalctl --quiet --unit="$unit" --since=@$began --output=cat; } || true
    if [ -e guarded ]; then
      former=$(cat unfinished)
      systemd-run --unit=reconfig-undo --on-active=3min --setenv=PATH="$PATH" bash -c "
        [ -e ${home}/guarded ] || exit 0
        nix-env --profile /nix/var/nix/profiles/system --set $former
        $former/bin/switch-to-configuration switch
        touch ${home}/undone" 9>&-
    fi
    exit $status`
  const { status, lines } = await runUnit(node, row, nixosRebuild, signal)
  const confirm = `
    rm -f ${home}/guarded${disarm}
    if [ -e ${home}/undone ]; then echo undone; fi`
  if ((await remote(node, confirm, { timeout: 300 })) !== '') {
    throw new StepError(`${name} could not be reached after the switch and undid it`)
  }
  // If the switch is refused, the exit status depends on the version of nixos-rebuild.
  const refused = lines.some((line) => /Pre-switch check|Failed to install boot/.test(line))
  // 4: a unit had failed at that moment, as the scheduler does while the API server restarts.
  if (refused || (status !== 0 && status !== 4)) throw switchFailed(node, status, lines)
  row.step('waiting for services')
  await waitForServices(cluster, node, limits(row, signal))
  const output = await remote(node, 'systemctl list-units --state=failed --plain --no-legend')
  if (status === 4 && output) throw new StepError(`units failed on ${name}`, { output })
  const units = lines.flatMap((line) => {
    const [, list] = line.match(/(?<!NOT )\b(?:re)?starting the following units: (.*)$/) ?? []
    return list?.replaceAll('.service', '').split(', ') ?? []
  })
  const restarted = [...new Set(units)].sort().join(', ')
  return restarted ? `restarted ${restarted}` : 'no unit restarted'
}

function switchFailed(node: Node, status: number, lines: string[]): StepError {
  const { name } = node
  const { message, explanation } = failed('nixos-rebuild switch', node, status, lines)
  // NixOS refuses to replace a running D-Bus (1, since 26.05) or init (100): only a restart can.
  const refused = status === 100 || explanation.output?.includes('switchInhibitors')
  if (!refused) return new StepError(message, explanation)
  return new StepError(`this change of ${name} needs a restart instead of a switch`, {
    ...explanation,
    hint: `./bin/reconfig.mts --node ${name} --push-only
ssh -F tls/ssh_config ${name} 'nixos-rebuild boot && reboot'
when it is up again: ./bin/reconfig.mts --node ${name}`,
  })
}

/** @returns the error to throw: what failed, and whether the machine was rolled back */
async function goBack(node: Node, row: Row, error: unknown): Promise<unknown> {
  const { name } = node
  try {
    await putBack(name)
    if (flags.build) return error
    await switchTo(node, row, { guarded: false })
    await remote(node, `rm -f ${home}/unfinished`)
    const reason = `the change of ${name} failed, and it was rolled back to its previous configuration`
    return new StepError(reason, { output: describeError(error), cause: error })
  } catch (second) {
    const reason = flags.build
      ? `${name} was not upgraded, and could not be put back as it was`
      : `${name} is not healthy, not even with its previous configuration`
    const next = flags.build ? `upgrade NAME=${name} continues` : 'reconfig pushes again'
    return new StepError(reason, {
      output: `${describeError(error)}\n${describeError(second)}`,
      hint: `the former files are kept on it in ${home}/former; make ${next}`,
      cause: second,
    })
  }
}

// ── Another release ──────────────────────────────────────────────────────────────────────────

/** Takes NixOS from the channel of the release, and builds it. The former channel is kept. */
async function build(node: Node, row: Row): Promise<string> {
  const channel = `https://channels.nixos.org/nixos-${NIXOS_VERSION}`
  const command = `
    if [ ! -e former-channel ]; then
      url=$(nix-channel --list | sed -n 's/^nixos //p')
      echo "\${url:-${channel}}" >former-channel.new
      readlink /nix/var/nix/profiles/per-user/root/channels >>former-channel.new
      ${system} >>former-channel.new
      mv former-channel.new former-channel
    fi
    nix-channel --add ${channel} nixos
    nix-channel --update nixos
    rm -f result
    nixos-rebuild build`
  const hint = `nothing was changed; ${channel} must exist, and ${node.name} must reach it`
  row.step(`building NixOS ${NIXOS_VERSION}`)
  const { status, lines } = await runUnit(node, row, command, signal)
  if (status !== 0) throw failed(`the build of NixOS ${NIXOS_VERSION}`, node, status, lines, hint)
  return `NixOS ${NIXOS_VERSION} is built, nothing was switched to`
}

/** Restarts with what was built, unless that runs. Not a switch: it cannot replace D-Bus or init. */
async function restart(node: Node, row: Row): Promise<string> {
  const { name, role } = node
  await connect(cluster, node, { signal })
  const ask = async (question: string) => (await remote(node, question, { signal })).trim()
  const built = await ask(`readlink -e ${home}/result || true`)
  if (!built) {
    const hint = `./bin/reconfig.mts --build --node ${name}`
    throw new StepError(`nothing was built on ${name} that it could restart with`, { hint })
  }
  if ((await ask(system)) !== built) {
    row.step('nixos-rebuild boot')
    const { status, lines } = await runUnit(node, row, 'nixos-rebuild boot', signal)
    if (status !== 0) throw failed('nixos-rebuild boot', node, status, lines)
    row.step('restarting')
    const before = await ask(bootId)
    const $$ = $({ nothrow: true, timeout: '60s' })
    await $$`ssh -F tls/ssh_config ${name} systemctl reboot --no-block`
    const wait = { ...limits(row, signal), timeout: BOOT_TIMEOUT + STOP_TIMEOUT }
    await waitFor({ failure: `${name} has not restarted`, ...wait }, async () => {
      await waitForSsh(cluster, node, { ...wait, timeout: BOOT_TIMEOUT })
      return (await ask(bootId).catch(() => before)) === before ? 'it is shutting down' : undefined
    })
    const output = await ask(system)
    const reason = `${name} has booted another system than the one that was built`
    if (output !== built) throw new StepError(reason, { output })
  }
  row.step('waiting for services')
  await waitForServices(cluster, node, limits(row, signal))
  if (role === 'worker') await untilReady(node, row)
  await remote(node, `rm -f ${home}/unfinished`)
  return 'healthy with what was built'
}

// ── Long commands ───────────────────────────────────────────────────────────────────────────

/**
 * Runs shell text in our folder on a machine to its end, as a unit of systemd: a lost connection
 * does not end it. After Ctrl-C only the wait ends.
 * @returns its status, and the last lines, up to 200, of both outputs
 * @throws StepError if it does not end: the machine was stopped or restarted, or time is up
 */
async function runUnit(node: Node, row: Row, command: string, signal?: AbortSignal) {
  const { name } = node
  const log = '/var/log/reconfig.log'
  // A unit lacks what a login has: PATH, NIX_PATH, the proxy.
  const environment = '. /etc/set-environment; set -euo pipefail'
  const text = `${environment}; cd ${home}; exec 9>lock; flock 9; ${command}`
  // --remain-after-exit keeps its exit status until the unit is stopped.
  const start = `
    mkdir -p ${home}
    exec 9>${home}/lock
    flock --timeout 5 9 || { echo 'the last change is still running' >&2; exit 75; }
    systemctl stop reconfig 2>/dev/null || true
    systemctl reset-failed reconfig 2>/dev/null || true
    : >${log}
    systemd-run --quiet --unit=reconfig --remain-after-exit --setenv=HOME=/root \\
      --property=StandardOutput=append:${log} --property=StandardError=append:${log} \\
      bash -c ${quote(text)} 9>&-
    ${bootId}`
  const boot = await remote(node, start)
  const look = `${bootId}; systemctl show --property=SubState,ExecMainStatus reconfig
    echo '== log'; tail -n 200 ${log}`
  let ended = { status: 1, lines: [''] }
  const wait = { ...limits(row, signal), timeout: INSTALL_TIMEOUT }
  await waitFor({ failure: `a command on ${name} did not end`, ...wait }, async () => {
    const isOn = await isRunning(cluster, node)
    if (!isOn) throw new StepError(`${name} was switched off during a change`)
    const answer = await remote(node, look).catch(async (error) => {
      if (!(error instanceof NoAnswer)) throw error
      // Its network or its sshd may be restarting.
      await connect(cluster, node).catch(() => {})
    })
    if (!answer) return 'no answer'
    const [head = '', text = ''] = answer.split('== log\n')
    const reason = `${name} was restarted during a change`
    if (!head.startsWith(boot.trim())) throw new StepError(reason, { output: lastLines(text) })
    const lines = text.trimEnd().split('\n')
    if (/^SubState=(running|start.*)$/m.test(head)) return lines.at(-1) || 'running'
    ended = { status: Number(head.match(/^ExecMainStatus=(\d+)$/m)?.[1] ?? 1), lines }
    return undefined
  })
  return ended
}

function failed(what: string, { name }: Node, status: number, lines: string[], hint?: string) {
  const output = lines.slice(-20).join('\n')
  return new StepError(`${what} failed on ${name} (exit status ${status})`, { output, hint })
}
