import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync } from 'node:fs'
import {
  chmod,
  mkdir,
  readdir,
  readFile,
  realpath,
  rm,
  stat,
  symlink,
  writeFile,
} from 'node:fs/promises'
import { basename, dirname, join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { type Checkout, makeCheckout, type Outcome, projectRoot, run } from '../checkout.mts'
import { missing } from '../tools.mts'

const firstLines = `\
#!/bin/sh
':' //; exec node "$(dirname "$(readlink -f "$0")")/../lib/launch.mjs" "$0" "$@"
`

const declaration = `{
  does: 'Shows what a script is given.',
  reads: ['cluster.env'],
  writes: [],
  flags: {
    force: { help: 'do it anyway' },
    timeout: { value: 'SECONDS', number: true, help: 'how long' },
    mode: { value: 'MODE', choices: ['fast', 'slow'], help: 'how' },
    name: { value: 'NAME', help: 'who' },
    fail: { value: 'HOW', help: 'end with an error' },
  },
  args: 'NODE [FILE]',
  examples: ['./bin/sample.mts alpha', './bin/sample.mts --force alpha file'],
}`

/** A script that writes a file as soon as its command line is accepted. */
const sample = `${firstLines}import { writeFileSync } from 'node:fs'
import { StepError } from '../lib/errors.mts'
import { script } from '../lib/script.mts'

const { flags, args } = script(${declaration})
writeFileSync(new URL('../accepted', import.meta.url), '')
if (flags.fail === 'step') {
  const cause = new Error('the cause')
  throw new StepError('no luck', { hint: 'try again', exitCode: 7, cause })
}
if (flags.fail === 'later') setTimeout(() => { throw new StepError('no luck later') }, 1)
if (flags.fail === 'bug') throw new TypeError('a bug')
console.log(JSON.stringify({ flags, args }))
`

/** Gets several command lines one after the other, as a start takes half a second. */
const trial = `${firstLines}import { script } from '../lib/script.mts'

process.exit = (status) => { throw status }
for (const args of JSON.parse(process.argv.pop() ?? '')) {
  process.argv.splice(2, Infinity, ...args)
  try {
    script(${declaration})
    console.error('accepted')
  } catch (status) {
    console.error('status ' + status)
  }
  for (const one of [process.stdout, process.stderr]) one.removeAllListeners('error')
  process.removeAllListeners('uncaughtException')
}
`

let checkout: Checkout
before(async () => {
  checkout = await makeCheckout()
  await writeFile(checkout.path('bin', 'sample.mts'), sample, { mode: 0o755 })
})
after(() => checkout.remove())

const call = (...args: string[]): Promise<Outcome> => run(checkout, 'bin/sample.mts', args)

async function given(
  ...args: string[]
): Promise<{ flags: Record<string, unknown>; args: string[] }> {
  const { stdout, stderr, exitCode } = await call(...args)
  assert.equal(exitCode, 0, stderr)
  return JSON.parse(stdout)
}

describe('a script', () => {
  it('gets its flags, typed, and its arguments', async () => {
    const { flags, args } = await given('--timeout', '2.5', 'alpha', '--force', '--name=x y', 'f')
    assert.deepEqual(args, ['alpha', 'f'])
    assert.deepEqual([flags.force, flags.timeout, flags.name], [true, 2.5, 'x y'])
    assert.ok(!('mode' in flags))
  })

  it('gets arguments as text, and everything behind -- as arguments', async () => {
    assert.deepEqual((await given('007', '--', '--force=4')).args, ['007', '--force=4'])
  })

  it('shows with --help what it does, reads and writes, its flags and examples', async () => {
    for (const flag of ['--help', '-h']) {
      const { stdout, stderr, exitCode } = await call(flag)
      assert.equal(exitCode, 0)
      assert.equal(stderr, '')
      assert.equal(
        stdout,
        `Shows what a script is given.

Usage: ./bin/sample.mts [flags] NODE [FILE]

Flags (defaults in parentheses):
  --force            do it anyway
  --timeout SECONDS  how long
  --mode MODE        how
  --name NAME        who
  --fail HOW         end with an error
  --help             show this text
  --verbose          print every command as it runs, and the stack traces of errors

Reads:   cluster.env
Writes:  nothing

Examples:
  ./bin/sample.mts alpha
  ./bin/sample.mts --force alpha file
`,
      )
    }
  })

  const refused: [args: string[], reason: string][] = [
    [['alpha', '--forse'], 'unknown flag --forse'],
    [['alpha', '-f'], 'unknown flag -f'],
    [['alpha', '--timeout'], '--timeout needs a value: SECONDS'],
    [['alpha', '--timeout', '--force'], '--timeout needs a value: SECONDS'],
    [['alpha', '--name='], '--name needs a value: NAME'],
    [['alpha', '--no-name'], '--name needs a value: NAME'],
    [['alpha', '--timeout', 'soon'], '--timeout needs a number, not "soon"'],
    [['alpha', '--timeout=-5'], '--timeout needs a number, not "-5"'],
    [['alpha', '--mode', 'medium'], '--mode is one of fast, slow, not "medium"'],
    [['alpha', '--mode', 'fast', '--mode', 'slow'], '--mode is given more than once'],
    [['alpha', '--force=yes'], '--force takes no value'],
    [['alpha', 'file', 'more'], 'unexpected argument "more"'],
    [[], 'missing argument: NODE [FILE]'],
  ]
  it('refuses each mistake in its flags and arguments', async () => {
    await writeFile(checkout.path('bin', 'trial.mts'), trial, { mode: 0o755 })
    const lines = JSON.stringify(refused.map(([args]) => args))
    const { stdout, stderr } = await run(checkout, 'bin/trial.mts', [lines])
    const said = refused.map(
      ([, reason]) => `trial: ${reason}\n  hint:    ./bin/trial.mts --help\n`,
    )
    assert.equal(stderr, said.map((text) => `${text}status 2\n`).join(''))
    assert.equal(stdout, '')
  })

  it('has done nothing when it refuses', async () => {
    await rm(checkout.path('accepted'), { force: true })
    const { stdout, stderr, exitCode } = await call('alpha', '--forse')
    assert.equal(exitCode, 2)
    assert.equal(stderr, 'sample: unknown flag --forse\n  hint:    ./bin/sample.mts --help\n')
    assert.equal(stdout, '')
    assert.ok(!existsSync(checkout.path('accepted')))
  })

  it('prints an error without its stack, and ends with its status', async () => {
    const { stderr, exitCode } = await call('alpha', '--fail', 'step')
    assert.equal(exitCode, 7)
    assert.equal(stderr, 'sample: no luck\n  hint:    try again\n')
  })

  it('prints an error of a callback too', async () => {
    const { stderr, exitCode } = await call('alpha', '--fail', 'later')
    assert.equal(exitCode, 1)
    assert.equal(stderr, 'sample: no luck later\n')
  })

  it('prints with --verbose the stack, and that of the cause', async () => {
    const { stderr } = await call('alpha', '--fail', 'step', '--verbose')
    assert.match(stderr, /^sample: no luck\n/)
    assert.match(stderr, /StepError: no luck\n +at .*sample\.mts/)
    assert.match(stderr, /Error: the cause\n +at .*sample\.mts/)
  })

  it('ends with status 1 for an error of its own', async () => {
    const { stderr, exitCode } = await call('alpha', '--fail', 'bug')
    assert.deepEqual([stderr, exitCode], ['sample: a bug\n', 1])
  })
})

describe('the commands of a script', () => {
  const probe = `${firstLines}
import { $ } from 'zx/core'
import { script } from '../lib/script.mts'
const { args } = script({ does: 'x', reads: [], writes: [], args: 'COMMAND', examples: ['x'] })
const { stdout } = await $({ input: 'given' })\`sh -c \${args[0] ?? ''}\`
console.log(JSON.stringify({ stdout }))
`
  const ask = async (command: string, env: Record<string, string> = {}, args: string[] = []) => {
    await writeFile(checkout.path('bin', 'probe.mts'), probe, { mode: 0o755 })
    const { stdout, stderr } = await run(checkout, 'bin/probe.mts', [command, ...args], {
      env,
      cwd: '/',
    })
    return { said: JSON.parse(stdout || '{}').stdout, stderr }
  }

  it("run in the project's folder, with the input that they are given", async () => {
    const { said } = await ask('pwd -P; cat')
    assert.equal(said, `${await realpath(checkout.root)}\ngiven`)
  })

  it('do not see what the caller has set for shells, kubectl, ssh and languages', async () => {
    const noise = checkout.path('noise.sh')
    await writeFile(noise, 'echo noise\n')
    const { said } = await ask('env; ls() { :; }; pwd', {
      BASH_ENV: noise,
      ENV: noise,
      'BASH_FUNC_pwd%%': '() { echo noise; }',
      KUBECONFIG: '/elsewhere',
      SSH_AUTH_SOCK: '/elsewhere',
      LANG: 'de_DE.UTF-8',
      CDPATH: '/elsewhere',
      TAR_OPTIONS: '--elsewhere',
    })
    assert.doesNotMatch(said, /noise|elsewhere|de_DE/)
    assert.match(said, /^KUBERC=off$/m)
    assert.match(said, /^LC_ALL=C$/m)
  })

  it('are printed with --verbose as they could be pasted', async () => {
    const { stderr } = await ask(`echo "it's"`, {}, ['--verbose'])
    const line = stderr.match(/^\$ (sh -c .*)$/m)?.[1] ?? ''
    assert.equal((await run({ root: '/' }, 'bash', ['-c', line])).stdout, "it's\n")
  })

  it('are ended together with the script by Ctrl-C', async () => {
    const file = checkout.path('pid')
    await writeFile(checkout.path('bin', 'probe.mts'), probe, { mode: 0o755 })
    const child = spawn(checkout.path('bin', 'probe.mts'), [`echo $$ >'${file}'; exec sleep 60`])
    const pid = await poll(
      async () => Number(await readFile(file, 'utf8').catch(() => '')) || undefined,
    )
    child.kill('SIGINT')
    const [status] = await once(child, 'exit')
    assert.equal(status, 130)
    await poll(async () => (isAlive(pid) ? undefined : true))
  })

  it('that write to a closed pipe (| head) end quietly', async () => {
    const { stdout, stderr } = await run(checkout, 'bash', [
      '-c',
      '(./bin/sample.mts --help; echo "status $?" >&2) | head -n 1',
    ])
    assert.equal(stdout, 'Shows what a script is given.\n')
    assert.equal(stderr, 'status 0\n')
  })
})

describe('the launcher', () => {
  it('starts a script from any folder, named in any way', async () => {
    const from = join(checkout.root, 'bin')
    for (const [program, cwd] of [
      [join(checkout.root, 'bin/sample.mts'), '/'],
      ['./sample.mts', from],
      ['../bin/sample.mts', from],
      ['bin/sample.mts', checkout.root],
    ] as const) {
      const { stdout } = await run({ root: '/' }, 'sh', ['-c', '"$0" alpha', program], { cwd })
      assert.deepEqual(JSON.parse(stdout).args, ['alpha'], program)
    }
  })

  it('starts a script at a path of 150 characters with spaces, and keeps spaces in arguments', async () => {
    const long = await makeCheckout({ long: true })
    await writeFile(long.path('bin', 'sample.mts'), sample, { mode: 0o755 })
    const { stdout, stderr } = await run(long, 'bin/sample.mts', ['a  b', 'c\'d"e $HOME *'], {
      cwd: '/',
    })
    assert.deepEqual(JSON.parse(stdout || '{}').args, ['a  b', 'c\'d"e $HOME *'], stderr)
    await long.remove()
  })

  // Linux gives the interpreter the rest of line 1 as one argument; macOS splits all of it at blanks,
  // without regard to quotes (exec_extract_strings in XNU's kern_exec.c).
  const kernels: [name: string, words: (line: string) => string[]][] = [
    [
      'Linux',
      (line) =>
        line
          .match(/^#!\s*(\S+)\s*(.*)$/)
          ?.slice(1)
          .filter(Boolean) ?? [],
    ],
    [
      'macOS',
      (line) =>
        line
          .slice(2)
          .trim()
          .split(/[ \t]+/),
    ],
  ]
  for (const [name, words] of kernels) {
    it(`starts a script as the kernel of ${name} reads its first line`, async () => {
      const [program = '', ...args] = words(sample.split('\n')[0] ?? '')
      const script = checkout.path('bin', 'sample.mts')
      const { stdout, stderr } = await run({ root: '/' }, program, [...args, script, 'a  b'])
      assert.deepEqual(JSON.parse(stdout || '{}').args, ['a  b'], stderr)
    })
  }

  it('starts a script with the sh of busybox', { skip: missing('busybox') }, async () => {
    const script = checkout.path('bin', 'sample.mts')
    const { stdout, stderr } = await run({ root: '/' }, 'busybox', ['sh', script, 'alpha'])
    assert.deepEqual(JSON.parse(stdout || '{}').args, ['alpha'], stderr)
  })

  it('names npm ci where the packages were copied from another system', async () => {
    const copied = await makeCheckout()
    await writeFile(copied.path('bin', 'sample.mts'), sample, { mode: 0o755 })
    await rm(copied.path('node_modules')) // a link
    const packages = {
      'zx/index.js': '',
      'tsx/esm/api.js': 'throw new Error("@esbuild/linux-x64 is for\\nanother platform")',
    }
    for (const [file, text] of Object.entries(packages)) {
      await mkdir(dirname(copied.path('node_modules', file)), { recursive: true })
      await writeFile(copied.path('node_modules', file), text)
    }
    const manifest = '{"type": "module", "exports": {"./esm/api": "./esm/api.js"}}'
    await writeFile(copied.path('node_modules/tsx/package.json'), manifest)
    // Newer versions of Node read TypeScript without tsx.
    const newer = process.allowedNodeEnvironmentFlags.has('--no-experimental-strip-types')
    const old = newer ? ['--no-experimental-strip-types'] : []
    const launch = [copied.path('lib/launch.mjs'), copied.path('bin/sample.mts')]
    // Without what the tests' runner sets.
    const env = { NODE_OPTIONS: undefined }
    const outcome = await run({ root: '/' }, process.execPath, [...old, ...launch], { env })
    await copied.remove()
    assert.equal(outcome.exitCode, 1)
    assert.match(
      outcome.stderr,
      /^sample\.mts: the npm packages do not work on this system: @esbuild\S+ is for\n +hint: +cd \S+ && npm ci\n$/,
    )
  })

  it('starts a script through a link to it in another folder', async () => {
    const link = checkout.path('..', 'ksample')
    await symlink(checkout.path('bin', 'sample.mts'), link)
    const { stdout, stderr } = await run({ root: '/' }, link, ['alpha'])
    assert.deepEqual(JSON.parse(stdout || '{}').args, ['alpha'], stderr)
  })

  it('starts a script through a symbolic link to the project', async () => {
    const link = checkout.path('..', 'link')
    await symlink(checkout.root, link)
    const { stdout } = await run({ root: link }, 'bin/sample.mts', ['alpha'])
    assert.deepEqual(JSON.parse(stdout).args, ['alpha'])
  })

  it('says in one line what to run when the packages are missing', async () => {
    const bare = await makeCheckout()
    await rm(bare.path('node_modules'))
    await writeFile(bare.path('bin', 'sample.mts'), sample, { mode: 0o755 })
    const { stdout, stderr, exitCode } = await run(bare, 'bin/sample.mts', ['alpha'])
    assert.equal(exitCode, 1)
    const folder = await realpath(bare.root)
    assert.equal(
      stderr,
      `sample.mts: the npm packages are missing\n  hint:    cd "${folder}" && npm ci\n`,
    )
    assert.equal(stdout, '')
    await bare.remove()
  })

  it('says in one line that a Node is too old', async () => {
    const pretend = `Object.defineProperty(process, 'versions', { value: { ...process.versions, node: '18.20.4' } })`
    const { stderr, exitCode } = await run({ root: '/' }, process.execPath, [
      '--import',
      `data:text/javascript,${encodeURIComponent(pretend)}`,
      checkout.path('lib', 'launch.mjs'),
      checkout.path('bin', 'sample.mts'),
    ])
    assert.equal(exitCode, 1)
    assert.match(
      stderr,
      /^sample\.mts: Node 18\.20\.4 is too old: version 20\.11 or newer is needed\n {2}hint: .*nodejs/,
    )
  })

  it('shows no warnings of Node', async () => {
    assert.equal((await call('alpha')).stderr, '')
  })

  it('starts scripts with every Node at hand', async () => {
    // OTHER_NODES=/path/to/node22:/path/to/node24 adds to the one that runs the tests.
    const nodes = [process.execPath, ...(process.env.OTHER_NODES?.split(':') ?? [])]
    for (const [index, node] of nodes.entries()) {
      const folder = checkout.path(`node-${index}`)
      await mkdir(folder)
      await writeFile(join(folder, 'node'), `#!/bin/sh\nexec '${node}' "$@"\n`)
      await chmod(join(folder, 'node'), 0o755)
      const env = { PATH: `${folder}:${process.env.PATH}` }
      const { stdout, stderr } = await run(checkout, 'bin/sample.mts', ['alpha'], { env })
      assert.deepEqual([JSON.parse(stdout || '{}').args, stderr], [['alpha'], ''], node)
    }
  })

  it('needs at most 1.2 times as long as bare tsx', async () => {
    const tsx = join(projectRoot, 'node_modules', '.bin', 'tsx')
    const time = async (program: string, args: string[]) => {
      const start = performance.now()
      const { exitCode, stderr } = await run({ root: '/' }, 'env', [program, ...args])
      assert.equal(exitCode, 0, stderr)
      return performance.now() - start
    }
    const script = checkout.path('bin', 'sample.mts')
    const own: number[] = []
    const bare: number[] = []
    let ratio = Infinity
    // A computer that is busy for a moment gets more turns.
    for (let turn = 1; turn <= 20 && (turn <= 3 || ratio > 1.2); turn += 1) {
      own.push(await time(script, ['alpha']))
      bare.push(await time(tsx, [script, 'alpha']))
      ratio = median(own) / median(bare)
    }
    assert.ok(ratio <= 1.2, `${ratio.toFixed(2)} times`)
  })
})

describe('the scripts of bin/', () => {
  it('all begin with the lines that start them', async () => {
    const names = (await readdir(join(projectRoot, 'bin'))).filter((name) => /\.mts$/.test(name))
    assert.ok(names.length > 0)
    for (const name of names) {
      const path = join(projectRoot, 'bin', name)
      assert.ok((await readFile(path, 'utf8')).startsWith(firstLines), basename(path))
      assert.equal((await stat(path)).mode & 0o777, 0o755, basename(path))
    }
  })
})

async function poll<T>(look: () => Promise<T | undefined>): Promise<T> {
  for (let attempt = 0; attempt < 100; attempt += 1) {
    const found = await look()
    if (found !== undefined) return found
    await sleep(100)
  }
  throw new Error('it did not come')
}

function isAlive(pid: number): boolean {
  try {
    return process.kill(pid, 0)
  } catch {
    return false
  }
}

function median(values: number[]): number {
  return values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)] ?? Number.NaN
}
