import assert from 'node:assert/strict'
import { readdirSync, readFileSync } from 'node:fs'
import { chmod, mkdir, readFile, rm, symlink, utimes, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import { which } from 'zx'
import { loadCluster } from '../../lib/cluster.mts'
import { parseEnvFile } from '../../lib/env-file.mts'
import { type Checkout, makeCheckout, projectRoot, run } from '../checkout.mts'

const makefile = readFileSync(join(projectRoot, 'Makefile'), 'utf8')

describe('the Makefile', () => {
  let checkout: Checkout
  before(async () => {
    checkout = await makeCheckout({ long: true })
  })
  after(() => checkout.remove())

  const make = (...args: string[]) => run(checkout, 'make', ['--no-print-directory', ...args])

  it('shows its targets, each with what it does, also when nothing is asked for', async () => {
    const { stdout } = await make('help')
    assert.match(stdout, /^ {2}check {13}Verify prerequisites/m)
    assert.match(stdout, /^ {2}ssh-alpha\/sigma\/gamma {2}SSH into nodes$/m)
    assert.equal((await make()).stdout, stdout)
  })

  it('has the same list in the README', async () => {
    const readme = readFileSync(join(projectRoot, 'README.md'), 'utf8')
    const lines = (text: string) => text.match(/^ {2}[a-z].*$/gm) ?? []
    const shown = lines((await make('help')).stdout)
    const listed = lines(readme.match(/^```\n(?:.*\n)*? {2}check .*\n(?:.*\n)*?```$/m)?.[0] ?? '')
    assert.ok(shown.length > 30)
    assert.deepEqual(listed, shown)
  })

  it('shows a worker that was added to cluster.env', async () => {
    const env = { WORKER_NODES: 'sigma gamma delta' }
    const { stdout } = await run(checkout, 'make', ['-s', 'help'], { env })
    assert.match(stdout, /ssh-alpha\/sigma\/gamma\/delta {2}/)
  })

  it('has a line in that list for every target', async () => {
    const targets = [...makefile.matchAll(/^([a-z][a-z-]*)%?:(?! *=)/gm)].map(([, name]) => name)
    const { stdout } = await make('help')
    for (const target of targets) {
      if (target === 'packages' || target === 'print-') continue
      assert.match(stdout, new RegExp(`^ {2}${target}`, 'm'), target)
    }
  })

  it('calls every script of bin/, and none that is not there', () => {
    const called = new Set(makefile.match(/(?<=\.\/bin\/)[a-z-]+\.mts/g))
    const there = readdirSync(join(projectRoot, 'bin')).filter((name) => name.endsWith('.mts'))
    assert.deepEqual([...called].sort(), there.sort())
  })

  it('has every target that is no file among the phony ones', () => {
    const phony = makefile.match(/^\.PHONY: ((?:.*\\\n)*.*)/m)?.[1]?.match(/[a-z-]+/g) ?? []
    const targets = [...makefile.matchAll(/^([a-z][a-z-]*):(?! override)/gm)].map(
      ([, name]) => name,
    )
    assert.deepEqual([...phony].sort(), targets.sort())
  })

  it('hands FLAGS to the script, and its failure on', async () => {
    const { stdout, exitCode } = await make('certs', 'FLAGS=--help')
    assert.equal(exitCode, 0)
    assert.match(stdout, /Usage: \.\/bin\/generate-certs\.mts/)
    const refused = await make('certs', 'FLAGS=--no-such-flag')
    assert.notEqual(refused.exitCode, 0)
    assert.match(refused.stderr, /unknown flag --no-such-flag/)
  })

  it('hands FLAGS to no part of prepare, where --force would replace the CA', async () => {
    const { stdout } = await make('-n', 'prepare', 'FLAGS=--force')
    assert.match(stdout, /generate-certs\.mts/)
    assert.doesNotMatch(stdout, /--force/)
  })

  it('takes the variables of a target from its command line, not from the environment', async () => {
    const variables = ['NAME', 'FILE', 'FLAGS', 'CHART', 'REPO', 'RELEASE', 'NS', 'VALUES']
    const targets = [
      'snapshot',
      'restore',
      'add-worker',
      'remove-worker',
      'upgrade',
      'etcd-restore',
    ]
    const args = ['-n', ...targets, 'helm-deploy']
    const env = Object.fromEntries(variables.map((name) => [name, 'DESKTOP-4K2J']))
    const { stdout, exitCode } = await run(checkout, 'make', args, { env })
    assert.equal(exitCode, 0)
    assert.doesNotMatch(stdout, /DESKTOP/)
    const given = await run(checkout, 'make', [...args, 'NAME=lab 3', 'FILE=my.db', 'NS=web'])
    assert.match(given.stdout, /snapshot\.mts +"lab 3"/)
    assert.match(given.stdout, /restore +"my\.db"/)
    assert.match(given.stdout, /web/)
  })

  it('works from elsewhere, with make -C', async () => {
    const { stdout, exitCode } = await run({ root: '/' }, 'make', [
      '-C',
      checkout.root,
      'certs',
      'FLAGS=--help',
    ])
    assert.equal(exitCode, 0)
    assert.match(stdout, /Usage/)
  })

  for (const target of ['ssh', 'boot', 'install', 'console']) {
    it(`knows the nodes of cluster.env for ${target}-NODE, and no others`, async () => {
      const { stderr, exitCode } = await make(`${target}-nobody`)
      assert.notEqual(exitCode, 0)
      assert.match(stderr, /there is no node "nobody"/)
      assert.doesNotMatch((await make(`${target}-gamma`)).stderr, /there is no node/)
    })
  }

  it('never replaces the encryption key when all certificates are generated again', async () => {
    assert.equal((await make('pki')).exitCode, 0)
    const key = await readFile(checkout.path('configs', 'encryption-config.yaml'), 'utf8')
    const ca = await readFile(checkout.path('tls', 'ca.pem'), 'utf8')
    assert.equal((await make('pki', 'FLAGS=--force')).exitCode, 0)
    assert.notEqual(await readFile(checkout.path('tls', 'ca.pem'), 'utf8'), ca)
    assert.equal(await readFile(checkout.path('configs', 'encryption-config.yaml'), 'utf8'), key)
  })
})

describe('cluster.env', () => {
  let checkout: Checkout
  let names: string[]
  before(async () => {
    checkout = await makeCheckout()
    const file = checkout.path('cluster.env')
    // What the three readers might take differently.
    const tricky = [
      `CILIUM_CHART='oci://charts:3128/a#b c=d@e'   # a comment`,
      'SMOKE_IMAGE="$CILIUM_CHART/x"',
      'PROXY_NO="with spaces, \\"quotes\\" and a \\$"',
      "NIXOS_ISO_URL=/a\\ path/it\\'s.iso",
    ]
    await writeFile(file, `${await readFile(file, 'utf8')}${tricky.join('\n')}\n`)
    const { assignments } = parseEnvFile(await readFile(file, 'utf8'))
    names = [...new Set(assignments.map(({ name }) => name))]
    // What runs the tests may have set some, QEMU_ACCEL for one.
    for (const name of names) delete process.env[name]
  })
  after(() => checkout.remove())

  async function fromMake(env: Record<string, string> = {}): Promise<Map<string, string>> {
    const targets = names.map((name) => `print-${name}`)
    const { stdout, stderr } = await run(checkout, 'make', ['-s', ...targets], { env })
    const lines = stdout.split('\n').slice(0, -1)
    assert.equal(lines.length, names.length, stderr)
    return new Map(names.map((name, index) => [name, lines[index] ?? '']))
  }

  async function fromBash(): Promise<Map<string, string>> {
    const text = `. ./cluster.env; for name; do printf '%s\\n' "\${!name}"; done`
    const { stdout } = await run(checkout, 'bash', ['-euc', text, 'bash', ...names])
    const lines = stdout.split('\n')
    return new Map(names.map((name, index) => [name, lines[index] ?? '']))
  }

  function fromProject(env: Record<string, string> = {}): Map<string, string> {
    const { settings, nodes } = loadCluster({ root: checkout.root, env })
    const shared = Object.entries(settings).map(([name, value]): [string, string] => [
      name,
      Array.isArray(value) ? value.join(' ') : String(value),
    ])
    const ofNodes = nodes.flatMap(({ name, sshPort, ip, mac, podCidr }): [string, string][] => [
      [`SSH_PORT_${name}`, String(sshPort)],
      [`NODE_IP_${name}`, ip],
      [`MAC_${name}`, mac],
      ...(podCidr ? ([[`POD_CIDR_${name}`, podCidr]] as [string, string][]) : []),
    ])
    return new Map([...shared, ...ofNodes])
  }

  it('is the same, variable by variable, for bash, make and the scripts', async () => {
    const [make, bash, project] = [await fromMake(), await fromBash(), fromProject()]
    for (const name of names) {
      assert.equal(make.get(name), bash.get(name), `make's ${name}`)
      assert.equal(project.get(name), bash.get(name), `the scripts' ${name}`)
    }
    assert.equal(bash.get('SMOKE_IMAGE'), 'oci://charts:3128/a#b c=d@e/x')
  })

  it('gives way to the environment, for make and the scripts alike', async () => {
    const env = { WORKER_MEM: '2048', CLUSTER_NAME: 'mine', SSH_PORT_sigma: '4444', PROXY_NO: '' }
    const [make, project] = [await fromMake(env), fromProject(env)]
    for (const [name, value] of Object.entries(env)) {
      assert.equal(make.get(name), value, `make's ${name}`)
      assert.equal(project.get(name), value, `the scripts' ${name}`)
    }
    assert.equal(make.get('CONTROL_PLANE_MEM'), '8192')
  })

  it('gives way to variables on the command line of make', async () => {
    const args = ['-s', 'print-WORKER_MEM', 'WORKER_MEM=1024']
    assert.equal((await run(checkout, 'make', args)).stdout, '1024\n')
  })
})

describe('make and the npm packages', () => {
  let checkout: Checkout
  const lockFile = (version: string) =>
    JSON.stringify({ packages: { '': {}, 'node_modules/zx': { version } } })
  before(async () => {
    checkout = await makeCheckout()
    await rm(checkout.path('node_modules'))
    await writeFile(checkout.path('package-lock.json'), lockFile('8.0.0'))
    await writeFile(checkout.path('.npmrc'), '')
    // An npm that notes its calls, and installs by linking to what is there, unless it is offline.
    await mkdir(checkout.path('fake'))
    await writeFile(
      checkout.path('fake', 'npm'),
      `#!/bin/sh
echo "$@" >>'${checkout.path('npm-calls')}'
rm -rf node_modules; mkdir node_modules
[ ! -e '${checkout.path('offline')}' ] || exit 1
for package in '${projectRoot}'/node_modules/*; do ln -s "$package" node_modules/; done
cp package-lock.json node_modules/.package-lock.json
`,
    )
    await chmod(checkout.path('fake', 'npm'), 0o755)
  })
  after(() => checkout.remove())

  const help = () =>
    run(checkout, 'make', ['certs', 'FLAGS=--help'], {
      env: { PATH: `${checkout.path('fake')}:${process.env.PATH}` },
    })
  const calls = async () => (await readFile(checkout.path('npm-calls'), 'utf8')).trim().split('\n')

  it('are refused without npm, with what to install', async () => {
    // Only what make's recipe calls: no node, no npm.
    const bare = checkout.path('bare')
    await mkdir(bare)
    for (const name of ['sh', 'bash', 'make', 'mkdir', 'cp', 'rm', 'mv']) {
      await symlink(await which(name), join(bare, name))
    }
    const { exitCode, stderr } = await run(checkout, 'make', ['certs'], { env: { PATH: bare } })
    assert.match(stderr, /^npm is missing: brew install node/m)
    assert.equal(exitCode, 2)
  })

  it('are installed when they are missing', async () => {
    const { exitCode, stdout, stderr } = await help()
    assert.equal(exitCode, 0, stderr)
    assert.match(stdout, /Usage/)
    assert.deepEqual(await calls(), ['ci'])
  })

  it('are left alone when they are installed, whatever the times of the files', async () => {
    const soon = new Date(Date.now() + 5000)
    await utimes(checkout.path('package-lock.json'), soon, soon)
    await help()
    assert.deepEqual(await calls(), ['ci'])
  })

  it('are left alone where npm does not install those of the developers', async () => {
    const { packages } = JSON.parse(lockFile('8.0.0'))
    const more = { ...packages, 'node_modules/typescript': { version: '5.0.0', dev: true } }
    await writeFile(checkout.path('package-lock.json'), JSON.stringify({ packages: more }))
    await help()
    assert.deepEqual(await calls(), ['ci'])
  })

  it('stay, with a warning, when others are listed and cannot be installed', async () => {
    await writeFile(checkout.path('package-lock.json'), lockFile('8.1.0'))
    await writeFile(checkout.path('offline'), '')
    const { exitCode, stdout, stderr } = await help()
    assert.equal(exitCode, 0, stderr)
    assert.match(stdout, /Usage/)
    assert.match(stderr, /! using the packages that are installed, which differ/)
  })

  it('are replaced when others are listed', async () => {
    await rm(checkout.path('offline'))
    await help()
    await help()
    assert.equal((await calls()).length, 3)
    const installed = await readFile(checkout.path('node_modules/.package-lock.json'), 'utf8')
    assert.equal(installed, lockFile('8.1.0'))
  })

  it('are named by a script where they are missing', async () => {
    await rm(checkout.path('node_modules'), { recursive: true })
    const { stderr, exitCode } = await run(checkout, 'bin/generate-certs.mts', ['--help'])
    assert.equal(exitCode, 1)
    assert.match(stderr, /npm packages are missing\n +hint: .*npm ci/)
  })
})
