// A throwaway copy of the project for one test: the real scripts in a folder of their own, with
// ports of their own, so that nothing of a learner's cluster (or of another test) is touched.
import { execFile } from 'node:child_process'
import { existsSync } from 'node:fs'
import { cp, mkdir, mkdtemp, readFile, rename, rm, symlink, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { stopLanSwitch } from '../lib/lan.mts'
import { freePorts, ownBlock } from './ports.mts'

export const projectRoot = join(import.meta.dirname, '..')

export interface Checkout {
  root: string
  path(...parts: string[]): string
  /** Sets variables in its cluster.env, in place or as new lines at the end. */
  set(values: Record<string, string | number>): Promise<void>
  remove(): Promise<void>
}

/**
 * Copies what a clone holds into a temporary folder and links the installed packages.
 *
 * @param options.settings variables of cluster.env to change
 * @param options.long a path of 150 characters with a space in it
 * @param options.folder where, instead; what is there is deleted
 * @param options.keys with certificates and ssh keys, for tests that are not about generating them;
 *   generate-certs then adds what depends on the ports
 */
export async function makeCheckout(
  options: {
    settings?: Record<string, string | number>
    long?: boolean
    folder?: string
    keys?: boolean
  } = {},
): Promise<Checkout> {
  if (options.folder) await rm(options.folder, { recursive: true, force: true })
  const top = options.folder ?? (await mkdtemp(join(tmpdir(), 'checkout-')))
  let root = options.folder ?? join(top, 'c')
  if (options.long) {
    root = join(top, 'with space ')
    root += 'x'.repeat(150 - root.length)
  }
  await mkdir(root)
  for (const name of ['bin', 'lib', 'configs', 'cluster.env', 'Makefile', 'package.json']) {
    const generated = /\.kubeconfig$|encryption-config\.yaml$/
    await cp(join(projectRoot, name), join(root, name), {
      recursive: true,
      force: true,
      filter: (path) => !generated.test(path),
    }).catch((error) => {
      if (error.code !== 'ENOENT') throw error
    })
  }
  await symlink(join(projectRoot, 'node_modules'), join(root, 'node_modules'))
  const checkout: Checkout = {
    root,
    path: (...parts) => join(root, ...parts),
    set: (values) => setValues(join(root, 'cluster.env'), values),
    remove: async () => {
      // The one process that outlives the scripts which start it, if any of them did.
      await stopLanSwitch(checkout)
      await rm(top, { recursive: true, force: true })
    },
  }
  const [alpha, sigma, gamma, api] = await freePorts(4)
  // Where the environment says the same, no script names it as something that wins over the file.
  const { QEMU_ACCEL } = process.env
  await checkout.set({
    SSH_PORT_alpha: alpha ?? 0,
    SSH_PORT_sigma: sigma ?? 0,
    SSH_PORT_gamma: gamma ?? 0,
    API_PORT: api ?? 0,
    // Each machine's port is 1 to 254 above.
    LAN_SWITCH_PORT: await ownBlock(),
    ...(QEMU_ACCEL ? { QEMU_ACCEL } : {}),
    ...options.settings,
  })
  // Those of other nodes are not for all.
  if (options.keys && !options.settings?.WORKER_NODES) await placeKeys(checkout)
  return checkout
}

/** The keys that a checkout of this run of tests has made first: making them takes a second. */
async function placeKeys(checkout: Checkout): Promise<void> {
  const folder = process.env.TEST_KEYS
  const copying = { recursive: true, preserveTimestamps: true }
  if (folder && existsSync(folder)) return cp(folder, checkout.path('tls'), copying)
  const { exitCode, stderr } = await run(checkout, 'bin/generate-certs.mts')
  if (exitCode !== 0) throw new Error(stderr)
  if (!folder) return
  const partial = `${folder}.${process.pid}`
  await cp(checkout.path('tls'), partial, copying)
  // Another process may have been faster.
  await rename(partial, folder).catch(() => rm(partial, { recursive: true }))
}

export interface Outcome {
  stdout: string
  stderr: string
  exitCode: number
}

/** Runs a program in a checkout and waits for its end; a failure is an outcome, not an error. */
export function run(
  checkout: Pick<Checkout, 'root'>,
  program: string,
  args: readonly string[] = [],
  options: {
    env?: Record<string, string | undefined>
    cwd?: string
    timeout?: number
    input?: string
  } = {},
): Promise<Outcome> {
  const file = program.includes('/') ? join(checkout.root, program) : program
  return new Promise((resolve) => {
    const child = execFile(
      file,
      [...args],
      {
        cwd: options.cwd ?? checkout.root,
        env: { ...process.env, ...options.env },
        timeout: options.timeout ?? 120_000,
        maxBuffer: 64 * 2 ** 20,
      },
      (error, stdout, stderr) => {
        const exitCode = error ? (child.exitCode ?? 128) : 0
        const trouble = error && child.exitCode === null ? String(error) : ''
        resolve({ stdout, stderr: stderr + trouble, exitCode })
      },
    )
    child.stdin?.on('error', () => {})
    child.stdin?.end(options.input ?? '')
  })
}

async function setValues(file: string, values: Record<string, string | number>): Promise<void> {
  let text = await readFile(file, 'utf8')
  for (const [name, value] of Object.entries(values)) {
    const line = `${name}='${value}'`
    const pattern = new RegExp(`^${name}=.*$`, 'm')
    text = pattern.test(text) ? text.replace(pattern, () => line) : `${text}${line}\n`
  }
  await writeFile(file, text)
}
